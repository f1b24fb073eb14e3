//! Which way packets take to a backend on the same bridge: a router lowers the hop limit, a bridge does not.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use xtask::demo::Cluster;
use xtask::lab::Host;
use xtask::probe::{Ask, Lines};

use super::support::{SOON, cluster, eventually, web};

const BRIDGED: u8 = 64;
const ROUTED: u8 = 63;

/// `bridge-nf-call-iptables` and its twin.
fn netfilter(node: &Host, v4: bool, v6: bool) -> Result<()> {
    for (name, on) in [("iptables", v4), ("ip6tables", v6)] {
        node.sysctl(&format!("bridge.bridge-nf-call-{name}"), if on { "1" } else { "0" })?;
    }
    Ok(())
}

/// A pod's new connections to the web service reach the backends on its node with this hop limit, every packet of them.
fn arrive_with(cluster: &Cluster, [v4, v6]: [u8; 2]) -> Result<()> {
    let lab = cluster.lab();
    let captures = [lab.pod(0, 0).capture("eth0")?, lab.pod(0, 1).capture("eth0")?];
    for ask in web().map(|at| Ask::tcp(at).count(30)) {
        let answers = lab.pod(0, 2).ask(&ask)?;
        ensure!(answers.iter().all(|a| a.failure().is_none()), "{answers:?}");
    }
    let (mut seen, mut from) = ([BTreeSet::new(), BTreeSet::new()], lab.pod(0, 2).ips());
    from.sort();
    for packet in captures.iter().map(|c| c.packets()).collect::<Result<Vec<_>>>()?.concat() {
        let Ok(sliced) = SlicedPacket::from_ip(&packet.bytes) else { continue };
        let Some(TransportSlice::Tcp(_)) = sliced.transport else { continue };
        match sliced.net {
            Some(NetSlice::Ipv4(ip)) if from.contains(&ip.header().source_addr().into()) => {
                seen[0].insert(ip.header().ttl())
            }
            Some(NetSlice::Ipv6(ip)) if from.contains(&ip.header().source_addr().into()) => {
                seen[1].insert(ip.header().hop_limit())
            }
            _ => continue,
        };
    }
    ensure!(seen == [BTreeSet::from([v4]), BTreeSet::from([v6])], "hop limits {seen:?}, not {v4} and {v6}");
    Ok(())
}

#[test]
fn the_bridge_carries_what_netfilter_sees_either_way() -> Result<()> {
    let mut cluster = cluster("bridged")?;
    for (v4, v6) in [(true, true), (false, false), (true, false), (false, true)] {
        netfilter(cluster.lab().node(0), v4, v6)?;
        let limits = [v4, v6].map(|on| if on { BRIDGED } else { ROUTED });
        eventually(SOON, || arrive_with(&cluster, limits))?;
    }
    netfilter(cluster.lab().node(0), false, false)?;
    cluster.restart_agent(0, &["--bridge-shortcut=on"])?;
    arrive_with(&cluster, [BRIDGED; 2])?;
    netfilter(cluster.lab().node(0), true, true)?;
    cluster.restart_agent(0, &["--bridge-shortcut=off"])?;
    arrive_with(&cluster, [ROUTED; 2])
}

fn next(lines: &mut Lines) -> Result<()> {
    let answer = lines.next().context("the client ended")?;
    ensure!(answer.failure().is_none(), "{answer:?}");
    Ok(())
}

/// Nothing is remembered of where a neighbour was: the kernel is asked for each packet.
#[test]
fn connections_survive_a_change_of_the_way() -> Result<()> {
    let cluster = cluster("bridged-live")?;
    let node = cluster.lab().node(0);
    netfilter(node, true, true)?;
    eventually(SOON, || arrive_with(&cluster, [BRIDGED; 2]))?;
    let mut talks: Vec<Lines> = Vec::new();
    for at in [web(), web(), web(), web()].concat() {
        let ask = Ask::tcp(at).keep().count(1_000_000).interval(Duration::from_millis(10));
        talks.push(cluster.lab().pod(0, 2).start_asking(&ask)?);
    }
    talks.iter_mut().try_for_each(next)?;
    // The bridge forgets its neighbours, which sends packets back to the router until they are found again.
    for family in ["-4", "-6"] {
        let status = node.command("ip").args([family, "neigh", "flush", "dev", "cni0"]).status()?;
        ensure!(status.success(), "ip {family} neigh flush: {status}");
    }
    for talk in &mut talks {
        (0..50).try_for_each(|_| next(talk))?;
    }
    netfilter(node, false, false)?;
    for talk in &mut talks {
        (0..50).try_for_each(|_| next(talk))?;
    }
    Ok(())
}
