//! A new flow to a frontend: which backend.

use super::enter::{FULL, enter, forward};
use super::ingress::onward;
use super::parse::{Headers, Kind, Wire};
use super::reclaim::make_room;
use super::{FlowRef, Kernel, Outcome, Packet, Put, Reason, Tables, Verdict, affinity};
use crate::affinity::scale;
use crate::maps::{Addr, Device, Flow, FlowKey, Frontend, FrontendKey, Set, Side, Slot, SlotKey};

/// Slots tried for a mid-flow packet whose entry was lost.
const REPAIR_PROBES: u32 = 8;

/// Chooses a backend for a packet to `frontend`, enters the flow and sends the packet on.
#[inline(never)]
pub(super) fn choose<A: Wire, P: Packet, K: Tables<A>>(
    packet: &mut P,
    kernel: &K,
    headers: &Headers<A>,
    frontend: &Frontend,
) -> Outcome {
    if frontend.flags & Frontend::SOCKETS_ONLY != 0 {
        return Verdict::Pass.raw();
    }
    let device = device_flags(kernel);
    let inside = device & Device::POD != 0;
    let set = frontend.set(inside);
    if set.count == 0 {
        let drop = if inside { Frontend::INTERNAL_DROP } else { Frontend::EXTERNAL_DROP };
        let verdict = if frontend.flags & drop != 0 {
            Verdict::Drop(Reason::NoLocalEndpoint)
        } else {
            Verdict::Reject(Reason::NoEndpoint)
        };
        return verdict.raw();
    }
    let key = &headers.key;
    if frontend.flags & Frontend::SOURCE_RANGES != 0 && !kernel.source_admitted(frontend.service, key.src) {
        return Verdict::Drop(Reason::SourceRange).raw();
    }
    let slot = match pick(kernel, key, frontend, inside) {
        Some(slot) => slot,
        // The frontend was flipped to a new set, and the old one removed, between our two look-ups.
        None => match again(kernel, key, inside) {
            Some(slot) => slot,
            None => return Verdict::Drop(Reason::SlotMissing).raw(),
        },
    };
    let hairpin = slot.addr == key.src;
    let local = slot.flags & Slot::<A>::LOCAL != 0;
    let far = !inside && !local;
    let bridged =
        if local && !hairpin && device & Device::bridged::<A>() != 0 { Flow::<A>::BRIDGED } else { 0 };
    let masquerade = if hairpin || far || frontend.flags & Frontend::MASQUERADE_ALWAYS != 0 {
        Flow::<A>::MASQ_NEEDED
    } else {
        Flow::<A>::MASQ_UNDECIDED
    };
    let Some(draft) = kernel.draft() else { return Verdict::Drop(Reason::SlotMissing).raw() };
    draft.write(Flow {
        backend: slot.addr,
        backend_port: slot.port,
        backend_id: slot.backend_id,
        backend_epoch: slot.backend_epoch,
        service: frontend.service,
        flags: Flow::<A>::DNAT | masquerade | bridged,
        ..Flow::straight(key, kernel.now())
    });
    let mut entered = enter(kernel, &draft);
    if entered == FULL && make_room(kernel) {
        entered = enter(kernel, &draft);
    }
    if entered != Verdict::Pass.raw() {
        return entered;
    }
    onward(packet, headers, draft.get()).raw()
}

/// The flags of the device that the packet comes in by.
#[inline(always)]
fn device_flags<K: Kernel>(kernel: &K) -> u32 {
    kernel.device().map_or(0, |device| device.flags)
}

#[inline(always)]
fn pick<'k, A: Addr, K: Tables<A>>(
    kernel: &'k K,
    key: &FlowKey<A>,
    frontend: &Frontend,
    inside: bool,
) -> Option<&'k Slot<A>> {
    if frontend.affinity == 0 {
        return by_hash(kernel, key, frontend.set(inside));
    }
    match affinity::place(kernel, key, frontend, inside) {
        affinity::NO_ROOM => affinity::by_address(kernel, key, frontend, inside),
        index => slot(kernel, frontend.set(inside), index),
    }
}

#[inline(never)]
fn slot<A: Addr, K: Tables<A>>(kernel: &K, set: Set, index: u32) -> Option<&Slot<A>> {
    kernel.slot(&SlotKey { set: set.id, index })
}

/// The slot that a tuple's hash says.
#[inline(always)]
pub(super) fn by_hash<'k, A: Addr, K: Tables<A>>(
    kernel: &'k K,
    key: &FlowKey<A>,
    set: Set,
) -> Option<&'k Slot<A>> {
    kernel.slot(&SlotKey { set: set.id, index: scale(key.hash(kernel.hash_seed()), set.count) })
}

#[inline(always)]
fn again<'k, A: Addr, K: Tables<A>>(kernel: &'k K, key: &FlowKey<A>, inside: bool) -> Option<&'k Slot<A>> {
    let frontend = kernel.frontend(&FrontendKey::new(key.dst, key.dport, key.proto))?;
    by_hash(kernel, key, frontend.set(inside))
}

/// A mid-flow packet without an entry. If the flow's other entries are there, the choice can be made again, because
/// it goes by the hash of the tuple. Otherwise it is none of ours (kube-proxy's from before we came, say) and is
/// left to the host.
#[inline(never)]
pub(super) fn repair<A: Wire, P: Packet, K: Tables<A>>(
    packet: &mut P,
    kernel: &K,
    headers: &Headers<A>,
    frontend: &Frontend,
) -> Outcome {
    let Some(entry) = search(kernel, &headers.key, frontend) else {
        if matches!(headers.kind, Kind::Tcp(_)) {
            kernel.count(Reason::MidFlowPassed);
        }
        return Verdict::Leave.raw();
    };
    restore(kernel, &entry);
    onward(packet, headers, entry.get()).raw()
}

/// Makes the first entry again from the forward one.
#[inline(never)]
fn restore<A: Addr, K: Tables<A>>(kernel: &K, forward: &FlowRef<'_, A>) {
    let Some(draft) = kernel.draft() else { return };
    draft.write(forward.get().as_side(Side::Front));
    if kernel.put_flow(&draft.get().key(Side::Front), draft.get(), Put::New).is_ok() {
        kernel.count(Reason::Repaired);
    }
}

/// The flow's forward entry: by what the client was sent to last, by the backend that the tuple's hash says, and by a
/// few neighbours in case that the set has changed.
#[inline(never)]
fn search<'k, A: Addr, K: Tables<A>>(
    kernel: &'k K,
    key: &FlowKey<A>,
    frontend: &Frontend,
) -> Option<FlowRef<'k, A>> {
    let inside = device_flags(kernel) & Device::POD != 0;
    if frontend.affinity != 0
        && let Some(slot) = affinity::slot_again(kernel, key, frontend, inside)
        && let Some(entry) = forward(kernel, key, slot, true)
    {
        return Some(entry);
    }
    let set = frontend.set(inside);
    let first = scale(key.hash(kernel.hash_seed()), set.count);
    for i in 0..REPAIR_PROBES {
        if i >= set.count {
            break;
        }
        let index = first + i;
        let index = if index >= set.count { index - set.count } else { index };
        let slot = kernel.slot(&SlotKey { set: set.id, index })?;
        if let Some(entry) = forward(kernel, key, slot, i == 0) {
            return Some(entry);
        }
    }
    None
}
