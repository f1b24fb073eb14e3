//! The packets and addresses that programs are measured with, in both families.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use etherparse::PacketBuilder;
use lb_common::addr::{Ip4, Ip6, NetPort};
use lb_common::maps::Addr;

/// Length of all packets: room for the headers twice (see `lb-ebpf/src/bench.rs`).
const LEN: usize = 160;
/// Length of the headers' copy.
const HEADERS: usize = 80;

/// Who sends and receives.
#[derive(Clone, Copy, Debug)]
pub(super) enum Who {
    /// A pod.
    Client,
    /// A ClusterIP.
    Vip,
    /// A pod on the same node.
    Backend,
    /// The node.
    Node,
    /// A host outside the cluster.
    Outside,
    /// A pod, on another node, that uses no Service, and is not in any's.
    Stranger,
}

/// One end of a packet.
#[derive(Clone, Copy, Debug)]
pub(super) struct End(pub(super) Who, pub(super) u16);

impl End {
    pub(super) fn addr<A: Family>(self) -> A {
        A::of(self.0)
    }

    pub(super) fn port(self) -> NetPort {
        NetPort::new(self.1)
    }
}

/// A family's addresses and table names.
pub(super) trait Family: Addr + aya::Pod + Into<IpAddr> {
    /// Last character of the tables' names.
    const SUFFIX: char;
    fn of(who: Who) -> Self;
    /// The node's pod network.
    fn pods() -> (Self, u32);
}

impl Family for Ip4 {
    const SUFFIX: char = '4';

    fn of(who: Who) -> Self {
        match who {
            Who::Client => Ipv4Addr::new(10, 244, 1, 10),
            Who::Vip => Ipv4Addr::new(10, 96, 0, 1),
            Who::Backend => Ipv4Addr::new(10, 244, 1, 11),
            Who::Node => Ipv4Addr::new(172, 18, 0, 11),
            Who::Outside => Ipv4Addr::new(198, 51, 100, 10),
            Who::Stranger => Ipv4Addr::new(10, 244, 2, 12),
        }
        .into()
    }

    fn pods() -> (Self, u32) {
        (Ipv4Addr::new(10, 244, 0, 0).into(), 16)
    }
}

impl Family for Ip6 {
    const SUFFIX: char = '6';

    fn of(who: Who) -> Self {
        match who {
            Who::Client => Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, 0x10),
            Who::Vip => Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 1),
            Who::Backend => Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, 0x11),
            Who::Node => Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 0, 0x11),
            Who::Outside => Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 0x10),
            Who::Stranger => Ipv6Addr::new(0xfd00, 0x10, 0x244, 2, 0, 0, 0, 0x12),
        }
        .into()
    }

    fn pods() -> (Self, u32) {
        (Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, 0).into(), 48)
    }
}

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    Syn,
    Ack,
    Udp,
}

impl Transport {
    pub(super) fn number(self) -> u8 {
        if self == Self::Udp { 17 } else { 6 }
    }
}

/// A packet; with `copy`, its payload starts where the copy of its headers ends.
pub(super) fn build<A: Family>(src: End, dst: End, transport: Transport, copy: bool) -> Result<Vec<u8>> {
    let ethernet = PacketBuilder::ethernet2([0x0e, 0x1b, 0, 0, 1, 0], [0x0e, 0x1b, 0, 0, 1, 1]);
    let ip = match (src.addr::<A>().into(), dst.addr::<A>().into()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => ethernet.ipv4(src.octets(), dst.octets(), 64),
        (IpAddr::V6(src), IpAddr::V6(dst)) => ethernet.ipv6(src.octets(), dst.octets(), 64),
        _ => unreachable!("both ends are of one family"),
    };
    let headers = if A::IS_V4 { 34 } else { 54 };
    let mut out = Vec::with_capacity(LEN);
    let payload = |transport: usize| vec![0; LEN - headers - transport];
    match transport {
        Transport::Syn => ip.tcp(src.1, dst.1, 1, 64240).syn().write(&mut out, &payload(20))?,
        Transport::Ack => ip.tcp(src.1, dst.1, 1, 501).ack(1).write(&mut out, &payload(20))?,
        Transport::Udp => ip.udp(src.1, dst.1).write(&mut out, &payload(8))?,
    }
    if copy {
        out.copy_within(..HEADERS, HEADERS);
    }
    Ok(out)
}
