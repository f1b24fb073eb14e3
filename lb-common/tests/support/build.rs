//! Packets by the `etherparse` crate, and their checksums by RFC 1071 as it is written.

use etherparse::{IpNumber, NetSlice, PacketBuilder, PacketBuilderStep, SlicedPacket, TcpHeader};
use std::net::{IpAddr, SocketAddr};

pub(crate) const ETH: usize = 14;
pub(crate) const SYN: u8 = 2;
pub(crate) const FIN: u8 = 1;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;
const MAC_A: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MAC_B: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// What is in the IP packet. An echo's identifier is the source port of a request, the destination port of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum L4 {
    Tcp(u8),
    Udp,
    EchoRequest,
    EchoReply,
}

impl L4 {
    /// IP protocol number, of the family for echoes.
    pub(crate) fn proto(self, v6: bool) -> u8 {
        match self {
            Self::Tcp(_) => 6,
            Self::Udp => 17,
            Self::EchoRequest | Self::EchoReply => {
                if v6 {
                    58
                } else {
                    1
                }
            }
        }
    }

    /// Of the packets the other way.
    pub(crate) fn answer(self) -> Self {
        match self {
            Self::Tcp(SYN) => Self::Tcp(SYN | ACK),
            Self::EchoRequest => Self::EchoReply,
            other => other,
        }
    }
}

fn ip(src: IpAddr, dst: IpAddr, swapped: bool, ttl: u8) -> PacketBuilderStep<etherparse::IpHeaders> {
    let eth =
        if swapped { PacketBuilder::ethernet2(MAC_B, MAC_A) } else { PacketBuilder::ethernet2(MAC_A, MAC_B) };
    eth.ip(match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let header = etherparse::Ipv4Header::new(0, ttl, IpNumber(0), src.octets(), dst.octets());
            etherparse::IpHeaders::Ipv4(header.expect("an empty payload fits"), Default::default())
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => etherparse::IpHeaders::Ipv6(
            etherparse::Ipv6Header {
                source: src.octets(),
                destination: dst.octets(),
                hop_limit: ttl,
                ..Default::default()
            },
            Default::default(),
        ),
        _ => panic!("{src} and {dst} are of two families"),
    })
}

/// A whole frame.
pub(crate) fn packet(src: SocketAddr, dst: SocketAddr, l4: L4, payload: &[u8]) -> Vec<u8> {
    let step = ip(src.ip(), dst.ip(), false, 64);
    let mut bytes = Vec::new();
    match l4 {
        L4::Tcp(flags) => {
            let mut header = TcpHeader::new(src.port(), dst.port(), 0x0102_0304, 4096);
            header.syn = flags & SYN != 0;
            header.fin = flags & FIN != 0;
            header.rst = flags & RST != 0;
            header.ack = flags & ACK != 0;
            step.tcp_header(header).write(&mut bytes, payload)
        }
        L4::Udp => step.udp(src.port(), dst.port()).write(&mut bytes, payload),
        L4::EchoRequest if src.is_ipv4() => {
            step.icmpv4_echo_request(src.port(), 7).write(&mut bytes, payload)
        }
        L4::EchoReply if src.is_ipv4() => step.icmpv4_echo_reply(dst.port(), 7).write(&mut bytes, payload),
        L4::EchoRequest => step.icmpv6_echo_request(src.port(), 7).write(&mut bytes, payload),
        L4::EchoReply => step.icmpv6_echo_reply(dst.port(), 7).write(&mut bytes, payload),
    }
    .expect("a Vec takes everything");
    bytes
}

/// The packets that a router or sender would make of one that is too large: `size` bytes of payload each, a multiple
/// of eight.
pub(crate) fn fragments(packet: &[u8], id: u16, size: usize) -> Vec<Vec<u8>> {
    let v4 = packet[12] == 8;
    let header = ETH + if v4 { 20 } else { 40 };
    let count = packet[header..].len().div_ceil(size);
    let chunks = packet[header..].chunks(size).enumerate();
    chunks
        .map(|(number, chunk)| {
            let mut bytes = packet[..header].to_vec();
            let offset = (number * size) as u16;
            let more = u16::from(number + 1 < count);
            if v4 {
                let mut ip = etherparse::Ipv4Header::from_slice(&bytes[ETH..]).expect("a header").0;
                ip.identification = id;
                ip.dont_fragment = false;
                ip.more_fragments = more == 1;
                ip.fragment_offset = etherparse::IpFragOffset::try_new(offset / 8).expect("an offset");
                ip.set_payload_len(chunk.len()).expect("a length");
                ip.header_checksum = ip.calc_header_checksum();
                bytes[ETH..].copy_from_slice(&ip.to_bytes());
            } else {
                let [a, b] = (offset | more).to_be_bytes();
                let [c, d] = id.to_be_bytes();
                bytes[ETH + 4..ETH + 6].copy_from_slice(&((chunk.len() + 8) as u16).to_be_bytes());
                bytes.extend([packet[ETH + 6], 0, a, b, 0, 0, c, d]);
                bytes[ETH + 6] = 44;
            }
            bytes.extend(chunk);
            bytes
        })
        .collect()
}

/// An ICMP error's type and code by family, and the rest of its header.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Error {
    pub(crate) v4: (u8, u8),
    pub(crate) v6: (u8, u8),
    pub(crate) rest: [u8; 4],
}

/// "Fragmentation needed" / "packet too big" with an MTU of 1280.
pub(crate) const TOO_BIG: Error = Error { v4: (3, 4), v6: (2, 0), rest: [0, 0, 5, 0] };
pub(crate) const PORT_UNREACHABLE: Error = Error { v4: (3, 3), v6: (1, 4), rest: [0; 4] };
pub(crate) const TIME_EXCEEDED: Error = Error { v4: (11, 0), v6: (3, 0), rest: [0; 4] };

/// A frame with an ICMP error that quotes `quoted`, which starts at its IP header.
pub(crate) fn error(src: IpAddr, dst: IpAddr, error: Error, quoted: &[u8]) -> Vec<u8> {
    let step = ip(src, dst, false, 64);
    let mut bytes = Vec::new();
    if src.is_ipv4() {
        step.icmpv4_raw(error.v4.0, error.v4.1, error.rest).write(&mut bytes, quoted)
    } else {
        step.icmpv6_raw(error.v6.0, error.v6.1, error.rest).write(&mut bytes, quoted)
    }
    .expect("a Vec takes everything");
    bytes
}

/// What answers `of`, which came from `client`: Ethernet addresses are swapped.
pub(crate) fn reset(vip: SocketAddr, client: SocketAddr, ack: u32) -> Vec<u8> {
    let mut header = TcpHeader::new(vip.port(), client.port(), 0, 0);
    (header.rst, header.ack, header.acknowledgment_number) = (true, true, ack);
    let mut bytes = Vec::new();
    ip(vip.ip(), client.ip(), true, 64).tcp_header(header).write(&mut bytes, &[]).expect("a Vec");
    bytes
}

/// As [`error`], the other way.
pub(crate) fn refusal(vip: IpAddr, client: IpAddr, quoted: &[u8]) -> Vec<u8> {
    let mut bytes = error(vip, client, PORT_UNREACHABLE, quoted);
    bytes[..6].copy_from_slice(&MAC_A);
    bytes[6..12].copy_from_slice(&MAC_B);
    bytes
}

/// The offset of the transport checksum in a frame without options.
pub(crate) fn checksum_at(frame: &[u8]) -> usize {
    let (l4, proto) = if frame[12] == 8 { (ETH + 20, frame[ETH + 9]) } else { (ETH + 40, frame[ETH + 6]) };
    l4 + match proto {
        6 => 16,
        17 => 6,
        _ => 2,
    }
}

/// As a sender with checksum offload leaves it.
pub(crate) fn to_partial(mut frame: Vec<u8>) -> Vec<u8> {
    let at = checksum_at(&frame);
    let (pseudo, _) = pseudo_and_payload(&frame).expect("a good packet");
    frame[at..at + 2].copy_from_slice(&fold(pseudo).to_be_bytes());
    frame
}

/// What the device makes of it.
pub(crate) fn complete(mut frame: Vec<u8>) -> Vec<u8> {
    let at = checksum_at(&frame);
    let l4 = if frame[12] == 8 { ETH + 20 } else { ETH + 40 };
    let sum = !fold(sum(&frame[l4..]));
    let sum = if sum == 0 && at - l4 == 6 { 0xffff } else { sum };
    frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    frame
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|w| u64::from(w[0]) << 8 | u64::from(*w.get(1).unwrap_or(&0))).sum()
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The sum of what the transport checksum covers besides the IP payload, and that payload.
fn pseudo_and_payload(frame: &[u8]) -> Option<(u64, Vec<u8>)> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let (addresses, payload) = match packet.net? {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            if header.header_checksum() != header.to_header().calc_header_checksum() {
                return None;
            }
            ([header.source().as_slice(), header.destination().as_slice()].concat(), ip.payload().clone())
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            ([header.source().as_slice(), header.destination().as_slice()].concat(), ip.payload().clone())
        }
        NetSlice::Arp(_) => return None,
    };
    if payload.fragmented {
        return None;
    }
    let pseudo = match payload.ip_number {
        IpNumber(1) => 0,
        number => sum(&addresses) + u64::from(number.0) + payload.payload.len() as u64,
    };
    Some((pseudo, payload.payload.to_vec()))
}

/// Whether all checksums of a frame hold, by etherparse's reading; `None` where it finds no whole packet.
pub(crate) fn valid(frame: &[u8]) -> Option<bool> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let proto = match packet.net.as_ref()? {
        NetSlice::Ipv4(ip) => ip.payload_ip_number(),
        NetSlice::Ipv6(ip) => ip.payload().ip_number,
        NetSlice::Arp(_) => return None,
    };
    let Some((pseudo, payload)) = pseudo_and_payload(frame) else { return Some(false) };
    let no_checksum = proto == IpNumber::UDP && payload.get(6..8) == Some(&[0, 0]);
    if no_checksum {
        // Only IPv4 may do without (RFC 8200, 8.1).
        return Some(frame[12] == 8);
    }
    Some(fold(pseudo + sum(&payload)) == 0xffff)
}
