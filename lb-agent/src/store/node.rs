//! This node.

use super::service::usable_ip;
use crate::objects::{self, label};
use ipnet::IpNet;
use std::collections::BTreeSet;
use std::net::IpAddr;

/// The autoscaler puts this taint on a node that it is about to delete.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// What is used of the Node object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<Box<str>>,
    /// Addresses in the object's order, internal ones before external ones.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`: where this node's pods live.
    pub pod_cidrs: Vec<IpNet>,
    /// False while the node is being deleted: load balancers should go elsewhere (KEP-3836).
    pub eligible: bool,
}

impl Default for Node {
    fn default() -> Self {
        Self { zone: None, addresses: Vec::new(), pod_cidrs: Vec::new(), eligible: true }
    }
}

impl From<&objects::Node> for Node {
    fn from(node: &objects::Node) -> Self {
        let labels = node.metadata.labels.as_ref();
        let spec = node.spec.as_ref();
        let taints = spec.and_then(|spec| spec.taints.as_ref());
        let listed = node.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default();
        let of_type = |kind| listed.iter().filter(move |address| address.type_ == kind);
        let cidrs =
            spec.and_then(|spec| spec.pod_cidrs.clone().or(spec.pod_cidr.clone().map(|cidr| vec![cidr])));
        Self {
            zone: labels.and_then(|labels| labels.get(label::ZONE)).map(|zone| zone.as_str().into()),
            addresses: of_type("InternalIP")
                .chain(of_type("ExternalIP"))
                .filter_map(|address| usable_ip(&address.address))
                .collect(),
            pod_cidrs: cidrs.into_iter().flatten().filter_map(|cidr| cidr.parse().ok()).collect(),
            eligible: node.metadata.deletion_timestamp.is_none()
                && !taints.is_some_and(|taints| taints.iter().any(|taint| taint.key == TO_BE_DELETED)),
        }
    }
}

/// The addresses of this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalAddresses {
    /// All of them, whatever their scope.
    pub all: BTreeSet<IpAddr>,
    /// The address of the default route's device, at most one of each family: what `primary` means where the Node
    /// object does not say it.
    pub primary: Vec<IpAddr>,
}

impl FromIterator<IpAddr> for LocalAddresses {
    /// The first address of each family is the primary one.
    fn from_iter<I: IntoIterator<Item = IpAddr>>(addresses: I) -> Self {
        let mut local = Self::default();
        for address in addresses {
            if !local.primary.iter().any(|other| other.is_ipv4() == address.is_ipv4()) {
                local.primary.push(address);
            }
            local.all.insert(address);
        }
        local
    }
}
