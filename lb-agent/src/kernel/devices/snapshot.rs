//! Devices and addresses as the kernel has them now.

use crate::store::LocalAddresses;
use anyhow::{Context as _, Result};
use futures::TryStreamExt as _;
use rtnetlink::Handle;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressScope};
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::route::RouteAttribute;
use rtnetlink::{RouteMessageBuilder, packet_route::route::RouteMessage};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// One device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// The kernel's word for virtual devices: `veth`, `bridge`, `vxlan`, …
    pub kind: Option<String>,
    /// Index of the bridge that it is a port of.
    pub bridge: Option<u32>,
    /// Name of that bridge.
    pub bridge_name: Option<String>,
    /// Whether it is a loopback device.
    pub loopback: bool,
    /// Whether its packets start with an Ethernet header.
    pub ethernet: bool,
    /// The network namespace of its other end, if that is another one.
    pub peer_netns: Option<i32>,
}

/// An address of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Address {
    index: u32,
    ip: IpAddr,
    global: bool,
}

/// Devices, addresses and default routes.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// All devices.
    pub links: Vec<Link>,
    addresses: Vec<Address>,
    /// Devices of default routes.
    ways_out: Vec<(bool, u32)>,
}

impl Snapshot {
    /// Asks the kernel.
    ///
    /// # Errors
    /// If netlink fails.
    pub async fn take(handle: &Handle) -> Result<Self> {
        let links: Vec<LinkMessage> =
            handle.link().get().execute().try_collect().await.context("list the devices")?;
        let mut links: Vec<Link> = links.into_iter().map(link).collect();
        let names: Vec<(u32, String)> = links.iter().map(|l| (l.index, l.name.clone())).collect();
        for link in &mut links {
            link.bridge_name =
                link.bridge.and_then(|b| names.iter().find(|(i, _)| *i == b).map(|(_, name)| name.clone()));
        }
        let messages: Vec<_> =
            handle.address().get().execute().try_collect().await.context("list the addresses")?;
        let mut addresses = Vec::new();
        for message in messages {
            let ip = message.attributes.iter().find_map(|a| match a {
                AddressAttribute::Local(ip) => Some(*ip),
                _ => None,
            });
            // IPv6 has no separate local address.
            let ip = ip.or_else(|| {
                message.attributes.iter().find_map(|a| match a {
                    AddressAttribute::Address(ip) => Some(*ip),
                    _ => None,
                })
            });
            if let Some(ip) = ip {
                let global = message.header.scope == AddressScope::Universe;
                addresses.push(Address { index: message.header.index, ip, global });
            }
        }
        let mut ways_out = Vec::new();
        for (v4, query) in [
            (true, RouteMessageBuilder::<Ipv4Addr>::new().build()),
            (false, RouteMessageBuilder::<Ipv6Addr>::new().build()),
        ] {
            let routes: Vec<RouteMessage> =
                handle.route().get(query).execute().try_collect().await.context("list the routes")?;
            let default = |r: &&RouteMessage| {
                r.header.destination_prefix_length == 0
                    && r.header.address_family == if v4 { AddressFamily::Inet } else { AddressFamily::Inet6 }
            };
            for route in routes.iter().filter(default) {
                for attribute in &route.attributes {
                    if let RouteAttribute::Oif(index) = attribute {
                        ways_out.push((v4, *index));
                    }
                }
            }
        }
        Ok(Self { links, addresses, ways_out })
    }

    /// Whether a device has an address that others can reach.
    pub fn has_global_address(&self, index: u32) -> bool {
        self.addresses.iter().any(|a| a.index == index && a.global)
    }

    /// Whether a default route leads through the device.
    pub fn is_way_out(&self, index: u32) -> bool {
        self.ways_out.iter().any(|(_, i)| *i == index)
    }

    /// What packets that leave by `link` are masqueraded to: its first global address, its bridge's, or else the
    /// address of the default route's device.
    pub fn masquerade_addresses(&self, link: &Link) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
        let v4 = self.first(link, true).and_then(|ip| match ip {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        });
        let v6 = self.first(link, false).and_then(|ip| match ip {
            IpAddr::V6(ip) => Some(ip),
            IpAddr::V4(_) => None,
        });
        (v4, v6)
    }

    fn first(&self, link: &Link, v4: bool) -> Option<IpAddr> {
        let of = |index| self.addresses.iter().find(|a| a.index == index && a.global && a.ip.is_ipv4() == v4);
        of(link.index)
            .or_else(|| link.bridge.and_then(of))
            .or_else(|| self.ways_out.iter().filter(|(f, _)| *f == v4).find_map(|(_, index)| of(*index)))
            .map(|a| a.ip)
    }

    /// The addresses of this host.
    pub fn local_addresses(&self) -> LocalAddresses {
        let primary = [true, false].into_iter().filter_map(|v4| {
            let (_, index) = self.ways_out.iter().find(|(f, _)| *f == v4)?;
            let found =
                self.addresses.iter().find(|a| a.index == *index && a.global && a.ip.is_ipv4() == v4)?;
            Some(found.ip)
        });
        LocalAddresses { all: self.addresses.iter().map(|a| a.ip).collect(), primary: primary.collect() }
    }
}

fn link(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        loopback: message.header.flags.contains(LinkFlags::Loopback),
        ethernet: message.header.link_layer_type == LinkLayerType::Ether,
        ..Link::default()
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Controller(index) => link.bridge = Some(index),
            LinkAttribute::LinkNetNsId(id) => link.peer_netns = Some(id),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(kind) = info {
                        link.kind = Some(kind_name(&kind));
                    }
                }
            }
            _ => {}
        }
    }
    link
}

fn kind_name(kind: &InfoKind) -> String {
    kind.to_string()
}
