//! What serves Services on the nodes of a site.

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use aya::Ebpf;
use serde_json::json;

use super::Mode;
use super::hooks;
use super::kube_proxy::Running;
use super::tools::Tools;
use crate::agent::Agent;
use crate::bench::family::IpFamily;
use crate::bench::services::{Cluster, Service};
use crate::bench::{iptables, nftables};
use crate::lab::{ApiServer, Host, Lab};

/// How long one agent may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long it took to serve a cluster on the first node, from nothing.
#[derive(Clone, Copy, Debug)]
pub(in crate::bench) struct Programmed {
    /// From the start of the process, or of the command that loads the rules.
    pub(in crate::bench) whole: Duration,
    /// From when it had been sent the last object.
    pub(in crate::bench) listed: Option<Duration>,
}

/// Of one site.
#[derive(Debug)]
pub(super) enum Proxy {
    /// Nothing does.
    None,
    /// Nothing does, but there are programs.
    Hooks { _attached: Ebpf },
    /// Rules that the harness writes.
    Rules(Mode),
    /// Our agents.
    Agents { agents: Vec<Agent>, api: ApiServer },
    /// The real kube-proxy.
    KubeProxies { running: Vec<Running>, api: ApiServer },
}

impl Proxy {
    /// Makes both nodes serve a cluster.
    pub(super) fn start(
        mode: Mode,
        tools: &Tools,
        lab: &Lab,
        cluster: &Cluster,
    ) -> Result<(Self, Option<Programmed>)> {
        let nodes = [lab.node(0), lab.node(1)];
        match mode {
            Mode::Direct => return Ok((Self::None, None)),
            Mode::Hooks => return Ok((Self::Hooks { _attached: hooks::start(lab)? }, None)),
            _ => {}
        }
        if mode.is_ours() {
            let api = api(lab, cluster)?;
            let url = api.api().url();
            let start = |node: &Host| -> Result<(Agent, f64)> {
                let mut command = Agent::command(&tools.agent, node);
                command.args(["--master", &url]).args(mode.agent_flags());
                let mut agent = Agent::spawn(command, node)?;
                let written = agent.wait_written(PATIENCE)?;
                Ok((agent, written))
            };
            let (agents, programmed) = one_after_the_other(nodes, &api, start)?;
            return Ok((Self::Agents { agents, api }, Some(programmed)));
        }
        if let Some(real) = tools.kube_proxy(mode) {
            for (number, node) in nodes.into_iter().enumerate() {
                match mode {
                    Mode::Iptables => iptables::load_masquerade(node, number, cluster.family)?,
                    _ => nftables::load_masquerade(node, number, cluster.family)?,
                }
            }
            let api = api(lab, cluster)?;
            let url = api.api().url();
            let start = |node: &Host| -> Result<(Running, f64)> {
                let mut running = Running::start(real, mode, cluster.family, node, &url)?;
                let written = running.wait_written()?;
                Ok((running, written))
            };
            let (running, programmed) = one_after_the_other(nodes, &api, start)?;
            return Ok((Self::KubeProxies { running, api }, Some(programmed)));
        }
        let load = |number: usize| -> Result<Duration> {
            let (node, start) = (nodes[number], Instant::now());
            match mode {
                Mode::Iptables => iptables::load(node, number, cluster)?,
                _ => nftables::load(node, number, cluster)?,
            }
            Ok(start.elapsed())
        };
        // Each takes one core.
        let (whole, other) = std::thread::scope(|s| {
            let other = s.spawn(|| load(1));
            (load(0), other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        other?;
        Ok((Self::Rules(mode), Some(Programmed { whole: whole?, listed: None })))
    }

    /// The process on the first node, if there is one.
    pub(super) fn pid(&self) -> Option<u32> {
        match self {
            Self::None | Self::Hooks { .. } | Self::Rules(_) => None,
            Self::Agents { agents, .. } => agents.first().map(Agent::pid),
            Self::KubeProxies { running, .. } => running.first().map(Running::pid),
        }
    }

    /// The API server that it follows, if it does.
    pub(super) fn api(&self) -> Option<&ApiServer> {
        match self {
            Self::None | Self::Hooks { .. } | Self::Rules(_) => None,
            Self::Agents { api, .. } | Self::KubeProxies { api, .. } => Some(api),
        }
    }

    /// Gives a Service other endpoints: by the API where somebody watches it, by hand on the first node otherwise.
    pub(super) fn update(&self, lab: &Lab, service: &Service, endpoints: Vec<SocketAddr>) -> Result<()> {
        let changed = service.with_endpoints(endpoints);
        match (self.api(), self) {
            (Some(api), _) => api.api().apply(changed.slice()),
            (None, Self::Rules(Mode::Iptables)) => iptables::update(lab.node(0), &changed)?,
            (None, Self::Rules(_)) => nftables::update(lab.node(0), &changed)?,
            (None, _) => {}
        }
        Ok(())
    }

    /// Takes rules away at once, so that nothing goes on being removed while others are measured.
    pub(super) fn clear(&self, mode: Mode, lab: &Lab) -> Result<()> {
        for node in [lab.node(0), lab.node(1)] {
            match mode {
                Mode::Iptables => iptables::clear(node)?,
                Mode::Nftables => nftables::clear(node)?,
                _ => {}
            }
        }
        Ok(())
    }
}

/// An API server with a cluster's objects, on the wire between the nodes.
fn api(lab: &Lab, cluster: &Cluster) -> Result<ApiServer> {
    let server = ApiServer::start(lab.wire())?;
    for (number, node) in [lab.node(0), lab.node(1)].into_iter().enumerate() {
        // The cluster's family first: that of the first address is kube-proxy's own.
        let mut ips = node.ips();
        ips.sort_by_key(|&ip| IpFamily::of(ip) != cluster.family);
        let addresses: Vec<_> = ips.map(|ip| json!({"type": "InternalIP", "address": ip})).into();
        let (net, prefix) = cluster.family.pod_cidr(number);
        server.api().apply(json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name()},
            "spec": {"podCIDR": format!("{net}/{prefix}"), "podCIDRs": [format!("{net}/{prefix}")]},
            "status": {"addresses": addresses},
        }));
    }
    for service in &cluster.all {
        server.api().apply(service.object());
        server.api().apply(service.slice());
    }
    Ok(server)
}

/// Starts a process on each node; the time of the first, which has the machine to itself. `start` returns when all has been
/// written, in seconds since 1970.
fn one_after_the_other<T>(
    nodes: [&Host; 2],
    api: &ApiServer,
    start: impl Fn(&Host) -> Result<(T, f64)>,
) -> Result<(Vec<T>, Programmed)> {
    let begun = SystemTime::now();
    let since = |time: SystemTime, end: f64| {
        let begin = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        Duration::from_secs_f64((end - begin).max(0.0))
    };
    let (first, written) = start(nodes[0])?;
    let listed = api.api().listed().context("nobody has listed anything")?;
    let listed = SystemTime::now() - listed.elapsed();
    let programmed = Programmed { whole: since(begun, written), listed: Some(since(listed, written)) };
    let (second, _) = start(nodes[1])?;
    Ok((vec![first, second], programmed))
}
