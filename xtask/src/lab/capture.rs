//! What goes over a device, as tcpdump would show it.

use std::io;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{LinkAddr, recvfrom, setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use super::Host;

/// Plenty for a test; the default loses packets of a burst.
const BUFFER: usize = 16 << 20;

/// Collects the packets of one device until it is asked for them. It sees them as the outside does: what comes in before
/// our programs, what leaves after them.
#[derive(Debug)]
pub struct Capture {
    socket: Socket,
    device: usize,
}

/// A packet of a [`Capture`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Captured {
    /// Whether it left by the device.
    pub out: bool,
    /// From the IP header on.
    pub bytes: Vec<u8>,
}

impl Host {
    /// Begins to collect the packets of a device.
    pub fn capture(&self, device: &str) -> Result<Capture> {
        self.run_in(|| -> Result<Capture> {
            let all = Protocol::from(i32::from((libc::ETH_P_ALL as u16).to_be()));
            let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(all)).context("a packet socket")?;
            socket.set_nonblocking(true)?;
            setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
            let device = nix::net::if_::if_nametoindex(device).with_context(|| format!("no {device}"))?;
            Ok(Capture { socket, device: device as usize })
        })?
    }
}

impl Capture {
    /// The packets so far that have not been read yet.
    pub fn packets(&self) -> Result<Vec<Captured>> {
        let (mut packets, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
        loop {
            match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut buffer) {
                Ok((len, Some(from))) if from.ifindex() == self.device => {
                    let out = from.pkttype() == libc::PACKET_OUTGOING;
                    packets.push(Captured { out, bytes: buffer[..len].to_vec() });
                }
                Ok(_) => {}
                Err(Errno::EAGAIN) => return Ok(packets),
                Err(e) => return Err(io::Error::from(e)).context("reading captured packets"),
            }
        }
    }
}
