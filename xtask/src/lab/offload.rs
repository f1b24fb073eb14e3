//! What a device does for the stack: the part of `ethtool -K` that the lab needs.

use std::ffi::CString;
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};

/// Something that a device can be told to do, or to leave to others.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Offload {
    /// Completing the checksums of what is sent. A veth "does" it by handing them over incomplete.
    SentChecksums,
    /// Making one packet of several that arrive. A veth has a place where drivers can put packets then.
    Gro,
}

impl Offload {
    /// `ETHTOOL_STXCSUM`, `ETHTOOL_SGRO` (linux/ethtool.h)
    const fn command(self) -> u32 {
        match self {
            Self::SentChecksums => 0x17,
            Self::Gro => 0x2c,
        }
    }
}

/// `struct ethtool_value`
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Switches it on or off at a device of the calling thread's network namespace.
pub(crate) fn set(device: &str, what: Offload, on: bool) -> Result<()> {
    let mut value = Value { command: what.command(), data: u32::from(on) };
    let name = CString::new(device)?;
    let bytes = name.as_bytes_with_nul();
    // SAFETY: plain data, valid when zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    anyhow::ensure!(bytes.len() <= request.ifr_name.len(), "{device} is no device's name");
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    let socket = UdpSocket::bind("0.0.0.0:0").context("a socket to ask with")?;
    // SAFETY: the kernel reads the request and what it points to, both of which outlive the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("set {what:?} of {device} to {on}"));
    }
    Ok(())
}
