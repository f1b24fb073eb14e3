//! Datagrams that nobody waits for.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Source ports, used in turn.
const PORTS: RangeInclusive<u16> = 1024..=65535;
/// Datagrams between two pauses: a veth's queue holds more.
const BURST: usize = 16;
/// How long a pause is.
const PAUSE: Duration = Duration::from_millis(1);

/// `probe flood`: sends datagrams, each from another source port, and waits for no answers.
#[derive(Clone, Debug, clap::Args)]
pub struct Flood {
    /// The protocol
    #[arg(value_parser = ["udp"])]
    pub transport: String,
    /// Where to
    pub to: SocketAddr,
    /// How many datagrams
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub count: u32,
}

/// What became of the datagrams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FloodReport {
    /// Sent.
    pub sent: usize,
    /// Not sent: the port was taken, or the kernel refused.
    pub failed: usize,
}

impl Flood {
    /// So many datagrams.
    pub fn new(to: SocketAddr, count: u32) -> Self {
        Self { transport: "udp".into(), to, count }
    }

    pub(crate) fn args(&self) -> Vec<String> {
        ["flood", "udp", &self.to.to_string(), "--count", &self.count.to_string()].map(String::from).to_vec()
    }

    pub(crate) fn run(&self) -> FloodReport {
        let any = if self.to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let mut report = FloodReport::default();
        for (i, port) in (0..self.count as usize).zip(PORTS.cycle()) {
            if i % BURST == BURST - 1 {
                std::thread::sleep(PAUSE);
            }
            let sent =
                UdpSocket::bind(SocketAddr::new(any, port)).and_then(|s| s.send_to(b"flood\n", self.to));
            match sent {
                Ok(_) => report.sent += 1,
                Err(_) => report.failed += 1,
            }
        }
        report
    }
}
