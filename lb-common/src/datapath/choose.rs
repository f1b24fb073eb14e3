//! A new flow to a frontend: which backend.

use super::ingress::done;
use super::parse::{Headers, Kind, Wire};
use super::rewrite::{End, rewrite};
use super::{Kernel, Outcome, Packet, Put, PutError, Reason, Tables, Verdict};
use crate::maps::{Addr, Device, Flow, Frontend, FrontendKey, Side, Slot, SlotKey};

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
    let inside = is_inside(kernel);
    let (set, drop) = if inside {
        (frontend.internal, frontend.flags & Frontend::INTERNAL_DROP != 0)
    } else {
        (frontend.external, frontend.flags & Frontend::EXTERNAL_DROP != 0)
    };
    let hash = headers.key.hash(kernel.hash_seed());
    if set.count == 0 {
        let verdict =
            if drop { Verdict::Drop(Reason::NoLocalEndpoint) } else { Verdict::Reject(Reason::NoEndpoint) };
        return verdict.raw();
    }
    let slot = match kernel.slot(&SlotKey { set: set.id, index: pick(hash, set.count) }) {
        Some(slot) => slot,
        // The frontend was flipped to a new set, and the old one removed, between our two look-ups.
        None => match again(kernel, headers, inside, hash) {
            Some(slot) => slot,
            None => return Verdict::Drop(Reason::SlotMissing).raw(),
        },
    };
    let mut flow = new_flow(kernel, headers, frontend.service, slot);
    let hairpin = slot.addr == headers.key.src;
    let far = !inside && slot.flags & Slot::<A>::LOCAL == 0;
    flow.flags |= if hairpin || far || frontend.flags & Frontend::MASQUERADE_ALWAYS != 0 {
        Flow::<A>::MASQ_NEEDED
    } else {
        Flow::<A>::MASQ_UNDECIDED
    };
    if let Err(reason) = enter(kernel, &mut flow) {
        return Verdict::Drop(reason).raw();
    }
    kernel.count(Reason::NewFlow);
    done(rewrite(packet, headers, End::Destination, flow.backend, flow.backend_port)).raw()
}

/// Whether the packet comes from a pod of this node.
#[inline(always)]
fn is_inside<K: Kernel>(kernel: &K) -> bool {
    kernel.device().is_some_and(|d| d.flags & Device::POD != 0)
}

/// Uniform for any count, without a division.
#[inline(always)]
fn pick(hash: u32, count: u32) -> u32 {
    ((hash as u64 * count as u64) >> 32) as u32
}

#[inline(always)]
fn again<'k, A: Addr, K: Tables<A>>(
    kernel: &'k K,
    headers: &Headers<A>,
    inside: bool,
    hash: u32,
) -> Option<&'k Slot<A>> {
    let key = &headers.key;
    let frontend = kernel.frontend(&FrontendKey::new(key.dst, key.dport, key.proto))?;
    let set = if inside { frontend.internal } else { frontend.external };
    kernel.slot(&SlotKey { set: set.id, index: pick(hash, set.count) })
}

#[inline(always)]
fn new_flow<A: Addr, K: Tables<A>>(
    kernel: &K,
    headers: &Headers<A>,
    service: u32,
    slot: &Slot<A>,
) -> Flow<A> {
    let key = &headers.key;
    Flow {
        client: key.src,
        vip: key.dst,
        backend: slot.addr,
        masq: key.src,
        client_port: key.sport,
        vip_port: key.dport,
        backend_port: slot.port,
        masq_port: key.sport,
        last_seen: kernel.now(),
        backend_id: slot.backend_id,
        backend_epoch: slot.backend_epoch,
        service,
        proto: key.proto,
        side: 0,
        flags: Flow::<A>::DNAT,
        state: 0,
        pad: 0,
    }
}

/// Enters the three entries of a translated flow; the fourth comes when a port is taken for it. All or none: half of
/// a flow that was refused would translate the replies of the one that it collided with.
#[inline(always)]
fn enter<A: Addr, K: Tables<A>>(kernel: &K, flow: &mut Flow<A>) -> Result<(), Reason> {
    put(kernel, flow, Side::Reply)?;
    if let Err(reason) = put(kernel, flow, Side::Forward) {
        kernel.remove_flow(&flow.key(Side::Reply));
        return Err(reason);
    }
    if let Err(reason) = put(kernel, flow, Side::Front) {
        kernel.remove_flow(&flow.key(Side::Forward));
        kernel.remove_flow(&flow.key(Side::Reply));
        return Err(reason);
    }
    Ok(())
}

#[inline(always)]
fn put<A: Addr, K: Tables<A>>(kernel: &K, flow: &mut Flow<A>, side: Side) -> Result<(), Reason> {
    flow.side = side as u8;
    let key = flow.key(side);
    match kernel.put_flow(&key, flow, Put::New) {
        Ok(()) => Ok(()),
        Err(PutError::Full) => Err(Reason::FlowTableFull),
        Err(PutError::Taken) => {
            let Some(other) = kernel.flow(&key) else { return Err(Reason::Collision) };
            let other = other.get();
            // Our own from before (a half that outlived its other half), or a closed one's.
            if other.same_origin(flow) || other.state & Flow::<A>::CLOSING != 0 || stale(kernel, other) {
                kernel.put_flow(&key, flow, Put::Any).map_err(|_| Reason::FlowTableFull)
            } else {
                Err(Reason::Collision)
            }
        }
    }
}

#[inline(always)]
fn stale<A: Addr, K: Tables<A>>(kernel: &K, flow: &Flow<A>) -> bool {
    flow.backend_id != 0 && kernel.backend_epoch(flow.backend_id) != flow.backend_epoch
}

/// Removes all entries of a flow. What another flow has taken over stays.
#[inline(never)]
pub(super) fn forget<A: Addr, K: Tables<A>>(kernel: &K, flow: &Flow<A>) {
    // Its memory stays as it is until the program ends (RCU), though its own entry is among those that go.
    let forward = flow.key(Side::Forward);
    if let Some(entry) = kernel.flow(&forward) {
        let entry = entry.get();
        if entry.same_origin(flow) {
            if entry.flags & Flow::<A>::MASQ_DONE != 0 {
                let back = entry.key(Side::Back);
                kernel.remove_flow(&back);
            }
            kernel.remove_flow(&forward);
        }
    }
    let reply = flow.key(Side::Reply);
    if kernel.flow(&reply).is_some_and(|entry| entry.get().same_origin(flow)) {
        kernel.remove_flow(&reply);
    }
    kernel.remove_flow(&flow.key(Side::Front));
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
    let set = if is_inside(kernel) { frontend.internal } else { frontend.external };
    let first = pick(headers.key.hash(kernel.hash_seed()), set.count);
    for i in 0..REPAIR_PROBES {
        if i >= set.count {
            break;
        }
        let index = first + i;
        let index = if index >= set.count { index - set.count } else { index };
        let Some(slot) = kernel.slot(&SlotKey { set: set.id, index }) else { break };
        let mut forward = headers.key;
        (forward.dst, forward.dport) = (slot.addr, slot.port);
        if let Some(entry) = kernel.flow(&forward) {
            let flow = entry.get();
            if flow.side == Side::Forward as u8
                && flow.vip == headers.key.dst
                && flow.vip_port == headers.key.dport
            {
                let front = flow.as_side(Side::Front);
                if kernel.put_flow(&front.key(Side::Front), &front, Put::New).is_ok() {
                    kernel.count(Reason::Repaired);
                }
                return done(rewrite(packet, headers, End::Destination, slot.addr, slot.port)).raw();
            }
        }
    }
    if matches!(headers.kind, Kind::Tcp(_)) {
        kernel.count(Reason::MidFlowPassed);
    }
    Verdict::Pass.raw()
}
