//! Room in a full flow table. Tidying up is the agent's work; this is for when it is away, so that Services can go on
//! being used: a new flow may take the place of one that began a while ago and is over.

use super::enter::forget;
use super::{Reason, Tables};
use crate::maps::{Addr, Flow};

/// Flows looked at.
const LOOKS: u32 = 4;

/// Ends a flow that is over, if one is found.
#[inline(never)]
pub(super) fn make_room<A: Addr, K: Tables<A>>(kernel: &K) -> bool {
    for after in 0..LOOKS {
        if let Some(key) = kernel.old_flow(after)
            && let Some(entry) = kernel.flow(key)
            && is_over(entry.get(), kernel.now())
        {
            forget(kernel, entry.get());
            kernel.count(Reason::Reclaimed);
            return true;
        }
    }
    false
}

/// Long before its time, but nothing is lost by it: a packet that comes after all begins a new flow, which the hash
/// sends to the same backend.
#[inline(always)]
fn is_over<A: Addr>(flow: &Flow<A>, now: u32) -> bool {
    if is_closed(flow, now) {
        return true;
    }
    let patience = match flow.state {
        state if state & Flow::<A>::SEEN == 0 => 5,
        _ if flow.proto == super::parse::TCP => return false,
        _ => 30,
    };
    is_idle(flow, now, patience)
}

/// Whether that side was closed, and what belongs to the closing has gone by.
#[inline(always)]
pub(super) fn is_closed<A: Addr>(flow: &Flow<A>, now: u32) -> bool {
    flow.state & Flow::<A>::CLOSING != 0 && is_idle(flow, now, 2)
}

#[inline(always)]
fn is_idle<A: Addr>(flow: &Flow<A>, now: u32, seconds: u32) -> bool {
    let idle = now.wrapping_sub(flow.last_seen);
    // More than half of the clock's range is the future: another CPU's packet.
    idle >= seconds && idle < u32::MAX / 2
}
