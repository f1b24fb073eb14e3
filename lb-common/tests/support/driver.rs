//! The node's devices, routes and neighbours as XDP meets them, and what the kernel's router and its tunnels do to a
//! packet, written down independently.

use super::build::{self, ETH};
use super::cluster::{BOTH, Net, OVERLAY, UPLINK};
use super::frame::Frame;
use super::paths::node;
use super::world::{Action, Fam, Hook, World};
use bytemuck::Pod;
use etherparse::{IpNumber, PacketBuilder};
use lb_common::addr::{Ip6, Mac, NetPort};
use lb_common::checksum::Sum;
use lb_common::datapath::{
    Context, Covered, Driver, FlowRef, Flows, NextHop, Packet, Put, PutError, Query, RawPacket, Reason,
    Routes, Sent, transit,
};
use lb_common::maps::{Flow, FlowKey, VtepKey, XdpDevice};
use std::cell::RefCell;
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
const RANDOM: u32 = 0xabcd_1234;

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

    /// Where the kernel would send it. Pods here have devices that XDP does not know, and what is the node's own is
    /// not sent anywhere.
    pub(crate) fn hop(&self, dst: IpAddr) -> Option<NextHop> {
        let hop = |device, dst: [u8; 6], src: [u8; 6]| NextHop { device, dst: dst.into(), src: src.into() };
        let n = BOTH.map(Net::of).into_iter().find(|n| n.pod.is_ipv4() == dst.is_ipv4())?;
        if [n.node, n.overlay, n.gateway, n.vip].contains(&dst) {
            None
        } else if dst == n.pod || dst == n.near {
            Some(hop(super::cluster::BACKEND, PEER, VTEP))
        } else if dst == n.far && self.network != Network::Routed {
            Some(hop(OVERLAY, PEER, VTEP))
        } else {
            Some(hop(UPLINK, ROUTER, OWN))
        }
    }

    /// The program on a packet that comes in by the uplink.
    pub(crate) fn xdp(&self, frame: &mut Frame) -> Sent {
        let (cell, head) = (RefCell::new(frame.clone()), RefCell::default());
        let at = At { node: self, frame: &cell, head: &head };
        let sent = transit(at);
        *frame = cell.into_inner();
        sent
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
fn one_hop_less(bytes: &mut [u8]) -> Option<()> {
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

/// One packet at the driver.
#[derive(Clone, Copy)]
struct At<'a> {
    node: &'a XdpNode,
    frame: &'a RefCell<Frame>,
    /// Bytes in front of it.
    head: &'a RefCell<Vec<u8>>,
}

/// Bytes of it.
struct Window<'a> {
    frame: &'a RefCell<Frame>,
    from: usize,
    len: usize,
}

impl<'a> RawPacket for At<'a> {
    type Window = Window<'a>;

    fn length(&self) -> usize {
        self.frame.borrow().bytes.len()
    }

    fn window(&self, from: usize, len: usize) -> Option<Window<'a>> {
        (from + len <= self.length()).then_some(Window { frame: self.frame, from, len })
    }

    fn grow(&self, bytes: usize) -> Option<()> {
        let mut head = self.head.borrow_mut();
        let at = head.len().saturating_sub(bytes);
        let mut front = vec![0xee; bytes.saturating_sub(head.len())];
        front.extend(head.drain(at..));
        self.frame.borrow_mut().bytes.splice(..0, front);
        Some(())
    }

    fn shrink(&self, bytes: usize) -> Option<()> {
        self.head.borrow_mut().extend(self.frame.borrow_mut().bytes.drain(..bytes));
        Some(())
    }

    fn trim(&self, len: usize) -> Option<()> {
        self.frame.borrow_mut().bytes.truncate(len);
        Some(())
    }
}

impl Window<'_> {
    /// On the packet as a whole. The driver does not know that a checksum is partial.
    fn apply<T>(&self, offset: usize, size: usize, change: impl FnOnce(&mut Frame, usize) -> T) -> Option<T> {
        if offset + size > self.len {
            return None;
        }
        let mut frame = self.frame.borrow_mut();
        let partial = std::mem::take(&mut frame.partial);
        let result = change(&mut frame, self.from + offset);
        frame.partial = partial;
        Some(result)
    }
}

impl Packet for Window<'_> {
    fn read<T: Pod>(&self, offset: usize) -> Option<T> {
        self.apply(offset, size_of::<T>(), |frame, at| frame.load(at))?
    }

    fn load<T: Pod>(&self, _: usize) -> Option<T> {
        None
    }

    fn store<T: Pod>(&mut self, offset: usize, value: &T) -> Result<(), Reason> {
        self.apply(offset, size_of::<T>(), |frame, at| frame.store(at, value)).ok_or(Reason::Malformed)?
    }

    fn l3_checksum(&mut self, offset: usize, change: Sum) -> Result<(), Reason> {
        self.apply(offset, 2, |frame, at| frame.l3_checksum(at, change)).ok_or(Reason::Malformed)?
    }

    fn l4_checksum(&mut self, offset: usize, change: Sum, of: Covered) -> Result<(), Reason> {
        self.apply(offset, 2, |frame, at| frame.l4_checksum(at, change, of)).ok_or(Reason::Malformed)?
    }
}

impl Context for At<'_> {
    fn now(&self) -> u32 {
        self.node.world.now()
    }

    fn count(&self, reason: Reason) {
        self.node.world.count(reason);
    }

    fn backend_epoch(&self, id: u32) -> u32 {
        self.node.world.backend_epoch(id)
    }
}

impl<A: Fam> Flows<A> for At<'_> {
    fn flow(&self, key: &FlowKey<A>) -> Option<FlowRef<'_, A>> {
        self.node.world.flow(key)
    }

    fn put_flow(&self, key: &FlowKey<A>, flow: &Flow<A>, how: Put) -> Result<(), PutError> {
        self.node.world.put_flow(key, flow, how)
    }
}

impl Driver for At<'_> {
    fn arrival(&self) -> u32 {
        UPLINK
    }

    fn xdp_device(&self, index: u32) -> Option<&XdpDevice> {
        self.node.devices.get(&index)
    }

    fn vtep(&self, device: u32, mac: Mac) -> Option<Ip6> {
        self.node.vteps.get(&VtepKey { device, mac, pad: 0 }).copied()
    }

    fn random(&self) -> u32 {
        RANDOM
    }
}

impl<A: Fam> Routes<A> for At<'_> {
    fn route(&self, query: &Query<A>) -> Option<NextHop> {
        let dst: IpAddr = query.key.dst.into();
        if query.own {
            assert_eq!(query.device, UPLINK, "the overlay's packets leave by its own link");
        }
        let mtu = if !query.own && dst == Net::of(dst.is_ipv6()).far && self.node.network != Network::Routed {
            self.node.overlay_mtu
        } else {
            self.node.mtu
        };
        self.node.hop(dst).filter(|_| query.len <= mtu)
    }
}
