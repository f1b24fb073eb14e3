//! Which endpoints a Service port may use: readiness, termination, locality, topology hints.

use crate::model::{Endpoint, EndpointSet};
use crate::store::{Port, Service, Slice, SliceEndpoint};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// The endpoints of one Service port in one family, by the policy that may use them.
pub(super) struct Categorized {
    cluster: EndpointSet,
    local: EndpointSet,
    /// All that would answer, whether they get anything new or not.
    serving: Vec<SocketAddr>,
}

impl Categorized {
    /// Merges the slices by port name and protocol, each with its own port number.
    pub(super) fn new<'a>(
        slices: impl Iterator<Item = &'a Slice>,
        port: &Port,
        v4: bool,
        zone: Option<&str>,
    ) -> Self {
        let mut all: BTreeMap<SocketAddr, Candidate<'_>> = BTreeMap::new();
        for slice in slices {
            let joins = |other: &&crate::store::SlicePort| {
                *other.name == *port.name && other.protocol == port.protocol
            };
            let Some(port) = slice.ports.iter().find(joins) else { continue };
            for (ip, endpoint) in slice.endpoints().filter(|(ip, _)| ip.is_ipv4() == v4) {
                let new = Candidate { endpoint, zones: slice.zone_hints(endpoint) };
                // The controller may list an endpoint in two slices for a moment. The more useful entry counts.
                let kept = all.entry(SocketAddr::new(ip, port.port)).or_insert(new);
                if new.usefulness() > kept.usefulness() {
                    *kept = new;
                }
            }
        }

        let hint = Topology::of(all.values(), zone);
        let ready = pick(&all, |endpoint| endpoint.ready && hint.admits(endpoint, zone));
        let cluster = or_else(ready, || pick(&all, terminating));
        let local_ready = pick(&all, |endpoint| endpoint.local && endpoint.ready);
        let local = or_else(local_ready, || pick(&all, |endpoint| endpoint.local && terminating(endpoint)));
        // Topology never empties the set, so the cluster's set is empty only if there is nothing anywhere.
        let none_local = if cluster.is_empty() { EndpointSet::Reject } else { EndpointSet::Drop };
        let serving = all.iter().filter(|(_, endpoint)| endpoint.serving).map(|(addr, _)| *addr).collect();
        Self { cluster: set(cluster, EndpointSet::Reject), local: set(local, none_local), serving }
    }

    /// Those that would answer but are in none of the sets.
    pub(super) fn lingering(&self, sets: [&EndpointSet; 2]) -> Arc<[SocketAddr]> {
        let in_a_set = |addr: &SocketAddr| {
            sets.into_iter().any(|set| match set {
                EndpointSet::Endpoints(endpoints) => endpoints.contains(addr),
                EndpointSet::Reject | EndpointSet::Drop => false,
            })
        };
        self.serving.iter().filter(|addr| !in_a_set(addr)).copied().collect()
    }

    /// The endpoints for a traffic policy.
    pub(super) fn set(&self, local: bool) -> EndpointSet {
        if local { self.local.clone() } else { self.cluster.clone() }
    }
}

#[derive(Clone, Copy)]
struct Candidate<'a> {
    endpoint: &'a SliceEndpoint,
    zones: &'a [Box<str>],
}

impl Candidate<'_> {
    fn usefulness(&self) -> (bool, bool, bool) {
        (self.endpoint.ready, self.endpoint.serving, self.endpoint.local)
    }
}

impl std::ops::Deref for Candidate<'_> {
    type Target = SliceEndpoint;

    fn deref(&self) -> &SliceEndpoint {
        self.endpoint
    }
}

/// Endpoints that shut down but still answer: used only where no ready one is left.
fn terminating(endpoint: &Candidate<'_>) -> bool {
    endpoint.serving && endpoint.terminating
}

fn pick(all: &BTreeMap<SocketAddr, Candidate<'_>>, wanted: impl Fn(&Candidate<'_>) -> bool) -> Vec<Endpoint> {
    let wanted = all.iter().filter(|(_, endpoint)| wanted(endpoint));
    wanted.map(|(addr, endpoint)| Endpoint { addr: *addr, local: endpoint.local }).collect()
}

fn or_else(endpoints: Vec<Endpoint>, others: impl FnOnce() -> Vec<Endpoint>) -> Vec<Endpoint> {
    if endpoints.is_empty() { others() } else { endpoints }
}

fn set(endpoints: Vec<Endpoint>, none: EndpointSet) -> EndpointSet {
    if endpoints.is_empty() { none } else { EndpointSet::Endpoints(endpoints.into_iter().collect()) }
}

/// What the hints of a Service port's ready endpoints allow: all of them have hints of a kind and one fits, or that
/// kind does not count.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Topology {
    Node,
    Zone,
    Everywhere,
}

impl Topology {
    fn of<'a>(endpoints: impl Iterator<Item = &'a Candidate<'a>> + Clone, zone: Option<&str>) -> Self {
        let ready = endpoints.filter(|endpoint| endpoint.ready);
        let usable = |hinted: fn(&Candidate<'_>) -> bool, mode: Self| {
            ready.clone().all(hinted) && ready.clone().any(|endpoint| mode.admits(endpoint, zone))
        };
        if usable(|endpoint| endpoint.node_hint.is_some(), Self::Node) {
            Self::Node
        } else if usable(|endpoint| !endpoint.zones.is_empty(), Self::Zone) {
            Self::Zone
        } else {
            Self::Everywhere
        }
    }

    fn admits(self, endpoint: &Candidate<'_>, zone: Option<&str>) -> bool {
        match self {
            Self::Everywhere => true,
            Self::Node => endpoint.node_hint == Some(true),
            Self::Zone => zone.is_some_and(|zone| endpoint.zones.iter().any(|hint| &**hint == zone)),
        }
    }
}

/// The number that a health check answers: ready endpoints on this node, whatever their ports. Terminating ones do
/// not count although they may still get traffic, so that load balancers move on.
///
/// A pod of both families is one: kube-proxy counts each family by itself, and serves one of the numbers.
pub(super) fn local_ready<'a>(service: &Service, slices: impl Iterator<Item = &'a Slice>) -> usize {
    let ready = slices.flat_map(Slice::endpoints).filter(|(_, endpoint)| endpoint.local && endpoint.ready);
    let served = ready.map(|(ip, _)| ip).filter(|ip| service.serves_family_of(ip));
    let (v4, v6): (BTreeSet<IpAddr>, BTreeSet<IpAddr>) = served.partition(IpAddr::is_ipv4);
    v4.len().max(v6.len())
}
