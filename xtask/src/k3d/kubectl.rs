//! kubectl on one cluster.

use crate::probe::{Answer, Ask};
use crate::system::output;
use anyhow::{Context as _, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

#[derive(Debug)]
pub(super) struct Kubectl {
    config: PathBuf,
}

impl Kubectl {
    pub(super) fn new(config: &Path) -> Self {
        Self { config: config.into() }
    }

    pub(super) fn config(&self) -> &Path {
        &self.config
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("kubectl");
        command.arg("--kubeconfig").arg(&self.config).args(args);
        command
    }

    pub(super) fn run(&self, args: &[&str]) -> Result<String> {
        output(&mut self.command(args))
    }

    pub(super) fn get(&self, args: &[&str]) -> Result<Vec<Value>> {
        let text = self.run(&[&["get", "-o", "json"], args].concat())?;
        let mut list: Value = serde_json::from_str(&text).context("kubectl's answer")?;
        match list["items"].take() {
            Value::Array(items) => Ok(items),
            _ => Ok(vec![list]),
        }
    }

    /// Sends requests from a pod.
    pub(super) fn ask(&self, pod: &str, ask: &Ask) -> Result<Vec<Answer>> {
        let text = output(&mut self.probe(pod, ask)).with_context(|| format!("ask {} from {pod}", ask.to))?;
        answers(&text)
    }

    /// The same in the background: [`answers`] reads what it prints.
    pub(super) fn start_asking(&self, pod: &str, ask: &Ask) -> Result<Child> {
        let mut command = self.probe(pod, ask);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("start kubectl")
    }

    fn probe(&self, pod: &str, ask: &Ask) -> Command {
        let mut command =
            self.command(&["-n", super::suite::NAMESPACE, "exec", pod, "--", "/bin/probe", "probe"]);
        command.args(ask.args());
        command
    }
}

/// What the probe prints: an answer in each line.
pub(super) fn answers(text: &str) -> Result<Vec<Answer>> {
    text.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}
