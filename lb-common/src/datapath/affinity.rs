//! `sessionAffinity: ClientIP` for packets.

use super::Tables;
use super::choose::by_hash;
use crate::affinity::{find, remember, scale};
use crate::maps::{Addr, AffinityKey, FlowKey, Frontend, Set, Slot, SlotKey};

/// What [`place`] says if there is no room to remember a choice.
pub(super) const NO_ROOM: u32 = u32::MAX;

/// The place in the set for a new flow, remembered for the client's next one.
#[inline(never)]
pub(super) fn place<A: Addr, K: Tables<A>>(
    kernel: &K,
    flow: &FlowKey<A>,
    frontend: &Frontend,
    inside: bool,
) -> u32 {
    let set = frontend.set(inside);
    let key = AffinityKey { client: flow.src.mapped(), service: frontend.service, pad: 0 };
    let index = match remembered(kernel, &key, frontend, set) {
        Some(index) => index,
        None => scale(flow.hash(kernel.hash_seed()), set.count),
    };
    let index = kernel.launder_number(index);
    match kernel.slot(&SlotKey { set: set.id, index }) {
        Some(slot) if !kernel.put_affinity(&key, &remember(slot, index, kernel.now(), frontend.affinity)) => {
            NO_ROOM
        }
        _ => index,
    }
}

/// The slot for a client that cannot be remembered: as long as the endpoints stay the same, so does a choice by the address
/// alone.
#[inline(never)]
pub(super) fn by_address<'k, A: Addr, K: Tables<A>>(
    kernel: &'k K,
    flow: &FlowKey<A>,
    frontend: &Frontend,
    inside: bool,
) -> Option<&'k Slot<A>> {
    by_hash(kernel, &FlowKey { src: flow.src, ..FlowKey::default() }, frontend.set(inside))
}

/// The slot that the client's last flow was sent to.
#[inline(never)]
pub(super) fn slot_again<'k, A: Addr, K: Tables<A>>(
    kernel: &'k K,
    flow: &FlowKey<A>,
    frontend: &Frontend,
    inside: bool,
) -> Option<&'k Slot<A>> {
    let set = frontend.set(inside);
    let key = AffinityKey { client: flow.src.mapped(), service: frontend.service, pad: 0 };
    let index = kernel.launder_number(remembered(kernel, &key, frontend, set)?);
    kernel.slot(&SlotKey { set: set.id, index })
}

/// Where in the set the remembered backend is, if it still is. The set is sorted.
#[inline(always)]
fn remembered<A: Addr, K: Tables<A>>(
    kernel: &K,
    key: &AffinityKey,
    frontend: &Frontend,
    set: Set,
) -> Option<u32> {
    let known = kernel.affinity(key)?;
    if !known.holds(kernel.now(), frontend.affinity) {
        return None;
    }
    find(known, set, |key| kernel.slot_group(&key))
}
