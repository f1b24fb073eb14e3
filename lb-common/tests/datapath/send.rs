//! One packet through one hook.

use crate::support::build::{self, L4};
use crate::support::cluster::sock;
use crate::support::frame::Frame;
use crate::support::world::{Action, Hook, World};
use std::net::{IpAddr, SocketAddr};

/// Sends one packet through one hook; `Some` is what it became, by etherparse.
pub(crate) fn pass(
    world: &World,
    device: u32,
    hook: Hook,
    src: SocketAddr,
    dst: SocketAddr,
    l4: L4,
) -> Option<(SocketAddr, SocketAddr)> {
    let mut frame = Frame::new(build::packet(src, dst, l4, b""));
    let action = world.run(device, hook, &mut frame);
    (action == Action::Pass).then(|| tuple(&frame.bytes))
}

pub(crate) fn tuple(frame: &[u8]) -> (SocketAddr, SocketAddr) {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};
    let packet = SlicedPacket::from_ethernet(frame).expect("a packet");
    let (src, dst): (IpAddr, IpAddr) = match packet.net.expect("an IP header") {
        NetSlice::Ipv4(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Arp(_) => panic!("ARP"),
    };
    match packet.transport.expect("a transport header") {
        TransportSlice::Tcp(h) => (sock(src, h.source_port()), sock(dst, h.destination_port())),
        TransportSlice::Udp(h) => (sock(src, h.source_port()), sock(dst, h.destination_port())),
        other => panic!("{other:?}"),
    }
}
