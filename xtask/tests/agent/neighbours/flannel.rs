//! flannel's own masquerade, which k3s cannot switch off for IPv4.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use xtask::demo::Cluster;
use xtask::lab::{Capture, Host};
use xtask::probe::{Ask, Transport};
use xtask::system::{ensure_debian_packages, find_program, output};

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

/// What our flow table makes of a source; nothing if it has no such flow, or leaves it as it is.
fn by_us(node: &Host, source: SocketAddr) -> Result<Option<SocketAddr>> {
    let flows = inspect::json(node, &["flows", &source.to_string()])?;
    for flow in flows.as_array().context("a list of flows")? {
        let end = |tuple: &str| flow[tuple]["source"].as_str().unwrap_or_default().parse::<SocketAddr>();
        if end("original")? == source && end("translated")? != source {
            return Ok(Some(end("translated")?));
        }
    }
    Ok(None)
}

/// Whether a flow of ours has that source.
fn is_ours(node: &Host, source: SocketAddr) -> Result<bool> {
    let flows = inspect::json(node, &["flows", &source.to_string()])?;
    let flows = flows.as_array().context("a list of flows")?;
    Ok(flows.iter().any(|flow| flow["translated"]["source"] == source.to_string()))
}

/// What netfilter makes of a pod's source: where the replies that it expects go to.
fn by_netfilter(node: &Host, protocol: &str, source: SocketAddr) -> Result<SocketAddr> {
    ensure_debian_packages(&[("conntrack", "conntrack")])?;
    let family = if source.is_ipv4() { "ipv4" } else { "ipv6" };
    let (ip, port) = (source.ip().to_string(), source.port().to_string());
    let mut command = node.command(find_program("conntrack").context("no conntrack")?);
    command.args(["-L", "-f", family, "-p", protocol, "--orig-src", &ip, "--orig-port-src", &port]);
    let text = output(&mut command)?;
    let last = |key: &str| text.split_whitespace().rev().find_map(|word| word.strip_prefix(key));
    let tracked =
        last("dst=").zip(last("dport=")).with_context(|| format!("{source} is not tracked: {text}"))?;
    Ok(SocketAddr::new(tracked.0.parse()?, tracked.1.parse()?))
}

/// A pod's packets to the outside are translated once, by the one or the other, and into what the server sees.
fn one_translation(cluster: &Cluster, ask: &Ask, by_flannel: bool) -> Result<()> {
    let lab = cluster.lab();
    let (pod, node) = (lab.pod(0, 2), lab.node(0));
    let (outside, mut all) = (node.capture("eth0")?, BTreeSet::new());
    let protocol = if ask.transport == Transport::Tcp { "tcp" } else { "udp" };
    for _ in 0..5 {
        // Never the same twice, as netfilter goes on with what it once began for a port; and one that nobody else gets.
        static PORT: AtomicU16 = AtomicU16::new(61_000);
        let ask = ask.clone().source_port(PORT.fetch_add(1, Ordering::Relaxed));
        let answer = pod.ask(&ask)?.pop().context("no answer")?;
        let reply = answer.0.map_err(|e| anyhow::anyhow!("{protocol} {}: {e}", ask.to))?;
        let (own, seen) = (reply.own, reply.peer.context("no source")?);
        let tracked = by_netfilter(node, protocol, own)?;
        // Ours comes last, and would begin with what netfilter has made of it.
        let ours = by_us(node, tracked)?;
        let what = format!(
            "{protocol} {own} → {}: netfilter makes it {tracked}, we {ours:?}, the server sees {seen}",
            ask.to
        );
        ensure!(node.ips().contains(&seen.ip()), "{what}");
        match by_flannel {
            // Another port only if the one that netfilter took by chance is one of ours.
            true => match ours {
                None => ensure!(tracked == seen, "{what}"),
                Some(ours) => ensure!(ours == seen && is_ours(node, tracked)?, "{what}"),
            },
            false => ensure!(tracked == own && ours == Some(seen), "{what}"),
        }
        all.insert(seen);
    }
    let left = sources(&outside, ask.to)?;
    ensure!(left == all && all.len() == 5, "{left:?} left by eth0, the server saw {all:?}");
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

#[test]
fn as_it_is_today() -> Result<()> {
    beside("flannel-random", Flannel { skips_marked: true, random_fully: true })
}

#[test]
fn connections_survive_with_random_ports() -> Result<()> {
    connections_survive("flannel-live-random", true)
}
