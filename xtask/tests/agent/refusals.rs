//! Agents that cannot start: they say why and what to do, and change nothing that worked.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xtask::agent::Agent;
use xtask::demo::Cluster;
use xtask::lab::{Host, Lab};
use xtask::probe::Ask;

use super::support::{Traffic, agent_exe, answered, cluster, dns, web};

/// Runs an agent that should give up soon, and returns its status and what it said.
fn gives_up(mut command: Command) -> Result<(i32, String)> {
    let mut child =
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn()?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            let out = child.wait_with_output()?;
            anyhow::bail!("it goes on: {}", String::from_utf8_lossy(&out.stderr));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let out = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    Ok((out.status.code().with_context(|| format!("killed: {said}"))?, said))
}

fn refused(command: Command, status: i32, words: &[&str]) -> Result<()> {
    let what = format!("{:?}", command.get_args().collect::<Vec<_>>());
    let (code, said) = gives_up(command).with_context(|| what.clone())?;
    ensure!(code == status, "{what}: status {code}, {said}");
    for word in words {
        ensure!(said.contains(word), "{what}: says nothing of {word:?}:\n{said}");
    }
    ensure!(!said.contains("panicked") && !said.contains("backtrace"), "{said}");
    Ok(())
}

/// The mistakes that people make. `good` is a directory of manifests.
fn mistakes(exe: &Path, node: &Host, good: &Path) -> Result<()> {
    let with = |args: &[&str]| {
        let mut command = Agent::command(exe, node);
        command.args(args);
        command
    };
    let good = good.to_str().context("an odd path")?;
    refused(with(&[]), 1, &["--manifests DIR", "--kubeconfig FILE"])?;
    refused(with(&["--manifests", "/nowhere/at/all"]), 1, &["/nowhere/at/all", "No such file"])?;
    refused(with(&["--socket-lb=off", "--masquerade=false", "--manifests", "/nowhere"]), 1, &["/nowhere"])?;
    refused(with(&["--kubeconfig", "/nowhere/config"]), 1, &["/nowhere/config"])?;
    refused(with(&["--manifests", good, "--kubeconfig", "x"]), 2, &["--kubeconfig", "cannot be used with"])?;
    refused(with(&["--manifests", good, "--socket-lb=some"]), 2, &["host, all, off"])?;
    refused(with(&["--manifests", good, "--non-masquerade-cidrs=10.0.0"]), 2, &["CIDR like"])?;
    refused(with(&["--manifests", good, "--masquerade-ports=30000-40000"]), 2, &["NodePorts"])?;
    refused(with(&["--manifests", good, "--no-such-flag"]), 2, &["--no-such-flag", "--help"])?;

    let raw = |args: &[&str]| {
        let mut command = node.command(exe);
        command.args(["run", "--hostname-override", node.name(), "--manifests", good]).args(args);
        command
    };
    let cgroup = node.cgroup_dir().to_str().context("an odd path")?;
    let full = tempfile::tempdir()?;
    fs::write(full.path().join("file"), "")?;
    let full = full.path().to_str().context("an odd path")?;
    refused(raw(&["--bpffs", full, "--cgroup", cgroup]), 1, &[full, "not a BPF file system", "--bpffs"])?;
    let bpffs = node.bpffs_dir();
    let bpffs = bpffs.to_str().context("an odd path")?;
    refused(
        raw(&["--bpffs", bpffs, "--cgroup", "/nowhere/cgroup"]),
        1,
        &["/nowhere/cgroup", "No such file"],
    )?;

    let mut nobody = with(&["--manifests", good]);
    let become_nobody = || {
        nix::unistd::setgid(nix::unistd::Gid::from_raw(65534))?;
        Ok(nix::unistd::setuid(nix::unistd::Uid::from_raw(65534))?)
    };
    // SAFETY: setgid and setuid are async-signal-safe. The other closure, which joins the lab, runs before.
    unsafe { nobody.pre_exec(become_nobody) };
    refused(nobody, 1, &["root", "CAP_BPF"])
}

/// A copy that everybody may run: the build directory may be closed to others.
fn public_copy(exe: &Path) -> Result<(tempfile::TempDir, std::path::PathBuf)> {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir()?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
    let copy = dir.path().join("lb-agent");
    // By another process: this one may fork at any moment, and who inherits a file open for writing keeps it busy.
    ensure!(Command::new("cp").arg(exe).arg(&copy).status()?.success(), "copying {}", exe.display());
    Ok((dir, copy))
}

#[test]
fn a_fresh_node_is_left_as_it_was() -> Result<()> {
    let lab = Lab::builder("refuse").pods(1).build()?;
    let (_dir, exe) = public_copy(&agent_exe()?)?;
    let good = lab.node(0).state_dir().join("manifests");
    fs::create_dir(&good)?;
    mistakes(&exe, lab.node(0), &good)?;
    let links = lab.node(0).bpffs_dir().join("lb/links");
    let left: Vec<_> = fs::read_dir(links).into_iter().flatten().flatten().map(|e| e.file_name()).collect();
    ensure!(left.is_empty(), "programs were attached all the same: {left:?}");
    // A cgroup2 directory is what it takes, not any directory.
    let mut command = lab.node(0).command(&exe);
    command.arg("run").arg("--manifests").arg(&good).arg("--bpffs").arg(lab.node(0).bpffs_dir());
    command.args(["--cgroup", "/tmp"]);
    refused(command, 1, &["/tmp", "cgroup2"])
}

fn works(cluster: &Cluster) -> Result<()> {
    let lab = cluster.lab();
    let (pod, node) = (lab.pod(0, 2), lab.node(0));
    for family in [0, 1] {
        answered(&pod, &Ask::tcp(web()[family]).count(5))?;
        answered(&pod, &Ask::tcp(lab.inet().at(8080)[family]))?;
        answered(lab.client(), &Ask::tcp(node.at(30081)[family]))?;
        answered(node, &Ask::tcp(web()[family]).count(5))?;
        answered(node, &Ask::udp(dns()[family]).count(5))?;
    }
    Ok(())
}

#[test]
fn what_worked_goes_on() -> Result<()> {
    let mut cluster = cluster("refgo")?;
    let (_dir, exe) = public_copy(cluster.agent_exe())?;
    let mut traffic = Traffic::default();
    traffic.conversation(&cluster.lab().pod(0, 2), &Ask::udp(dns()[0]))?;
    traffic.connections(cluster.lab().client(), cluster.lab().node(0).at(30080)[0]);
    cluster.stop_agent(0)?;
    mistakes(&exe, cluster.lab().node(0), cluster.manifests())?;
    works(&cluster)?;
    traffic.finish(Instant::now() - Duration::from_millis(200))?;
    cluster.start_agent(0, &[])?;
    works(&cluster)
}
