//! Devices and addresses as the kernel has them now.

use crate::netlink::Netlink;
use crate::vxlan::Vxlan;
use anyhow::{Context as _, Result, anyhow};
use lb_common::maps::Device;
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP};
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoData, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp, XdpAttached,
};
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd as _;

/// A list that changes while it is read is read again, this often.
const ATTEMPTS: usize = 10;

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
    /// Index of its other end, of what it is on top of, in that one's network namespace.
    pub peer: Option<u32>,
    /// The network namespace of its other end, if that is another one.
    pub peer_netns: Option<i32>,
    /// Its hardware address.
    pub mac: Vec<u8>,
    /// Whether it is up.
    pub up: bool,
    /// The XDP program on it.
    pub xdp: Option<XdpProgram>,
    /// How it wraps packets, if it is a vxlan device.
    pub vxlan: Option<Vxlan>,
}

/// An XDP program on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XdpProgram {
    /// Its id.
    pub id: u32,
    /// Whether the kernel runs it in the driver's place.
    pub generic: bool,
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
    /// Asks the kernel about the network namespace of the calling thread.
    ///
    /// # Errors
    /// If netlink fails.
    pub fn take() -> Result<Self> {
        let netlink = Netlink::open(NETLINK_ROUTE).context("open a netlink socket")?;
        let mut links = list_links(&netlink)?;
        let names: Vec<(u32, String)> = links.iter().map(|l| (l.index, l.name.clone())).collect();
        for link in &mut links {
            link.bridge_name =
                link.bridge.and_then(|b| names.iter().find(|(i, _)| *i == b).map(|(_, name)| name.clone()));
        }
        let question = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let addresses = list(&netlink, question, new_address).context("list the addresses")?;
        let addresses = addresses.iter().filter_map(address).collect();
        let mut ways_out = Vec::new();
        for (v4, family) in [(true, AddressFamily::Inet), (false, AddressFamily::Inet6)] {
            let mut question = RouteMessage::default();
            question.header.address_family = family;
            let routes = list(&netlink, RouteNetlinkMessage::GetRoute(question), new_route)
                .context("list the routes")?;
            let default = |route: &&RouteMessage| {
                route.header.destination_prefix_length == 0 && route.header.address_family == family
            };
            for attribute in routes.iter().filter(default).flat_map(|route| &route.attributes) {
                if let RouteAttribute::Oif(index) = attribute {
                    ways_out.push((v4, *index));
                }
            }
        }
        Ok(Self { links, addresses, ways_out })
    }

    /// A device by its index.
    pub fn link(&self, index: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.index == index)
    }

    /// A device's entry in the device table. With [`Device::POD`] among the flags, the programs are told which
    /// namespace is behind it.
    pub fn entry(&self, link: &Link, flags: u32) -> Device {
        let (v4, v6) = self.masquerade_addresses(link);
        let id = link.peer_netns.filter(|_| flags & Device::POD != 0).and_then(|id| u32::try_from(id).ok());
        Device {
            flags,
            masq4: v4.map(Into::into).unwrap_or_default(),
            masq6: v6.map(Into::into).unwrap_or_default(),
            netns: id.map_or(0, |id| id + 1),
            pad: 0,
        }
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

    /// All addresses of this host.
    pub fn all_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.iter().map(|a| a.ip)
    }

    /// Those of the default routes' devices, one of each family.
    pub fn primary_addresses(&self) -> impl Iterator<Item = IpAddr> {
        [true, false].into_iter().filter_map(|v4| {
            let (_, index) = self.ways_out.iter().find(|(f, _)| *f == v4)?;
            let found =
                self.addresses.iter().find(|a| a.index == *index && a.global && a.ip.is_ipv4() == v4)?;
            Some(found.ip)
        })
    }
}

/// The devices alone, of the calling thread's network namespace.
///
/// # Errors
/// If netlink fails.
pub fn links() -> Result<Vec<Link>> {
    let netlink = Netlink::open(NETLINK_ROUTE).context("open a netlink socket")?;
    list_links(&netlink)
}

fn list_links(netlink: &Netlink) -> Result<Vec<Link>> {
    let question = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let links = list(netlink, question, new_link).context("list the devices")?;
    Ok(links.into_iter().map(link).collect())
}

/// What the calling thread's network namespace calls another one; nothing if they have never met.
///
/// # Errors
/// If netlink fails, or the file is no network namespace.
pub fn namespace_id(netns: &File) -> Result<Option<i32>> {
    let mut question = NsidMessage::default();
    question.attributes.push(NsidAttribute::Fd(netns.as_raw_fd().cast_unsigned()));
    let mut id = None;
    let netlink = Netlink::open(NETLINK_ROUTE).context("open a netlink socket")?;
    netlink
        .ask(NLM_F_ACK, RouteNetlinkMessage::GetNsId(question), |answer| {
            if let RouteNetlinkMessage::NewNsId(message) = answer {
                id = message.attributes.iter().find_map(|a| match a {
                    NsidAttribute::Id(id) => Some(*id),
                    _ => None,
                });
            }
        })
        .context("ask for the id of a network namespace")?;
    Ok(id.filter(|id| *id >= 0))
}

/// The address that the calling thread's network namespace sends from to another one, unless told otherwise; nothing if
/// there is no way.
///
/// # Errors
/// If netlink fails.
pub fn source(to: IpAddr) -> Result<Option<IpAddr>> {
    let mut question = RouteMessage::default();
    (question.header.address_family, question.header.destination_prefix_length) = match to {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    question.attributes.push(RouteAttribute::Destination(to.into()));
    let netlink = Netlink::open(NETLINK_ROUTE).context("open a netlink socket")?;
    let mut source = None;
    let result = netlink.ask(NLM_F_ACK, RouteNetlinkMessage::GetRoute(question), |answer| {
        if let RouteNetlinkMessage::NewRoute(route) = answer {
            source = route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::PrefSource(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
                RouteAttribute::PrefSource(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
                _ => None,
            });
        }
    });
    match result {
        Err(error) if error.kind() == io::ErrorKind::NetworkUnreachable => Ok(None),
        result => result.map(|()| source).with_context(|| format!("ask for the route to {to}")),
    }
}

pub(crate) fn list<T>(
    netlink: &Netlink,
    question: RouteNetlinkMessage,
    wanted: impl Fn(RouteNetlinkMessage) -> Option<T>,
) -> Result<Vec<T>> {
    for _ in 0..ATTEMPTS {
        let mut all = Vec::new();
        match netlink.ask(NLM_F_DUMP, question.clone(), |answer| all.extend(wanted(answer))) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return Ok(result.map(|()| all)?),
        }
    }
    Err(anyhow!("it changes faster than it can be read"))
}

fn new_link(message: RouteNetlinkMessage) -> Option<LinkMessage> {
    match message {
        RouteNetlinkMessage::NewLink(link) => Some(link),
        _ => None,
    }
}

fn new_address(message: RouteNetlinkMessage) -> Option<AddressMessage> {
    match message {
        RouteNetlinkMessage::NewAddress(address) => Some(address),
        _ => None,
    }
}

fn new_route(message: RouteNetlinkMessage) -> Option<RouteMessage> {
    match message {
        RouteNetlinkMessage::NewRoute(route) => Some(route),
        _ => None,
    }
}

fn address(message: &AddressMessage) -> Option<Address> {
    let local = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    // IPv6 has no separate local address.
    let only = || {
        message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })
    };
    let global = message.header.scope == AddressScope::Universe;
    Some(Address { index: message.header.index, ip: local.or_else(only)?, global })
}

fn link(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        loopback: message.header.flags.contains(LinkFlags::Loopback),
        ethernet: message.header.link_layer_type == LinkLayerType::Ether,
        up: message.header.flags.contains(LinkFlags::Up),
        ..Link::default()
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Controller(index) => link.bridge = Some(index),
            LinkAttribute::Link(index) => link.peer = Some(index),
            LinkAttribute::LinkNetNsId(id) => link.peer_netns = Some(id),
            LinkAttribute::Address(address) => link.mac = address,
            LinkAttribute::Xdp(all) => {
                let generic = all.contains(&LinkXdp::Attached(XdpAttached::SocketBuffer));
                link.xdp = all.iter().find_map(|xdp| match xdp {
                    LinkXdp::ProgId(id) => Some(XdpProgram { id: *id, generic }),
                    _ => None,
                });
            }
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => link.kind = Some(kind.to_string()),
                        LinkInfo::Data(InfoData::Vxlan(data)) => link.vxlan = Some(Vxlan::new(&data)),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    link
}
