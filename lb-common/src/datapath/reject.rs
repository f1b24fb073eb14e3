//! A packet to a frontend without endpoints becomes its own answer: a TCP reset, or an ICMP port unreachable.
//!
//! Reset rather than an ICMP error for TCP: one that meets a socket inside `connect()` is lost until the SYN is
//! sent again (`tcp_v4_err`, socket owned by user).

use super::parse::{ETH, Headers, Kind, Wire, parse, tcp_flags};
use super::{Packet, Reason};
use crate::checksum::Sum;
use crate::maps::Addr;

/// What a rejection needs beyond [`Packet`].
pub trait Reshape: Packet {
    /// Cuts the packet to `len` bytes.
    fn truncate(&mut self, len: usize) -> Result<(), Reason>;
    /// Makes room for `len` bytes between the Ethernet and the IP header.
    fn insert_after_ethernet(&mut self, len: usize) -> Result<(), Reason>;
    /// Whether the transport checksum at `offset` is still to be completed by the device (`CHECKSUM_PARTIAL`).
    /// May change the checksum.
    fn checksum_is_partial(&mut self, offset: usize) -> bool;
}

const TCP_HEADER: usize = 20;
const ICMP_HEADER: usize = 8;
const TTL: u8 = 64;

/// Turns the packet into its rejection, to be sent back by the device that it came from.
///
/// # Errors
/// If the packet has options or extension headers, or the kernel has no room: then it is dropped.
#[inline(always)]
pub fn reject<A: Wire, P: Reshape>(packet: &mut P) -> Result<(), Reason> {
    let headers = parse::<A, P>(packet).map_err(|_| Reason::RejectFailed)?;
    if headers.l4 != ETH + A::HEADER {
        return Err(Reason::RejectFailed);
    }
    match headers.kind {
        Kind::Tcp(flags) if flags & tcp_flags::RST == 0 => reset(packet, &headers),
        Kind::Udp => unreachable(packet, &headers),
        _ => Err(Reason::RejectFailed),
    }
}

#[inline(always)]
fn reset<A: Wire, P: Reshape>(packet: &mut P, headers: &Headers<A>) -> Result<(), Reason> {
    let l4 = ETH + A::HEADER;
    let key = &headers.key;
    let seq: u32 = packet.load(l4 + 4).ok_or(Reason::RejectFailed)?;
    let partial = packet.checksum_is_partial(l4 + 16);
    packet.truncate(l4 + TCP_HEADER)?;
    swap_ethernet(packet)?;
    write_ip(packet, ETH, key.dst, key.src, key.proto, TCP_HEADER)?;
    // RFC 9293, 3.10.7.1: a segment to a closed port is answered with its own end as the acknowledgement.
    let ack = u32::from_be(seq).wrapping_add(1).to_be();
    let mut tcp = [0u16; TCP_HEADER / 2];
    tcp[0] = key.dport.wire();
    tcp[1] = key.sport.wire();
    tcp[4] = u16::from_ne_bytes([ack.to_ne_bytes()[0], ack.to_ne_bytes()[1]]);
    tcp[5] = u16::from_ne_bytes([ack.to_ne_bytes()[2], ack.to_ne_bytes()[3]]);
    tcp[6] = (5u16 << 12 | u16::from(tcp_flags::RST | tcp_flags::ACK)).to_be();
    let pseudo = pseudo_header(key.src, key.dst, key.proto, TCP_HEADER);
    tcp[8] = if partial { pseudo.fold() } else { !words(&tcp).plus(pseudo).fold() };
    packet.store(l4, &tcp)
}

#[inline(always)]
fn unreachable<A: Wire, P: Reshape>(packet: &mut P, headers: &Headers<A>) -> Result<(), Reason> {
    let l4 = ETH + A::HEADER;
    let key = &headers.key;
    let quoted_len = A::HEADER + 8;
    let udp: [u16; 4] = packet.load(l4).ok_or(Reason::RejectFailed)?;
    let partial = packet.checksum_is_partial(l4 + 6);
    // It is quoted as it came.
    packet.store(l4 + 6, &udp[3])?;
    let mut quoted_udp = words(&udp);
    if partial {
        // The device will still complete the quoted checksum, over what is left of the packet: count what it will
        // write, not what is there now.
        quoted_udp = words(&[udp[0], udp[1], udp[2], !quoted_udp.fold()]);
    }
    packet.truncate(ETH + quoted_len)?;
    let quoted = A::sum_header(packet).ok_or(Reason::RejectFailed)?.plus(quoted_udp);
    packet.insert_after_ethernet(A::HEADER + ICMP_HEADER)?;
    swap_ethernet(packet)?;
    let icmp_len = ICMP_HEADER + quoted_len;
    write_ip(packet, ETH, key.dst, key.src, A::ICMP, icmp_len)?;
    let kind: [u8; 2] = if A::IS_V4 { [3, 3] } else { [1, 4] };
    let mut icmp = [u16::from_ne_bytes(kind), 0, 0, 0];
    let mut covered = words(&icmp).plus(quoted);
    if !A::IS_V4 {
        covered = covered.plus(pseudo_header(key.src, key.dst, A::ICMP, icmp_len));
    }
    icmp[1] = !covered.fold();
    packet.store(l4, &icmp)
}

#[inline(always)]
fn swap_ethernet<P: Packet>(packet: &mut P) -> Result<(), Reason> {
    let [a, b, c, d, e, f]: [u16; 6] = packet.load(0).ok_or(Reason::RejectFailed)?;
    packet.store(0, &[d, e, f, a, b, c])
}

#[inline(always)]
fn write_ip<A: Wire, P: Packet>(
    packet: &mut P,
    at: usize,
    src: A,
    dst: A,
    proto: u8,
    payload: usize,
) -> Result<(), Reason> {
    packet.store(at, &A::header(src, dst, proto, payload as u16, TTL))
}

/// The sum of the pseudo header (RFC 9293, RFC 8200); the same for both families in one's complement.
#[inline(always)]
fn pseudo_header<A: Addr>(src: A, dst: A, proto: u8, len: usize) -> Sum {
    // diff(0, x) is x plus the sum of all ones, which is zero.
    let addresses = A::diff(A::default(), src).plus(A::diff(A::default(), dst));
    addresses.plus(Sum(u32::from((u16::from(proto)).to_be()))).plus(Sum(u32::from((len as u16).to_be())))
}

#[inline(always)]
fn words<const N: usize>(words: &[u16; N]) -> Sum {
    let mut total = 0;
    for &w in words {
        total += u32::from(w);
    }
    Sum(total)
}
