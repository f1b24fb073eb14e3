//! Agents that are killed, stopped and started again, under load and with other flags.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::maps::{HashMap, Map, MapData, MapInfo};
use aya::programs::links::{FdLink, PinnedLink};
use lb_common::addr::Ip4;
use lb_common::maps::{Flow, FlowKey};
use xtask::demo::Cluster;
use xtask::lab::Host;
use xtask::probe::{Answer, Ask, Direction, Failure, Ping, names};

use super::support::{SOON, Traffic, answered, cluster, dns, eventually, store, web};

const STREAM: u64 = 200_000_000;

/// Every path, both families where it costs little.
fn load(cluster: &Cluster) -> Result<Traffic> {
    let lab = cluster.lab();
    let (pod, node, client, inet) = (lab.pod(0, 2), lab.node(0), lab.client(), lab.inet());
    let mut traffic = Traffic::default();
    traffic.streams(&pod, store()[0], STREAM, Direction::Up);
    traffic.streams(&lab.pod(0, 1), inet.at(8080)[1], STREAM, Direction::Down);
    traffic.streams(client, node.at(30081)[0], STREAM, Direction::Down);
    for to in [web()[0], node.at(30080)[1]] {
        traffic.connections(if to == web()[0] { &pod } else { client }, to);
    }
    traffic.connections(node, web()[0]);
    traffic.connections(&lab.pod(0, 1), inet.at(8080)[0]);
    for family in [0, 1] {
        traffic.conversation(&pod, &Ask::udp(dns()[family]))?;
        traffic.conversation(client, &Ask::udp(node.at(30053)[family]))?;
        traffic.conversation(client, &Ask::tcp(node.at(30081)[family]))?;
        traffic.conversation(&lab.pod(0, 1), &Ask::udp(inet.at(5353)[family]))?;
        traffic.conversation(node, &Ask::udp(dns()[family]))?;
        traffic.conversation(node, &Ask::udp(dns()[family]).unconnected())?;
    }
    Ok(traffic)
}

#[test]
fn no_packet_notices_that_agents_are_killed_and_started() -> Result<()> {
    let mut cluster = cluster("kill")?;
    let traffic = load(&cluster)?;
    std::thread::sleep(Duration::from_millis(300));
    let mut kills = Vec::new();
    for node in [0, 1] {
        cluster.kill_agent(node);
        kills.push(Instant::now());
        std::thread::sleep(Duration::from_millis(200));
        cluster.start_agent(node, &[])?;
    }
    cluster.stop_agent(0)?;
    std::thread::sleep(Duration::from_millis(100));
    cluster.start_agent(0, &[])?;
    let end = Instant::now();
    std::thread::sleep(Duration::from_millis(300));
    let done = traffic.finish(end)?;
    for (what, spans) in done.iter().filter(|(what, _)| what.starts_with("streams")) {
        let hit = kills.iter().any(|kill| spans.iter().any(|s| s.0 < *kill && s.1 > *kill));
        ensure!(hit, "{what}: none was under way when an agent was killed");
    }
    Ok(())
}

/// What is pinned on a node: ids of maps, and of links with their programs'.
struct Pinned {
    maps: BTreeMap<String, u32>,
    links: BTreeMap<String, (u32, u32)>,
}

pub(crate) fn maps_dir(node: &Host) -> PathBuf {
    node.bpffs_dir().join(format!("lb/v{}/maps", lb_common::maps::VERSION))
}

fn entries(dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let entries = fs::read_dir(dir)?;
    entries
        .map(|e| e.map(|e| (e.file_name().to_string_lossy().into_owned(), e.path())).map_err(Into::into))
        .collect()
}

fn pinned(node: &Host) -> Result<Pinned> {
    let (mut maps, mut links) = (BTreeMap::new(), BTreeMap::new());
    for (name, path) in entries(&maps_dir(node))? {
        maps.insert(name, MapInfo::from_pin(path)?.id());
    }
    for (name, path) in entries(&node.bpffs_dir().join("lb/links"))? {
        let info = FdLink::from(PinnedLink::from_pin(path)?).info()?;
        links.insert(name, (info.id(), info.program_id()));
    }
    Ok(Pinned { maps, links })
}

fn flows(node: &Host) -> Result<Vec<FlowKey<Ip4>>> {
    let map = MapData::from_pin(maps_dir(node).join("LB_FLOW4"))?;
    let map: HashMap<_, FlowKey<Ip4>, Flow<Ip4>> = HashMap::try_from(Map::HashMap(map))?;
    map.keys().collect::<Result<_, _>>().context("read the flows")
}

#[test]
fn a_new_agent_adopts_what_is_pinned() -> Result<()> {
    let mut cluster = cluster("adopt")?;
    let node = cluster.lab().node(0).clone();
    let mut traffic = Traffic::default();
    traffic.conversation(&cluster.lab().pod(0, 2), &Ask::tcp(store()[0]))?;
    traffic.conversation(cluster.lab().client(), &Ask::udp(node.at(30053)[0]))?;
    eventually(SOON, || {
        ensure!(flows(&node)?.len() >= 5, "two flows and their entries");
        Ok(())
    })?;
    let (before, flows_before) = (pinned(&node)?, flows(&node)?);
    cluster.kill_agent(0);
    cluster.start_agent(0, &[])?;
    let (after, flows_after) = (pinned(&node)?, flows(&node)?);
    ensure!(!before.maps.is_empty() && before.maps == after.maps, "the same maps");
    ensure!(before.links.keys().eq(after.links.keys()), "{:?} {:?}", before.links, after.links);
    for (name, (link, program)) in &before.links {
        let (new_link, new_program) = after.links[name];
        ensure!(*link == new_link, "{name}: the link is another one: there was a moment without");
        ensure!(*program != new_program, "{name}: still the old program");
    }
    ensure!(flows_before.iter().all(|key| flows_after.contains(key)), "flows are kept");
    traffic.finish(Instant::now() - Duration::from_millis(100))?;
    Ok(())
}

#[test]
fn other_flags_take_effect_and_cut_nothing_else() -> Result<()> {
    let mut cluster = cluster("flags")?;
    let (pod, node) = (cluster.lab().pod(0, 2), cluster.lab().node(0).clone());
    let outside = cluster.lab().inet().at(8080);
    let mut traffic = Traffic::default();
    traffic.conversation(&pod, &Ask::udp(dns()[0]))?;
    traffic.connections(&pod, web()[1]);
    let short = Duration::from_millis(400);
    let ask = |from: &Host, to: SocketAddr| -> Result<Vec<Answer>> { from.ask(&Ask::tcp(to).timeout(short)) };

    cluster.restart_agent(0, &["--masquerade=false", "--socket-lb=off"])?;
    for family in [0, 1] {
        ensure!(ask(&pod, outside[family])?[0].failure() == Some(&Failure::Timeout), "not masqueraded");
        let host = ask(&node, web()[family])?;
        ensure!(host[0].0.is_err(), "a host process without socket hooks: {host:?}");
    }
    ensure!(!cluster.lab().pod(0, 1).pings(outside[0].ip())?);
    cluster.restart_agent(0, &["--masquerade=true", "--socket-lb=host"])?;
    for family in [0, 1] {
        ensure!(names(&ask(&pod, outside[family])?) == ["outside"]);
        answered(&node, &Ask::tcp(web()[family]).count(5))?;
    }
    ensure!(cluster.lab().pod(0, 1).ping(&Ping::new(outside[0].ip()))?[0].0.is_ok());
    cluster.restart_agent(0, &["--socket-lb=all"])?;
    for family in [0, 1] {
        answered(&pod, &Ask::udp(dns()[family]).unconnected().count(5))?;
        answered(&node, &Ask::tcp(web()[family]).count(5))?;
    }
    traffic.finish(Instant::now() - Duration::from_millis(100))?;
    Ok(())
}

#[test]
fn what_changed_while_no_agent_ran_is_applied_at_start() -> Result<()> {
    let mut cluster = cluster("absent")?;
    let pod = cluster.lab().pod(0, 2);
    cluster.kill_agent(0);
    let on_n1 = [cluster.lab().pod(0, 0), cluster.lab().pod(0, 1)];
    cluster.web_without(&on_n1)?;
    fs::remove_file(cluster.manifests().join("store.yaml"))?;
    let before = answered(&pod, &Ask::tcp(web()[0]).count(60))?;
    ensure!(before.iter().any(|name| name != "web-3"), "the kernel cannot know yet");
    answered(&pod, &Ask::tcp(store()[0]))?;
    cluster.start_agent(0, &[])?;
    for family in [0, 1] {
        let after = answered(&pod, &Ask::tcp(web()[family]).count(30))?;
        ensure!(after.iter().all(|name| name == "web-3"), "{after:?}");
        let gone = pod.ask(&Ask::tcp(store()[family]).timeout(Duration::from_millis(300)))?;
        ensure!(gone[0].0.is_err(), "a Service that is gone: {gone:?}");
    }
    Ok(())
}
