//! `sessionAffinity: ClientIP`: what a client was sent to last, and whether it may be sent there again.

use crate::maps::{Addr, Affinity, SLOT_GROUP, Set, Slot, SlotGroup, SlotGroupKey, SlotKey};

/// Enough for a set as large as the slot table: two to the nineteenth groups.
const STEPS: u32 = 19;

/// Where in the set the remembered backend is, if it still is. Sets are sorted. `group` gives the set's groups of slots.
#[inline(always)]
pub(crate) fn find<'s, A: Addr>(
    known: &Affinity,
    set: Set,
    group: impl Fn(SlotGroupKey) -> Option<&'s SlotGroup<A>>,
) -> Option<u32> {
    let addr = A::from_mapped(known.addr)?;
    let is_it = |slot: &Slot<A>| slot.addr == addr && slot.port == known.port;
    // Where it was is where it most likely still is.
    let (was_in, place) = SlotKey { set: set.id, index: known.index }.group();
    if known.index < set.count && group(was_in)?.slots.get(place).is_some_and(is_it) {
        return Some(known.index);
    }
    // By the groups' first slots: which group has it if any has.
    let (mut low, mut high) = (0, set.count.div_ceil(SLOT_GROUP as u32));
    for _ in 0..STEPS {
        if high - low <= 1 {
            break;
        }
        let middle = low + (high - low) / 2;
        let [first, ..] = &group(SlotGroupKey { set: set.id, group: middle })?.slots;
        let after =
            if first.addr == addr { known.port.get() < first.port.get() } else { addr.precedes(first.addr) };
        if after {
            high = middle;
        } else {
            low = middle;
        }
    }
    let slots = &group(SlotGroupKey { set: set.id, group: low })?.slots;
    let index = low * SLOT_GROUP as u32 + slots.iter().position(is_it)? as u32;
    (index < set.count).then_some(index)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Ip4, NetPort};
    use std::collections::HashMap;

    /// A set's backends: every second address, two ports each, sorted.
    fn slot(index: u32) -> Slot<Ip4> {
        let addr = core::net::Ipv4Addr::from(0x0a00_00ff + index / 2 * 2).into();
        Slot { addr, port: NetPort::new(80 + (index % 2) as u16), ..Slot::default() }
    }

    #[test]
    fn a_backend_is_found_wherever_it_was_and_no_other() {
        for count in 1..=40 {
            let set = Set { id: 7, count };
            let mut groups: HashMap<SlotGroupKey, SlotGroup<Ip4>> = HashMap::new();
            for index in 0..count {
                let (group, place) = SlotKey { set: 7, index }.group();
                groups.entry(group).or_default().slots[place] = slot(index);
            }
            let sought = |slot: Slot<Ip4>, index| {
                let known = remember(&slot, index, 0, 1);
                find::<Ip4>(&known, set, |key| groups.get(&key))
            };
            for index in 0..count {
                for was in [0, index, count - 1, count, 1000] {
                    assert_eq!(sought(slot(index), was), Some(index), "{index} of {count}, was {was}");
                }
                let between = Slot { port: NetPort::new(82), ..slot(index) };
                assert_eq!(sought(between, index), None);
            }
            assert_eq!(sought(slot(count + 1), count), None);
            assert_eq!(sought(Slot { port: NetPort::new(79), ..slot(0) }, 0), None);
            // What is beyond the end is no backend.
            assert_eq!(sought(Slot::default(), count), None);
        }
    }
}
