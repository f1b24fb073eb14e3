//! The plugin as containerd and podman run it, with real containers.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xtask::cni::DEBIAN;
use xtask::lab::Host;
use xtask::system::{ensure_debian_packages, output};

use super::super::support::{cluster, store};
use super::{all_served, bridge, ipam, ours, plugin_exe, state_dir};

/// Mounts of the runtime's own, so that nothing of this machine's is written to. A container's files are this machine's.
const MOUNTS: &str = r#"
mount --make-rprivate /
mkdir up run
mount -t tmpfs none up
mount --rbind /run run
mount -t tmpfs none /run
for dir in lb-lab netns; do mkdir /run/$dir; mount --rbind run/$dir /run/$dir; done
mount -t tmpfs none /dev/shm
for dir in etc opt var; do
    mkdir -p up/$dir/upper up/$dir/work
    mount -t overlay -o lowerdir=/$dir,upperdir=up/$dir/upper,workdir=up/$dir/work none /$dir
done
mkdir rootfs
for dir in usr bin lib lib64; do if [ -d /$dir ]; then mkdir rootfs/$dir; mount --bind /$dir rootfs/$dir; fi; done
(cd rootfs && mkdir dev etc lab proc run sys tmp)
mount --rbind "$BINARIES" rootfs/lab
"#;

/// Runs a script on a node, in mounts and a directory of its own, and returns what it printed.
fn on(node: &Host, name: &str, list: &Value, script: &str) -> Result<String> {
    let dir = node.state_dir().join(name);
    fs::create_dir(&dir)?;
    fs::write(dir.join("list"), list.to_string())?;
    let mut command = node.command("unshare");
    command.args(["--mount", "sh", "-ec"]).arg(format!("{MOUNTS}\n{script}")).current_dir(&dir);
    command.env("DIR", &dir).env("DEBIAN", DEBIAN).env("PLUGIN", plugin_exe()?);
    command.env("BINARIES", Path::new(env!("CARGO_BIN_EXE_xtask")).with_file_name(""));
    let out = command.stdin(Stdio::null()).output().context("run unshare")?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&out.stdout), text(&out.stderr));
    ensure!(out.status.success(), "{name}: {}\n{stdout}\n{stderr}", out.status);
    Ok(stdout)
}

const CONTAINERD: &str = r#"
mkdir -p /etc/cni/net.d /opt/cni/bin
cp list /etc/cni/net.d/00-lab.conflist
cp $DEBIAN/* "$PLUGIN" /opt/cni/bin/
cat >config <<END
version = 2
root = "$DIR/root"
state = "/run/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "/run/containerd.sock"
END
containerd -c config >containerd.log 2>&1 &
trap "kill $!; wait $!" EXIT
tries=0
until ctr -a /run/containerd.sock version >/dev/null 2>&1; do
    tries=$((tries + 1)); [ $tries -lt 200 ] || { cat containerd.log; exit 1; }; sleep 0.1
done
for to in $TO; do
    ctr -a /run/containerd.sock run --rm --cni --cgroup "" --rootfs $DIR/rootfs lab /lab/xtask probe ask tcp $to
done
"#;

/// The limits are those that any machine grants. Podman leaves its cgroups behind.
const PODMAN: &str = r#"
mkdir net.d plugins
cp list net.d/00-lab.conflist
cp $DEBIAN/* "$PLUGIN" plugins/
cat >containers.conf <<END
[network]
network_backend = "cni"
cni_plugin_dirs = ["$DIR/plugins"]
network_config_dir = "$DIR/net.d"
default_network = "cbr0"
[engine]
runtime = "runc"
events_logger = "file"
cgroup_manager = "cgroupfs"
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
END
export CONTAINERS_CONF=$DIR/containers.conf
parent=lb-lab-podman-$$
trap 'find /sys/fs/cgroup -depth -type d -path "*/$parent*" -exec rmdir {} +' EXIT
for to in $TO; do
    podman --root $DIR/root --runroot /run/podman --storage-driver vfs run --rm --network cbr0 --cgroup-parent /$parent \
        --security-opt label=disable --rootfs $DIR/rootfs /lab/xtask probe ask tcp $to
done
"#;

#[test]
fn containers_of_containerd_and_podman_are_served_while_no_agent_runs() -> Result<()> {
    ensure_debian_packages(&[("containerd", "containerd"), ("runc", "runc"), ("podman", "podman")])?;
    super::plugins_of_debian()?;
    let mut cluster = cluster("runtimes")?;
    let node = cluster.lab().node(0).clone();
    cluster.kill_agent(0);
    let to: Vec<String> = store().iter().map(ToString::to_string).collect();
    let to = format!("TO='{}'\n", to.join(" "));
    let mut runtimes = vec![("containerd", "1.0.0", CONTAINERD)];
    // From version 5 on, podman knows no CNI any more.
    let podman = output(Command::new("podman").arg("--version"))?;
    if podman.contains("version 3.") || podman.contains("version 4.") {
        runtimes.push(("podman", "0.4.0", PODMAN));
    }
    for (runtime, version, script) in runtimes {
        let portmap = json!({ "type": "portmap", "capabilities": { "portMappings": true } });
        let ptp = json!({ "type": "ptp", "mtu": 1450 });
        for (chain, mut plugins) in [("bridge", vec![bridge(&node), portmap]), ("ptp", vec![ptp])] {
            plugins[0]["ipam"] = ipam(&node);
            // Clear of the lab's pods.
            plugins[0]["ipam"]["ranges"] = json!([
                [{ "subnet": "10.244.1.0/24", "rangeStart": "10.244.1.100" }],
                [{ "subnet": "fd00:10:244:1::/64", "rangeStart": "fd00:10:244:1::100" }],
            ]);
            plugins.push(ours(&node));
            let list = json!({ "cniVersion": version, "name": "cbr0", "plugins": plugins });
            let name = format!("{runtime}-{chain}");
            let said = on(&node, &name, &list, &format!("{to}{script}"))?;
            ensure!(said.matches("\"store\"").count() == 2, "{name}: {said}");
            nothing_stays(&node).context(name)?;
        }
    }
    Ok(())
}

/// Each of the two containers had one ADD and one DEL.
fn nothing_stays(node: &Host) -> Result<()> {
    let log = state_dir(node).join("cni.log");
    let lines = fs::read_to_string(&log)?;
    let count = |word: &str| lines.lines().filter(|line| line.contains(word)).count();
    ensure!(count(": is served") == 2 && count(" DEL ") == 2 && lines.lines().count() == 4, "{lines}");
    fs::remove_file(log)?;
    ensure!(fs::read_dir(state_dir(node).join("pods"))?.count() == 0, "records are left");
    all_served(node)
}
