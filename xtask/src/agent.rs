//! The built `lb-agent` on a node of a lab.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::{CLUSTER_CIDR, Host};
use crate::system::workspace;

/// Where `/metrics` answers inside a node.
const METRICS: &str = "127.0.0.1:10249";

/// When the agent last wrote all that it knew, zero for never.
const WRITTEN: &str = "kubeproxy_sync_proxy_rules_last_timestamp_seconds";

/// Builds `lb-agent` as this program was built and returns its path.
///
/// # Errors
/// If the build fails; what cargo said has been shown.
pub fn build() -> Result<PathBuf> {
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace()).args(["build", "--quiet", "--package", "lb-agent", "--bins"]);
    if profile == "release" {
        cargo.arg("--release");
    }
    ensure!(cargo.status().context("starting cargo")?.success(), "building lb-agent failed");
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from);
    Ok(target.join(profile).join("lb-agent"))
}

/// A running agent; dropping it kills it. What it wrote to the kernel stays.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    node: Host,
}

impl Agent {
    /// `lb-agent run` on a node, with the node's own bpffs and cgroup and the lab's pod networks: what to serve is for
    /// the caller to add.
    pub fn command(exe: &Path, node: &Host) -> Command {
        let mut command = node.command(exe);
        command.arg("run").args(["--hostname-override", node.name()]);
        command.arg("--bpffs").arg(node.bpffs_dir()).arg("--cgroup").arg(node.cgroup_dir());
        command.args(["--cluster-cidr", CLUSTER_CIDR, "--healthz-bind-address", "0.0.0.0:10256"]);
        command.args(["--metrics-bind-address", "127.0.0.1:10249"]).env("RUST_LOG", "info");
        command.stdin(Stdio::null());
        // SAFETY: only system calls.
        unsafe { command.pre_exec(keep_capabilities) };
        command
    }

    /// Starts `lb-agent run` on a node with these manifests, and `flags` after the others. Its output is added to
    /// [`log_path`].
    ///
    /// # Errors
    /// If the program cannot be started.
    pub fn start(exe: &Path, node: &Host, manifests: &Path, flags: &[&str]) -> Result<Self> {
        let mut command = Self::command(exe, node);
        command.arg("--manifests").arg(manifests).args(flags);
        Self::spawn(command, node)
    }

    /// Starts what [`Self::command`] began.
    ///
    /// # Errors
    /// If the program cannot be started.
    pub fn spawn(mut command: Command, node: &Host) -> Result<Self> {
        let log = File::options().create(true).append(true).open(log_path(node))?;
        command.stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("starting lb-agent on {}", node.name()))?;
        Ok(Self { child, node: node.clone() })
    }

    /// Waits until programs are attached and everything known has been written to the kernel.
    ///
    /// # Errors
    /// If the agent ends, or is not ready in time; the end of its log is part of the message.
    pub fn wait_healthy(&mut self, timeout: Duration) -> Result<()> {
        self.wait_written(timeout).map(drop)
    }

    /// As [`Self::wait_healthy`]; when it was, in seconds since 1970.
    ///
    /// # Errors
    /// As there.
    pub fn wait_written(&mut self, timeout: Duration) -> Result<f64> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!("lb-agent on {} ended: {status}\n{}", self.node.name(), log_tail(&self.node));
            }
            if let Some(time) = last_written(&self.node)? {
                return Ok(time);
            }
            if Instant::now() > deadline {
                bail!(
                    "lb-agent on {} is not ready after {timeout:?}\n{}",
                    self.node.name(),
                    log_tail(&self.node)
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to end and waits until it has.
    ///
    /// # Errors
    /// If it has not ended after ten seconds.
    pub fn stop(mut self) -> Result<()> {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM)?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.child.try_wait()?.is_none() {
            ensure!(Instant::now() < deadline, "lb-agent on {} does not end", self.node.name());
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Leaves it running.
    pub fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Leaves the program to be started with what `manifests/base` gives to the agent's container: root may do more, and
/// what takes more is not to be found out in a cluster.
fn keep_capabilities() -> std::io::Result<()> {
    // Of linux/capability.h, which neither `libc` nor `nix` has.
    const CAP_NET_ADMIN: libc::c_ulong = 12;
    const CAP_PERFMON: libc::c_ulong = 38;
    const CAP_BPF: libc::c_ulong = 39;
    const KEPT: [libc::c_ulong; 3] = [CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF];
    for capability in (0..64).filter(|capability| !KEPT.contains(capability)) {
        // SAFETY: numbers only. Those that this kernel does not know are refused.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        let error = std::io::Error::last_os_error();
        if result < 0 && error.raw_os_error() != Some(libc::EINVAL) {
            return Err(error);
        }
    }
    Ok(())
}

/// Where the agent of a node writes its log.
pub fn log_path(node: &Host) -> PathBuf {
    node.state_dir().join("agent.log")
}

/// The last lines of a node's agent.
pub fn log_tail(node: &Host) -> String {
    let text = fs::read(log_path(node)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].iter().map(|l| format!("  {}: {l}\n", node.name())).collect()
}

/// When the agent of a node, or its kube-proxy, last wrote all that it knew, in seconds since 1970. `/healthz` says yes
/// while it starts; the metrics say whether it has.
///
/// # Errors
/// If the node is not there.
pub fn last_written(node: &Host) -> Result<Option<f64>> {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(METRICS)?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let last = |text: String| {
        let value = text.lines().find_map(|line| line.strip_prefix(WRITTEN))?;
        value.rsplit(' ').next()?.parse::<f64>().ok().filter(|&time| time > 0.0)
    };
    Ok(node.run_in(ask)?.ok().and_then(last))
}
