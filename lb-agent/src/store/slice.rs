//! EndpointSlices, cut down.

use super::service::{port_number, protocol, usable_ip};
use super::{ObjectName, Warning};
use crate::model::Protocol;
use crate::objects::{self, label};
use arcstr::ArcStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::SystemTime;

/// What is used of an EndpointSlice.
#[derive(Clone, Debug)]
pub struct Slice {
    /// The Service that it belongs to.
    pub service: ObjectName,
    /// The ports that every endpoint of the slice has.
    pub ports: Box<[SlicePort]>,
    endpoints: Endpoints,
    /// `None` where there is nothing to say.
    extras: Option<Box<Extras>>,
    /// When the control plane saw what changed the slice. Not part of what the slice says.
    pub trigger: Option<SystemTime>,
}

impl PartialEq for Slice {
    fn eq(&self, other: &Self) -> bool {
        self.service == other.service
            && self.ports == other.ports
            && self.endpoints == other.endpoints
            && self.extras == other.extras
    }
}

impl Eq for Slice {}

/// With their addresses, all of one family: nothing is kept more often than these.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Endpoints {
    V4(Box<[(Ipv4Addr, SliceEndpoint)]>),
    V6(Box<[(Ipv6Addr, SliceEndpoint)]>),
}

/// What few slices have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Extras {
    /// The different `hints.forZones`, see [`Slice::zone_hints`]. Endpoints are many and their zones few.
    zones: Box<[Box<[Box<str>]>]>,
    /// What is not served, and why.
    warnings: Box<[Warning]>,
}

/// A port of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// Name, empty where there is none; joins it with the Service's port.
    pub name: ArcStr,
    /// Protocol.
    pub protocol: Protocol,
    /// The endpoints' own port.
    pub port: u16,
}

/// An endpoint of a slice, without its address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// Takes new connections.
    pub ready: bool,
    /// Would answer, whether it is terminating or not.
    pub serving: bool,
    /// Is being stopped.
    pub terminating: bool,
    /// Runs on this node.
    pub local: bool,
    /// Whether hints name nodes, and whether this node is among them.
    pub node_hint: Option<bool>,
    /// Which `hints.forZones` it has: 0 is none, others count from 1.
    zones: u16,
}

impl Slice {
    /// Cuts down a slice as seen by the node `node_name`.
    ///
    /// `None`: it belongs to no Service, or asks not to be served.
    pub fn new(slice: &objects::EndpointSlice, node_name: &str) -> Option<Self> {
        let meta = &slice.metadata;
        let labels = meta.labels.as_ref()?;
        let service = labels.get(label::SERVICE_NAME).filter(|name| !name.is_empty())?;
        if labels.contains_key(label::HEADLESS) {
            return None;
        }
        let namespace = meta.namespace.as_deref().unwrap_or_default();
        let mut warnings = Vec::new();
        let v4 = match slice.address_type.as_str() {
            "IPv4" => Some(true),
            "IPv6" => Some(false),
            other => {
                let name = ObjectName::new(namespace, meta.name.as_deref().unwrap_or_default());
                warnings.push(Warning::AddressType { slice: name, kind: other.into() });
                None
            }
        };
        let ports =
            slice.ports.iter().flatten().filter_map(|port| SlicePort::new(port, &mut warnings)).collect();
        let mut zones = Vec::new();
        let listed = slice.endpoints.iter().flatten();
        let listed = listed.filter_map(|endpoint| {
            let ip = address(endpoint, v4?, &mut warnings)?;
            Some((ip, SliceEndpoint::new(endpoint, node_name, &mut zones)))
        });
        let endpoints = Endpoints::new(v4 != Some(false), listed);
        let extras = Extras { zones: zones.into(), warnings: warnings.into() };
        let trigger = meta.annotations.as_ref().and_then(|annotations| annotations.get(label::TRIGGER_TIME));
        let trigger = trigger.and_then(|time| time.parse::<k8s_openapi::jiff::Timestamp>().ok());
        Some(Self {
            service: ObjectName::new(namespace, service),
            ports,
            endpoints,
            extras: (extras != Extras::default()).then(|| extras.into()),
            trigger: trigger.map(SystemTime::from),
        })
    }
}

impl Slice {
    /// The endpoints by their addresses.
    pub fn endpoints(&self) -> impl Iterator<Item = (IpAddr, &SliceEndpoint)> {
        let (v4, v6): (&[_], &[_]) = match &self.endpoints {
            Endpoints::V4(list) => (list, &[]),
            Endpoints::V6(list) => (&[], list),
        };
        let v4 = v4.iter().map(|(ip, endpoint): &(Ipv4Addr, _)| (IpAddr::from(*ip), endpoint));
        v4.chain(v6.iter().map(|(ip, endpoint): &(Ipv6Addr, _)| (IpAddr::from(*ip), endpoint)))
    }

    /// What is not served, and why.
    pub fn warnings(&self) -> &[Warning] {
        self.extras.as_ref().map_or(&[], |extras| &extras.warnings)
    }

    /// `hints.forZones` of one of its endpoints, empty where there are none.
    pub fn zone_hints(&self, endpoint: &SliceEndpoint) -> &[Box<str>] {
        let index = usize::from(endpoint.zones).checked_sub(1);
        index.and_then(|index| self.extras.as_ref()?.zones.get(index)).map_or(&[], |zones| zones)
    }
}

impl SlicePort {
    fn new(port: &objects::EndpointPort, warnings: &mut Vec<Warning>) -> Option<Self> {
        // Without a number it means "all ports", which is not for service proxies. An unknown protocol cannot match
        // a port of the Service, which is where it is warned of.
        let number = port_number("EndpointSlice ports[].port", port.port?, warnings)?;
        let protocol = protocol(port.protocol.as_deref())?;
        Some(Self { name: port.name.as_deref().unwrap_or_default().into(), protocol, port: number })
    }
}

impl Endpoints {
    fn new(v4: bool, all: impl Iterator<Item = (IpAddr, SliceEndpoint)>) -> Self {
        if v4 {
            let of_v4 = |(ip, endpoint)| if let IpAddr::V4(ip) = ip { Some((ip, endpoint)) } else { None };
            Self::V4(all.filter_map(of_v4).collect())
        } else {
            let of_v6 = |(ip, endpoint)| if let IpAddr::V6(ip) = ip { Some((ip, endpoint)) } else { None };
            Self::V6(all.filter_map(of_v6).collect())
        }
    }
}

/// An endpoint's address, if it can be used.
fn address(endpoint: &objects::Endpoint, v4: bool, warnings: &mut Vec<Warning>) -> Option<IpAddr> {
    const FIELD: &str = "EndpointSlice endpoints[].addresses";
    // Further addresses of one endpoint are the same pod again; consumers use the first.
    let address = endpoint.addresses.as_ref()?.first()?;
    match usable_ip(address) {
        None => {
            warnings.push(Warning::Address { field: FIELD, value: address.as_str().into() });
            None
        }
        Some(address) if address.is_ipv4() != v4 => {
            let reason = "the slice's addressType is the other family";
            warnings.push(Warning::Family { field: FIELD, address, reason });
            None
        }
        Some(ip) => Some(ip),
    }
}

impl SliceEndpoint {
    fn new(endpoint: &objects::Endpoint, node_name: &str, zone_sets: &mut Vec<Box<[Box<str>]>>) -> Self {
        let conditions = endpoint.conditions.as_ref();
        let hints = endpoint.hints.as_ref();
        let nodes = hints.and_then(|hints| hints.for_nodes.as_deref()).filter(|nodes| !nodes.is_empty());
        let zones = hints.and_then(|hints| hints.for_zones.as_deref()).unwrap_or_default();
        let zones: Box<[Box<str>]> = zones.iter().map(|zone| zone.name.as_str().into()).collect();
        let zones = if zones.is_empty() {
            0
        } else {
            let known = zone_sets.iter().position(|other| *other == zones);
            known.unwrap_or_else(|| {
                zone_sets.push(zones);
                zone_sets.len() - 1
            }) + 1
        };
        Self {
            ready: conditions.and_then(|c| c.ready).unwrap_or(true),
            serving: conditions.and_then(|c| c.serving).unwrap_or(true),
            terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
            local: endpoint.node_name.as_deref() == Some(node_name),
            node_hint: nodes.map(|nodes| nodes.iter().any(|node| node.name == node_name)),
            // A slice has 1,000 endpoints at most.
            zones: u16::try_from(zones).unwrap_or(0),
        }
    }
}
