//! The ways through the lab that are measured.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::family::IpFamily;
use super::load::Transport;
use super::mode::Mode;
use super::services::{self, Cluster, Kind, Where};
use crate::lab::{Host, Lab};

/// From where to where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Path {
    /// Pod → ClusterIP, the endpoints on the same node.
    SameNode,
    /// Pod → ClusterIP, the endpoints on another node, over vxlan.
    OtherNode,
    /// Outside → NodePort of the node that has the endpoints.
    NodePortHere,
    /// Outside → NodePort of a node that has none, and on over vxlan.
    NodePortThere,
    /// Pod → outside, masqueraded.
    Outside,
}

impl Path {
    /// All of them.
    pub(super) const ALL: [Self; 5] =
        [Self::SameNode, Self::OtherNode, Self::NodePortHere, Self::NodePortThere, Self::Outside];

    /// In words.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::SameNode => "pod → ClusterIP, same node",
            Self::OtherNode => "pod → ClusterIP, other node",
            Self::NodePortHere => "outside → NodePort, pod here",
            Self::NodePortThere => "outside → NodePort, pod on other node",
            Self::Outside => "pod → outside (SNAT)",
        }
    }

    /// The kind of Service on this way; none where there is no Service on it.
    pub(super) fn kind(self, transport: Transport) -> Option<Kind> {
        let at = match self {
            Self::SameNode | Self::NodePortHere => Where::Here,
            Self::OtherNode | Self::NodePortThere => Where::There,
            Self::Outside => return None,
        };
        Some(Kind { at, transport })
    }

    /// Whether the client is the host outside the cluster, and not a pod.
    pub(super) fn is_from_outside(self) -> bool {
        matches!(self, Self::NodePortHere | Self::NodePortThere)
    }

    /// What the client connects to.
    pub(super) fn targets(
        self,
        mode: Mode,
        lab: &Lab,
        cluster: &Cluster,
        transport: Transport,
        round: usize,
    ) -> Result<Vec<SocketAddr>> {
        let Some(kind) = self.kind(transport) else {
            return Ok(vec![services::plain(cluster.family.pick(lab.inet().ips()))]);
        };
        let service =
            cluster.measured(kind, round).with_context(|| format!("no Service for {}", self.name()))?;
        if mode.is_direct() {
            return Ok(service.endpoints.clone());
        }
        let node = cluster.family.pick(lab.node(0).ips());
        Ok(vec![match service.node_port {
            Some(port) if self.is_from_outside() => SocketAddr::new(node, port),
            _ => service.vip,
        }])
    }
}

/// Gives the servers' pods their endpoints' addresses.
pub(super) fn add_endpoints(lab: &Lab) -> Result<()> {
    for (node, pod) in servers(lab) {
        for family in IpFamily::ALL {
            let endpoints = (0..services::ENDPOINTS).map(|n| family.endpoint(node, n));
            pod.add_addresses("eth0", &endpoints.collect::<Vec<_>>(), family.pod_cidr(node).1)?;
        }
    }
    Ok(())
}

/// The pods that answer, with their nodes.
pub(super) fn servers(lab: &Lab) -> [(usize, Host); 2] {
    [(0, lab.pod(0, 1)), (1, lab.pod(1, 0))]
}

/// Makes pods reachable from everywhere without any translation, by way of the first node both times: so that the direct
/// way is as long as the others.
pub(super) fn route_pods(lab: &Lab) -> Result<()> {
    for family in IpFamily::ALL {
        let node = family.pick(lab.node(0).ips());
        for pods in [0, 1].map(|node| family.pod_cidr(node)) {
            lab.wire().add_route(pods, node, None)?;
        }
        let overlay = if family == IpFamily::V4 { "flannel.1" } else { "flannel-v6.1" };
        // The overlay address of the first node is the first of its pod network.
        lab.node(1).add_route(family.client_net(), family.pod_cidr(0).0, Some(overlay))?;
    }
    Ok(())
}
