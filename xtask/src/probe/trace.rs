//! One packet at a time, and the ICMP error that comes of it.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

use super::ask::Transport;
use super::ping::forbid_fragments;
use super::wire::{Failure, canonical, millis};
use crate::lab::Host;

/// `probe trace`: sends a packet for each hop limit, each from a new, connected socket, and prints what came of it. What
/// the kernel takes for an error of this socket has to quote a packet as this socket has sent it.
#[derive(Clone, Debug, clap::Args)]
pub struct Trace {
    /// The protocol: a SYN or a datagram
    pub transport: Transport,
    /// Where to
    pub to: SocketAddr,
    /// The first hop limit
    #[arg(long, default_value_t = 1)]
    pub first: u8,
    /// The last hop limit
    #[arg(long, default_value_t = 8)]
    pub last: u8,
    /// UDP: bytes of payload
    #[arg(long, default_value_t = 6)]
    pub size: usize,
    /// UDP: so many packets with each hop limit, from one socket
    #[arg(long, default_value_t = 1)]
    pub times: usize,
    /// How long to wait for what comes of each, in milliseconds
    #[arg(long, default_value = "900", value_parser = millis)]
    pub timeout: Duration,
}

/// What came of one packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hop {
    /// It arrived: the connection stands, or a datagram came back.
    Answered,
    /// An ICMP error came back.
    Icmp(IcmpError),
    /// Neither.
    Failed(Failure),
}

/// An ICMP error as the socket has it in its error queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IcmpError {
    /// Who sent it.
    pub from: IpAddr,
    /// Where the packet that it quotes was going to.
    pub about: SocketAddr,
    /// ICMP's or ICMPv6's type.
    pub kind: u8,
    /// And code.
    pub code: u8,
    /// The path's MTU, where it is about that.
    pub mtu: u32,
}

impl Host {
    /// Sends packets with growing hop limits.
    pub fn trace(&self, trace: &Trace) -> Result<Vec<Hop>> {
        self.probe_lines(&trace.args())
    }
}

impl Trace {
    /// A packet that may go as far as it has to.
    pub fn new(transport: Transport, to: SocketAddr) -> Self {
        Self { transport, to, first: 64, last: 64, size: 6, times: 1, timeout: Duration::from_millis(900) }
    }

    /// Packets that may go so many hops, and one more each, until one arrives.
    pub fn hops(mut self, last: u8) -> Self {
        (self.first, self.last) = (1, last);
        self
    }

    /// So many datagrams of so many bytes, not to be fragmented, from one socket.
    pub fn unfragmented(mut self, times: usize, size: usize) -> Self {
        (self.times, self.size) = (times, size);
        self
    }

    pub(crate) fn args(&self) -> Vec<String> {
        let transport = if self.transport == Transport::Tcp { "tcp" } else { "udp" };
        let mut args = vec!["trace".into(), transport.into(), self.to.to_string()];
        args.extend(["--first".into(), self.first.to_string(), "--last".into(), self.last.to_string()]);
        args.extend(["--size".into(), self.size.to_string(), "--times".into(), self.times.to_string()]);
        args.extend(["--timeout".into(), self.timeout.as_millis().to_string()]);
        args
    }

    pub(crate) fn run(&self, mut report: impl FnMut(&Hop) -> Result<()>) -> Result<()> {
        for limit in self.first..=self.last {
            let socket = self.socket(limit)?;
            for _ in 0..self.times {
                let hop = self.send(&socket).unwrap_or_else(|e| Hop::Failed(e.into()));
                report(&hop)?;
                if hop == Hop::Answered && self.times == 1 {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn socket(&self, limit: u8) -> io::Result<Socket> {
        let (kind, protocol) = match self.transport {
            Transport::Tcp => (Type::STREAM, Protocol::TCP),
            Transport::Udp => (Type::DGRAM, Protocol::UDP),
        };
        let socket = Socket::new(Domain::for_address(self.to), kind, Some(protocol))?;
        socket.set_nonblocking(true)?;
        if self.to.is_ipv4() {
            socket.set_ttl_v4(limit.into())?;
            setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
        } else {
            socket.set_unicast_hops_v6(limit.into())?;
            setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
        }
        forbid_fragments(&socket, self.to.is_ipv4())?;
        if self.transport == Transport::Udp {
            socket.connect(&self.to.into())?;
        }
        Ok(socket)
    }

    fn send(&self, socket: &Socket) -> io::Result<Hop> {
        let mut wanted = PollFlags::POLLIN;
        if self.transport == Transport::Udp {
            let mut request = vec![b'x'; self.size.max(1)];
            request[self.size.max(1) - 1] = b'\n';
            socket.send(&request)?;
        } else if let Err(e) = socket.connect(&self.to.into())
            && e.raw_os_error() != Some(libc::EINPROGRESS)
        {
            return Err(e);
        } else {
            wanted = PollFlags::POLLOUT;
        }
        let deadline = Instant::now() + self.timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(socket.as_fd(), wanted)];
            if poll(&mut fds, timeout)? == 0 {
                return Ok(Hop::Failed(Failure::Timeout));
            }
            if let Some(error) = icmp_error(socket)? {
                // The socket's own copy of the error must not meet the next packet.
                let _ = socket.take_error();
                return Ok(Hop::Icmp(error));
            }
            if let Some(error) = socket.take_error()? {
                return Err(error);
            }
            if fds[0].revents().is_some_and(|r| r.intersects(wanted)) {
                if self.transport == Transport::Udp {
                    nix::unistd::read(socket, &mut [0; 2048])?;
                }
                return Ok(Hop::Answered);
            }
        }
    }
}

/// The first ICMP error in the socket's queue.
fn icmp_error(socket: &Socket) -> io::Result<Option<IcmpError>> {
    let mut space = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
    let mut quoted = [0; 2048];
    let mut parts = [IoSliceMut::new(&mut quoted)];
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let message = match recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags) {
        Err(Errno::EAGAIN) => return Ok(None),
        message => message?,
    };
    let about = message.address.as_ref().and_then(|a| {
        let v4 = a.as_sockaddr_in().map(|a| SocketAddr::from((a.ip(), a.port())));
        v4.or_else(|| a.as_sockaddr_in6().map(|a| SocketAddr::from((a.ip(), a.port()))))
    });
    for part in message.cmsgs()? {
        let (error, from) = match part {
            ControlMessageOwned::Ipv4RecvErr(error, Some(from)) => {
                (error, IpAddr::from(from.sin_addr.s_addr.to_ne_bytes()))
            }
            ControlMessageOwned::Ipv6RecvErr(error, Some(from)) => {
                (error, IpAddr::from(from.sin6_addr.s6_addr))
            }
            _ => continue,
        };
        if let Some(about) = about
            && matches!(error.ee_origin, libc::SO_EE_ORIGIN_ICMP | libc::SO_EE_ORIGIN_ICMP6)
        {
            let (kind, code, mtu) = (error.ee_type, error.ee_code, error.ee_info);
            return Ok(Some(IcmpError { from, about: canonical(about), kind, code, mtu }));
        }
    }
    Ok(None)
}
