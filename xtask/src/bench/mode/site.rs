//! Where a mode is measured: a lab of its own, so that no mode has another's rules, programs or connection tracking in
//! its way. The labs live side by side and take turns.

use std::net::SocketAddr;

use anyhow::{Context, Result};

use super::Mode;
use super::evidence::{self, Counts};
use super::proxy::{Programmed, Proxy};
use super::tools::Tools;
use crate::bench::cores::{self, SoftIrqs};
use crate::bench::load::{Client, Load, Server, Turn};
use crate::bench::services::{self, Cluster, Service};
use crate::bench::through::{Forwarded, Through};
use crate::bench::topology::{self, Path};
use crate::lab::{ApiServer, Lab};

/// Whether bridged packets pass netfilter.
const BRIDGE_NETFILTER: [&str; 2] = ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"];

fn bridge(key: &str) -> String {
    format!("bridge.{key}")
}

/// A lab with clients and servers, whose nodes serve a cluster in some mode.
#[derive(Debug)]
pub(in crate::bench) struct Site {
    pub(in crate::bench) mode: Mode,
    // In this order they go: the lab's processes before the lab.
    proxy: Proxy,
    pod: Client,
    outside: Client,
    servers: Vec<Server>,
    softirqs: SoftIrqs,
    through: Option<Through>,
    core: usize,
    lab: Lab,
    pub(in crate::bench) programmed: Option<Programmed>,
}

/// Changes Services.
#[derive(Debug)]
pub(in crate::bench) struct Updater<'a> {
    proxy: &'a Proxy,
    lab: &'a Lab,
}

impl Updater<'_> {
    /// Gives a Service other endpoints.
    pub(in crate::bench) fn update(&self, service: &Service, endpoints: &[SocketAddr]) -> Result<()> {
        self.proxy.update(self.lab, service, endpoints.to_vec())
    }
}

/// What a turn was, and the processor seconds that it took.
#[derive(Clone, Debug)]
pub(in crate::bench) struct Paid {
    pub(in crate::bench) turn: Turn,
    /// Of client, server and softirqs together.
    pub(in crate::bench) cpu: f64,
}

impl Site {
    pub(in crate::bench) fn start(mode: Mode, tools: &Tools, core: usize, cluster: &Cluster) -> Result<Self> {
        let lab =
            Lab::builder(&format!("bench-{}", mode.short())).pods(2).build().context("starting a lab")?;
        // kube-proxy cannot do without: replies within a bridge would miss their translation. We can, and so can the direct
        // way, but the clusters that we come to have it on, and what is compared must not differ in it.
        for node in [lab.node(0), lab.node(1)] {
            for key in BRIDGE_NETFILTER {
                node.sysctl(&bridge(key), "1")?;
            }
            // Closed connections are tracked for two minutes otherwise, and at a benchmark's rate the table overflows.
            node.sysctl("netfilter.nf_conntrack_tcp_timeout_time_wait", "5")?;
        }
        topology::add_endpoints(&lab)?;
        if mode.is_direct() {
            topology::route_pods(&lab)?;
        }
        let mut servers = Vec::new();
        for (node, pod) in topology::servers(&lab) {
            servers.push(Server::start(&pod, core, &services::tcp_ports(), &services::udp_addresses(node))?);
        }
        let inet = lab.inet();
        let udp = inet.ips().map(services::plain);
        servers.push(Server::start(inet, core, &services::tcp_ports(), &udp)?);
        let (pod, outside) = (Client::start(&lab.pod(0, 0), core)?, Client::start(lab.client(), core)?);
        let (proxy, programmed) = Proxy::start(mode, tools, &lab, cluster)
            .with_context(|| format!("{} Services in mode {}", cluster.all.len(), mode.name()))?;
        let softirqs = SoftIrqs::of(core);
        Ok(Self { mode, proxy, pod, outside, servers, softirqs, through: None, core, lab, programmed })
    }

    /// Whether bridged packets pass netfilter, as the nodes have it now: whoever serves them may have changed it.
    pub(in crate::bench) fn bridge_netfilter(&self) -> Result<String> {
        let values = BRIDGE_NETFILTER.map(|key| {
            let values = [self.lab.node(0), self.lab.node(1)].map(|node| node.read_sysctl(&bridge(key)));
            let [one, other] = values;
            let (one, other) = (one?, other?);
            Ok(if one == other { format!("{key}={one}") } else { format!("{key}={one} and {other}") })
        });
        Ok(values.into_iter().collect::<Result<Vec<_>>>()?.join(", "))
    }

    pub(in crate::bench) fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The process that serves the first node, if there is one.
    pub(in crate::bench) fn pid(&self) -> Option<u32> {
        self.proxy.pid()
    }

    pub(in crate::bench) fn api(&self) -> Option<&ApiServer> {
        self.proxy.api()
    }

    /// The pod's client, and the way to change Services while it works.
    pub(in crate::bench) fn parts(&mut self) -> (&mut Client, Updater<'_>) {
        (&mut self.pod, Updater { proxy: &self.proxy, lab: &self.lab })
    }

    fn client(&mut self, path: Path) -> &mut Client {
        if path.is_from_outside() { &mut self.outside } else { &mut self.pod }
    }

    fn cpu(&self, path: Path) -> Result<f64> {
        let client = if path.is_from_outside() { &self.outside } else { &self.pod };
        let mut sum = self.softirqs.seconds() + cores::seconds_of(client.pid())?;
        for server in &self.servers {
            sum += cores::seconds_of(server.pid())?;
        }
        Ok(sum)
    }

    /// Makes it ready for a load on a way.
    pub(in crate::bench) fn prepare(&mut self, path: Path, load: Load) -> Result<()> {
        self.through = None;
        // What comes from outside comes by a wire, whatever serves it.
        self.lab.like_wires(path.is_from_outside())?;
        if load == Load::Forwarded {
            self.through = Some(Through::new(&self.lab, self.core)?);
        }
        Ok(())
    }

    /// Takes a turn of what it was made ready for.
    pub(in crate::bench) fn measure(
        &mut self,
        path: Path,
        load: Load,
        count: u64,
        cluster: &Cluster,
        round: usize,
    ) -> Result<Paid> {
        let to = path.targets(self.mode, &self.lab, cluster, load.transport(), round)?;
        if let Some(through) = &mut self.through {
            let from = SocketAddr::new(cluster.family.pick(self.lab.client().ips()), 0);
            let Forwarded { packets, cpu } = through.turn(from, to[0], count)?;
            return Ok(Paid { turn: Turn::uniform(packets, cpu), cpu });
        }
        let before = self.cpu(path)?;
        let turn = self.client(path).measure(load, count, &to);
        let turn = turn.with_context(|| format!("{} to {}, {}", self.mode.name(), to[0], path.name()))?;
        Ok(Paid { turn, cpu: self.cpu(path)? - before })
    }

    /// Makes sure that the mode does what it says on a way; `fresh`: before the turns.
    ///
    /// # Errors
    /// If not.
    pub(in crate::bench) fn verify(&mut self, path: Path, cluster: &Cluster, fresh: bool) -> Result<()> {
        const CONNECTIONS: u64 = 200;
        let (mode, load) = (self.mode, Load::Connections);
        self.prepare(path, load)?;
        let to = path.targets(mode, &self.lab, cluster, load.transport(), 0)?;
        let before = Counts::of(self.lab.node(0), mode)?;
        self.client(path).measure(load, CONNECTIONS, &to)?;
        let after = Counts::of(self.lab.node(0), mode)?;
        let seen = self.client(path).who(to[0])?.client;
        let host = if path.is_from_outside() { self.lab.client().clone() } else { self.lab.pod(0, 0) };
        let client = cluster.family.pick(host.ips());
        evidence::check((mode, path, fresh), (before, after, CONNECTIONS), (seen, client))
    }

    /// Takes everything down, so that nothing goes on being removed while others are measured.
    pub(in crate::bench) fn end(self) -> Result<()> {
        self.proxy.clear(self.mode, &self.lab)
    }
}
