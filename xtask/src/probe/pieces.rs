//! Datagrams in fragments, sent in whatever order one likes.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use etherparse::err::ValueTooBigError;
use etherparse::{IpFragOffset, IpNumber, Ipv4Header, Ipv6FragmentHeader, Ipv6Header, UdpHeader};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

/// Bytes of the datagram in each fragment: less than any path in the lab allows.
const PIECE: usize = 1368;

/// Between two fragments, so that their order is the one they are sent in, whichever CPUs they pass by.
const PAUSE: Duration = Duration::from_micros(200);

const HOPS: u8 = 64;

/// The order in which fragments leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
pub enum Order {
    /// As the kernel sends them.
    Straight,
    /// The last one first.
    Reversed,
    /// The first one, which has the ports, after all others.
    FirstLast,
    /// The first one somewhere in the middle.
    Shuffled,
}

impl Order {
    /// All that are not the kernel's.
    pub const ODD: [Self; 3] = [Self::Reversed, Self::FirstLast, Self::Shuffled];

    /// The fragments' places in the datagram, in the order of their sending.
    fn of(self, pieces: usize) -> Vec<usize> {
        let mut places: Vec<usize> = (0..pieces).collect();
        match self {
            Self::Straight => {}
            Self::Reversed => places.reverse(),
            Self::FirstLast => places.rotate_left(1),
            // 3 1 0 2 for four, and so on: every other one from behind, then the rest.
            Self::Shuffled => {
                let (mut odd, even): (Vec<_>, Vec<_>) = places.iter().partition(|&place| place % 2 == 1);
                odd.reverse();
                places = [odd, even].concat();
            }
        }
        places
    }
}

/// Sends what `socket` would send to its peer. The kernel takes part in the first hop's routing only.
pub(super) fn send(socket: &UdpSocket, payload: &[u8], order: Order) -> io::Result<()> {
    let (from, to) = (socket.local_addr()?, socket.peer_addr()?);
    // Milliseconds: 16 bits of them come again after a minute, when no datagram is left that had the same.
    let id = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?).as_millis() as u32;
    let packets = packets(from, to, id, payload).map_err(io::Error::other)?;
    // This protocol means that packets come with their IP headers.
    let raw = Socket::new(Domain::for_address(to), Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
    let next_hop = SocketAddr::new(to.ip(), 0).into();
    for place in order.of(packets.len()) {
        raw.send_to(&packets[place], &next_hop)?;
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

/// The fragments of one datagram, IP headers included.
fn packets(
    from: SocketAddr,
    to: SocketAddr,
    id: u32,
    payload: &[u8],
) -> Result<Vec<Vec<u8>>, ValueTooBigError<usize>> {
    let ip = Ip::new(from.ip(), to.ip());
    let datagram = [ip.udp(from.port(), to.port(), payload)?.to_bytes().as_slice(), payload].concat();
    let last = datagram.len().div_ceil(PIECE) - 1;
    let packet = |(place, piece): (usize, &[u8])| {
        // A datagram has no more than 65535 bytes.
        let offset = IpFragOffset::try_new((place * PIECE / 8) as u16).unwrap_or(IpFragOffset::ZERO);
        let mut packet = ip.fragment(id, piece.len() as u16, offset, place < last);
        packet.extend_from_slice(piece);
        packet
    };
    Ok(datagram.chunks(PIECE).enumerate().map(packet).collect())
}

/// What all fragments have in common.
enum Ip {
    V4(Ipv4Header),
    V6(Ipv6Header),
}

impl Ip {
    fn new(from: IpAddr, to: IpAddr) -> Self {
        if let (IpAddr::V4(from), IpAddr::V4(to)) = (from, to) {
            let (source, destination) = (from.octets(), to.octets());
            let (time_to_live, protocol) = (HOPS, IpNumber::UDP);
            let dont_fragment = false;
            return Self::V4(Ipv4Header {
                time_to_live,
                dont_fragment,
                protocol,
                source,
                destination,
                ..Ipv4Header::default()
            });
        }
        let [source, destination] = [from, to].map(|ip| match ip {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        });
        let next_header = IpNumber::IPV6_FRAGMENTATION_HEADER;
        Self::V6(Ipv6Header { hop_limit: HOPS, next_header, source, destination, ..Ipv6Header::default() })
    }

    fn udp(&self, sport: u16, dport: u16, payload: &[u8]) -> Result<UdpHeader, ValueTooBigError<usize>> {
        match self {
            Self::V4(ip) => UdpHeader::with_ipv4_checksum(sport, dport, ip, payload),
            Self::V6(ip) => UdpHeader::with_ipv6_checksum(sport, dport, ip, payload),
        }
    }

    /// The headers of a fragment with so many bytes.
    fn fragment(&self, id: u32, len: u16, offset: IpFragOffset, more: bool) -> Vec<u8> {
        match self {
            Self::V4(ip) => {
                let mut ip = ip.clone();
                ip.total_len = Ipv4Header::MIN_LEN as u16 + len;
                (ip.identification, ip.fragment_offset, ip.more_fragments) = (id as u16, offset, more);
                ip.to_bytes().to_vec()
            }
            Self::V6(ip) => {
                let mut ip = ip.clone();
                ip.payload_length = Ipv6FragmentHeader::LEN as u16 + len;
                let fragment = Ipv6FragmentHeader::new(IpNumber::UDP, offset, more, id);
                [ip.to_bytes().as_slice(), fragment.to_bytes().as_slice()].concat()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_odd() {
        assert_eq!(Order::Reversed.of(4), [3, 2, 1, 0]);
        assert_eq!(Order::FirstLast.of(4), [1, 2, 3, 0]);
        assert_eq!(Order::Shuffled.of(5), [3, 1, 0, 2, 4]);
    }
}
