//! The Services that the guest's paths lead to: each with its own backend, so that an answer names its path.

use crate::lab::{EXTERNAL_V4, EXTERNAL_V6, Lab};
use serde_json::{Value, json};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Where backends listen.
pub(super) const PORT: u16 = 8080;
const SERVICE_PORT: u16 = 80;
const FIRST_NODE_PORT: u16 = 30001;

/// The kinds of addresses that a Service has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    ClusterIp,
    NodePort,
    LoadBalancer,
    ExternalIp,
}

/// A Service, and which of the lab's hosts is its only backend.
#[derive(Debug)]
pub(super) struct Service {
    name: &'static str,
    number: u8,
}

/// Backend on the first node, on the second, the asking pod itself, outside the cluster, none.
pub(super) const SERVICES: [Service; 5] = [
    Service { name: "here", number: 1 },
    Service { name: "there", number: 2 },
    Service { name: "itself", number: 3 },
    Service { name: "outside", number: 4 },
    Service { name: "empty", number: 5 },
];

impl Service {
    /// Where to ask for it; for NodePorts, on the first node.
    pub(super) fn at(&self, kind: Kind, lab: &Lab, v6: bool) -> SocketAddr {
        if kind == Kind::NodePort {
            return lab.node(0).at(self.node_port())[usize::from(v6)];
        }
        SocketAddr::new(self.ip(kind, v6), SERVICE_PORT)
    }

    fn node_port(&self) -> u16 {
        FIRST_NODE_PORT + u16::from(self.number)
    }

    fn ip(&self, kind: Kind, v6: bool) -> IpAddr {
        // The lab routes the lower half of its external network as LoadBalancer addresses, the upper as external IPs.
        let host = if kind == Kind::ExternalIp { 128 + self.number } else { self.number };
        let (v4_net, v6_net) = match kind {
            Kind::ClusterIp => {
                (Ipv4Addr::new(10, 96, 0, 0), Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0))
            }
            _ => (EXTERNAL_V4, EXTERNAL_V6),
        };
        if v6 {
            Ipv6Addr::from_bits(v6_net.to_bits() | u128::from(host)).into()
        } else {
            Ipv4Addr::from_bits(v4_net.to_bits() | u32::from(host)).into()
        }
    }

    fn objects(&self, backend: Option<([IpAddr; 2], Option<&str>)>) -> Vec<Value> {
        let both = |kind| [self.ip(kind, false), self.ip(kind, true)];
        let ports = ["TCP", "UDP"].map(|protocol| {
            json!({"name": protocol.to_lowercase(), "protocol": protocol, "port": SERVICE_PORT, "targetPort": PORT,
                   "nodePort": self.node_port()})
        });
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": self.name, "namespace": "default"},
            "spec": {
                "type": "LoadBalancer", "ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv4", "IPv6"],
                "clusterIP": self.ip(Kind::ClusterIp, false), "clusterIPs": both(Kind::ClusterIp),
                "externalIPs": both(Kind::ExternalIp), "ports": ports,
            },
            "status": {"loadBalancer": {"ingress": both(Kind::LoadBalancer).map(|ip| json!({"ip": ip}))}},
        });
        let ports = ["TCP", "UDP"]
            .map(|protocol| json!({"name": protocol.to_lowercase(), "protocol": protocol, "port": PORT}));
        let slice = |(v6, family): (usize, &str)| {
            let endpoints = backend.iter().map(|(ips, node)| {
                json!({"addresses": [ips[v6]], "nodeName": node, "conditions": {"ready": true}})
            });
            json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {"name": format!("{}-{}", self.name, family.to_lowercase()), "namespace": "default",
                             "labels": {"kubernetes.io/service-name": self.name}},
                "addressType": family, "ports": ports, "endpoints": endpoints.collect::<Vec<_>>(),
            })
        };
        let slices = [(0, "IPv4"), (1, "IPv6")].map(slice);
        std::iter::once(service).chain(slices).collect()
    }
}

/// All Services and their endpoints, for both agents.
pub(super) fn manifests(lab: &Lab) -> String {
    let pod = |node: usize, pod| (lab.pod(node, pod).ips(), Some(["n1", "n2"][node]));
    let backends = [Some(pod(0, 1)), Some(pod(1, 0)), Some(pod(0, 0)), Some((lab.inet().ips(), None)), None];
    let objects = SERVICES.iter().zip(backends).flat_map(|(service, backend)| service.objects(backend));
    // JSON is YAML.
    objects.map(|object| format!("---\n{object:#}\n")).collect()
}

/// The first node's address on its pods' bridge.
pub(super) fn bridge_address(lab: &Lab, v6: bool) -> IpAddr {
    pod_net(lab, v6, 1)
}

/// The first node's address on its overlay device.
pub(super) fn overlay_address(lab: &Lab, v6: bool) -> IpAddr {
    pod_net(lab, v6, 0)
}

/// Another address of the network that the first node's pods are in.
fn pod_net(lab: &Lab, v6: bool, host: u8) -> IpAddr {
    let pod = lab.pod(0, 0);
    if v6 {
        Ipv6Addr::from_bits(pod.v6().to_bits() & !0xffff | u128::from(host)).into()
    } else {
        Ipv4Addr::from_bits(pod.v4().to_bits() & !0xff | u32::from(host)).into()
    }
}
