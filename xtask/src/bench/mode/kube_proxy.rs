//! The real kube-proxy on a node of the lab.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Mode;
use super::tools::KubeProxy;
use crate::agent::last_written;
use crate::bench::family::IpFamily;
use crate::lab::{CLUSTER_CIDR, Host};
use crate::system::find_program;

/// How long it may take until it has written everything: minutes, with tens of thousands of Services.
const PATIENCE: Duration = Duration::from_secs(900);

/// A running kube-proxy; dropping it kills it. Its rules stay.
#[derive(Debug)]
pub(super) struct Running {
    child: Child,
    node: Host,
}

impl Running {
    pub(super) fn start(
        real: &KubeProxy,
        mode: Mode,
        family: IpFamily,
        node: &Host,
        api: &str,
    ) -> Result<Self> {
        let dir = node.state_dir();
        let log = File::create(dir.join("kube-proxy.log"))?;
        let mut command = node.command(&real.path);
        command.env("PATH", programs(node)?).args(["--master", api]);
        command.args(["--kube-api-content-type=application/json", "--hostname-override", node.name()]);
        command.arg(format!("--proxy-mode={}", mode.short()));
        let both = real.version >= (1, 23);
        if !both {
            // Then it serves one family, that of the address that it binds to.
            let any = if family == IpFamily::V4 { "0.0.0.0" } else { "::" };
            command.args(["--bind-address", any]);
        }
        command.args(["--cluster-cidr", if both { CLUSTER_CIDR } else { family.cluster_cidr() }]);
        // The node's own network namespace has none of these.
        for limit in ["max-per-core", "tcp-timeout-established", "tcp-timeout-close-wait"] {
            command.arg(format!("--conntrack-{limit}=0"));
        }
        command.args(["--healthz-bind-address=0.0.0.0:10256", "--metrics-bind-address=127.0.0.1:10249"]);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("starting {}", real.path.display()))?;
        Ok(Self { child, node: node.clone() })
    }

    /// Waits until it has written its rules; when that was, in seconds since 1970.
    pub(super) fn wait_written(&mut self) -> Result<f64> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!("kube-proxy on {} ended: {status}\n{}", self.node.name(), self.log_tail());
            }
            if let Some(time) = last_written(&self.node)? {
                return Ok(time);
            }
            if Instant::now() > deadline {
                bail!(
                    "kube-proxy on {} is not ready after {PATIENCE:?}\n{}",
                    self.node.name(),
                    self.log_tail()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn log_tail(&self) -> String {
        let text = fs::read_to_string(self.node.state_dir().join("kube-proxy.log")).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A `PATH` that begins with the legacy flavour of iptables under its plain names: the faster one.
fn programs(node: &Host) -> Result<String> {
    let dir: PathBuf = node.state_dir().join("bin");
    fs::create_dir_all(&dir)?;
    for family in ["iptables", "ip6tables"] {
        for what in ["", "-save", "-restore"] {
            let name = format!("{family}-legacy{what}");
            let from = find_program(&name).with_context(|| format!("no {name}"))?;
            let _ = symlink(from, dir.join(format!("{family}{what}")));
        }
    }
    let rest = std::env::var("PATH").unwrap_or_default();
    Ok(format!("{}:{rest}:/usr/sbin:/sbin", dir.display()))
}
