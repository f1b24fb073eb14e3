//! Entering a flow's entries, and removing them.
//!
//! Two flows of one client may become the same tuple: one port to two Services with one backend, or to a Service and
//! straight to its backend. The later one gets another port for the client then (an *alias*), as from nf_conntrack.
//! It is put in and taken out at the client's own device, where the destination is translated too, so that the
//! address, which routing and policies look at, stays what it is.

use super::ingress::{begins_here, onward, used_again};
use super::parse::{Headers, Kind, Wire};
use super::ports::Ports;
use super::redirect::{forget_client, note_client};
use super::{FlowRef, Flows, Outcome, Packet, Put, PutError, Reason, Tables, Verdict};
use crate::addr::NetPort;
use crate::maps::{Addr, Flow, FlowKey, FrontendKey, Side, Slot};

/// Ports tried for an alias.
const ALIASES: u32 = 4;

/// What [`enter`] says if the table is full.
pub(super) const FULL: Outcome = Verdict::Drop(Reason::FlowTableFull).raw();

/// Enters the three entries of a translated flow; the fourth comes when a port is taken for it. `Pass` if it is done.
#[inline(never)]
pub(super) fn enter<A: Addr, K: Tables<A>>(kernel: &K, draft: &FlowRef<'_, A>) -> Outcome {
    let mut ports = Ports::new(kernel, &draft.get().key(Side::Front));
    for _ in 0..=ALIASES {
        if !connected(kernel, draft.get()) {
            match put_all(kernel, draft) {
                ENTERED => {
                    kernel.count(Reason::NewFlow);
                    kernel.remember(&draft.get().key(Side::Forward));
                    return Verdict::Pass.raw();
                }
                NO_ROOM => return FULL,
                _ => {}
            }
        }
        draft.set_alias(NetPort::new(ports.next()));
    }
    Verdict::Drop(Reason::Collision).raw()
}

/// Whether the client talks to the backend already, straight, with that port: nothing of ours would know it.
#[inline(always)]
fn connected<A: Addr, K: Tables<A>>(kernel: &K, flow: &Flow<A>) -> bool {
    let Some(device) = kernel.device() else { return false };
    flow.proto == super::parse::TCP
        && device.netns != 0
        && kernel.connected(&flow.key(Side::Reply), device.netns - 1)
}

/// What becomes of an attempt to enter.
const ENTERED: Outcome = 0;
const NO_ROOM: Outcome = 1;
const TAKEN: Outcome = 2;

/// All or none: half of a flow that was refused would translate the replies of the one that it collided with.
#[inline(always)]
fn put_all<A: Addr, K: Tables<A>>(kernel: &K, draft: &FlowRef<'_, A>) -> Outcome {
    if kernel.redirects() {
        note_client(kernel, draft);
    }
    let result = kernel.put_draft(Side::Reply as u32);
    if kernel.redirects() {
        forget_client(draft);
    }
    if result != ENTERED {
        return result;
    }
    let result = kernel.put_draft(Side::Forward as u32);
    if result != ENTERED {
        kernel.remove_flow(&draft.get().key(Side::Reply));
        return result;
    }
    let result = kernel.put_draft(Side::Front as u32);
    if result != ENTERED {
        kernel.remove_flow(&draft.get().key(Side::Forward));
        kernel.remove_flow(&draft.get().key(Side::Reply));
    }
    result
}

/// Enters the draft as one side of the flow. See [`Apart::put_draft`](super::Apart).
#[inline(always)]
pub fn put_draft<A: Addr, K: Tables<A>>(kernel: &K, side: u32) -> Outcome {
    let (Some(draft), Some(side)) = (kernel.draft(), Side::from_raw(side as u8)) else { return NO_ROOM };
    let key = draft.turn(side);
    let flow = draft.get();
    let result = match kernel.put_flow(&key, flow, Put::New) {
        Err(PutError::Taken) => {
            let Some(other) = kernel.flow(&key) else { return TAKEN };
            let other = other.get();
            // Our own from before (a half that outlived its other half), or one that is over.
            if !other.same_origin(flow) && other.state & Flow::<A>::RST == 0 && !stale(kernel, other) {
                return TAKEN;
            }
            kernel.put_flow(&key, flow, Put::Any)
        }
        result => result,
    };
    if result.is_ok() { ENTERED } else { NO_ROOM }
}

/// A UDP flow to a backend that is gone.
#[inline(always)]
pub(super) fn stale<A: Addr, K: Flows<A>>(kernel: &K, flow: &Flow<A>) -> bool {
    flow.backend_id != 0 && kernel.backend_epoch(flow.backend_id) != flow.backend_epoch
}

/// The forward entry of the flow that begins with `front`, if it goes to that backend; maybe with an alias.
#[inline(never)]
pub(super) fn forward<'k, A: Addr, K: Tables<A>>(
    kernel: &'k K,
    front: &FlowKey<A>,
    slot: &Slot<A>,
    aliases: bool,
) -> Option<FlowRef<'k, A>> {
    let mut ports = Ports::new(kernel, front);
    let mut key = *front;
    (key.dst, key.dport) = (slot.addr, slot.port);
    for _ in 0..=ALIASES {
        if let Some(entry) = kernel.flow(&key)
            && entry.get().is_forward_of(front)
        {
            return Some(entry);
        }
        if !aliases {
            break;
        }
        key.sport = NetPort::new(ports.next());
    }
    None
}

/// What [`straight`] says of a packet that may be for a frontend after all.
pub(super) const LOOK_ON: Outcome = 0x400;
/// What [`known_straight`] says of a packet that begins a flow.
const BEGINS: Outcome = 0x402;

/// A packet to a backend's own address, with the tuple of a flow that comes by way of a Service (`twin`, that flow's
/// forward entry): it is a flow of its own. (One function after the other, not one in the other: the stack is short.)
#[inline(always)]
pub(super) fn straight<A: Wire, P: Packet, K: Tables<A>>(
    packet: &mut P,
    kernel: &K,
    headers: &Headers<A>,
    twin: &Flow<A>,
) -> Outcome {
    match known_straight(packet, kernel, headers) {
        BEGINS => new_straight(packet, kernel, headers, twin),
        outcome => outcome,
    }
}

#[inline(never)]
fn known_straight<A: Wire, P: Packet, K: Tables<A>>(
    packet: &mut P,
    kernel: &K,
    headers: &Headers<A>,
) -> Outcome {
    let mut key = headers.key;
    key.variant = 1;
    if let Some(entry) = kernel.flow(&key) {
        let flow = entry.get();
        if !used_again(headers, flow) {
            entry.seen(kernel.now(), headers.state() | Flow::<A>::SEEN);
            return onward(packet, headers, flow).raw();
        }
        forget(kernel, flow);
    }
    if !headers.starts_flow() || !begins_here(kernel, headers) {
        return Verdict::Leave.raw();
    }
    BEGINS
}

#[inline(never)]
fn new_straight<A: Wire, P: Packet, K: Tables<A>>(
    packet: &mut P,
    kernel: &K,
    headers: &Headers<A>,
    twin: &Flow<A>,
) -> Outcome {
    let front = FrontendKey::new(headers.key.dst, headers.key.dport, headers.key.proto);
    if kernel.frontend(&front).is_some() {
        // A Service whose address is its endpoint's.
        return LOOK_ON;
    }
    if twin.state & Flow::<A>::CLOSING != 0 && matches!(headers.kind, Kind::Tcp(_)) || stale(kernel, twin) {
        // Over: its entries must not translate this one's replies.
        forget(kernel, twin);
        return Verdict::Pass.raw();
    }
    let Some(draft) = kernel.draft() else { return Verdict::Pass.raw() };
    let flags = Flow::<A>::DNAT | Flow::<A>::MASQ_UNDECIDED;
    draft.write(Flow { flags, ..Flow::straight(&headers.key, kernel.now()) });
    let entered = enter(kernel, &draft);
    if entered != Verdict::Pass.raw() {
        return entered;
    }
    onward(packet, headers, draft.get()).raw()
}

/// Removes all entries of a flow. What another flow has taken over stays.
#[inline(never)]
pub(super) fn forget<A: Addr, K: Tables<A>>(kernel: &K, flow: &Flow<A>) {
    // Its memory stays as it is until the program ends (RCU), though its own entry is among those that go.
    remove(kernel, flow, Side::Forward);
    remove(kernel, flow, Side::Reply);
    remove(kernel, flow, Side::Front);
}

#[inline(never)]
fn remove<A: Addr, K: Tables<A>>(kernel: &K, flow: &Flow<A>, side: Side) {
    let mut key = flow.key(side);
    let Some(entry) = kernel.flow(&key) else { return };
    if !entry.get().same_origin(flow) {
        return;
    }
    if matches!(side, Side::Forward) {
        key.variant = 1;
        if kernel.flow(&key).is_some_and(|other| !other.get().same_origin(flow)) {
            // A straight flow has the same tuple: it is found by way of this entry.
            entry.seen(kernel.now(), Flow::<A>::RST);
            return;
        }
        // The forward entry alone is sure to know it.
        if entry.get().flags & Flow::<A>::MASQ_DONE != 0 {
            key = entry.get().key(Side::Back);
            if kernel.flow(&key).is_some_and(|back| back.get().same_origin(flow)) {
                kernel.remove_flow(&key);
            }
        }
        key = flow.key(side);
    }
    kernel.remove_flow(&key);
}
