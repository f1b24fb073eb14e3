//! What only passes through a node, by XDP: beside the least that can be done to such a packet, sending it back to where it
//! came from by a redirection. Both with real packets on veths (see [`Through`]), since a redirection is made after its program
//! has ended.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::{Ebpf, EbpfLoader};
use lb_common::datapath::Reason;
use serde_json::{Value, json};

use super::{Cost, Figure, Limit, object};
use crate::agent::Agent;
use crate::bench::family::IpFamily;
use crate::bench::load::Transport;
use crate::bench::plan::Depth;
use crate::bench::services::{Cluster, ENDPOINTS, Kind, Service, Where};
use crate::bench::stats::Spread;
use crate::bench::through::{Through, attach, xdp};
use crate::lab::Lab;

/// How long an agent may take.
const PATIENCE: Duration = Duration::from_secs(60);
const BARE: &str = "bare program: an XDP redirect, with the driver's work";
/// Sending on takes this many times as long at most.
const AT_MOST: f64 = 1.25;

/// How packets come to the other node's pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Overlay,
    Route,
}

impl By {
    const ALL: [Self; 2] = [Self::Overlay, Self::Route];

    fn name(self) -> &'static str {
        match self {
            Self::Overlay => "forwarded: outside → NodePort, pod on other node, into vxlan",
            Self::Route => "forwarded: the same, pods routed",
        }
    }

    /// A Service whose endpoints are reached that way. They need not be there: nothing comes so far.
    fn service(self, family: IpFamily) -> Result<Service> {
        let kind = Kind { at: Where::There, transport: Transport::Udp };
        let cluster = Cluster::new(family, 1, &[kind]);
        let mut service = cluster.measured(kind, 0).context("no Service")?.clone();
        let number = family as u16 * 2 + self as u16;
        service.name = format!("svc-{number}");
        service.node_port = service.node_port.map(|port| port + number);
        if self == Self::Route {
            let beyond = 0..ENDPOINTS;
            let endpoints = beyond.map(|n| SocketAddr::new(routed(family, n), 8000));
            service.endpoints = endpoints.collect();
        }
        Ok(service)
    }
}

/// A pod's address in the part of the other node's pod network that is routed.
fn routed(family: IpFamily, n: usize) -> IpAddr {
    family.endpoint(1, n + if family == IpFamily::V4 { 92 } else { 0x100 })
}

/// That part.
fn routed_net(family: IpFamily) -> (IpAddr, u8) {
    (routed(family, 0), if family == IpFamily::V4 { 26 } else { 120 })
}

/// Nanoseconds of the node's processor for each packet, in turn.
pub(in crate::bench) fn measure(exe: &Path, core: usize, depth: Depth) -> Result<Vec<Cost>> {
    let (rounds, packets) = depth.forwarded();
    let (bare, _program) = bare_lab()?;
    let (lab, _agent) = our_lab(exe)?;
    let (mut bare, mut ours) = (Through::new(&bare, core)?, Through::new(&lab, core)?);
    let mut ways = Vec::new();
    for family in IpFamily::ALL {
        for by in By::ALL {
            let port = by.service(family)?.node_port.context("no NodePort")?;
            let from = SocketAddr::new(family.pick(lab.client().ips()), 0);
            ways.push((family, by, from, SocketAddr::new(family.pick(lab.node(0).ips()), port)));
        }
    }
    for (_, by, from, to) in &ways {
        // Flows begin at the other hooks.
        ours.turn(*from, *to, u64::from(packets))?;
        let before = sent_on(&lab)?;
        ours.turn(*from, *to, u64::from(packets))?;
        let sent = sent_on(&lab)? - before;
        ensure!(sent >= u64::from(packets), "{}: XDP sent {sent} of {packets} packets on", by.name());
    }
    let mut floors = [Vec::new(), Vec::new()];
    let mut times = vec![Vec::new(); ways.len()];
    for _ in 0..rounds {
        for (i, (_, by, from, to)) in ways.iter().enumerate() {
            times[i].push(nanoseconds(&mut ours, (*from, *to), packets)?);
            if *by == By::Overlay {
                floors[i / By::ALL.len()].push(nanoseconds(&mut bare, (*from, *to), packets)?);
            }
        }
    }
    let figure = |times: &[f64], limit| Figure { nanoseconds: Spread::of(times), limit };
    let row = |packet: &str, families| Cost { packet: packet.into(), hook: "xdp".into(), families };
    let mut costs = vec![row(BARE, floors.iter().map(|times| figure(times, None)).collect())];
    for by in By::ALL {
        let of = ways.iter().zip(&times).zip([0, 0, 1, 1]).filter(|(((_, other, ..), _), _)| *other == by);
        let figures = of.map(|((_, times), family)| {
            let ratios: Vec<_> =
                times.iter().zip(&floors[family]).map(|(ours, floor)| ours / floor).collect();
            let limit = Limit { floor: BARE.into(), ratio: Spread::of(&ratios), at_most: AT_MOST };
            figure(times, Some(limit))
        });
        costs.push(row(by.name(), figures.collect()));
    }
    Ok(costs)
}

fn nanoseconds(through: &mut Through, (from, to): (SocketAddr, SocketAddr), packets: u32) -> Result<f64> {
    let forwarded = through.turn(from, to, u64::from(packets))?;
    // A few may find a queue full.
    ensure!(forwarded.packets > u64::from(packets) / 10 * 9, "{to}: of {packets} packets came {forwarded:?}");
    Ok(forwarded.cpu * 1e9 / forwarded.packets as f64)
}

/// A node that only redirects. The program is there as long as the second value.
fn bare_lab() -> Result<(Lab, Ebpf)> {
    let lab = Lab::builder("bench-bare").build().context("starting a lab")?;
    lab.like_wires(true)?;
    let mut ebpf = EbpfLoader::new().load_file(object("lb-ebpf-bench")?)?;
    xdp(&mut ebpf, "redirect")?.load().context("loading redirect")?;
    attach(lab.node(0), &mut ebpf, "redirect", "eth0")?;
    Ok((lab, ebpf))
}

/// A node with our agent, which serves a Service for each way.
fn our_lab(exe: &Path) -> Result<(Lab, Agent)> {
    let lab = Lab::builder("bench-xdp-only").build().context("starting a lab")?;
    lab.like_wires(true)?;
    let mut objects: Vec<Value> = Vec::new();
    for (number, node) in [lab.node(0), lab.node(1)].into_iter().enumerate() {
        let nets = IpFamily::ALL.map(|family| family.pod_cidr(number));
        let nets = nets.map(|(net, prefix)| format!("{net}/{prefix}"));
        let addresses = node.ips().map(|ip| json!({"type": "InternalIP", "address": ip}));
        objects.push(json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name()},
            "spec": {"podCIDR": nets[0], "podCIDRs": nets}, "status": {"addresses": addresses},
        }));
    }
    for family in IpFamily::ALL {
        lab.node(0).add_route(routed_net(family), family.pick(lab.node(1).ips()), None)?;
        for by in By::ALL {
            let service = by.service(family)?;
            objects.extend([service.object(), service.slice()]);
        }
    }
    let manifests = lab.node(0).state_dir().join("manifests");
    fs::create_dir_all(&manifests)?;
    for (i, object) in objects.iter().enumerate() {
        fs::write(manifests.join(format!("{i}.yaml")), object.to_string())?;
    }
    let mut agent = Agent::start(exe, lab.node(0), &manifests, &["--xdp=native"])?;
    agent.wait_written(PATIENCE)?;
    Ok((lab, agent))
}

/// Packets that XDP has sent on.
fn sent_on(lab: &Lab) -> Result<u64> {
    crate::bench::maps::counted(lab.node(0), Reason::XdpForwarded)
}
