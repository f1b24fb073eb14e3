//! Datagrams that are too large for one packet.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xtask::lab::Host;
use xtask::probe::{Ask, Ping};

use super::support::{SOON, answered, cluster, dns, eventually};

/// A dozen packets and more.
pub(crate) const LARGE: usize = 20_000;

/// Datagrams of that size are answered by others of that size, by all of these servers, and none is lost.
pub(crate) fn arrive(from: &Host, ask: Ask, servers: &[&str]) -> Result<()> {
    let to = ask.to;
    // The first ones may be what tells either end of a smaller MTU on the way; not all of them would be.
    let first = ask.clone().count(10).timeout(Duration::from_millis(200));
    eventually(SOON, || answered(from, &first).map(drop))?;
    let names = answered(from, &ask.count(20))?;
    let names: BTreeSet<&str> = names.iter().map(String::as_str).collect();
    ensure!(names.iter().eq(servers), "{names:?} answered {} → {to}, not {servers:?}", from.name());
    Ok(())
}

/// Who serves the flow from that port.
pub(crate) fn server(from: &Host, to: SocketAddr, port: u16) -> Result<String> {
    let mut names = answered(from, &Ask::udp(to).source_port(port))?;
    names.pop().context("nobody answered")
}

#[test]
fn large_datagrams_arrive_both_ways() -> Result<()> {
    let cluster = cluster("frag")?;
    let lab = cluster.lab();
    let (pod, node, client, inet) = (lab.pod(0, 0), lab.node(0), lab.client(), lab.inet());
    for family in [0, 1] {
        let large = |to: [SocketAddr; 2]| Ask::udp(to[family]).echo(LARGE);
        let both = ["dns-1", "dns-2"];
        arrive(&pod, large(dns()), &both)?;
        arrive(client, large(node.at(30053)), &both)?;
        arrive(&pod, large(inet.at(5353)), &["outside"])?;
        arrive(node, large(dns()), &both)?;
        arrive(node, large(dns()).unconnected(), &both)?;
        // In flows that were there before.
        for port in 40_010..40_014 {
            let server = server(client, node.at(30053)[family], port)?;
            arrive(client, large(node.at(30053)).source_port(port).keep(), &[&server])?;
        }
    }
    pings(&pod, inet)
}

/// Large echo requests, and their answers.
fn pings(pod: &Host, inet: &Host) -> Result<()> {
    for to in inet.ips() {
        let ping = Ping::new(to).size(8000);
        eventually(SOON, || {
            let first = pod.ping(&ping)?;
            ensure!(first[0].0.is_ok(), "{to}: {first:?}");
            Ok(())
        })?;
        let answers = pod.ping(&ping.count(10))?;
        ensure!(answers.iter().all(|answer| answer.0.is_ok()), "{to}: {answers:?}");
    }
    Ok(())
}
