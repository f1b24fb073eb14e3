//! Agents of another version, whose maps are laid out differently, take over: an upgrade, and the way back.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_common::maps::VERSION;
use xtask::build::next_agent;
use xtask::demo::Cluster;
use xtask::lab::Host;
use xtask::probe::Ask;

use super::support::{Traffic, agent_exe, cluster, dns, eventually, log, web};

/// The next version's agent, built once.
fn next() -> Result<&'static Path> {
    static NEXT: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();
    let built = NEXT.get_or_init(|| next_agent().map_err(|error| format!("{error:#}")));
    built.as_deref().map_err(|error| anyhow::anyhow!("{error}"))
}

/// Two versions' programs are verified, three times over, while all of the load goes on.
const PATIENCE: Duration = Duration::from_secs(60);

/// Every kind of path, new flows and old ones, of pods, of the node itself and of the outside.
fn load(cluster: &Cluster) -> Result<Traffic> {
    let lab = cluster.lab();
    let (pod, other, node, client, inet) =
        (lab.pod(0, 2), lab.pod(0, 1), lab.node(0), lab.client(), lab.inet());
    // Its ports come round every few seconds, as they do in a minute where a connection leaves a TIME_WAIT.
    other.sysctl("ipv4.tcp_max_tw_buckets", "0")?;
    other.sysctl("ipv4.ip_local_port_range", "33000 33999")?;
    let mut traffic = Traffic::default();
    traffic.new_connections(&pod, web()[0])?;
    traffic.new_connections(client, node.at(30080)[0])?;
    traffic.new_connections(&other, inet.at(8080)[0])?;
    traffic.new_connections(node, web()[0])?;
    for family in [0, 1] {
        traffic.conversation(&pod, &Ask::tcp(web()[family]))?;
        traffic.conversation(&pod, &Ask::udp(dns()[family]))?;
        traffic.conversation(client, &Ask::udp(node.at(30053)[family]))?;
        traffic.conversation(client, &Ask::tcp(node.at(30081)[family]))?;
        traffic.conversation(&other, &Ask::udp(inet.at(5353)[family]))?;
        traffic.conversation(&other, &Ask::tcp(inet.at(8080)[family]))?;
        traffic.conversation(node, &Ask::udp(dns()[family]))?;
        traffic.conversation(node, &Ask::udp(dns()[family]).unconnected())?;
    }
    Ok(traffic)
}

/// What is below a node's pin directory, but for the pins themselves.
fn versions(node: &Host) -> Result<Vec<String>> {
    let entries = fs::read_dir(node.bpffs_dir().join("lb")).context("the pins")?;
    let mut names: Vec<_> = entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
    names.retain(|name| name.starts_with('v'));
    names.sort();
    Ok(names)
}

/// That there is nothing but one version's.
fn only(node: &Host, version: u32) -> Result<()> {
    let versions = versions(node)?;
    ensure!(versions == [format!("v{version}")], "{versions:?}\n{}", log(node));
    for (dir, prefix) in [("front", ""), ("links", "front"), ("links", "beside")] {
        let entries = fs::read_dir(node.bpffs_dir().join("lb").join(dir))?.flatten();
        let left: Vec<_> =
            entries.map(|e| e.file_name()).filter(|n| n.to_string_lossy().starts_with(prefix)).collect();
        ensure!(left.is_empty(), "{left:?} are left");
    }
    Ok(())
}

/// Has another program serve in the first node's place.
fn change_to(cluster: &mut Cluster, exe: &Path, version: u32) -> Result<()> {
    cluster.stop_agent(0)?;
    start(cluster, exe, version)
}

/// Starts it where none runs, and waits until nothing is left of any other version.
fn start(cluster: &mut Cluster, exe: &Path, version: u32) -> Result<()> {
    cluster.use_agent(exe);
    cluster.begin_agent(0)?;
    cluster.wait_for_agent(0, PATIENCE)?;
    only(cluster.lab().node(0), version)
}

fn pause() {
    std::thread::sleep(Duration::from_millis(500));
}

#[test]
fn no_connection_notices_an_upgrade_or_the_way_back() -> Result<()> {
    let (next, this) = (next()?, agent_exe()?);
    let mut cluster = cluster("upgrade")?;
    let node = cluster.lab().node(0).clone();
    let traffic = load(&cluster)?;
    pause();
    let mut last = Instant::now();
    for (exe, version) in [(next, VERSION + 1), (&*this, VERSION), (next, VERSION + 1)] {
        change_to(&mut cluster, exe, version)?;
        pause();
        last = Instant::now();
        pause();
    }
    traffic.finish(last).map_err(|e| anyhow::anyhow!("{e:#}\n{}", log(&node)))?;
    Ok(())
}

#[test]
fn agents_of_both_versions_that_are_killed_at_any_moment_cut_nothing() -> Result<()> {
    let (next, this) = (next()?, agent_exe()?);
    let mut cluster = cluster("crashes")?;
    let node = cluster.lab().node(0).clone();
    let traffic = load(&cluster)?;
    pause();
    let taking_over = || log(&node).matches("taking over, as version").count();
    // Killed so many milliseconds after it began: to be gone on with by the next life, then to be undone.
    for (first, second) in [(0, 800), (200, 400)] {
        cluster.stop_agent(0)?;
        cluster.use_agent(next);
        for life in [first, second] {
            let before = taking_over();
            cluster.begin_agent(0)?;
            eventually(PATIENCE, || {
                let begun = node.bpffs_dir().join("lb/front/egress").exists() && taking_over() > before;
                ensure!(begun || only(&node, VERSION + 1).is_ok(), "it does not begin:\n{}", log(&node));
                Ok(())
            })?;
            std::thread::sleep(Duration::from_millis(life));
            cluster.kill_agent(0);
        }
        start(&mut cluster, &this, VERSION)?;
    }
    pause();
    let last = Instant::now();
    pause();
    traffic.finish(last)?;
    Ok(())
}

#[test]
fn a_start_that_fails_halfway_leaves_the_other_version_serving() -> Result<()> {
    let (next, this) = (next()?, agent_exe()?);
    let mut cluster = cluster("failed")?;
    let node = cluster.lab().node(0).clone();
    let traffic = load(&cluster)?;
    pause();
    cluster.stop_agent(0)?;
    cluster.use_agent(next);
    // Nothing can be pinned there, which is found out when all flows are the new version's.
    let obstacle = node.bpffs_dir().join("lb/links/beside-recvmsg4");
    fs::create_dir(&obstacle).context("an obstacle")?;
    cluster.begin_agent(0)?;
    let error = cluster.wait_for_agent(0, PATIENCE).err().context("it started nevertheless")?;
    ensure!(format!("{error:#}").contains("exit status: 1"), "{error:#}");
    cluster.kill_agent(0);
    fs::remove_dir(&obstacle)?;
    only(&node, VERSION)?;
    let said = log(&node);
    for words in ["beside-recvmsg4", "the programs of version"] {
        ensure!(said.contains(words), "nothing about {words:?} in\n{said}");
    }
    pause();
    for (exe, version) in [(&*this, VERSION), (next, VERSION + 1)] {
        change_to(&mut cluster, exe, version)?;
    }
    pause();
    let last = Instant::now();
    pause();
    traffic.finish(last)?;
    Ok(())
}
