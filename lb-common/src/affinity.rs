//! `sessionAffinity: ClientIP`: what a client was sent to last, and whether it may be sent there again.

use crate::maps::{Addr, Affinity, Set, Slot};

/// Enough for a set as large as the slot table: two to the twentieth.
const STEPS: u32 = 20;

/// Where in the set the remembered backend is, if it still is. Sets are sorted.
#[inline(always)]
pub(crate) fn find<'s, A: Addr>(
    known: &Affinity,
    set: Set,
    slot: impl Fn(u32) -> Option<&'s Slot<A>>,
) -> Option<u32> {
    let addr = A::from_mapped(known.addr)?;
    let (mut low, mut high) = (0, set.count);
    // Where it was is where it most likely still is.
    let mut index = if known.index < high { known.index } else { high / 2 };
    for _ in 0..STEPS {
        if low >= high {
            break;
        }
        let slot = slot(index)?;
        if slot.addr == addr && slot.port == known.port {
            return Some(index);
        }
        let before =
            if slot.addr == addr { slot.port.get() < known.port.get() } else { slot.addr.precedes(addr) };
        if before {
            low = index + 1;
        } else {
            high = index;
        }
        index = low + (high - low) / 2;
    }
    None
}

/// What to remember of a choice.
#[inline(always)]
pub(crate) fn remember<A: Addr>(slot: &Slot<A>, index: u32, now: u32, timeout: u32) -> Affinity {
    Affinity { addr: slot.addr.mapped(), port: slot.port, pad: 0, index, last_used: now, timeout }
}

/// From a hash to one of `count`: uniform for any count, without a division.
#[inline(always)]
pub(crate) fn scale(hash: u32, count: u32) -> u32 {
    ((hash as u64 * count as u64) >> 32) as u32
}
