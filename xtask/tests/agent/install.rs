//! `lb-agent install` and `cleanup` on a node that is a container: mount, process and cgroup namespaces of its own, and
//! from inside a pod's, which has others again.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use xtask::lab::{Host, Lab};

use super::support::{SOON, agent_exe, eventually};

const LIST: &str =
    r#"{"cniVersion": "1.0.0", "name": "cbr0", "plugins": [{"type": "bridge"}, {"type": "portmap"}]}"#;

/// A node in namespaces like a container's.
struct Node {
    /// Its first process, as seen from here.
    first: Child,
    /// The same in this machine's numbers.
    pid: Pid,
    host: Host,
}

/// Whether a container engine gives its containers a cgroup namespace.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cgroups {
    Own,
    Hosts,
}

impl Node {
    fn start(host: &Host, cgroups: Cgroups) -> Result<Self> {
        // As a service manager does, it puts itself into a cgroup below the node's own.
        let init = host.cgroup_dir().join("init.scope");
        fs::create_dir(&init).with_context(|| init.display().to_string())?;
        let mut command = host.command("unshare");
        command.args(["--mount", "--propagation=private", "--pid", "--fork", "--mount-proc", "--kill-child"]);
        if cgroups == Cgroups::Own {
            command.arg("--cgroup");
        }
        let script = format!(
            "mount -t tmpfs none /run && echo 0 > \"$1\" && echo ready && exec sleep 1000 {}",
            "# the first process"
        );
        // Written from inside, so that this process is what is moved.
        command.args(["sh", "-c", &script, "sh"]).arg(init.join("cgroup.procs"));
        let mut first = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let mut ready = [0; 6];
        let out = first.stdout.as_mut().context("no pipe")?;
        std::io::Read::read_exact(out, &mut ready).context("the node's first process did not start")?;
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", first.id()))?;
        let pid = Pid::from_raw(children.trim().parse().with_context(|| format!("children: {children}"))?);
        Ok(Self { first, pid, host: host.clone() })
    }

    /// A path on the node.
    fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.pid))
    }

    /// Runs the agent in a pod of the node's: with the node's processes in sight, but with mounts and a cgroup of its own.
    fn in_pod(&self, args: &[&str], dirs: &Dirs) -> Result<Command> {
        let mut command = self.host.command("nsenter");
        command.args(["-t", &self.pid.to_string(), "-m", "-p", "-C", "-n", "--", "unshare", "-m", "-C"]);
        command
            .arg(agent_exe()?)
            .args(args)
            .args(["--bpffs=/run/lb-agent/bpf", "--cgroup=/run/lb-agent/cgroup"]);
        command.arg("--cni-bin-dir").arg(dirs.bin()).arg("--cni-conf-dir").arg(dirs.conf());
        Ok(command)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = self.first.wait();
    }
}

/// The node's directories for CNI. Not the lab's, which the node's `/run` hides.
struct Dirs(tempfile::TempDir);

impl Dirs {
    fn new() -> Result<Self> {
        let dirs = Self(tempfile::tempdir()?);
        fs::create_dir(dirs.conf())?;
        fs::write(dirs.list(), LIST)?;
        Ok(dirs)
    }

    fn bin(&self) -> PathBuf {
        self.0.path().join("cni-bin")
    }

    fn conf(&self) -> PathBuf {
        self.0.path().join("net.d")
    }

    fn list(&self) -> PathBuf {
        self.conf().join("10-flannel.conflist")
    }

    fn plugins(&self) -> Result<Vec<String>> {
        let list: Value = serde_json::from_slice(&fs::read(self.list())?)?;
        let plugins = list["plugins"].as_array().context("no list")?;
        Ok(plugins.iter().filter_map(|plugin| Some(plugin["type"].as_str()?.to_owned())).collect())
    }
}

fn succeeds(mut command: Command) -> Result<Output> {
    let out = command.output()?;
    ensure!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    Ok(out)
}

/// A container runtime that starts pods all the time: the configuration has to be whole, and its plugins there.
struct Runtime {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<u64>>>,
}

impl Runtime {
    fn start(dirs: &Dirs) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, list, plugin) = (stop.clone(), dirs.list(), dirs.bin().join("lb-cni"));
        let look = move || {
            let mut looks = 0;
            while !stopped.load(Ordering::Relaxed) {
                let text = fs::read(&list).context("no configuration")?;
                let config: Value = serde_json::from_slice(&text).context("half a configuration")?;
                let named = config["plugins"].as_array().context("no plugins")?;
                if named.iter().any(|plugin| plugin["type"] == "lb-cni") {
                    let meta = fs::metadata(&plugin).context("the plugin is named, but not there")?;
                    ensure!(meta.permissions().mode() & 0o111 != 0 && meta.len() > 100_000, "half a plugin");
                }
                looks += 1;
            }
            Ok(looks)
        };
        Self { stop, thread: Some(std::thread::spawn(look)) }
    }

    fn finish(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let looks =
            self.thread.take().map(|thread| thread.join().expect("no panic")).context("a thread")??;
        ensure!(looks > 100, "only {looks} looks");
        Ok(())
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn inode(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path).with_context(|| path.display().to_string())?.ino())
}

fn links(node: &Node) -> Result<Vec<String>> {
    let links = fs::read_dir(node.path("/run/lb-agent/bpf/lb/links"))?;
    links.map(|link| Ok(link?.file_name().to_string_lossy().into_owned())).collect()
}

#[test]
fn a_node_that_is_a_container_gets_all_and_is_rid_of_all() -> Result<()> {
    let lab = Lab::builder("install").pods(1).build()?;
    for (host, cgroups) in [(lab.node(0), Cgroups::Own), (lab.node(1), Cgroups::Hosts)] {
        let (node, dirs) = (Node::start(host, cgroups)?, Dirs::new()?);
        let runtime = Runtime::start(&dirs);
        // Twice: a pod is restarted, a version is rolled out.
        for _ in 0..2 {
            succeeds(node.in_pod(&["install"], &dirs)?)?;
        }
        ensure!(dirs.plugins()? == ["bridge", "portmap", "lb-cni"], "{:?}", dirs.plugins()?);
        // The node's own cgroup: not its service manager's, and none above it.
        ensure!(inode(&node.path("/run/lb-agent/cgroup"))? == inode(host.cgroup_dir())?, "another cgroup");

        let manifests = dirs.0.path().join("manifests");
        fs::create_dir(&manifests)?;
        let mut command = node.in_pod(&["run"], &dirs)?;
        command.arg("--manifests").arg(&manifests).args(["--hostname-override=n", "--healthz-bind-address="]);
        command.arg("--metrics-bind-address=").stderr(Stdio::null()).process_group(0);
        let mut agent = Stopped(command.spawn()?);
        eventually(Duration::from_secs(20), || {
            let links = links(&node)?;
            ensure!(links.iter().any(|name| name.starts_with("tc-")), "{links:?}");
            ensure!(links.iter().any(|name| name == "cgroup-connect4"), "{links:?}");
            Ok(())
        })?;
        // The CNI writes its file anew.
        eventually(SOON, || {
            fs::write(dirs.0.path().join("new"), LIST)?;
            Ok(fs::rename(dirs.0.path().join("new"), dirs.list())?)
        })?;
        eventually(SOON, || {
            ensure!(dirs.plugins()?.contains(&"lb-cni".into()), "{:?}", dirs.plugins()?);
            Ok(())
        })?;
        agent.stop()?;

        // As the plugin writes down pods.
        fs::create_dir(node.path("/run/lb-agent/pods"))?;
        fs::write(node.path("/run/lb-agent/pods/c1:eth0.json"), "{}")?;
        for _ in 0..2 {
            succeeds(node.in_pod(&["cleanup", "--grace=100ms"], &dirs)?)?;
            ensure!(dirs.plugins()? == ["bridge", "portmap"], "{:?}", dirs.plugins()?);
            ensure!(fs::read_dir(dirs.bin())?.next().is_none(), "the plugin is still there");
            ensure!(!node.path("/run/lb-agent").exists(), "/run/lb-agent is still there");
        }
        runtime.finish()?;
    }
    Ok(())
}

#[test]
fn a_node_is_not_cleaned_under_an_agent() -> Result<()> {
    let lab = Lab::builder("busy").pods(1).build()?;
    let (node, dirs) = (Node::start(lab.node(0), Cgroups::Own)?, Dirs::new()?);
    succeeds(node.in_pod(&["install"], &dirs)?)?;
    fs::create_dir_all(node.path("/run/lb-agent/bpf/lb/links"))?;
    let busy = fs::File::open(node.path("/run/lb-agent/bpf/lb"))?;
    busy.lock()?;
    let mut cleanup =
        Stopped(node.in_pod(&["cleanup", "--grace=0s"], &dirs)?.stderr(Stdio::piped()).spawn()?);
    std::thread::sleep(Duration::from_millis(300));
    ensure!(cleanup.0.try_wait()?.is_none(), "it does not wait for the agent");
    ensure!(dirs.plugins()?.contains(&"lb-cni".into()), "the agent would put it back");
    drop(busy);
    ensure!(cleanup.0.wait()?.success());
    ensure!(!node.path("/run/lb-agent").exists());
    Ok(())
}

/// A process that does not outlive the test.
struct Stopped(Child);

impl Stopped {
    fn stop(&mut self) -> Result<()> {
        // nsenter and unshare wait for what they have started, and pass signals on to nobody.
        kill(Pid::from_raw(-(self.0.id() as i32)), Signal::SIGTERM)?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
