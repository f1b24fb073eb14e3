//! CNI plugins, run on a node of a lab as a container runtime runs them.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

use crate::lab::Host;

/// Where Debian has plugins.
pub const DEBIAN: &str = "/usr/lib/cni";

/// What a plugin answered.
#[derive(Debug)]
pub struct Answer {
    /// Whether it exited with zero.
    pub ok: bool,
    /// What it said on standard output, if anything.
    pub json: Option<Value>,
    /// What it said on standard error.
    pub log: String,
}

/// Runs a plugin in a node's network namespace, with exactly these `CNI_` variables.
///
/// # Errors
/// If it cannot be run, or says something that is no JSON.
pub fn call(node: &Host, plugin: &Path, vars: &[(&str, &str)], config: &str) -> Result<Answer> {
    let mut command = node.command(plugin);
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").envs(vars.iter().copied());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("start {}", plugin.display()))?;
    // A plugin that fails early does not read it all.
    let _ = child.stdin.take().context("no pipe")?.write_all(config.as_bytes());
    let out = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&out.stdout);
    let json = match said.trim() {
        "" => None,
        said => Some(serde_json::from_str(said).with_context(|| format!("{}: {said}", plugin.display()))?),
    };
    Ok(Answer { ok: out.status.success(), json, log: String::from_utf8_lossy(&out.stderr).into() })
}

/// A network configuration list on a node.
#[derive(Clone, Debug)]
pub struct Network {
    /// The node.
    pub node: Host,
    /// Its contents, as in `/etc/cni/net.d`.
    pub list: Value,
    /// Where plugins are, in order.
    pub path: Vec<PathBuf>,
}

/// A pod that a runtime keeps: what it will hand to CHECK and DEL.
#[derive(Clone, Debug)]
pub struct Attached {
    /// The last result of ADD.
    pub result: Value,
    capabilities: Map<String, Value>,
}

impl Network {
    /// Plugs a pod in. What a plugin wants to know under its capabilities is in `capabilities`.
    ///
    /// # Errors
    /// What the plugin that failed said; nothing is undone.
    pub fn add(&self, pod: &Host, capabilities: &Value) -> Result<Attached> {
        let capabilities = capabilities.as_object().cloned().unwrap_or_default();
        let mut result = None;
        for plugin in self.plugins()? {
            let config = self.configure(plugin, &capabilities, result.as_ref());
            let answer = self.call(plugin, "ADD", pod, &config)?;
            result = Some(answer.with_context(|| format!("{} has no result", plugin["type"]))?);
        }
        Ok(Attached { result: result.context("no plugin")?, capabilities })
    }

    /// Has every plugin look whether all is well.
    ///
    /// # Errors
    /// What the plugin said that is not content.
    pub fn check(&self, pod: &Host, attached: &Attached) -> Result<()> {
        for plugin in self.plugins()? {
            let config = self.config(plugin, attached);
            self.call(plugin, "CHECK", pod, &config)?;
        }
        Ok(())
    }

    /// Unplugs a pod.
    ///
    /// # Errors
    /// What the plugin that failed said.
    pub fn del(&self, pod: &Host, attached: &Attached) -> Result<()> {
        for plugin in self.plugins()?.iter().rev() {
            let config = self.config(plugin, attached);
            self.call(plugin, "DEL", pod, &config)?;
        }
        Ok(())
    }

    fn plugins(&self) -> Result<&[Value]> {
        self.list["plugins"].as_array().map(Vec::as_slice).context("no list of plugins")
    }

    /// What a plugin of the list is given about a pod.
    pub fn config(&self, plugin: &Value, attached: &Attached) -> Value {
        self.configure(plugin, &attached.capabilities, Some(&attached.result))
    }

    fn configure(&self, plugin: &Value, capabilities: &Map<String, Value>, result: Option<&Value>) -> Value {
        let mut config = plugin.clone();
        for key in ["name", "cniVersion"] {
            config[key] = self.list[key].clone();
        }
        let wanted = |name: &&String| plugin["capabilities"][name.as_str()] == true;
        let runtime: Map<_, _> = capabilities
            .iter()
            .filter(|(name, _)| wanted(name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !runtime.is_empty() {
            config["runtimeConfig"] = runtime.into();
        }
        if let Some(result) = result {
            config["prevResult"] = result.clone();
        }
        config
    }

    /// Has one plugin do one thing for a pod.
    ///
    /// # Errors
    /// What it said if it failed.
    pub fn call(&self, plugin: &Value, command: &str, pod: &Host, config: &Value) -> Result<Option<Value>> {
        let name = plugin["type"].as_str().context("a plugin without a type")?;
        let exe = self.path.iter().map(|dir| dir.join(name)).find(|file| file.is_file());
        let exe = exe.with_context(|| format!("no CNI plugin {name} in {:?}", self.path))?;
        let path: Vec<_> = self.path.iter().map(|dir| dir.display().to_string()).collect();
        let (path, netns) = (path.join(":"), pod.netns_path().display().to_string());
        let pod_name = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=lab;K8S_POD_NAME={}", pod.name());
        let vars = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", pod.name()),
            ("CNI_NETNS", &netns),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", &pod_name),
            ("CNI_PATH", &path),
        ];
        let answer = call(&self.node, &exe, &vars, &config.to_string())?;
        if !answer.ok {
            let json = answer.json.unwrap_or_default();
            bail!("{name} {command} for {}: {json}\n{}", pod.name(), answer.log);
        }
        Ok(answer.json)
    }
}
