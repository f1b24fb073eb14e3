//! vxlan devices: how they wrap packets, and whom they know.

use crate::netlink::Netlink;
use crate::snapshot::list;
use anyhow::{Context as _, Result};
use netlink_packet_route::link::{InfoVxlan, VxlanDf};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use std::collections::HashMap;
use std::net::IpAddr;

/// How a vxlan device wraps packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vxlan {
    /// The network's identifier.
    pub vni: u32,
    /// The UDP port that packets are sent to.
    pub port: u16,
    /// Those that they leave from, the last one excluded; nothing if the node's local ports are meant.
    pub source_ports: Option<(u16, u16)>,
    /// The device's own address.
    pub local: Option<IpAddr>,
    /// Index of the device that packets have to leave by, zero for any.
    pub link: u32,
    /// Time to live, zero for the node's.
    pub ttl: u8,
    /// Whether its UDP packets have checksums.
    pub checksum: bool,
    /// Whether it does something else besides, which nobody but the kernel knows how to do.
    pub special: bool,
}

impl Vxlan {
    /// From what the kernel says of a device.
    pub(crate) fn new(attributes: &[InfoVxlan]) -> Self {
        let mut vxlan = Self {
            vni: 0,
            port: 0,
            source_ports: None,
            local: None,
            link: 0,
            ttl: 0,
            checksum: true,
            special: false,
        };
        let mut without_checksum6 = false;
        for attribute in attributes {
            match attribute {
                InfoVxlan::Id(vni) => vxlan.vni = *vni,
                InfoVxlan::Port(port) => vxlan.port = *port,
                InfoVxlan::PortRange((0, 0)) => {}
                InfoVxlan::PortRange(ports) => vxlan.source_ports = Some(*ports),
                InfoVxlan::Local(ip) => vxlan.local = Some((*ip).into()),
                InfoVxlan::Local6(ip) => vxlan.local = Some((*ip).into()),
                InfoVxlan::Link(index) => vxlan.link = *index,
                InfoVxlan::Ttl(ttl) => vxlan.ttl = *ttl,
                InfoVxlan::UDPCsum(on) => vxlan.checksum = *on,
                InfoVxlan::UDPZeroCsumTX(on) => without_checksum6 = *on,
                InfoVxlan::Tos(0)
                | InfoVxlan::Label(0)
                | InfoVxlan::Df(VxlanDf::Unset)
                | InfoVxlan::TtlInherit(0)
                | InfoVxlan::Learning(false)
                | InfoVxlan::Rsc(false)
                | InfoVxlan::CollectMetadata(false)
                | InfoVxlan::RemCsumTX(false)
                | InfoVxlan::RemCsumRX(false)
                | InfoVxlan::Vnifilter(false)
                | InfoVxlan::LabelPolicy(0)
                // Who else may get a packet, what is told when nobody is known: not our packets.
                | InfoVxlan::Group(_)
                | InfoVxlan::Group6(_)
                | InfoVxlan::Ageing(_)
                | InfoVxlan::Limit(_)
                | InfoVxlan::Proxy(_)
                | InfoVxlan::L2Miss(_)
                | InfoVxlan::L3Miss(_)
                | InfoVxlan::UDPZeroCsumRX(_)
                | InfoVxlan::Localbypass(_)
                | InfoVxlan::ReservedBits(_)
                | InfoVxlan::McRoute(_) => {}
                _ => vxlan.special = true,
            }
        }
        if vxlan.local.is_some_and(|ip| ip.is_ipv6()) {
            vxlan.checksum = !without_checksum6;
        }
        vxlan
    }
}

/// An Ethernet address behind a device.
pub type Station = (u32, [u8; 6]);

/// Where devices send what is for the Ethernet addresses that they know. Those with more than one answer, or a special one,
/// are left out.
///
/// # Errors
/// If netlink fails.
pub fn stations() -> Result<HashMap<Station, IpAddr>> {
    let netlink = Netlink::open(NETLINK_ROUTE).context("open a netlink socket")?;
    let mut question = NeighbourMessage::default();
    question.header.family = AddressFamily::Bridge;
    let entries = list(&netlink, RouteNetlinkMessage::GetNeighbour(question), |message| match message {
        RouteNetlinkMessage::NewNeighbour(entry) => Some(entry),
        _ => None,
    });
    Ok(unambiguous(entries.context("list the overlays' forwarding tables")?.iter().filter_map(station)))
}

fn unambiguous(entries: impl Iterator<Item = (Station, Option<IpAddr>)>) -> HashMap<Station, IpAddr> {
    let mut all: HashMap<Station, Option<IpAddr>> = HashMap::new();
    for (station, at) in entries {
        all.entry(station).and_modify(|known| *known = None).or_insert(at);
    }
    all.into_iter().filter_map(|(station, at)| Some((station, at?))).collect()
}

/// An entry of a forwarding table; without an address if there is more to it than that.
fn station(message: &NeighbourMessage) -> Option<(Station, Option<IpAddr>)> {
    let (mut mac, mut at, mut special) = (None, None, false);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            NeighbourAttribute::Destination(address) => at = ip(address),
            NeighbourAttribute::CacheInfo(_) | NeighbourAttribute::Probes(_) => {}
            // A bridge's port, a network's name, a state: nothing that a packet would see.
            NeighbourAttribute::Controller(_)
            | NeighbourAttribute::LinkNetNsId(_)
            | NeighbourAttribute::Protocol(_)
            | NeighbourAttribute::ExtFlags(_) => {}
            _ => special = true,
        }
    }
    let at = at.filter(|_| !special);
    Some(((message.header.ifindex, mac?), at))
}

fn ip(address: &NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(ip) => Some((*ip).into()),
        NeighbourAddress::Inet6(ip) => Some((*ip).into()),
        // The table is a bridge's, for the library; what is in it is an address of either family.
        NeighbourAddress::Other(bytes) => match bytes.len() {
            4 => Some(IpAddr::from(<[u8; 4]>::try_from(bytes.as_slice()).ok()?)),
            16 => Some(IpAddr::from(<[u8; 16]>::try_from(bytes.as_slice()).ok()?)),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flannels() -> Vec<InfoVxlan> {
        vec![
            InfoVxlan::Id(1),
            InfoVxlan::Link(2),
            InfoVxlan::Local([192, 168, 7, 1].into()),
            InfoVxlan::Ttl(0),
            InfoVxlan::TtlInherit(0),
            InfoVxlan::Tos(0),
            InfoVxlan::Df(VxlanDf::Unset),
            InfoVxlan::Label(0),
            InfoVxlan::Learning(false),
            InfoVxlan::Proxy(false),
            InfoVxlan::Rsc(false),
            InfoVxlan::L2Miss(false),
            InfoVxlan::L3Miss(false),
            InfoVxlan::CollectMetadata(false),
            InfoVxlan::Ageing(300),
            InfoVxlan::Limit(0),
            InfoVxlan::Port(8472),
            InfoVxlan::UDPCsum(true),
            InfoVxlan::UDPZeroCsumTX(false),
            InfoVxlan::UDPZeroCsumRX(false),
            InfoVxlan::RemCsumTX(false),
            InfoVxlan::RemCsumRX(false),
            InfoVxlan::PortRange((0, 0)),
        ]
    }

    #[test]
    fn a_device_as_flannel_makes_it() {
        let expected = Vxlan {
            vni: 1,
            port: 8472,
            source_ports: None,
            local: Some([192, 168, 7, 1].into()),
            link: 2,
            ttl: 0,
            checksum: true,
            special: false,
        };
        assert_eq!(Vxlan::new(&flannels()), expected);
        let with = |change: InfoVxlan| Vxlan::new(&[flannels(), vec![change]].concat());
        assert_eq!(with(InfoVxlan::PortRange((4000, 5000))).source_ports, Some((4000, 5000)));
        assert!(!with(InfoVxlan::UDPCsum(false)).checksum);
        let over_v6 = Vxlan::new(&[flannels(), vec![InfoVxlan::Local6([1; 16].into())]].concat());
        assert!(over_v6.checksum, "in IPv6, checksums are the rule");
        let blank = [flannels(), vec![InfoVxlan::Local6([1; 16].into()), InfoVxlan::UDPZeroCsumTX(true)]];
        assert!(!Vxlan::new(&blank.concat()).checksum);
    }

    #[test]
    fn what_only_the_kernel_can_do() {
        for special in [
            InfoVxlan::Learning(true),
            InfoVxlan::CollectMetadata(true),
            InfoVxlan::Gbp,
            InfoVxlan::Gpe,
            InfoVxlan::Tos(1),
            InfoVxlan::Df(VxlanDf::Set),
            InfoVxlan::TtlInherit(1),
            InfoVxlan::Vnifilter(true),
            InfoVxlan::Rsc(true),
        ] {
            assert!(Vxlan::new(&[flannels(), vec![special.clone()]].concat()).special, "{special:?}");
        }
    }

    #[test]
    fn stations_with_one_plain_answer() {
        let entry = |index: u32, mac: u8, attributes: Vec<NeighbourAttribute>| {
            let mut message = NeighbourMessage::default();
            message.header.ifindex = index;
            message.attributes = attributes;
            message.attributes.push(NeighbourAttribute::LinkLayerAddress(vec![mac; 6]));
            message
        };
        let to = |bytes: &[u8]| NeighbourAttribute::Destination(NeighbourAddress::Other(bytes.to_vec()));
        let entries = [
            entry(3, 1, vec![to(&[10, 0, 0, 1])]),
            entry(3, 2, vec![to(&[1; 16])]),
            entry(3, 3, vec![to(&[10, 0, 0, 3]), NeighbourAttribute::Vni(7)]),
            entry(3, 4, vec![to(&[10, 0, 0, 4])]),
            entry(3, 4, vec![to(&[10, 0, 0, 5])]),
            entry(4, 1, vec![NeighbourAttribute::Vlan(1)]),
        ];
        let expected =
            HashMap::from([((3, [1; 6]), IpAddr::from([10, 0, 0, 1])), ((3, [2; 6]), IpAddr::from([1; 16]))]);
        assert_eq!(unambiguous(entries.iter().filter_map(station)), expected);
    }
}
