//! What the agent wants the kernel to hold: the contract between the pure core and the map writer.
//!
//! [`crate::desired`] produces it from Kubernetes objects, [`crate::kernel`] writes the difference.

mod endpoints;

pub use endpoints::{Endpoint, Endpoints};

use crate::store::ObjectName;
use arcstr::ArcStr;
use ipnet::IpNet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// Transport protocol of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// IP protocol 6.
    Tcp,
    /// IP protocol 17.
    Udp,
}

impl Protocol {
    /// The IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        })
    }
}

/// A Service's port: `namespace/name:port` (the port name may be empty). Copies share the text: each is kept in several
/// places.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServicePort {
    /// The Service.
    pub service: ObjectName,
    /// `spec.ports[].name`, empty where the only port has none.
    pub port: ArcStr,
}

impl std::fmt::Display for ServicePort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.service)?;
        if !self.port.is_empty() {
            write!(f, ":{}", self.port)?;
        }
        Ok(())
    }
}

/// Where a frontend's address comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FrontendKind {
    /// `spec.clusterIPs`.
    ClusterIp,
    /// `spec.ports[].nodePort` on one of the node's addresses.
    NodePort,
    /// `status.loadBalancer.ingress[].ip`.
    LoadBalancer,
    /// `spec.externalIPs`.
    ExternalIp,
}

/// What packets are sent to: the key of a frontend. Each is kept in several places, and a [`SocketAddr`] is half as large
/// again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendAddr {
    ip: IpAddr,
    port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

impl FrontendAddr {
    /// Of an address and port in host representation; the map writer turns them into network order.
    pub const fn new(addr: SocketAddr, protocol: Protocol) -> Self {
        Self { ip: addr.ip(), port: addr.port(), protocol }
    }

    /// Address and port.
    pub const fn addr(&self) -> SocketAddr {
        SocketAddr::new(self.ip, self.port)
    }
}

/// The endpoints that one class of clients may be sent to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndpointSet {
    /// Non-empty, sorted, no duplicates.
    Endpoints(Endpoints),
    /// No endpoint anywhere: TCP reset / ICMP port unreachable.
    Reject,
    /// A `Local` policy without a local endpoint: dropped, so that clients try elsewhere.
    Drop,
}

/// Everything the kernel has to know of one frontend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// The Service port that it belongs to.
    pub service: ServicePort,
    /// Where the address comes from.
    pub kind: FrontendKind,
    /// For pods of this node and its host processes.
    pub internal: EndpointSet,
    /// For everybody else.
    pub external: EndpointSet,
    /// `sessionAffinity: ClientIP` and its timeout.
    pub affinity: Option<Duration>,
    /// Masquerade whoever the client is (`--masquerade-all`).
    pub masquerade_always: bool,
    /// `loadBalancerSourceRanges`; `None` admits everybody.
    pub sources: Option<Arc<Sources>>,
    /// UDP: endpoints that are in neither set and get nothing new, but still serve (they are terminating, say), so that
    /// the flows that they have stay with them. Sorted.
    pub lingering: Arc<[SocketAddr]>,
}

/// Clients that are admitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    /// Their addresses, of the frontend's family. Sorted.
    pub ranges: Arc<[IpNet]>,
    /// Whether one of the node's own addresses is among them, so that its processes are admitted.
    pub node: bool,
}
