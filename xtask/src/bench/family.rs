//! The two families, and the cluster's networks in them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum IpFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpFamily {
    /// Both.
    pub(super) const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// As people write it, and as the API does.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    /// That of an address.
    pub(super) fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// The address of this family of an IPv4 and an IPv6 address.
    pub(super) fn pick(self, [v4, v6]: [IpAddr; 2]) -> IpAddr {
        match self {
            Self::V4 => v4,
            Self::V6 => v6,
        }
    }

    /// Bits of an address.
    pub(super) fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    /// All pods.
    pub(super) fn cluster_cidr(self) -> &'static str {
        match self {
            Self::V4 => "10.244.0.0/16",
            Self::V6 => "fd00:10:244::/48",
        }
    }

    /// The pods of a node, counted from 0.
    pub(super) fn pod_cidr(self, node: usize) -> (IpAddr, u8) {
        let n = node as u8 + 1;
        match self {
            Self::V4 => (Ipv4Addr::new(10, 244, n, 0).into(), 24),
            Self::V6 => (Ipv6Addr::new(0xfd00, 0x10, 0x244, n.into(), 0, 0, 0, 0).into(), 64),
        }
    }

    /// Where ClusterIPs come from.
    pub(super) fn service_cidr(self) -> &'static str {
        match self {
            Self::V4 => "10.96.0.0/12",
            Self::V6 => "fd00:10:96::/108",
        }
    }

    /// Multicast.
    pub(super) fn multicast(self) -> &'static str {
        match self {
            Self::V4 => "224.0.0.0/4",
            Self::V6 => "ff00::/8",
        }
    }

    /// The client's network outside the cluster.
    pub(super) fn client_net(self) -> (IpAddr, u8) {
        match self {
            Self::V4 => (Ipv4Addr::new(192, 0, 2, 0).into(), 24),
            Self::V6 => (Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0).into(), 64),
        }
    }

    /// A ClusterIP.
    pub(super) fn cluster_ip(self, n: usize) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::from_bits(Ipv4Addr::new(10, 96, 1, 0).to_bits() + n as u32).into(),
            Self::V6 => {
                let first = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x100).to_bits();
                Ipv6Addr::from_bits(first + n as u128).into()
            }
        }
    }

    /// A pod of a node that the lab does not have.
    pub(super) fn elsewhere(self, n: usize) -> IpAddr {
        match self {
            Self::V4 => {
                let first = Ipv4Addr::new(10, 244, 128, 0).to_bits();
                Ipv4Addr::from_bits(first + (n % (1 << 15)) as u32).into()
            }
            Self::V6 => {
                let first = Ipv6Addr::new(0xfd00, 0x10, 0x244, 0x80, 0, 0, 0, 0).to_bits();
                Ipv6Addr::from_bits(first + n as u128).into()
            }
        }
    }

    /// The further addresses of the lab's server on a node, which are the measured Services' endpoints.
    pub(super) fn endpoint(self, node: usize, n: usize) -> IpAddr {
        match (self, self.pod_cidr(node).0) {
            (_, IpAddr::V4(net)) => Ipv4Addr::from_bits(net.to_bits() + 100 + n as u32).into(),
            (_, IpAddr::V6(net)) => Ipv6Addr::from_bits(net.to_bits() + 0x100 + n as u128).into(),
        }
    }
}
