//! The node's devices, routes and neighbours as XDP meets them, and what the kernel's router and its tunnels do to a
//! packet, written down independently.

use super::build::{self, ETH};
use super::cluster::{BOTH, Net, OVERLAY, UPLINK};
use super::frame::Frame;
use super::paths::node;
use super::world::{Action, Hook, World};
use etherparse::{IpNumber, PacketBuilder};
use lb_common::addr::{Ip6, NetPort};
use lb_common::datapath::NextHop;
use lb_common::maps::{VtepKey, XdpDevice};
use std::collections::HashMap;
use std::net::IpAddr;

/// The uplink's address: where test packets are sent.
pub(crate) const OWN: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// The router's, behind the uplink.
pub(crate) const ROUTER: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// The overlay device's, and its peer's.
pub(crate) const VTEP: [u8; 6] = [6, 0, 0, 0, 0, 1];
pub(crate) const PEER: [u8; 6] = [6, 0, 0, 0, 0, 2];
pub(crate) const PORT: u16 = 8472;
pub(crate) const VNI: u32 = 1;
pub(crate) const RANDOM: u32 = 0xabcd_1234;

/// How other nodes' pods are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Network {
    Routed,
    /// By vxlan over that family.
    Vxlan {
        v6: bool,
        checksum: bool,
    },
}

pub(crate) const VXLANS: [Network; 3] = [
    Network::Vxlan { v6: false, checksum: false },
    Network::Vxlan { v6: false, checksum: true },
    Network::Vxlan { v6: true, checksum: true },
];
pub(crate) const NETWORKS: [Network; 4] = [Network::Routed, VXLANS[0], VXLANS[1], VXLANS[2]];

/// A node with an XDP program on its uplink.
pub(crate) struct XdpNode {
    pub(crate) world: World,
    pub(crate) network: Network,
    pub(crate) devices: HashMap<u32, XdpDevice>,
    pub(crate) vteps: HashMap<VtepKey, Ip6>,
    pub(crate) mtu: u16,
    pub(crate) overlay_mtu: u16,
}

impl XdpNode {
    pub(crate) fn new(network: Network) -> Self {
        let uplink = XdpDevice { index: UPLINK, flags: XdpDevice::TX, mac: OWN.into(), ..Default::default() };
        let mut devices = HashMap::from([(UPLINK, uplink)]);
        let mut vteps = HashMap::new();
        if let Network::Vxlan { v6, checksum } = network {
            let (local, remote) = (mapped(Net::of(v6).node), mapped(Net::of(v6).router));
            let overlay = XdpDevice {
                index: OVERLAY,
                flags: XdpDevice::OVERLAY | if v6 || checksum { XdpDevice::CHECKSUM } else { 0 },
                mac: VTEP.into(),
                port: NetPort::new(PORT),
                vni: (VNI << 8).to_be(),
                until: 160,
                link: UPLINK,
                first_port: 32768,
                ports: 28232,
                local,
                ttl: 64,
                ..Default::default()
            };
            devices.insert(OVERLAY, overlay);
            let at = devices.get_mut(&UPLINK).expect("the uplink");
            *(if v6 { &mut at.overlay6 } else { &mut at.overlay4 }) = OVERLAY;
            vteps.insert(VtepKey { device: OVERLAY, mac: PEER.into(), pad: 0 }, remote);
        }
        Self { world: node(), network, devices, vteps, mtu: 1500, overlay_mtu: 1430 }
    }

    /// Whether the overlay is one over IPv6.
    pub(crate) fn over_v6(&self) -> bool {
        matches!(self.network, Network::Vxlan { v6: true, .. })
    }

    /// Where the kernel would send it. Pods here have devices that XDP does not know; what is the node's own, or nobody's,
    /// is not sent anywhere.
    pub(crate) fn hop(&self, dst: IpAddr) -> Option<NextHop> {
        let hop = |device, dst: [u8; 6], src: [u8; 6]| NextHop { device, dst: dst.into(), src: src.into() };
        let n = BOTH.map(Net::of).into_iter().find(|n| n.pod.is_ipv4() == dst.is_ipv4())?;
        if dst == n.pod || dst == n.near {
            Some(hop(super::cluster::BACKEND, PEER, VTEP))
        } else if dst == n.far && self.network != Network::Routed {
            Some(hop(OVERLAY, PEER, VTEP))
        } else if [n.far, n.outside, n.internet, n.router].contains(&dst) {
            Some(hop(UPLINK, ROUTER, OWN))
        } else {
            None
        }
    }

    /// What the kernel and the two hooks make of a packet that comes in by the uplink. `None` if it does not leave.
    pub(crate) fn hooks(&self, frame: &Frame) -> Option<Frame> {
        let (mut frame, device, outer) = match self.unwrap(&frame.bytes) {
            Some(inner) => (Frame { bytes: inner, partial: frame.partial }, OVERLAY, true),
            None => (frame.clone(), UPLINK, false),
        };
        let mine = if outer { VTEP } else { OWN };
        if frame.bytes.get(..6) != Some(&mine) {
            return None;
        }
        if self.world.run(device, Hook::Ingress, &mut frame) != Action::Pass {
            return None;
        }
        let hop = self.hop(destination(&frame.bytes)?)?;
        one_hop_less(&mut frame.bytes)?;
        if self.world.run(hop.device, Hook::Egress, &mut frame) != Action::Pass {
            return None;
        }
        let [dst, src]: [[u8; 6]; 2] = [hop.dst.into(), hop.src.into()];
        frame.bytes[..12].copy_from_slice(&[dst, src].concat());
        if hop.device == OVERLAY {
            let len = ip_length(&frame.bytes);
            frame.bytes.truncate(ETH + len);
            frame.bytes = self.wrap(&frame.bytes, None);
        }
        Some(frame)
    }

    /// As the kernel's vxlan device sends it; or as its peer does, which chooses that source port.
    pub(crate) fn wrap(&self, inner: &[u8], from_peer: Option<u16>) -> Vec<u8> {
        let Network::Vxlan { v6, checksum } = self.network else { panic!("no vxlan here") };
        let n = Net::of(v6);
        let ((eth_src, eth_dst), (src, dst)) = match from_peer {
            None => ((OWN, ROUTER), (n.node, n.router)),
            Some(_) => ((ROUTER, OWN), (n.router, n.node)),
        };
        let header = [[8, 0, 0, 0].as_slice(), &(VNI << 8).to_be_bytes(), inner].concat();
        let class = inner.get(15).copied().unwrap_or(0);
        let ecn = if inner[12] == 8 { class & 3 } else { class >> 4 & 3 };
        let ecn = if ecn == 3 { 2 } else { ecn };
        let eth = PacketBuilder::ethernet2(eth_src, eth_dst);
        let step = match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let header = etherparse::Ipv4Header {
                    time_to_live: 64,
                    protocol: IpNumber::UDP,
                    source: src.octets(),
                    destination: dst.octets(),
                    identification: (RANDOM as u16).to_be(),
                    dont_fragment: false,
                    ecn: etherparse::IpEcn::try_new(ecn).expect("two bits"),
                    ..Default::default()
                };
                eth.ip(etherparse::IpHeaders::Ipv4(header, Default::default()))
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let header = etherparse::Ipv6Header {
                    traffic_class: ecn,
                    hop_limit: 64,
                    source: src.octets(),
                    destination: dst.octets(),
                    ..Default::default()
                };
                eth.ip(etherparse::IpHeaders::Ipv6(header, Default::default()))
            }
            _ => panic!("two families"),
        };
        let mut bytes = Vec::new();
        step.udp(from_peer.unwrap_or(0), PORT).write(&mut bytes, &header).expect("a Vec");
        if !v6 && !checksum {
            bytes[ETH + 26..ETH + 28].fill(0);
        }
        bytes
    }

    /// What is in a vxlan packet that is for us.
    fn unwrap(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let Network::Vxlan { v6, .. } = self.network else { return None };
        let at = if v6 { 70 } else { 50 };
        let ethertype: [u8; 2] = if v6 { [0x86, 0xdd] } else { [8, 0] };
        let proto = if v6 { 20 } else { 23 };
        (bytes.len() > at + ETH
            && bytes[12..14] == ethertype
            && bytes[proto] == 17
            && bytes[at - 14..at - 12] == PORT.to_be_bytes()
            && destination(bytes) == Some(Net::of(v6).node))
        .then(|| bytes[at..].to_vec())
    }
}

/// The outer source port is any of the node's, and the checksum says which: set aside, so that the rest can be compared.
pub(crate) fn without_source_port(bytes: &[u8], network: Network) -> Vec<u8> {
    let Network::Vxlan { v6, checksum } = network else { panic!("no vxlan here") };
    let udp = ETH + if v6 { 40 } else { 20 };
    let port = u16::from_be_bytes([bytes[udp], bytes[udp + 1]]);
    assert!((32768..=60999).contains(&port), "{port} is not the node's to use");
    if build::valid(&bytes[udp + 16..]) == Some(true) {
        assert_eq!(build::valid(bytes), Some(true), "the outer checksum: {bytes:02x?}");
    }
    assert_eq!(bytes[udp + 6..udp + 8] != [0, 0], checksum, "whether there is a checksum");
    blank_ports(bytes.to_vec(), v6)
}

/// Without the outer source port and the checksum.
pub(crate) fn blank_ports(mut bytes: Vec<u8>, v6: bool) -> Vec<u8> {
    let udp = ETH + if v6 { 40 } else { 20 };
    bytes[udp..udp + 2].fill(0);
    bytes[udp + 6..udp + 8].fill(0);
    bytes
}

fn ip_length(bytes: &[u8]) -> usize {
    let word = |at| usize::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]));
    if bytes[12] == 8 { word(16) } else { word(18) + 40 }
}

pub(crate) fn destination(bytes: &[u8]) -> Option<IpAddr> {
    if bytes.get(12) == Some(&8) {
        Some(IpAddr::from(<[u8; 4]>::try_from(bytes.get(30..34)?).ok()?))
    } else {
        Some(IpAddr::from(<[u8; 16]>::try_from(bytes.get(38..54)?).ok()?))
    }
}

/// As ip_decrease_ttl() and ip6_forward() do. `None` where it would not be sent on.
pub(crate) fn one_hop_less(bytes: &mut [u8]) -> Option<()> {
    let at = if bytes[12] == 8 { 22 } else { 21 };
    if *bytes.get(at)? < 2 {
        return None;
    }
    bytes[at] -= 1;
    if bytes[12] == 8 {
        let sum = u32::from(u16::from_be_bytes([bytes[24], bytes[25]])) + 0x100;
        let sum = sum + u32::from(sum >= 0xffff);
        bytes[24..26].copy_from_slice(&(sum as u16).to_be_bytes());
    }
    Some(())
}

fn mapped(ip: IpAddr) -> Ip6 {
    match ip {
        IpAddr::V4(ip) => Ip6::mapped(ip.into()),
        IpAddr::V6(ip) => ip.into(),
    }
}
