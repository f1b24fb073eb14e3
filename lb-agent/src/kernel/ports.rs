//! Ports that must not be masqueraded to, because the host has reserved them.

use anyhow::{Context as _, Result};
use aya::maps::{Array, MapData};

/// Takes over `net.ipv4.ip_local_reserved_ports`. Ports in use are found out by the programs, at the moment of use.
///
/// # Errors
/// If the map cannot be written.
pub fn reserve(ports: &mut Array<MapData, u64>) -> Result<()> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports").unwrap_or_default();
    for (index, bits) in (0u32..).zip(bitmap(&text)) {
        ports.set(index, bits, 0).context("write the reserved ports")?;
    }
    Ok(())
}

/// Every second port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// 0, 2, 4, …
    Even,
    /// 1, 3, 5, …
    Odd,
}

/// Reserves half of all ports besides: while two versions masquerade, no two flows must get one port, though neither
/// knows the other's latest. [`reserve`] ends it.
///
/// # Errors
/// If the map cannot be read or written.
pub fn reserve_half(ports: &mut Array<MapData, u64>, half: Half) -> Result<()> {
    let more = match half {
        Half::Even => 0x5555_5555_5555_5555,
        Half::Odd => 0xaaaa_aaaa_aaaa_aaaa,
    };
    for index in 0..ports.len() {
        let bits: u64 = ports.get(&index, 0).context("read the reserved ports")?;
        ports.set(index, bits | more, 0).context("write the reserved ports")?;
    }
    Ok(())
}

/// The kernel's list (`8080,9000-9100`) as one bit a port.
fn bitmap(text: &str) -> [u64; 1024] {
    let mut bits = [0u64; 1024];
    for item in text.trim().split(',').filter(|item| !item.is_empty()) {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        if let (Ok(first), Ok(last)) = (first.parse::<u16>(), last.parse::<u16>()) {
            for port in first..=last {
                bits[usize::from(port >> 6)] |= 1 << (port & 63);
            }
        }
    }
    bits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_list_is_understood() {
        let bits = bitmap("8080,9000-9002,65535\n");
        let set: Vec<u16> =
            (0..=u16::MAX).filter(|p| bits[usize::from(p >> 6)] >> (p & 63) & 1 == 1).collect();
        assert_eq!(set, [8080, 9000, 9001, 9002, 65535]);
        assert_eq!(bitmap(""), [0; 1024]);
    }
}
