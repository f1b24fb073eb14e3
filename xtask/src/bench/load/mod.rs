//! What is done to a server, and how it is told: client and server are processes of their own, in the hosts' namespaces
//! and cgroups, on one core.

mod client;
mod datagrams;
mod drive;
mod serve;
mod stream;

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::topology::Path;

pub(super) use client::{Client, Server, Turn, Watching};
pub(super) use drive::Drive;
pub(super) use serve::Serve;

/// Which transport a load uses, and with it which of the server's ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Transport {
    /// As rules spell it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Load {
    /// Connect, a byte each way, close.
    Connections,
    /// A byte each way over one connection.
    TcpTrips,
    /// A byte each way over one UDP socket.
    UdpTrips,
    /// Frames of 64 bytes over one UDP socket, one way.
    Packets,
    /// The same, but without client and server: the driver's end of the node's wire, and only what the node spends.
    Forwarded,
    /// Bytes over one connection, one way.
    Stream,
    /// Bytes over eight connections, one way.
    Streams,
}

impl Load {
    /// All of them.
    pub(super) const ALL: [Self; 7] = [
        Self::Connections,
        Self::TcpTrips,
        Self::UdpTrips,
        Self::Packets,
        Self::Forwarded,
        Self::Stream,
        Self::Streams,
    ];

    /// In words.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Connections => "new connections",
            Self::TcpTrips => "TCP round trips",
            Self::UdpTrips => "UDP round trips",
            Self::Packets => "64-byte UDP packets",
            Self::Forwarded => "forwarded packets",
            Self::Stream => "TCP stream",
            Self::Streams => "8 TCP streams",
        }
    }

    /// The transport below.
    pub(super) fn transport(self) -> Transport {
        match self {
            Self::UdpTrips | Self::Packets | Self::Forwarded => Transport::Udp,
            _ => Transport::Tcp,
        }
    }

    /// Whether its figure is a time, of which less is better, and not a rate.
    pub(super) fn is_timed(self) -> bool {
        matches!(self, Self::Connections | Self::TcpTrips | Self::UdpTrips)
    }

    /// Whether there is anything to measure on a way: what is forwarded leaves by the device that it came by.
    pub(super) fn is_for(self, path: Path) -> bool {
        self != Self::Forwarded || path == Path::NodePortThere
    }

    /// Unit of its figure, and how many of that an operation a second is.
    pub(super) fn unit(self) -> (&'static str, f64) {
        match self {
            Self::Connections | Self::TcpTrips | Self::UdpTrips => ("µs p50", 1.0),
            Self::Packets | Self::Forwarded => ("kpacket/s", 1e-3),
            Self::Stream | Self::Streams => ("Gbit/s", OPERATION as f64 * 8e-9),
        }
    }

    /// What an operation is, where its processor time is told.
    pub(super) fn operation(self) -> &'static str {
        match self {
            Self::Connections => "connection",
            Self::TcpTrips | Self::UdpTrips => "round trip",
            Self::Packets | Self::Forwarded => "packet",
            Self::Stream | Self::Streams => "64 KiB",
        }
    }

    /// How many make the first turn, before anything is known.
    pub(super) fn first_count(self) -> u64 {
        match self {
            Self::Connections => 200,
            Self::TcpTrips | Self::UdpTrips => 1000,
            Self::Packets | Self::Forwarded => 64 * WINDOW as u64,
            Self::Stream | Self::Streams => 512,
        }
    }
}

/// Bytes that a stream counts as an operation.
const OPERATION: usize = 1 << 16;
/// Packets before the client waits for an answer, so that none is lost for want of room.
const WINDOW: usize = 64;
/// Payload of a 64-byte IPv4 frame (the frame check sequence counts): Ethernet, IPv4 and UDP take 46.
const PAYLOAD: usize = 18;

/// What a client sends first over TCP, and over UDP in each datagram.
mod says {
    /// Answer and go on.
    pub(super) const NEXT: u8 = b'N';
    /// Answer and close.
    pub(super) const LAST: u8 = b'L';
    /// Say who asked and who was asked, and close.
    pub(super) const WHO: u8 = b'W';
    /// Swallow everything, then say how much it was.
    pub(super) const SINK: u8 = b'S';
    /// Do not answer.
    pub(super) const QUIET: u8 = b'Q';
}

/// What a client is asked to do, a line each.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Task {
    /// That many operations, with the addresses in turn where each is a connection of its own.
    Measure { load: Load, count: u64, to: Vec<SocketAddr> },
    /// Connect over and over; a line for each time that another end answers, until there were so many or so many
    /// seconds are over.
    Watch { to: SocketAddr, changes: usize, seconds: u64 },
    /// Connect once.
    Who { to: SocketAddr },
}

/// A client's answer: this line, then the samples as 32-bit numbers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Measured {
    nanoseconds: u64,
    /// Operations that were done; packets that arrived.
    done: u64,
    /// How many samples of whole operations follow, and how many of connecting after those.
    samples: [usize; 2],
}

/// Who answered, and whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ends {
    /// The client's address, as the server sees it.
    pub(super) client: IpAddr,
    /// The server's own.
    pub(super) server: IpAddr,
}

/// From when on somebody answered.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Answered {
    /// Monotonic clock, nanoseconds.
    at: u64,
    ends: Ends,
}
