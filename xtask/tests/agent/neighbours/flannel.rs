//! flannel's own masquerade, which k3s cannot switch off for IPv4.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use xtask::demo::Cluster;
use xtask::lab::{Capture, Host};
use xtask::probe::{Ask, Transport};

use super::super::inspect;
use super::super::support::{Traffic, cluster};
use super::{everything_works, pod_networks, track};

/// What differs between flannel's versions and settings.
#[derive(Clone, Copy)]
struct Flannel {
    /// Leaves alone what kube-proxy has marked.
    skips_marked: bool,
    random_fully: bool,
}

impl Flannel {
    /// `SetupAndEnsureMasqRules` and `SetupAndEnsureForwardRules`, one after the other.
    fn rules(self, node: usize, v4: bool) -> String {
        let [four, six] = pod_networks(node);
        let (cluster, own, multicast) = if v4 { four } else { six };
        let comment = "-m comment --comment \"flanneld masq\"";
        let mark = format!("-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {comment} -j RETURN\n");
        let mark = if self.skips_marked { &mark } else { "" };
        let random = if self.random_fully { " --random-fully" } else { "" };
        format!(
            "*nat\n:FLANNEL-POSTRTG - [0:0]\n\
             -A POSTROUTING {comment} -j FLANNEL-POSTRTG\n\
             {mark}\
             -A FLANNEL-POSTRTG -s {own} -d {cluster} {comment} -j RETURN\n\
             -A FLANNEL-POSTRTG -s {cluster} -d {own} {comment} -j RETURN\n\
             -A FLANNEL-POSTRTG ! -s {cluster} -d {own} {comment} -j RETURN\n\
             -A FLANNEL-POSTRTG -s {cluster} ! -d {multicast} {comment} -j MASQUERADE{random}\n\
             -A FLANNEL-POSTRTG ! -s {cluster} -d {cluster} {comment} -j MASQUERADE{random}\n\
             COMMIT\n\
             *filter\n:FLANNEL-FWD - [0:0]\n\
             -A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n\
             -A FLANNEL-FWD -s {cluster} -m comment --comment \"flanneld forward\" -j ACCEPT\n\
             -A FLANNEL-FWD -d {cluster} -m comment --comment \"flanneld forward\" -j ACCEPT\n\
             COMMIT\n"
        )
    }
}

/// Both nodes, both families.
fn add(cluster: &Cluster, flannel: Flannel) -> Result<()> {
    for node in 0..2 {
        for v4 in [true, false] {
            cluster.lab().node(node).add_rules(v4, &flannel.rules(node, v4))?;
        }
    }
    Ok(())
}

/// The sources of the packets to a server that left by the captured device.
fn sources(capture: &Capture, server: SocketAddr) -> Result<BTreeSet<SocketAddr>> {
    let mut sources = BTreeSet::new();
    for packet in capture.packets()?.iter().filter(|packet| packet.out) {
        let Ok(sliced) = SlicedPacket::from_ip(&packet.bytes) else { continue };
        let ips = match sliced.net {
            Some(NetSlice::Ipv4(ip)) => {
                let header = ip.header();
                (header.source_addr().into(), header.destination_addr().into())
            }
            Some(NetSlice::Ipv6(ip)) => {
                let header = ip.header();
                (header.source_addr().into(), header.destination_addr().into())
            }
            _ => continue,
        };
        let ports = match sliced.transport {
            Some(TransportSlice::Tcp(tcp)) => (tcp.source_port(), tcp.destination_port()),
            Some(TransportSlice::Udp(udp)) => (udp.source_port(), udp.destination_port()),
            _ => continue,
        };
        if SocketAddr::new(ips.1, ports.1) == server {
            sources.insert(SocketAddr::new(ips.0, ports.0));
        }
    }
    Ok(sources)
}

/// What our flow table says the source of `client`'s packets becomes.
fn ours(node: &Host, client: SocketAddr) -> Result<Option<String>> {
    let flows = inspect::json(node, &["flows", &client.to_string()])?;
    let flows = flows.as_array().context("a list of flows")?;
    let source = |flow: &serde_json::Value| flow["translated"]["source"].as_str().map(String::from);
    Ok(flows.iter().find_map(source).filter(|source| *source != client.to_string()))
}

/// A pod's packets to the outside are translated once, whoever does it, and into what the server sees.
fn one_translation(cluster: &Cluster, ask: &Ask, by_flannel: bool) -> Result<()> {
    let lab = cluster.lab();
    let (pod, node) = (lab.pod(0, 2), lab.node(0));
    let (inside, outside) = (node.capture("cni0")?, node.capture("eth0")?);
    let mut answers = pod.ask(&ask.clone().count(5))?;
    let what = format!("{:?} {}: {answers:?}", ask.transport, ask.to);
    let mut seen = BTreeSet::new();
    let mut own = BTreeSet::new();
    for answer in answers.drain(..) {
        let reply = answer.0.map_err(|e| anyhow::anyhow!("{what}: {e}"))?;
        seen.insert(reply.peer.context("no source")?);
        own.insert(reply.own);
    }
    ensure!(seen.len() == 5 && own.len() == 5, "{what}");
    ensure!(seen.iter().all(|source| node.ips().contains(&source.ip())), "{what}");
    let left = sources(&outside, ask.to)?;
    ensure!(left == seen, "{what}: {left:?} left by eth0");
    let came: BTreeSet<_> = inside.packets()?.into_iter().filter(|packet| !packet.out).collect();
    ensure!(!came.is_empty(), "{what}: nothing came from the pod");
    for client in own {
        let ours = ours(node, client)?;
        ensure!(ours.is_none() == by_flannel, "{what}: we make {client} {ours:?}");
        if let Some(source) = ours {
            ensure!(seen.contains(&source.parse()?), "{what}: {source} was translated again");
        }
    }
    Ok(())
}

/// A port outside that only the background talks to.
const OTHER: u16 = 5354;

/// To the outside, where flannel masquerades before we could.
fn to_the_outside(cluster: &Cluster, by_flannel: bool) -> Result<()> {
    for to in cluster.lab().inet().at(5432) {
        one_translation(cluster, &Ask::tcp(to), by_flannel)?;
    }
    for to in cluster.lab().inet().at(5353) {
        one_translation(cluster, &Ask { transport: Transport::Udp, ..Ask::tcp(to) }, by_flannel)?;
    }
    Ok(())
}

fn beside(name: &str, flannel: Flannel) -> Result<()> {
    let cluster = cluster(name)?;
    track(&cluster)?;
    to_the_outside(&cluster, false)?;
    add(&cluster, flannel)?;
    to_the_outside(&cluster, true)?;
    everything_works(&cluster)
}

#[test]
fn with_the_mark() -> Result<()> {
    beside("flannel", Flannel { skips_marked: true, random_fully: false })
}

#[test]
fn without_the_mark() -> Result<()> {
    beside("flannel-old", Flannel { skips_marked: false, random_fully: false })
}

/// Connections through us when flannel comes, and through flannel when we come.
fn connections_survive(name: &str, random_fully: bool) -> Result<()> {
    let mut cluster = cluster(name)?;
    track(&cluster)?;
    let (pod, client) = (cluster.lab().pod(0, 2), cluster.lab().client().clone());
    let slowly = |ask: Ask| ask.interval(Duration::from_millis(50));
    let talks = |traffic: &mut Traffic, cluster: &Cluster| -> Result<()> {
        for family in [0, 1] {
            let lab = cluster.lab();
            for _ in 0..6 {
                traffic.conversation(&pod, &slowly(Ask::tcp(lab.inet().at(8080)[family])))?;
                traffic.conversation(&client, &slowly(Ask::tcp(lab.node(0).at(30081)[family])))?;
            }
            traffic.conversation(&pod, &slowly(Ask::udp(lab.inet().at(OTHER)[family])))?;
        }
        Ok(())
    };
    let _server = cluster.lab().inet().serve_ports(&[], &[OTHER])?;
    let mut traffic = Traffic::default();
    talks(&mut traffic, &cluster)?;
    to_the_outside(&cluster, false)?;
    add(&cluster, Flannel { skips_marked: true, random_fully })?;
    to_the_outside(&cluster, true)?;
    talks(&mut traffic, &cluster)?;
    cluster.restart_agent(0, &[])?;
    to_the_outside(&cluster, true)?;
    traffic.finish(Instant::now()).map(drop)
}

#[test]
fn connections_survive_either_ones_coming() -> Result<()> {
    connections_survive("flannel-live", false)
}
