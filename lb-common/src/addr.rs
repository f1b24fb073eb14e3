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

/// An IPv6 address in network order. Two words, not sixteen bytes: BPF loads are as wide as the alignment, and a pair
/// of scalars stays in registers (LLVM 22's BPF back end crashes on some block copies of a `[u32; 4]`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Ip6(u64, u64);

/// An Ethernet address. Three words: BPF loads are as wide as the alignment.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Mac([u16; 3]);

impl From<[u8; 6]> for Mac {
    fn from(bytes: [u8; 6]) -> Self {
        bytemuck::cast(bytes)
    }
}

impl From<Mac> for [u8; 6] {
    fn from(mac: Mac) -> Self {
        bytemuck::cast(mac.0)
    }
}

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
    /// From the sixteen bytes of the wire, read as two native integers.
    #[inline(always)]
    pub const fn from_wire(high: u64, low: u64) -> Self {
        Self(high, low)
    }

    /// The sixteen bytes of the wire, as two native integers.
    #[inline(always)]
    pub const fn wire(self) -> (u64, u64) {
        (self.0, self.1)
    }

    /// `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2).
    #[inline(always)]
    pub const fn mapped(ip: Ip4) -> Self {
        let low = if cfg!(target_endian = "little") {
            0xffff_0000 | (ip.0 as u64) << 32
        } else {
            0xffff_0000_0000 | ip.0 as u64
        };
        Self(0, low)
    }

    /// The IPv4 address in a mapped one.
    #[inline(always)]
    pub const fn unmapped(self) -> Option<Ip4> {
        let (head, ip) = if cfg!(target_endian = "little") {
            (self.1 as u32, (self.1 >> 32) as u32)
        } else {
            (((self.1 >> 32) as u32).swap_bytes(), self.1 as u32)
        };
        if self.0 == 0 && head == 0xffff_0000 { Some(Ip4(ip)) } else { None }
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
        bytemuck::cast(ip.octets())
    }
}

impl From<Ip6> for Ipv6Addr {
    fn from(ip: Ip6) -> Self {
        Self::from(bytemuck::cast::<Ip6, [u8; 16]>(ip))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_keep_their_bytes() {
        let v4 = Ipv4Addr::new(10, 96, 0, 1);
        assert_eq!(bytemuck::cast::<Ip4, [u8; 4]>(v4.into()), [10, 96, 0, 1]);
        let v6: Ipv6Addr = "fd00:10:96::1".parse().unwrap();
        assert_eq!(bytemuck::cast::<Ip6, [u8; 16]>(v6.into()), v6.octets());
        assert_eq!(Ipv6Addr::from(Ip6::mapped(v4.into())), v4.to_ipv6_mapped());
        assert_eq!(Ip6::mapped(v4.into()).unmapped(), Some(v4.into()));
        assert_eq!(Ip6::from(v6).unmapped(), None);
        assert_eq!(bytemuck::cast::<NetPort, [u8; 2]>(NetPort::new(0x1234)), [0x12, 0x34]);
    }
}
