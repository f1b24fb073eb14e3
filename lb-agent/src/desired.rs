//! What the kernel should hold, computed from what the store knows: pure functions and the bookkeeping around them.
//!
//! [`service`] turns one Service into its frontends; policies, topology and readiness are decided there, never per
//! packet. [`Reconciler`] keeps the results, settles who has an address that two Services claim, and says what has
//! to be written.

mod addresses;
mod endpoints;
mod reconciler;

pub use addresses::{NodePortAddresses, node_port_addresses};
pub use reconciler::{Diff, Reconciler, Totals};

use crate::model::{EndpointSet, Frontend, FrontendAddr, FrontendKind, Protocol, ServicePort, Sources};
use crate::store::{LocalAddresses, Node, ObjectName, Port, Service, Slice, Warning};
use endpoints::Categorized;
use ipnet::IpNet;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// The flags that decide what is served.
#[derive(Clone, Debug)]
pub struct Config {
    /// Which of the node's addresses answer NodePorts.
    pub node_port_addresses: NodePortAddresses,
    /// NodePorts also on 127.0.0.1 and `::1`, where the addresses above admit them. No packet ever arrives there:
    /// these frontends are for the socket hooks.
    pub localhost_node_ports: bool,
    /// Masquerade everything that goes to a ClusterIP.
    pub masquerade_all: bool,
    /// Serve `spec.externalIPs`.
    pub external_ips: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node_port_addresses: NodePortAddresses::default(),
            localhost_node_ports: true,
            masquerade_all: false,
            external_ips: true,
        }
    }
}

/// A Service as this node serves it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DesiredService {
    /// Its frontends. Those of one port share one value.
    pub frontends: BTreeMap<FrontendAddr, Arc<Frontend>>,
    /// `healthCheckNodePort` and the number of ready endpoints on this node.
    pub health_check: Option<(u16, usize)>,
    /// What is not served, and why.
    pub warnings: Vec<Warning>,
}

/// What decides besides the Service and its endpoints.
#[derive(Clone, Copy, Debug)]
pub struct Host<'a> {
    /// This node's object.
    pub node: &'a Node,
    /// The addresses that answer NodePorts, see [`node_port_addresses`].
    pub node_ports: &'a [IpAddr],
    /// All addresses of the node.
    pub addresses: &'a LocalAddresses,
}

/// What one Service needs of this node: a pure function of its arguments.
pub fn service<'a>(
    name: &ObjectName,
    service: &Service,
    slices: impl Iterator<Item = &'a Slice> + Clone,
    host: &Host<'_>,
    config: &Config,
) -> DesiredService {
    let (mut desired, extras) = (DesiredService::default(), service.extras());
    desired.warnings.extend(extras.warnings.iter().cloned());
    desired.warnings.extend(slices.clone().flat_map(|slice| slice.warnings().iter().cloned()));
    if !config.external_ips && !extras.external_ips.is_empty() {
        desired.warnings.push(Warning::ExternalIps);
    }
    desired.warnings.sort_unstable();
    desired.warnings.dedup();

    for cluster_ip in &service.cluster_ips {
        let v4 = cluster_ip.is_ipv4();
        for port in &service.ports {
            let usable = Categorized::new(slices.clone(), port, v4, host.node.zone.as_deref());
            let mut builder = Builder { name, service, port, host, config, usable, desired: &mut desired };
            builder.add(FrontendKind::ClusterIp, port.port, std::slice::from_ref(cluster_ip));
            builder.add(FrontendKind::LoadBalancer, port.port, of_family(&extras.load_balancer_ips, v4));
            if config.external_ips {
                builder.add(FrontendKind::ExternalIp, port.port, of_family(&extras.external_ips, v4));
            }
            if let Some(node_port) = port.node_port {
                builder.add(FrontendKind::NodePort, node_port, of_family(host.node_ports, v4));
            }
        }
    }
    desired.health_check =
        extras.health_check_port.map(|port| (port, endpoints::local_ready(service, slices)));
    desired
}

fn of_family(addresses: &[IpAddr], v4: bool) -> impl IntoIterator<Item = &IpAddr> {
    addresses.iter().filter(move |address| address.is_ipv4() == v4)
}

struct Builder<'a> {
    name: &'a ObjectName,
    service: &'a Service,
    port: &'a Port,
    host: &'a Host<'a>,
    config: &'a Config,
    usable: Categorized,
    desired: &'a mut DesiredService,
}

impl Builder<'_> {
    fn add<'a>(&mut self, kind: FrontendKind, port: u16, addresses: impl IntoIterator<Item = &'a IpAddr>) {
        let mut addresses = addresses.into_iter().peekable();
        let Some(v4) = addresses.peek().map(|address| address.is_ipv4()) else { return };
        let frontend = Arc::new(self.frontend(kind, v4));
        for address in addresses {
            let key = FrontendAddr::new(SocketAddr::new(*address, port), self.port.protocol);
            // The same address twice in one Service: the kinds come in order of precedence.
            self.desired.frontends.entry(key).or_insert_with(|| frontend.clone());
        }
    }

    fn frontend(&self, kind: FrontendKind, v4: bool) -> Frontend {
        let cluster_ip = kind == FrontendKind::ClusterIp;
        let (internal, external) = if cluster_ip {
            let set = self.usable.set(self.service.internal_local);
            (set.clone(), set)
        } else {
            // Local counts for clients outside of the cluster only: pods and processes of this node reach every
            // endpoint, as through a ClusterIP.
            (self.usable.set(false), self.usable.set(self.service.external_local))
        };
        // TCP flows stay in any case.
        let lingering = match self.port.protocol {
            Protocol::Udp => self.usable.lingering([&internal, &external]),
            Protocol::Tcp => Arc::default(),
        };
        Frontend {
            lingering,
            service: ServicePort { service: self.name.clone(), port: self.port.name.clone() },
            kind,
            internal,
            external,
            affinity: self.service.extras().affinity,
            masquerade_always: cluster_ip && self.config.masquerade_all,
            sources: if kind == FrontendKind::LoadBalancer { self.sources(v4) } else { None },
        }
    }

    /// `loadBalancerSourceRanges` of one family. A list without any of the family does not restrict it.
    fn sources(&self, v4: bool) -> Option<Arc<Sources>> {
        let ranges = self.service.extras().source_ranges.iter().filter(|range| range.addr().is_ipv4() == v4);
        let ranges: Arc<[IpNet]> = ranges.copied().collect();
        let admitted = |address: &IpAddr| ranges.iter().any(|range| range.contains(address));
        // What a process's packets to the outside have as their source.
        let own = [&self.host.addresses.primary, &self.host.node.addresses];
        let node = own.into_iter().find(|own| own.iter().any(|ip| ip.is_ipv4() == v4));
        let node = node.is_some_and(|own| own.iter().any(admitted));
        (!ranges.is_empty()).then(|| Arc::new(Sources { ranges, node }))
    }
}

impl Frontend {
    /// Whether a `Local` policy leaves some clients without an endpoint: (those inside, those outside).
    pub(crate) fn without_local(&self) -> (bool, bool) {
        let cluster_ip = self.kind == FrontendKind::ClusterIp;
        let internal = cluster_ip && self.internal == EndpointSet::Drop;
        (internal, !cluster_ip && self.external == EndpointSet::Drop)
    }
}
