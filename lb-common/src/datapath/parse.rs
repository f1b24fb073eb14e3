//! From bytes to a tuple. Bounded, and never past the end.

use super::rewrite::End;
use super::{Packet, Reason, fragments};
use crate::addr::{Ip4, Ip6, NetPort};
use crate::checksum::{Sum, update};
use crate::maps::{Addr, FlowKey, FragmentKey};
use bytemuck::{Pod, Zeroable};

/// Length of the Ethernet header.
pub const ETH: usize = 14;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

/// What a packet is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// TCP with its flag byte.
    Tcp(u8),
    Udp,
    EchoRequest,
    EchoReply,
    /// An ICMP error, whose tuple is in the packet that it quotes.
    IcmpError,
}

impl Kind {
    /// The [`crate::maps::Flow`] state bits that such a packet sets.
    #[inline(always)]
    pub(super) fn state(self) -> u8 {
        match self {
            // FIN, SYN and RST are bits 0, 1 and 2 in the header, and 0, 7 and 1 in the state.
            Self::Tcp(flags) => {
                flags & tcp_flags::FIN | (flags & tcp_flags::RST) >> 1 | (flags & tcp_flags::SYN) << 6
            }
            _ => 0,
        }
    }
}

pub(super) mod tcp_flags {
    pub(in super::super) const FIN: u8 = 1;
    pub(in super::super) const SYN: u8 = 2;
    pub(in super::super) const RST: u8 = 4;
    pub(in super::super) const ACK: u8 = 16;
}

/// The headers of a packet that may be ours.
#[derive(Clone, Copy, Debug)]
pub(super) struct Headers<A> {
    pub(super) key: FlowKey<A>,
    pub(super) kind: Kind,
    /// Offset of the transport header.
    pub(super) l4: usize,
    /// Not zero if fragments without ports follow. A number as it is in the packet rather than a condition, of which
    /// the verifier would follow both ways.
    pub(super) more_fragments: u16,
}

/// Why there are no [`Headers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotOurs {
    /// Another protocol, neighbour discovery, nonsense: none of our business.
    Other,
    /// A fragment without ports.
    Fragment,
}

impl<A> Headers<A> {
    /// Whether this packet may start a flow.
    #[inline(always)]
    pub(super) fn starts_flow(&self) -> bool {
        match self.kind {
            Kind::Tcp(flags) => flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN,
            Kind::Udp | Kind::EchoRequest => true,
            Kind::EchoReply | Kind::IcmpError => false,
        }
    }

    /// Whether it opens a TCP connection.
    #[inline(always)]
    pub(super) fn is_syn(&self) -> bool {
        matches!(self.kind, Kind::Tcp(_)) && self.starts_flow()
    }

    /// The [`crate::maps::Flow`] state bits that this packet sets, and [`crate::maps::Flow::SYN`].
    #[inline(always)]
    pub(super) fn state(&self) -> u8 {
        self.kind.state()
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Ipv4Header {
    version_ihl: u8,
    tos: u8,
    total_len: u16,
    id: u16,
    fragment: u16,
    ttl: u8,
    proto: u8,
    checksum: u16,
    src: Ip4,
    dst: Ip4,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Ipv6Header {
    version_class_label: u32,
    payload_len: u16,
    next: u8,
    hop_limit: u8,
    src: Ip6,
    dst: Ip6,
}

/// What the IP header says, whatever the family.
#[derive(Clone, Copy)]
pub(super) struct IpHeader<A> {
    pub(super) src: A,
    pub(super) dst: A,
    pub(super) proto: u8,
    /// Length with options or extension headers.
    pub(super) len: usize,
    /// Whether `len` is the plain header's, so that the transport header's offset is a constant.
    pub(super) plain: bool,
    pub(super) more_fragments: u16,
}

/// The end of a plain IPv4 header and the ports behind it.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Ipv4Ends {
    ttl: u8,
    proto: u8,
    checksum: u16,
    src: Ip4,
    dst: Ip4,
    sport: NetPort,
    dport: NetPort,
}

/// The addresses of a plain IPv6 header and the ports behind it.
#[repr(C, packed)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Ipv6Ends {
    src: Ip6,
    dst: Ip6,
    sport: NetPort,
    dport: NetPort,
}

/// The same without the source.
#[repr(C, packed)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Ipv6End {
    dst: Ip6,
    sport: NetPort,
    dport: NetPort,
}

/// The part of the family that is about bytes.
pub trait Wire: Addr {
    /// Length of the header without options.
    const HEADER: usize;
    /// Offset of the source address in the header.
    const SRC: usize;
    /// Offset of the destination address in the header.
    const DST: usize;
    /// Offset of what is counted down by routers.
    const TTL: usize;
    /// Offset of the next header's protocol.
    const PROTO: usize;
    /// Offset of the header checksum, if there is one.
    const CHECKSUM: Option<usize>;
    /// The bytes of a plain header.
    type Header: Pod;
    /// A plain header with its checksum, if it has one.
    fn header(src: Self, dst: Self, proto: u8, payload: u16, ttl: u8) -> Self::Header;
    /// Where a packet ends, by the length in its header: padding may follow.
    fn end<P: Packet>(packet: &P) -> Option<usize>;
    /// What the fragments of the packet's datagram have in common.
    fn fragment_key<P: Packet>(packet: &P, hook: u8) -> Option<FragmentKey<Self>>;
    /// The sum over the plain header of a packet.
    fn sum_header<P: Packet>(packet: &P) -> Option<Sum>;
    /// The header of a packet that carries another one, in UDP, as the kernel's tunnels make it.
    fn carrier(src: Self, dst: Self, payload: u16, ttl_and_ecn: (u8, u8), id: u16) -> Self::Header;
    /// Length by the header, if that is a plain one and the packet is whole. The transport protocol is not looked at.
    fn plain<P: Packet>(packet: &P) -> Option<u16>;
    /// Counts a plain header down. The sum over its addresses has changed by `change`.
    fn one_hop_less<P: Packet>(packet: &mut P, change: Sum) -> Result<(), Reason>;
    /// Puts an address and a port at one end of a packet whose ports are right behind a plain header, and corrects the header's
    /// checksum, if it has one: all in one write. The transport checksum has been written before.
    fn store_end<P: Packet>(packet: &mut P, end: End, addr: Self, port: NetPort) -> Result<(), Reason>;
    /// What a header's first word says of congestion (RFC 3168).
    fn ecn(head: u32) -> u8;
    #[doc(hidden)]
    #[expect(private_interfaces, reason = "sealed: only the two address types implement it")]
    fn ip_header<P: Packet>(packet: &P, at: At) -> Result<IpHeader<Self>, NotOurs>;
}

/// Where the IP header is: at the packet's start, or quoted in an ICMP error.
#[derive(Clone, Copy)]
pub(super) enum At {
    Outer,
    Quoted(usize),
}

#[inline(always)]
fn get<P: Packet, T: Pod>(packet: &P, at: At) -> Result<T, NotOurs> {
    match at {
        At::Outer => packet.read(ETH),
        At::Quoted(offset) => packet.load(offset),
    }
    .ok_or(NotOurs::Other)
}

impl Wire for Ip4 {
    const HEADER: usize = 20;
    const SRC: usize = 12;
    const DST: usize = 16;
    const TTL: usize = 8;
    const PROTO: usize = 9;
    const CHECKSUM: Option<usize> = Some(10);
    type Header = Ipv4Header;

    #[inline(always)]
    fn header(src: Self, dst: Self, proto: u8, payload: u16, ttl: u8) -> Ipv4Header {
        let mut header = Ipv4Header {
            version_ihl: 0x45,
            tos: 0,
            total_len: (payload + Self::HEADER as u16).to_be(),
            id: 0,
            fragment: 0x4000u16.to_be(),
            ttl,
            proto,
            checksum: 0,
            src,
            dst,
        };
        header.checksum = !sum_words::<5>(&bytemuck::cast(header)).fold();
        header
    }

    #[inline(always)]
    fn end<P: Packet>(packet: &P) -> Option<usize> {
        packet.load::<u16>(ETH + 2).map(|len| ETH + u16::from_be(len) as usize)
    }

    #[inline(always)]
    fn fragment_key<P: Packet>(packet: &P, hook: u8) -> Option<FragmentKey<Self>> {
        let ip: Ipv4Header = packet.load(ETH)?;
        Some(fragments::key(ip.src, ip.dst, u32::from(ip.id), ip.proto, hook))
    }

    #[inline(always)]
    fn sum_header<P: Packet>(_: &P) -> Option<Sum> {
        // A header with a valid checksum sums up to zero.
        Some(Sum(0))
    }

    #[inline(always)]
    fn carrier(src: Self, dst: Self, payload: u16, (ttl, ecn): (u8, u8), id: u16) -> Ipv4Header {
        let mut header = Self::header(src, dst, UDP, payload, ttl);
        (header.tos, header.id, header.fragment, header.checksum) = (ecn, id, 0, 0);
        header.checksum = !sum_words::<5>(&bytemuck::cast(header)).fold();
        header
    }

    #[inline(always)]
    fn plain<P: Packet>(packet: &P) -> Option<u16> {
        let fragment: u16 = packet.read(ETH + 6)?;
        let whole = fragment & 0x3fffu16.to_be() == 0;
        let len = packet.read(ETH + 2).map(u16::from_be)?;
        (packet.read::<u8>(ETH)? == 0x45 && whole).then_some(len)
    }

    #[inline(always)]
    fn one_hop_less<P: Packet>(packet: &mut P, change: Sum) -> Result<(), Reason> {
        // Together with the protocol: a word of the checksum's.
        let old: u16 = packet.read(ETH + Self::TTL).ok_or(Reason::Malformed)?;
        let new = u16::from_be(old).wrapping_sub(0x100).to_be();
        packet.l3_checksum(ETH + 10, change.plus(Sum::diff16(old, new)))?;
        packet.store(ETH + Self::TTL, &new)
    }

    #[inline(always)]
    fn store_end<P: Packet>(packet: &mut P, end: End, addr: Self, port: NetPort) -> Result<(), Reason> {
        let at = ETH + Self::TTL;
        let mut ends: Ipv4Ends = packet.linear(at).ok_or(Reason::Malformed)?;
        let old = match end {
            End::Source => {
                ends.sport = port;
                core::mem::replace(&mut ends.src, addr)
            }
            End::Destination => {
                ends.dport = port;
                core::mem::replace(&mut ends.dst, addr)
            }
        };
        ends.checksum = update(ends.checksum, Self::diff(old, addr));
        packet.store(at, &ends)
    }

    #[inline(always)]
    fn ecn(head: u32) -> u8 {
        head.to_ne_bytes()[1] & 3
    }

    #[inline(always)]
    #[expect(private_interfaces, reason = "sealed")]
    fn ip_header<P: Packet>(packet: &P, at: At) -> Result<IpHeader<Self>, NotOurs> {
        let ip: Ipv4Header = get(packet, at)?;
        if ip.version_ihl >> 4 != 4 || ip.version_ihl & 0xf < 5 {
            return Err(NotOurs::Other);
        }
        let len = (ip.version_ihl & 0xf) as usize * 4;
        if ip.fragment & 0x1fffu16.to_be() != 0 {
            let cut_short = (u16::from_be(ip.total_len) as usize) <= len;
            return Err(if cut_short { NotOurs::Other } else { NotOurs::Fragment });
        }
        if too_short(ip.total_len, len) {
            return Err(NotOurs::Other);
        }
        let more_fragments = ip.fragment & 0x2000u16.to_be();
        Ok(IpHeader {
            src: ip.src,
            dst: ip.dst,
            proto: ip.proto,
            len,
            plain: len == Self::HEADER,
            more_fragments,
        })
    }
}

impl Wire for Ip6 {
    const HEADER: usize = 40;
    const SRC: usize = 8;
    const DST: usize = 24;
    const TTL: usize = 7;
    const PROTO: usize = 6;
    const CHECKSUM: Option<usize> = None;
    type Header = Ipv6Header;

    #[inline(always)]
    fn header(src: Self, dst: Self, proto: u8, payload: u16, ttl: u8) -> Ipv6Header {
        Ipv6Header {
            version_class_label: 0x6000_0000u32.to_be(),
            payload_len: payload.to_be(),
            next: proto,
            hop_limit: ttl,
            src,
            dst,
        }
    }

    #[inline(always)]
    fn end<P: Packet>(packet: &P) -> Option<usize> {
        packet.load::<u16>(ETH + 4).map(|len| ETH + Self::HEADER + u16::from_be(len) as usize)
    }

    #[inline(always)]
    fn fragment_key<P: Packet>(packet: &P, hook: u8) -> Option<FragmentKey<Self>> {
        let ip: Ipv6Header = packet.load(ETH)?;
        let (mut next, mut at) = (ip.next, ETH + Self::HEADER);
        // Hop-by-hop options, a routing header, destination options: no more may come before it.
        for _ in 0..4 {
            let ext: [u8; 8] = packet.load(at & MAX_HEADER)?;
            if next == 44 {
                let id = u32::from_ne_bytes([ext[4], ext[5], ext[6], ext[7]]);
                // The protocol is the first fragment's alone to say.
                return Some(fragments::key(ip.src, ip.dst, id, 0, hook));
            }
            if !is_extension(next) || at > MAX_HEADER {
                break;
            }
            (next, at) = (ext[0], at + (ext[1] as usize + 1) * 8);
        }
        None
    }

    #[inline(always)]
    fn sum_header<P: Packet>(packet: &P) -> Option<Sum> {
        packet.load::<[u32; 10]>(ETH).map(|w| sum_words(&w))
    }

    #[inline(always)]
    fn carrier(src: Self, dst: Self, payload: u16, (ttl, ecn): (u8, u8), _: u16) -> Ipv6Header {
        let class = u32::from(ecn) << 20;
        Ipv6Header {
            version_class_label: (0x6000_0000 | class).to_be(),
            ..Self::header(src, dst, UDP, payload, ttl)
        }
    }

    #[inline(always)]
    fn plain<P: Packet>(packet: &P) -> Option<u16> {
        let payload = packet.read(ETH + 4).map(u16::from_be)?;
        let plain = packet.read::<u8>(ETH)? >> 4 == 6;
        // Zero is a jumbogram's.
        if plain && payload != 0 { payload.checked_add(Self::HEADER as u16) } else { None }
    }

    #[inline(always)]
    fn one_hop_less<P: Packet>(packet: &mut P, _: Sum) -> Result<(), Reason> {
        let limit: u8 = packet.read(ETH + Self::TTL).ok_or(Reason::Malformed)?;
        packet.store(ETH + Self::TTL, &limit.wrapping_sub(1))
    }

    #[inline(always)]
    fn store_end<P: Packet>(packet: &mut P, end: End, addr: Self, port: NetPort) -> Result<(), Reason> {
        const PORTS: usize = ETH + Ip6::HEADER;
        match end {
            End::Source => {
                let dst = packet.linear(ETH + Self::DST).ok_or(Reason::Malformed)?;
                let dport = packet.linear(PORTS + 2).ok_or(Reason::Malformed)?;
                packet.store(ETH + Self::SRC, &Ipv6Ends { src: addr, dst, sport: port, dport })
            }
            End::Destination => {
                let sport = packet.linear(PORTS).ok_or(Reason::Malformed)?;
                packet.store(ETH + Self::DST, &Ipv6End { dst: addr, sport, dport: port })
            }
        }
    }

    #[inline(always)]
    fn ecn(head: u32) -> u8 {
        head.to_ne_bytes()[1] >> 4 & 3
    }

    #[inline(always)]
    #[expect(private_interfaces, reason = "sealed")]
    fn ip_header<P: Packet>(packet: &P, at: At) -> Result<IpHeader<Self>, NotOurs> {
        let ip: Ipv6Header = get(packet, at)?;
        if u32::from_be(ip.version_class_label) >> 28 != 6 {
            return Err(NotOurs::Other);
        }
        let mut header = IpHeader {
            src: ip.src,
            dst: ip.dst,
            proto: ip.next,
            len: Self::HEADER,
            plain: true,
            more_fragments: 0,
        };
        if !is_extension(ip.next) {
            return if too_short(ip.payload_len, 0) { Err(NotOurs::Other) } else { Ok(header) };
        }
        header.plain = false;
        let base = match at {
            At::Outer => ETH,
            At::Quoted(offset) => offset,
        };
        // More than six extension headers are nobody's traffic.
        for _ in 0..6 {
            if header.len > MAX_HEADER {
                break;
            }
            if !is_extension(header.proto) {
                if too_short(ip.payload_len, header.len - Self::HEADER) {
                    break;
                }
                return Ok(header);
            }
            let ext: [u8; 4] = packet.load(base + (header.len & MAX_HEADER)).ok_or(NotOurs::Other)?;
            if header.proto == 44 {
                let offset = u16::from_be_bytes([ext[2], ext[3]]);
                if offset & 0xfff8 != 0 {
                    if too_short(ip.payload_len, header.len - Self::HEADER) {
                        break;
                    }
                    return Err(NotOurs::Fragment);
                }
                header.more_fragments = offset & 1;
                header.len += 8;
            } else {
                header.len += (ext[1] as usize + 1) * 8;
            }
            header.proto = ext[0];
            // Hop-by-hop options come first or not at all.
            if header.proto == 0 {
                break;
            }
        }
        Err(NotOurs::Other)
    }
}

/// The longest IP header with all that belongs to it: what `& MAX_HEADER` leaves as it is.
const MAX_HEADER: usize = 0x7ff;

/// Whether a packet ends, by the length in its header, before the first eight bytes of what the header carries: the
/// ports would be from the padding. Zero stands for more than 64 KiB in segments (BIG TCP).
#[inline(always)]
fn too_short(length: u16, header: usize) -> bool {
    length != 0 && (u16::from_be(length) as usize) < header + 8
}

/// The sum over what a transport checksum covers besides the transport header and the payload.
#[inline(always)]
pub(super) fn pseudo_header<A: Addr>(key: &FlowKey<A>, len: u16) -> Sum {
    let words = u64::from(u16::from(key.proto).to_be()) + u64::from(len.to_be());
    let total = key.src.sum() + key.dst.sum() + words;
    Sum(total as u32).plus(Sum((total >> 32) as u32))
}

#[inline(always)]
pub(super) fn sum_words<const N: usize>(words: &[u32; N]) -> Sum {
    let mut total = 0u64;
    for &w in words {
        total += u64::from(w);
    }
    Sum(total as u32).plus(Sum((total >> 32) as u32))
}

/// Hop-by-hop, routing, fragment, destination options (RFC 8200). Not authentication: it covers the addresses, so
/// there is nothing to translate behind it.
#[inline(always)]
fn is_extension(next: u8) -> bool {
    matches!(next, 0 | 43 | 44 | 60)
}

/// The start of any transport header, as words: ports, sequence number, and TCP's flags.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Tcp {
    ports: [u16; 2],
    seq: u32,
    ack: u32,
    offset: u8,
    flags: u8,
    window: u16,
}

/// The first eight bytes: all that an ICMP error has to quote.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct First8 {
    words: [u16; 4],
}

/// Parses a packet's headers.
#[inline(always)]
pub(super) fn parse<A: Wire, P: Packet>(packet: &P) -> Result<Headers<A>, NotOurs> {
    let ip = A::ip_header(packet, At::Outer)?;
    let l4 = ETH + (ip.len & MAX_HEADER);
    if ip.proto == TCP {
        let tcp: Tcp = transport::<A, P, _>(packet, &ip, l4)?;
        let key = key(&ip, tcp.ports[0], tcp.ports[1]);
        return Ok(Headers { key, kind: Kind::Tcp(tcp.flags), l4, more_fragments: ip.more_fragments });
    }
    let first: First8 = transport::<A, P, _>(packet, &ip, l4)?;
    let (kind, sport, dport) = ports::<A>(ip.proto, first)?;
    Ok(Headers { key: key(&ip, sport, dport), kind, l4, more_fragments: ip.more_fragments })
}

/// Parses the packet quoted in an ICMP error at `offset`. Its `l4` is from the start of the whole packet.
#[inline(always)]
pub(super) fn parse_quoted<A: Wire, P: Packet>(packet: &P, offset: usize) -> Result<Headers<A>, NotOurs> {
    let ip = A::ip_header(packet, At::Quoted(offset))?;
    let l4 = offset + (ip.len & MAX_HEADER);
    let first: First8 = packet.load(l4).ok_or(NotOurs::Other)?;
    let (kind, sport, dport) = match ip.proto {
        TCP => (Kind::Tcp(0), first.words[0], first.words[1]),
        proto => ports::<A>(proto, first)?,
    };
    Ok(Headers { key: key(&ip, sport, dport), kind, l4, more_fragments: 0 })
}

#[inline(always)]
fn transport<A: Wire, P: Packet, T: Pod>(packet: &P, ip: &IpHeader<A>, l4: usize) -> Result<T, NotOurs> {
    if ip.plain { packet.read(ETH + A::HEADER) } else { packet.load(l4) }.ok_or(NotOurs::Other)
}

#[inline(always)]
fn key<A: Addr>(ip: &IpHeader<A>, sport: u16, dport: u16) -> FlowKey<A> {
    FlowKey {
        src: ip.src,
        dst: ip.dst,
        sport: NetPort::from_wire(sport),
        dport: NetPort::from_wire(dport),
        proto: ip.proto,
        variant: 0,
        pad: [0; 2],
    }
}

/// Kind and ports of everything but TCP.
#[inline(always)]
fn ports<A: Addr>(proto: u8, first: First8) -> Result<(Kind, u16, u16), NotOurs> {
    let w = first.words;
    if proto == UDP {
        return Ok((Kind::Udp, w[0], w[1]));
    }
    if proto != A::ICMP {
        return Err(NotOurs::Other);
    }
    let icmp_type = w[0].to_ne_bytes()[0];
    let (request, reply) = if A::IS_V4 { (8, 0) } else { (128, 129) };
    if icmp_type == request {
        Ok((Kind::EchoRequest, w[2], 0))
    } else if icmp_type == reply {
        Ok((Kind::EchoReply, 0, w[2]))
    } else if is_error::<A>(icmp_type) {
        Ok((Kind::IcmpError, 0, 0))
    } else {
        // Neighbour discovery, router advertisements, timestamps: never touched.
        Err(NotOurs::Other)
    }
}

/// Destination unreachable (with "fragmentation needed"), time exceeded, parameter problem; v6 packet too big.
#[inline(always)]
fn is_error<A: Addr>(icmp_type: u8) -> bool {
    if A::IS_V4 { matches!(icmp_type, 3 | 11 | 12) } else { matches!(icmp_type, 1..=4) }
}

/// Offset of the transport checksum in its header.
#[inline(always)]
pub(super) fn checksum_offset(kind: Kind) -> usize {
    match kind {
        Kind::Tcp(_) => 16,
        Kind::Udp => 6,
        Kind::EchoRequest | Kind::EchoReply | Kind::IcmpError => 2,
    }
}
