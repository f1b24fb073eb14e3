//! Which of the node's addresses answer NodePorts.

use crate::store::{LocalAddresses, Node};
use ipnet::IpNet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// `--nodeport-addresses`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// Every address of the node.
    #[default]
    All,
    /// The node's primary address of each family: the first that its Node object has, else that of the default route's
    /// device.
    Primary,
    /// The addresses in these ranges. A family that has no range here is served on all its addresses.
    Within(Vec<IpNet>),
}

impl NodePortAddresses {
    fn admits(&self, address: IpAddr) -> bool {
        match self {
            Self::All => true,
            Self::Primary => false,
            Self::Within(ranges) => {
                let mut family =
                    ranges.iter().filter(|range| range.addr().is_ipv4() == address.is_ipv4()).peekable();
                family.peek().is_none() || family.any(|range| range.contains(&address))
            }
        }
    }
}

impl std::str::FromStr for NodePortAddresses {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let items: Vec<_> = text.split(',').map(str::trim).filter(|item| !item.is_empty()).collect();
        match items.as_slice() {
            [] => Ok(Self::All),
            ["all"] => Ok(Self::All),
            ["primary"] => Ok(Self::Primary),
            ranges => {
                let parse = |range: &&str| match *range {
                    "all" | "primary" => Err(format!("`{range}` cannot be combined with anything else")),
                    _ => range.parse::<IpNet>().map_err(|_| format!("{range:?} is not a CIDR")),
                };
                ranges.iter().map(parse).collect::<Result<_, _>>().map(Self::Within)
            }
        }
    }
}

/// The addresses that answer NodePorts, sorted.
pub fn node_port_addresses(
    wanted: &NodePortAddresses,
    localhost: bool,
    local: &LocalAddresses,
    node: &Node,
) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = match wanted {
        NodePortAddresses::Primary => [true, false]
            .into_iter()
            .filter_map(|v4| {
                let listed = node.addresses.iter().chain(&local.primary);
                listed.copied().find(|address| address.is_ipv4() == v4)
            })
            // One that is not here (yet) is not replaced by another: that may be a network where nobody wants them.
            .filter(|address| local.all.contains(address))
            .collect(),
        _ => local
            .all
            .iter()
            .copied()
            .filter(|address| on_the_wire(address) && wanted.admits(*address))
            .collect(),
    };
    if localhost {
        let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
        addresses.extend(loopback.into_iter().filter(|address| wanted.admits(*address)));
    }
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

/// Loopback never arrives in a packet; a link-local IPv6 address is not one address but one for each link.
fn on_the_wire(address: &IpAddr) -> bool {
    let link_local = matches!(address, IpAddr::V6(ip) if ip.is_unicast_link_local());
    !address.is_loopback() && !address.is_unspecified() && !address.is_multicast() && !link_local
}
