//! Services, cut down.

use super::Warning;
use crate::model::Protocol;
use crate::objects::{self, label};
use arcstr::ArcStr;
use ipnet::IpNet;
use std::net::IpAddr;
use std::sync::LazyLock;
use std::time::Duration;

/// What is used of a Service.
///
/// One that no proxy serves (headless, ExternalName, one of the two opt-out labels) has no addresses and no ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Creation, in seconds since 1970; 0 where the object does not say.
    pub created: i64,
    /// `spec.clusterIPs`: at most one of each family. Families without one are not served at all.
    pub cluster_ips: Box<[IpAddr]>,
    /// The ports that can be served.
    pub ports: Box<[Port]>,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// `None` where there is nothing to say.
    extras: Option<Box<Extras>>,
}

/// What few Services have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extras {
    /// `spec.externalIPs` of the served families.
    pub external_ips: Box<[IpAddr]>,
    /// `status.loadBalancer.ingress[].ip` with `ipMode: VIP`, of the served families.
    pub load_balancer_ips: Box<[IpAddr]>,
    /// `sessionAffinity: ClientIP`, with its timeout.
    pub affinity: Option<Duration>,
    /// `spec.loadBalancerSourceRanges`.
    pub source_ranges: Box<[IpNet]>,
    /// `spec.healthCheckNodePort`, where it means something.
    pub health_check_port: Option<u16>,
    /// What is not served, and why.
    pub warnings: Box<[Warning]>,
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Name, empty where there is none.
    pub name: ArcStr,
    /// Protocol.
    pub protocol: Protocol,
    /// The port of the Service's own addresses.
    pub port: u16,
    /// The port on the nodes' addresses.
    pub node_port: Option<u16>,
}

impl Service {
    /// What few Services have.
    pub fn extras(&self) -> &Extras {
        static NONE: LazyLock<Extras> = LazyLock::new(Extras::default);
        self.extras.as_deref().unwrap_or(&NONE)
    }

    fn with(self, extras: Extras) -> Self {
        Self { extras: (extras != Extras::default()).then(|| extras.into()), ..self }
    }

    /// Whether anything about it depends on the node's addresses.
    pub fn depends_on_addresses(&self) -> bool {
        !self.extras().source_ranges.is_empty() || self.ports.iter().any(|port| port.node_port.is_some())
    }

    /// Whether it has a ClusterIP of the family of `address`.
    pub fn serves_family_of(&self, address: &IpAddr) -> bool {
        self.cluster_ips.iter().any(|ip| ip.is_ipv4() == address.is_ipv4())
    }
}

impl From<&objects::Service> for Service {
    fn from(service: &objects::Service) -> Self {
        let labels = service.metadata.labels.as_ref();
        let labelled = |label| labels.is_some_and(|labels| labels.contains_key(label));
        let created = service.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second());
        let unserved = Self { created, ..Self::default() };
        let Some(spec) = service.spec.as_ref() else { return unserved };
        let kind = spec.type_.as_deref().unwrap_or("ClusterIP");
        let headless = spec.cluster_ip.as_deref() == Some("None");
        if headless || kind == "ExternalName" || labelled(label::PROXY_NAME) || labelled(label::HEADLESS) {
            return unserved;
        }

        let mut warnings = Vec::new();
        let cluster_ips = cluster_ips(spec, &mut warnings);
        if cluster_ips.is_empty() {
            if warnings.is_empty() {
                warnings.push(Warning::NoClusterIp);
            }
            return unserved.with(Extras { warnings: warnings.into(), ..Extras::default() });
        }

        let node_ports = matches!(kind, "NodePort" | "LoadBalancer");
        let balancer = kind == "LoadBalancer";
        let ports = spec.ports.iter().flatten().filter_map(|port| Port::new(port, node_ports, &mut warnings));
        let ports = ports.collect();
        let mut served = Self { created, cluster_ips, ports, ..Self::default() };
        let mut extras = Extras::default();
        let external = spec.external_ips.iter().flatten().map(String::as_str);
        extras.external_ips = served.of_our_families("spec.externalIPs", external, &mut warnings);
        if balancer {
            let ingress = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
            let ingress = ingress.and_then(|status| status.ingress.as_deref()).unwrap_or_default();
            let vips =
                ingress.iter().filter(|ingress| ingress.ip_mode.as_deref().is_none_or(|mode| mode == "VIP"));
            let vips = vips.filter_map(|ingress| ingress.ip.as_deref());
            extras.load_balancer_ips =
                served.of_our_families("status.loadBalancer.ingress", vips, &mut warnings);
            extras.source_ranges = source_ranges(spec, &mut warnings);
        }
        served.internal_local = spec.internal_traffic_policy.as_deref() == Some("Local");
        served.external_local = spec.external_traffic_policy.as_deref() == Some("Local")
            && (node_ports || spec.external_ips.as_ref().is_some_and(|ips| !ips.is_empty()));
        if spec.session_affinity.as_deref() == Some("ClientIP") {
            let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
            let seconds = config.and_then(|config| config.timeout_seconds).unwrap_or(10800);
            extras.affinity = Some(Duration::from_secs(seconds.clamp(1, 86400) as u64));
        }
        if balancer && served.external_local {
            extras.health_check_port = spec
                .health_check_node_port
                .and_then(|port| u16::try_from(port).ok())
                .filter(|port| *port != 0);
        }
        extras.warnings = warnings.into();
        served.with(extras)
    }
}

impl Port {
    fn new(port: &objects::ServicePort, node_ports: bool, warnings: &mut Vec<Warning>) -> Option<Self> {
        let name = port.name.as_deref().unwrap_or_default();
        let Some(protocol) = protocol(port.protocol.as_deref()) else {
            let protocol = port.protocol.as_deref().unwrap_or_default().into();
            warnings.push(Warning::Protocol { port: name.into(), protocol });
            return None;
        };
        let number = port_number("spec.ports[].port", port.port, warnings)?;
        let node_port = port.node_port.filter(|number| node_ports && *number != 0);
        let node_port = node_port.and_then(|n| port_number("spec.ports[].nodePort", n, warnings));
        Some(Self { name: name.into(), protocol, port: number, node_port })
    }
}

impl Service {
    fn of_our_families<'a>(
        &self,
        field: &'static str,
        addresses: impl Iterator<Item = &'a str>,
        warnings: &mut Vec<Warning>,
    ) -> Box<[IpAddr]> {
        let mut good = Vec::new();
        for address in addresses.filter(|address| !address.is_empty()) {
            match usable_ip(address) {
                None => warnings.push(Warning::Address { field, value: address.into() }),
                Some(address) if !self.serves_family_of(&address) => {
                    let reason = "the Service has no clusterIP of that family";
                    warnings.push(Warning::Family { field, address, reason });
                }
                Some(address) => good.push(address),
            }
        }
        good.sort_unstable();
        good.dedup();
        good.into()
    }
}

/// `clusterIPs`, or `clusterIP` where a hand-written manifest has only that. One of each family, the first wins.
fn cluster_ips(spec: &objects::ServiceSpec, warnings: &mut Vec<Warning>) -> Box<[IpAddr]> {
    let mut ips: Vec<IpAddr> = Vec::new();
    for value in spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip).filter(|ip| !ip.is_empty()) {
        match usable_ip(value) {
            None => {
                warnings.push(Warning::Address { field: "spec.clusterIPs", value: value.as_str().into() })
            }
            Some(ip) if ips.contains(&ip) => {}
            Some(address) if ips.iter().any(|ip| ip.is_ipv4() == address.is_ipv4()) => {
                let reason = "the Service has another clusterIP of that family";
                warnings.push(Warning::Family { field: "spec.clusterIPs", address, reason });
            }
            Some(ip) => ips.push(ip),
        }
    }
    warnings.dedup();
    ips.into()
}

fn source_ranges(spec: &objects::ServiceSpec, warnings: &mut Vec<Warning>) -> Box<[IpNet]> {
    let mut ranges: Vec<IpNet> = Vec::new();
    for value in spec.load_balancer_source_ranges.iter().flatten() {
        match value.trim().parse() {
            Ok(range) => ranges.push(range),
            Err(_) => warnings
                .push(Warning::Cidr { field: "spec.loadBalancerSourceRanges", value: value.as_str().into() }),
        }
    }
    ranges.sort_unstable();
    ranges.dedup();
    ranges.into()
}

/// `None` for what we do not serve. Kubernetes' default is TCP.
pub(super) fn protocol(protocol: Option<&str>) -> Option<Protocol> {
    match protocol {
        None | Some("TCP" | "") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some(_) => None,
    }
}

pub(super) fn port_number(field: &'static str, number: i32, warnings: &mut Vec<Warning>) -> Option<u16> {
    let port = u16::try_from(number).ok().filter(|port| *port != 0);
    if port.is_none() {
        warnings.push(Warning::PortNumber { field, number });
    }
    port
}

/// An address that packets can be sent to: the API server's rule for endpoints and external addresses, since a
/// Service that took over loopback or multicast would break the node.
pub(super) fn usable_ip(text: &str) -> Option<IpAddr> {
    let ip = text.parse::<IpAddr>().ok()?.to_canonical();
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    (!ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast() && !link_local).then_some(ip)
}
