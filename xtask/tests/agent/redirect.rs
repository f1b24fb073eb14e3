//! Flows whose packets are redirected to pods: on the devices' outer ends only the first one is seen to leave, and what
//! closes a connection.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use xtask::demo::Cluster;
use xtask::lab::{Capture, Host};
use xtask::probe::{Ask, Direction, Failure, failures};

use super::support::{Traffic, answered, cluster, dns, metric, store, web};

const REDIRECT: &str = "--redirect=pods";
const ALL: &str = "--redirect=all";
/// Requests over one socket.
const REQUESTS: usize = 20;

/// The demo's cluster, whose agents redirect.
fn redirecting(name: &str) -> Result<Cluster> {
    let mut cluster = cluster(name)?;
    for node in 0..2 {
        cluster.restart_agent(node, &[REDIRECT])?;
    }
    Ok(cluster)
}

/// How many packets left by a device, for each pair of ends.
fn leaving(capture: &Capture) -> Result<BTreeMap<(SocketAddr, SocketAddr), usize>> {
    passing(capture, true)
}

/// How many packets left by a device, or came in.
pub(crate) fn passing(capture: &Capture, out: bool) -> Result<BTreeMap<(SocketAddr, SocketAddr), usize>> {
    let mut seen = BTreeMap::new();
    for packet in capture.packets()?.into_iter().filter(|packet| packet.out == out) {
        let Ok(sliced) = SlicedPacket::from_ip(&packet.bytes) else { continue };
        let (src, dst) = match sliced.net {
            Some(NetSlice::Ipv4(ip)) => {
                (ip.header().source_addr().into(), ip.header().destination_addr().into())
            }
            Some(NetSlice::Ipv6(ip)) => {
                (ip.header().source_addr().into(), ip.header().destination_addr().into())
            }
            _ => continue,
        };
        let (sport, dport) = match sliced.transport {
            Some(TransportSlice::Tcp(tcp)) => (tcp.source_port(), tcp.destination_port()),
            Some(TransportSlice::Udp(udp)) => (udp.source_port(), udp.destination_port()),
            _ => continue,
        };
        *seen.entry((SocketAddr::new(src, sport), SocketAddr::new(dst, dport))).or_default() += 1;
    }
    Ok(seen)
}

/// How many packets leave by the veths of the other pods on n1 for each flow of the client's, and by its own, while it keeps
/// a few conversations.
fn conversations(cluster: &Cluster, client: &Host, asks: &[Ask]) -> Result<[Vec<usize>; 2]> {
    let lab = cluster.lab();
    let veth = |pod: &Host| lab.node(0).capture(&lab.veth_of(pod));
    let pods = [0, 1, 2].map(|pod| lab.pod(0, pod));
    let (own, others): (Vec<_>, Vec<_>) = pods.iter().partition(|pod| pod.name() == client.name());
    let servers = others.into_iter().map(veth).collect::<Result<Vec<_>>>()?;
    let own = own.into_iter().map(veth).collect::<Result<Vec<_>>>()?;
    for ask in asks {
        for _ in 0..10 {
            answered(client, &ask.clone().keep().count(REQUESTS))?;
        }
    }
    let ours = |ip| client.ips().contains(&ip);
    let mut requests = Vec::new();
    for capture in &servers {
        requests.extend(leaving(capture)?.into_iter().filter(|((src, _), _)| ours(src.ip())).map(|(_, n)| n));
    }
    let mut replies = Vec::new();
    for capture in &own {
        replies.extend(leaving(capture)?.into_iter().filter(|((_, dst), _)| ours(dst.ip())).map(|(_, n)| n));
    }
    Ok([requests, replies])
}

#[test]
fn only_the_first_packet_of_a_flow_takes_the_long_way() -> Result<()> {
    let mut cluster = redirecting("redirect")?;
    // None of them has an endpoint of what it asks for: a pod's way to itself is a long one.
    let (pod, other, outside) =
        (cluster.lab().pod(0, 2), cluster.lab().pod(0, 0), cluster.lab().client().clone());
    let node_port = cluster.lab().node(0).at(30080);
    let over_tcp: Vec<Ask> = web().into_iter().chain(store()).map(Ask::tcp).collect();
    let over_udp: Vec<Ask> = dns().map(Ask::udp).into();
    let to_node_ports: Vec<Ask> = node_port.map(Ask::tcp).into();

    // The client's FIN takes the long way, too.
    for (client, asks, long) in [(&pod, &over_tcp, 2), (&other, &over_udp, 1)] {
        let [requests, replies] = conversations(&cluster, client, asks)?;
        ensure!(requests.len() >= 3 && requests.iter().all(|n| *n == long), "requests: {requests:?}");
        ensure!(replies.is_empty(), "replies: {replies:?}");
    }
    let [requests, _] = conversations(&cluster, &outside, &to_node_ports)?;
    ensure!(requests.len() >= 3 && requests.iter().all(|n| *n == 2), "requests from outside: {requests:?}");
    let flows = metric(cluster.lab().node(0), "lb_events_total{event=\"redirected\"}")?;
    ensure!(flows >= 60.0, "{flows} flows were redirected");

    cluster.restart_agent(0, &[])?;
    let [requests, replies] = conversations(&cluster, &pod, &over_tcp)?;
    let long = |seen: &[usize]| seen.len() >= 3 && seen.iter().all(|n| *n >= REQUESTS);
    ensure!(long(&requests) && long(&replies), "without: {requests:?}, {replies:?}");
    Ok(())
}

/// With `all`, requests for other nodes' pods do not come by the bridge, from where the node would route them.
#[test]
fn what_is_for_other_nodes_goes_past_the_bridge() -> Result<()> {
    let mut cluster = cluster("redirect-all")?;
    let requests = |cluster: &Cluster| -> Result<Vec<usize>> {
        let (lab, pod) = (cluster.lab(), cluster.lab().pod(0, 2));
        let bridge = lab.node(0).capture("cni0")?;
        for to in store() {
            for _ in 0..5 {
                answered(&pod, &Ask::tcp(to).keep().count(REQUESTS))?;
            }
        }
        let far = [0, 1, 2].map(|pod| lab.pod(1, pod).ips()).concat();
        let seen = passing(&bridge, false)?.into_iter();
        Ok(seen.filter(|((_, dst), _)| far.contains(&dst.ip())).map(|(_, packets)| packets).collect())
    };
    let long = requests(&cluster)?;
    ensure!(long.len() == 10 && long.iter().all(|n| *n >= REQUESTS), "without: {long:?}");
    cluster.restart_agent(0, &[ALL])?;
    let short = requests(&cluster)?;
    ensure!(short.len() == 10 && short.iter().all(|n| *n == 2), "with: {short:?}");
    Ok(())
}

#[test]
fn policies_decide_on_the_first_packet() -> Result<()> {
    let cluster = redirecting("redirect-policy")?;
    let (lab, pod) = (cluster.lab(), cluster.lab().pod(0, 2));
    for (v4, to) in [(true, web()[0]), (false, web()[1])] {
        let from = pod.ips()[usize::from(!v4)];
        lab.node(0).add_legacy_rules(v4, &format!("*filter\n-I FORWARD -s {from} -j DROP\nCOMMIT\n"))?;
        let answers = pod.ask(&Ask::tcp(to).timeout(Duration::from_millis(300)).count(5))?;
        ensure!(failures(&answers) == BTreeMap::from([(&Failure::Timeout, 5)]), "{answers:?}");
    }
    Ok(())
}

/// Agents come and go, with and without redirecting, and what has begun goes on; streams in both directions, too.
#[test]
fn connections_survive_a_change_of_the_flag() -> Result<()> {
    let mut cluster = redirecting("redirect-live")?;
    let lab = cluster.lab();
    let (pod, far, outside) = (lab.pod(0, 2), lab.pod(1, 1), lab.client().clone());
    let node_port = lab.node(0).at(30080);
    let mut traffic = Traffic::default();
    for to in web().into_iter().chain(store()) {
        traffic.conversation(&pod, &Ask::tcp(to))?;
        traffic.conversation(&far, &Ask::tcp(to))?;
        traffic.new_connections(&pod, to)?;
    }
    for to in dns() {
        traffic.conversation(&pod, &Ask::udp(to))?;
    }
    for to in node_port {
        traffic.conversation(&outside, &Ask::tcp(to))?;
        traffic.connections(&outside, to);
    }
    for (to, direction) in
        web().into_iter().chain(store()).zip([Direction::Up, Direction::Down].into_iter().cycle())
    {
        traffic.streams(&pod, to, 20_000_000, direction);
    }
    for flags in [&[][..], &[ALL], &["--bridge-shortcut=off"], &[REDIRECT, "--bridge-shortcut=off"], &[ALL]] {
        std::thread::sleep(Duration::from_millis(500));
        cluster.restart_agent(0, flags)?;
    }
    cluster.kill_agent(0);
    std::thread::sleep(Duration::from_secs(1));
    traffic.finish(Instant::now() - Duration::from_millis(500)).map(drop)
}
