//! One's-complement arithmetic of the Internet checksum (RFC 1071), incremental as in RFC 1624.
//!
//! Sums are over the bytes of the wire read as native integers, as the kernel's `__wsum` is: the result is right
//! in memory on either endianness.

/// An unfolded one's-complement sum (the kernel's `__wsum`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(pub u32);

impl Sum {
    /// The change of a checksummed field from `old` to `new`.
    #[inline(always)]
    pub const fn diff16(old: u16, new: u16) -> Self {
        Self(!old as u32 + new as u32)
    }

    /// As [`Self::diff16`] for a whole word.
    #[inline(always)]
    pub const fn diff32(old: u32, new: u32) -> Self {
        Self(!old).plus(Self(new))
    }

    /// One's-complement addition.
    #[inline(always)]
    pub const fn plus(self, other: Self) -> Self {
        let sum = self.0 as u64 + other.0 as u64;
        Self((sum as u32).wrapping_add((sum >> 32) as u32))
    }

    /// The sixteen-bit sum.
    #[inline(always)]
    pub const fn fold(self) -> u16 {
        let sum = (self.0 & 0xffff) + (self.0 >> 16);
        ((sum & 0xffff) + (sum >> 16)) as u16
    }
}

/// `checksum` after a change of the data it covers (the kernel's `csum_replace_by_diff`).
#[inline(always)]
pub const fn update(checksum: u16, change: Sum) -> u16 {
    !Sum(!checksum as u32).plus(change).fold()
}

/// The sum of a run of bytes that starts at an even offset. For tests and slow paths.
pub fn sum(bytes: &[u8]) -> Sum {
    let mut total = 0u64;
    let mut words = bytes.chunks_exact(2);
    for w in &mut words {
        total += u64::from(u16::from_ne_bytes([w[0], w[1]]));
    }
    if let [last] = words.remainder() {
        total += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    let folded = (total & 0xffff_ffff) + (total >> 32);
    Sum(folded as u32).plus(Sum((folded >> 32) as u32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_incremental_update_equals_a_full_sum(mut data in prop::collection::vec(any::<u8>(), 4..64), at in 0usize..60, new: u32) {
            let at = (at % (data.len() - 3)) & !1;
            let before = !sum(&data).fold();
            let old = u32::from_ne_bytes(data[at..at + 4].try_into().unwrap());
            data[at..at + 4].copy_from_slice(&new.to_ne_bytes());
            let after = update(before, Sum::diff32(old, new));
            // Zero has two forms; both verify.
            prop_assert_eq!(Sum(u32::from(after)).plus(sum(&data)).fold(), 0xffff);
        }
    }

    #[test]
    fn the_example_of_rfc_1071() {
        let data = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(sum(&data).fold().to_ne_bytes(), [0xdd, 0xf2]);
    }
}
