//! The packets that carry overlays': the programs are told their port, and remember nothing of them.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, HashMap, Map, MapData};
use lb_common::addr::{Ip4, Ip6, NetPort};
use lb_common::maps::{Addr, Flow, FlowKey, Overlay};
use xtask::lab::Host;
use xtask::probe::Ask;

use super::redirect::passing;
use super::restart::maps_dir;
use super::support::{answered, cluster, store};

/// flannel's, in the lab as everywhere.
const PORT: u16 = 8472;
/// The default of `--masquerade-ports`. What a node sends from one of them is taken for a flow that somebody else has
/// masqueraded, and entered.
const MASQUERADE_PORTS: RangeInclusive<u16> = 10_000..=29_999;

/// What the programs are told.
fn told(node: &Host) -> Result<Overlay> {
    let map = MapData::from_pin(maps_dir(node).join("LB_OVERLAY"))?;
    Array::try_from(Map::Array(map))?.get(&0, 0).context("read what carries overlays' packets")
}

/// How many entries a node's flow table has, and those of them that are an overlay's.
fn flows<A: Addr>(node: &Host, table: &str) -> Result<(usize, Vec<String>)> {
    let map = MapData::from_pin(maps_dir(node).join(table))?;
    let map: HashMap<_, FlowKey<A>, Flow<A>> = HashMap::try_from(Map::HashMap(map))?;
    let keys: Vec<FlowKey<A>> = map.keys().collect::<Result<_, _>>().context("read the flows")?;
    let overlays = keys.iter().map(|key| (key.sport.get(), key.dport.get()));
    let overlays = overlays.filter(|(from, to)| [*from, *to].contains(&PORT));
    Ok((keys.len(), overlays.map(|(from, to)| format!("{from} → {to}")).collect()))
}

#[test]
fn no_flow_is_entered_for_what_carries_an_overlays_packets() -> Result<()> {
    let cluster = cluster("overlay")?;
    let (nodes, pod) = ([0, 1].map(|node| cluster.lab().node(node)), cluster.lab().pod(0, 2));
    for node in nodes {
        let mut wanted = Overlay { port: NetPort::new(PORT), ..Overlay::default() };
        for ip in node.ips() {
            match ip {
                IpAddr::V4(ip) => wanted.addr4 = ip.into(),
                IpAddr::V6(ip) => wanted.addr6 = ip.into(),
            }
        }
        ensure!(told(node)? == wanted, "{} is told {:?}", node.name(), told(node)?);
        // Where vxlan takes its source ports from.
        let ports = format!("{} {}", MASQUERADE_PORTS.start(), MASQUERADE_PORTS.end());
        node.sysctl("ipv4.ip_local_port_range", &ports)?;
    }
    let wires = nodes.map(|node| node.capture("eth0"));
    for to in store().into_iter().chain(cluster.lab().pod(1, 2).at(8080)) {
        answered(&pod, &Ask::tcp(to).count(20))?;
    }
    for (node, wire) in nodes.into_iter().zip(wires) {
        let sent = passing(&wire?, true)?;
        for (v4, table) in [(true, "LB_FLOW4"), (false, "LB_FLOW6")] {
            let carried = sent.keys().filter(|(_, to)| to.port() == PORT && to.is_ipv4() == v4);
            let carried = carried.filter(|(from, _)| MASQUERADE_PORTS.contains(&from.port())).count();
            ensure!(carried >= 20, "{}: {carried} of an overlay's flows, {sent:?}", node.name());
            let (all, overlays) = if v4 { flows::<Ip4>(node, table)? } else { flows::<Ip6>(node, table)? };
            ensure!(overlays.is_empty(), "{}, of {all} entries in {table}: {overlays:?}", node.name());
            // The Service's, so that it is the right table.
            ensure!(all > 0 || node.name() != "n1", "no entries in {table}");
        }
    }
    Ok(())
}
