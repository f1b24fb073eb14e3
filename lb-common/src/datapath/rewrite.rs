//! The two rewrites, checksums included.

use super::parse::{ETH, Headers, Kind, Wire, checksum_offset};
use super::{Covered, Packet, Reason};
use crate::addr::NetPort;
use crate::checksum::Sum;

/// Which end of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum End {
    Source,
    Destination,
}

impl End {
    /// Offset of the address in the IP header.
    #[inline(always)]
    pub(super) fn addr_offset<A: Wire>(self) -> usize {
        match self {
            Self::Source => A::SRC,
            Self::Destination => A::DST,
        }
    }

    /// Offset of the port (or echo identifier) in the transport header.
    #[inline(always)]
    pub(super) fn port_offset(self, kind: Kind) -> usize {
        match (kind, self) {
            (Kind::EchoRequest | Kind::EchoReply | Kind::IcmpError, _) => 4,
            (_, Self::Source) => 0,
            (_, Self::Destination) => 2,
        }
    }

    /// Address and port of this end.
    #[inline(always)]
    pub(super) fn of<A: Wire>(self, headers: &Headers<A>) -> (A, NetPort) {
        match self {
            Self::Source => (headers.key.src, headers.key.sport),
            Self::Destination => (headers.key.dst, headers.key.dport),
        }
    }
}

/// Puts `addr` and `port` at one end of the packet.
#[inline(always)]
pub(super) fn rewrite<A: Wire, P: Packet>(
    packet: &mut P,
    headers: &Headers<A>,
    end: End,
    addr: A,
    port: NetPort,
) -> Result<(), Reason> {
    let (old_addr, old_port) = end.of(headers);
    if addr == old_addr && port == old_port {
        return Ok(());
    }
    transport(packet, headers, (old_addr, addr), (old_port, port))?;
    if matches!(headers.kind, Kind::Tcp(_) | Kind::Udp) && headers.l4 == ETH + A::HEADER {
        A::store_end(packet, end, addr, port)
    } else {
        store_parts(packet, headers, end, addr, port)
    }
}

/// The transport checksum's part of it.
#[inline(always)]
fn transport<A: Wire, P: Packet>(
    packet: &mut P,
    headers: &Headers<A>,
    (old_addr, addr): (A, A),
    (old_port, port): (NetPort, NetPort),
) -> Result<(), Reason> {
    let checksum = headers.l4 + checksum_offset(headers.kind);
    // In IPv6 too: none is allowed to tunnels (RFC 6935), and one that computes to zero must not look like none.
    let zero_is_none = headers.kind == Kind::Udp;
    // ICMPv4 alone has no pseudo header.
    if addr != old_addr && (!A::IS_V4 || headers.key.proto != A::ICMP) {
        let change = A::diff(old_addr, addr);
        packet.l4_checksum(checksum, change, Covered { pseudo_header: true, zero_is_none })?;
    }
    if port != old_port {
        let change = Sum::diff16(old_port.wire(), port.wire());
        packet.l4_checksum(checksum, change, Covered { pseudo_header: false, zero_is_none })?;
    }
    Ok(())
}

/// All but the transport checksum, field by field: behind options or extension headers, or an echo's identifier.
#[inline(always)]
fn store_parts<A: Wire, P: Packet>(
    packet: &mut P,
    headers: &Headers<A>,
    end: End,
    addr: A,
    port: NetPort,
) -> Result<(), Reason> {
    let (old_addr, old_port) = end.of(headers);
    if addr != old_addr {
        if let Some(offset) = A::CHECKSUM {
            packet.l3_checksum(ETH + offset, A::diff(old_addr, addr))?;
        }
        packet.store(ETH + end.addr_offset::<A>(), &addr)?;
    }
    if port != old_port {
        packet.store(headers.l4 + end.port_offset(headers.kind), &port)?;
    }
    Ok(())
}

/// Puts another port at one end of the packet. Rare: an alias.
#[inline(never)]
pub(super) fn new_port<A: Wire, P: Packet>(
    packet: &mut P,
    headers: &Headers<A>,
    end: End,
    port: NetPort,
) -> Result<(), Reason> {
    let (_, old) = end.of(headers);
    let covered = Covered { pseudo_header: false, zero_is_none: headers.kind == Kind::Udp };
    let change = Sum::diff16(old.wire(), port.wire());
    packet.l4_checksum(headers.l4 + checksum_offset(headers.kind), change, covered)?;
    packet.store(headers.l4 + end.port_offset(headers.kind), &port)
}

/// Puts `addr` at one end of a packet without a transport header: a later fragment.
#[inline(always)]
pub(super) fn readdress<A: Wire, P: Packet>(packet: &mut P, end: End, old: A, addr: A) -> Result<(), Reason> {
    if addr == old {
        return Ok(());
    }
    if let Some(offset) = A::CHECKSUM {
        packet.l3_checksum(ETH + offset, A::diff(old, addr))?;
    }
    packet.store(ETH + end.addr_offset::<A>(), &addr)
}
