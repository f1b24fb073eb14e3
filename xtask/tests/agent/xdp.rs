//! What only passes through a node, with XDP on its uplink: the same for everybody who looks at it, and where it cannot be
//! done there, it is done elsewhere.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xtask::demo::Cluster;
use xtask::lab::{Host, Lab};
use xtask::probe::{Ask, Bulk, Direction};

use super::inspect::json;
use super::support::{SOON, Traffic, agent_exe, answered, eventually, ip, logged, metric};

const NATIVE: &[&str] = &["--xdp=native"];
/// NodePorts: the store, whose backend is on n2, and the name server, one of whose backends is.
const STORE: u16 = 30081;
const DNS: u16 = 30053;
/// Of so many, one in 2^40 times none goes to the second of two servers.
const CONVERSATIONS: usize = 40;

/// The demo with XDP on n1's uplink.
fn with_xdp(name: &str) -> Result<Cluster> {
    let lab = Lab::builder(name).pods(3).build()?;
    lab.for_xdp()?;
    let mut cluster = Cluster::without_agents(lab, agent_exe()?)?;
    cluster.start_agent(1, &[])?;
    cluster.start_agent(0, NATIVE)?;
    Ok(cluster)
}

fn forwarded(node: &Host) -> Result<f64> {
    metric(node, "lb_events_total{event=\"xdp_forwarded\"}")
}

/// How many packets XDP has sent on meanwhile.
fn meanwhile(node: &Host, what: impl FnOnce() -> Result<()>) -> Result<f64> {
    let before = forwarded(node)?;
    what()?;
    Ok(forwarded(node)? - before)
}

/// Streams both ways, questions and answers, in both families.
fn all_of_it(cluster: &Cluster) -> Result<()> {
    let (client, node) = (cluster.lab().client(), cluster.lab().node(0));
    for family in [0, 1] {
        let to = node.at(STORE)[family];
        for direction in [Direction::Up, Direction::Down] {
            let bytes = 20_000_000;
            let packets = meanwhile(node, || {
                let report = client.bulk(&Bulk::new(to, bytes, direction))?;
                ensure!(report.ok, "{to} {direction:?}: {report:?}");
                Ok(())
            })?;
            // Of the data: most of it, at the very least.
            ensure!(packets > bytes as f64 / 1500.0, "{to} {direction:?}: only {packets} packets");
        }
        let to = node.at(DNS)[family];
        let packets = meanwhile(node, || {
            let names = answered(client, &Ask::udp(to).count(40))?;
            ensure!(names.iter().any(|name| name == "dns-2"), "{names:?}");
            Ok(())
        })?;
        // Each question comes from a port of its own: the first packet of a flow is for the hooks, the answer is not.
        ensure!(packets >= 5.0, "{to}: only {packets} answers");
        // All from one port, so that they go to one server: until it has been the one on the other node.
        let far = (0..CONVERSATIONS).find_map(|_| {
            let conversation = || -> Result<_> {
                let mut names = Vec::new();
                let packets = meanwhile(node, || {
                    names = answered(client, &Ask::udp(to).keep().count(10))?;
                    Ok(())
                })?;
                Ok(names.iter().all(|name| name == "dns-2").then_some(packets))
            };
            conversation().transpose()
        });
        let packets =
            far.with_context(|| format!("{to}: none of {CONVERSATIONS} went to the other node"))??;
        // The first question is for the hooks.
        ensure!(packets >= 19.0, "{to}: only {packets} packets of a conversation");
    }
    Ok(())
}

#[test]
fn into_the_overlay_and_out_of_it() -> Result<()> {
    let cluster = with_xdp("xdpvx")?;
    all_of_it(&cluster)?;
    let status = json(cluster.lab().node(0), &["status"])?;
    let devices = status["devices"].as_array().context("devices")?;
    for device in devices {
        let is_there = device["xdp"] == "native";
        ensure!(is_there == (device["name"] == "eth0"), "{device}");
    }
    Ok(())
}

#[test]
fn where_pods_are_routed() -> Result<()> {
    let mut cluster = with_xdp("xdprt")?;
    // A pod's datagrams to another node's address: whether they are answers, its own node cannot tell.
    cluster.restart_agent(1, &["--non-masquerade-cidrs=172.18.0.0/16,fd00:172:18::/48"])?;
    // As flannel's host-gw backend does it.
    let lab = cluster.lab();
    for (here, there, nets) in
        [(0, 1, ["10.244.2.0/24", "fd00:10:244:2::/64"]), (1, 0, ["10.244.1.0/24", "fd00:10:244:1::/64"])]
    {
        for (net, via) in nets.into_iter().zip(lab.node(there).ips()) {
            ip(lab.node(here), &["route", "replace", net, "via", &via.to_string()])?;
        }
    }
    all_of_it(&cluster)
}

fn is_on(node: &Host) -> Result<bool> {
    let status = json(node, &["status"])?;
    let devices = status["devices"].as_array().context("devices")?;
    Ok(devices.iter().any(|device| !device["xdp"].is_null()))
}

#[test]
fn no_packet_notices_that_the_agent_is_killed_and_started() -> Result<()> {
    let mut cluster = with_xdp("xdpkill")?;
    let (node, client) = (cluster.lab().node(0).clone(), cluster.lab().client().clone());
    // No streams: they fill the queues, and datagrams are lost for that reason alone.
    let mut traffic = Traffic::default();
    traffic.connections(&client, node.at(STORE)[0]);
    for family in [0, 1] {
        traffic.conversation(&client, &Ask::tcp(node.at(STORE)[family]))?;
        for _ in 0..4 {
            // Some of these ask the server on the other node.
            traffic.conversation(&client, &Ask::udp(node.at(DNS)[family]))?;
        }
    }
    std::thread::sleep(Duration::from_millis(200));
    let before = forwarded(&node)?;
    cluster.kill_agent(0);
    std::thread::sleep(Duration::from_millis(300));
    ensure!(is_on(&node)?);
    cluster.start_agent(0, NATIVE)?;
    ensure!(forwarded(&node)? > before, "it works without the agent");
    traffic.finish(Instant::now() - Duration::from_millis(100))?;
    Ok(())
}

/// A driver that begins or ends to run programs may lose what it has in its queues: a veth does.
#[test]
fn connections_outlive_its_being_switched_on_and_off() -> Result<()> {
    let mut cluster = with_xdp("xdpon")?;
    let (node, client) = (cluster.lab().node(0).clone(), cluster.lab().client().clone());
    let mut traffic = Traffic::default();
    traffic.streams(&client, node.at(STORE)[0], 50_000_000, Direction::Down);
    traffic.streams(&client, node.at(STORE)[1], 50_000_000, Direction::Up);
    for family in [0, 1] {
        traffic.conversation(&client, &Ask::tcp(node.at(STORE)[family]))?;
    }
    for flags in [&[][..], NATIVE, &["--xdp=off"]] {
        cluster.restart_agent(0, flags)?;
        eventually(SOON, || {
            ensure!(is_on(&node)? == (flags == NATIVE), "{flags:?}");
            Ok(())
        })?;
        std::thread::sleep(Duration::from_millis(200));
    }
    traffic.finish(Instant::now() - Duration::from_millis(100))?;
    Ok(())
}

#[test]
fn datagrams_go_where_somebody_serves() -> Result<()> {
    let cluster = with_xdp("xdpgo")?;
    let (client, node) = (cluster.lab().client(), cluster.lab().node(0));
    // A port that belongs to the server on the other node, among those that are tried.
    // Slower than they are read below: what is read must not be of long ago.
    let ask = |port: SocketAddr| Ask::udp(port).keep().count(1_000_000).interval(Duration::from_millis(50));
    let mut answers = Vec::new();
    for _ in 0..20 {
        answers.push(client.start_asking(&ask(node.at(DNS)[0]))?);
    }
    let mut next = |which: usize| -> Result<String> {
        let answer = answers[which].next().context("the client ended")?;
        answer.0.map(|said| said.name).map_err(|e| anyhow::anyhow!("not answered: {e}"))
    };
    let names: Vec<String> = (0..20).map(&mut next).collect::<Result<_>>()?;
    let far: Vec<usize> = (0..20).filter(|which| names[*which] == "dns-2").collect();
    ensure!(!far.is_empty(), "{names:?}");
    ensure!(meanwhile(node, || far.iter().try_for_each(|which| next(*which).map(drop)))? >= 1.0);
    cluster.without("dns.yaml", &[cluster.lab().pod(1, 1)])?;
    // What was answered while the others were being started comes first.
    eventually(5 * SOON, || {
        for which in &far {
            let name = next(*which)?;
            ensure!(name == "dns-1", "still {name}");
        }
        Ok(())
    })
}

#[test]
fn not_on_veths_unless_told_so() -> Result<()> {
    let mut cluster = with_xdp("xdpno")?;
    let node = cluster.lab().node(0).clone();
    logged(&node, &["XDP: eth0: native"])?;
    logged(&node, &["XDP: flannel.1: packets for it are wrapped"])?;
    cluster.restart_agent(0, &["--xdp=auto"])?;
    logged(&node, &["XDP: eth0: off: a veth", "--xdp=native"])?;
    ensure!(!is_on(&node)?);
    // By the kernel in the driver's place, the same packets go the same way.
    cluster.restart_agent(0, &["--xdp=generic"])?;
    logged(&node, &["XDP: eth0: generic"])?;
    all_of_it(&cluster)
}
