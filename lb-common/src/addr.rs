//! Addresses and ports **in network order**, in types that say so.
//!
//! The inner integers are the bytes of the wire read as a native integer. They are compared, copied and hashed,
//! never computed with; use the conversions to get at host-order numbers.

use bytemuck::{Pod, Zeroable};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A TCP or UDP port, or an ICMP echo identifier, in network order.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct NetPort(u16);

impl NetPort {
    /// From a host-order number.
    #[inline(always)]
    pub const fn new(port: u16) -> Self {
        Self(port.to_be())
    }

    /// From the two bytes of the wire, read as a native integer.
    #[inline(always)]
    pub const fn from_wire(raw: u16) -> Self {
        Self(raw)
    }

    /// The host-order number.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }

    /// The two bytes of the wire, as a native integer.
    #[inline(always)]
    pub const fn wire(self) -> u16 {
        self.0
    }
}

/// An IPv4 address in network order.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Ip4(u32);

/// An IPv6 address in network order. Four words, not sixteen bytes: BPF loads are as wide as the alignment.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Ip6([u32; 4]);

impl Ip4 {
    /// From the four bytes of the wire, read as a native integer.
    #[inline(always)]
    pub const fn from_wire(raw: u32) -> Self {
        Self(raw)
    }

    /// The four bytes of the wire, as a native integer.
    #[inline(always)]
    pub const fn wire(self) -> u32 {
        self.0
    }
}

impl Ip6 {
    /// From the sixteen bytes of the wire, read as four native integers.
    #[inline(always)]
    pub const fn from_wire(raw: [u32; 4]) -> Self {
        Self(raw)
    }

    /// The sixteen bytes of the wire, as four native integers.
    #[inline(always)]
    pub const fn wire(self) -> [u32; 4] {
        self.0
    }
}

impl From<Ipv4Addr> for Ip4 {
    fn from(ip: Ipv4Addr) -> Self {
        Self(u32::from_ne_bytes(ip.octets()))
    }
}

impl From<Ip4> for Ipv4Addr {
    fn from(ip: Ip4) -> Self {
        Self::from(ip.0.to_ne_bytes())
    }
}

impl From<Ipv6Addr> for Ip6 {
    fn from(ip: Ipv6Addr) -> Self {
        let o = ip.octets();
        let word = |i: usize| u32::from_ne_bytes([o[i], o[i + 1], o[i + 2], o[i + 3]]);
        Self([word(0), word(4), word(8), word(12)])
    }
}

impl From<Ip6> for Ipv6Addr {
    fn from(ip: Ip6) -> Self {
        let mut o = [0u8; 16];
        for (chunk, word) in o.chunks_exact_mut(4).zip(ip.0) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        Self::from(o)
    }
}

impl From<Ip4> for IpAddr {
    fn from(ip: Ip4) -> Self {
        Self::V4(ip.into())
    }
}

impl From<Ip6> for IpAddr {
    fn from(ip: Ip6) -> Self {
        Self::V6(ip.into())
    }
}
