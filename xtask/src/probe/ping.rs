//! ICMP echo over the kernel's ping sockets.

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::Result;
use socket2::{Domain, Protocol, Socket, Type};

use super::wire::{Answer, Failure, Reply, millis};

/// `probe ping`: sends echo requests and prints what became of each.
#[derive(Clone, Debug, clap::Args)]
pub struct Ping {
    /// Where to
    pub to: IpAddr,
    /// How many requests
    #[arg(long, default_value_t = 1)]
    pub count: u16,
    /// Payload of each request in bytes
    #[arg(long, default_value_t = 56)]
    pub size: usize,
    /// Forbid fragmentation
    #[arg(long)]
    pub df: bool,
    /// How long to wait for each answer, in milliseconds
    #[arg(long, default_value = "1000", value_parser = millis)]
    pub timeout: Duration,
}

impl Ping {
    /// One request.
    pub fn new(to: IpAddr) -> Self {
        Self { to, count: 1, size: 56, df: false, timeout: Duration::from_secs(1) }
    }

    /// So many requests.
    pub fn count(mut self, count: u16) -> Self {
        self.count = count;
        self
    }

    /// So many bytes of payload.
    pub fn size(mut self, size: usize) -> Self {
        self.size = size;
        self
    }

    /// So many bytes of payload, not to be fragmented.
    pub fn unfragmented(mut self, size: usize) -> Self {
        (self.size, self.df) = (size, true);
        self
    }

    pub(crate) fn args(&self) -> Vec<String> {
        let [to, timeout] = [self.to.to_string(), self.timeout.as_millis().to_string()];
        let [count, size] = [self.count.to_string(), self.size.to_string()];
        let mut args: Vec<_> = ["ping", &to, "--count", &count, "--size", &size, "--timeout", &timeout]
            .map(String::from)
            .to_vec();
        args.extend(self.df.then(|| "--df".into()));
        args
    }

    pub(crate) fn run(&self, mut report: impl FnMut(&Answer) -> Result<()>) -> Result<()> {
        let socket = self.socket()?;
        for seq in 0..self.count {
            report(&Answer(self.once(&socket, seq)))?;
        }
        Ok(())
    }

    fn socket(&self) -> Result<Socket> {
        let (domain, protocol) = match self.to {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        let socket = Socket::new(domain, Type::DGRAM, Some(protocol))?;
        if self.df {
            forbid_fragments(&socket, self.to.is_ipv4())?;
        }
        // Connected, so that ICMP errors come back as errors of the socket.
        socket.connect(&SocketAddr::new(self.to, 0).into())?;
        Ok(socket)
    }

    fn once(&self, socket: &Socket, seq: u16) -> Result<Reply, Failure> {
        const HEADER: usize = 8;
        let mut request = vec![0x5a; HEADER + self.size];
        // The kernel fills in id and checksum.
        request[..HEADER].fill(0);
        request[0] = if self.to.is_ipv4() { 8 } else { 128 };
        request[6..8].copy_from_slice(&seq.to_be_bytes());
        let start = Instant::now();
        socket.send(&request)?;

        let mut buffer = vec![0; request.len() + 64];
        loop {
            let left = self.timeout.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(Failure::Timeout);
            }
            socket.set_read_timeout(Some(left))?;
            let n = (&mut &*socket).read(&mut buffer)?;
            // An answer to an earlier request that was late.
            if n < HEADER || buffer[6..8] != seq.to_be_bytes() {
                continue;
            }
            if buffer[HEADER..n] != request[HEADER..] {
                return Err(Failure::Corrupt);
            }
            let own = socket.local_addr()?.as_socket().unwrap_or(SocketAddr::new(self.to, 0));
            return Ok(Reply {
                name: String::new(),
                peer: None,
                local: None,
                from: SocketAddr::new(self.to, 0),
                peername: None,
                own,
                us: start.elapsed().as_micros() as u64,
            });
        }
    }
}

/// Sets the socket to full path MTU discovery, for which neither nix nor socket2 has a name.
pub(super) fn forbid_fragments(socket: &Socket, v4: bool) -> io::Result<()> {
    let (level, name, value) = match v4 {
        true => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO),
        false => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO),
    };
    let size = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the descriptor is open, and the value is an int as both options want it.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), size) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
