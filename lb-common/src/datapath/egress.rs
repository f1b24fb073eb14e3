//! The egress hook: sources.

use super::enter::forget;
use super::ingress::{done, leaves_here};
use super::parse::{Headers, Kind, NotOurs, Wire, parse};
use super::rewrite::{End, new_port, rewrite};
use super::{FlowRef, Packet, Put, Reason, Tables, Verdict, fragments, icmp_error, overlay};
use super::{masquerade, masqueraded};
use crate::maps::{Addr, Flow, Side, stance};

/// A packet leaves by a device.
#[inline(always)]
pub fn egress<A: Wire, P: Packet, K: Tables<A>>(packet: &mut P, kernel: &K) -> Verdict {
    let headers = match parse::<A, P>(packet) {
        Ok(headers) => headers,
        Err(NotOurs::Other) => return Verdict::Pass,
        Err(NotOurs::Fragment) => return Verdict::from_raw(fragments::later_at_egress(packet, kernel)),
    };
    if headers.more_fragments != 0 {
        // Never the headers' own address, so that they stay in registers.
        let Some(headers) = kernel.launder(&headers) else { return Verdict::Pass };
        fragments::first_at_egress(packet, kernel, headers);
    }
    whole(packet, kernel, &headers)
}

#[inline(always)]
fn whole<A: Wire, P: Packet, K: Tables<A>>(packet: &mut P, kernel: &K, headers: &Headers<A>) -> Verdict {
    if headers.kind == Kind::IcmpError {
        let Some(headers) = kernel.launder(headers) else { return Verdict::Pass };
        return Verdict::from_raw(icmp_error::at_egress(packet, kernel, headers));
    }
    if overlay::carries(kernel, headers, headers.key.src) {
        return Verdict::Leave;
    }
    let may_be_known = kernel.may_have_flows(&headers.key);
    if !may_be_known && masquerade::is_nobodys(kernel, headers) {
        return Verdict::Leave;
    }
    let mut found = if may_be_known { kernel.flow(&headers.key) } else { None };
    let mut step = found.as_ref().and_then(|entry| known(kernel, headers, entry));
    // Not a function of its own that says an entry or a verdict: both would share a register, which the verifier refuses.
    if step.is_none() {
        let Some(headers) = kernel.launder(headers) else { return Verdict::Pass };
        if let Some(entry) = &found
            && entry.get().flags & Flow::<A>::DNAT == 0
        {
            // Over: its port may be another's by now, and what closed it says nothing of the connection that begins.
            forget(kernel, entry.get());
            found = None;
        }
        if found.is_none() {
            match if may_be_known { missing(kernel, headers) } else { UNKNOWN } {
                REPAIRED => found = kernel.flow(&headers.key),
                UNKNOWN => return unknown(packet, kernel, headers),
                _ => return Verdict::Leave,
            }
        }
        let Some(entry) = &found else { return Verdict::Pass };
        step = known(kernel, headers, entry);
        if step.is_none() {
            return Verdict::from_raw(masquerade::decide(packet, kernel, headers, entry));
        }
    }
    let (Some(entry), Some(step)) = (found, step) else { return Verdict::Pass };
    // One rewrite in the program, whichever way led here.
    match step {
        Step::Back => done(back(packet, headers, entry.get())),
        Step::Masquerade => {
            done(rewrite(packet, headers, End::Source, entry.get().masq, entry.get().masq_port))
        }
        Step::Untouched => Verdict::Pass,
        Step::Held => Verdict::Drop(Reason::HandedOver),
    }
}

/// A packet of no known flow. Most are none of ours: what tells so comes first, and nothing is called for them.
#[inline(always)]
fn unknown<A: Wire, P: Packet, K: Tables<A>>(packet: &mut P, kernel: &K, headers: &Headers<A>) -> Verdict {
    let begins = leaves_here(kernel, headers);
    if !begins && kernel.stance() != stance::DRAIN {
        return Verdict::Leave;
    }
    let may_be_masqueraded = masquerade::is_masquerade_port(kernel, headers.key.sport);
    if !may_be_masqueraded && !kernel.may_masquerade() {
        return Verdict::Leave;
    }
    let Some(device) = kernel.device() else { return Verdict::Pass };
    if begins {
        if !masquerade::may_be_new_or_lost(headers) {
            return Verdict::Pass;
        }
        if masquerade::wanted(kernel, headers, device) {
            return Verdict::from_raw(masquerade::new_flow(packet, kernel, headers, device));
        }
    }
    if may_be_masqueraded && masqueraded::may_be(headers, device) {
        return Verdict::from_raw(masqueraded::keep_port(packet, kernel, headers, device));
    }
    // Nothing was done: it may be an answer that another version's program behind has to see to.
    Verdict::Leave
}

/// What [`missing`] finds: there is an entry now; the flow is none of ours; nothing that belongs to it.
const REPAIRED: u32 = 0;
const NOT_OURS: u32 = 1;
const UNKNOWN: u32 = 2;

/// No entry: lost, or the first packet of a flow that only has to be masqueraded, or nothing of ours.
#[inline(never)]
fn missing<A: Wire, K: Tables<A>>(kernel: &K, headers: &Headers<A>) -> u32 {
    match kernel.flow(&headers.key.reversed()) {
        Some(twin) if repair(kernel, headers, twin.get()) => REPAIRED,
        // Ours leave from there, too.
        Some(twin) if masqueraded::at_this_device(kernel, twin.get()) => UNKNOWN,
        Some(twin) => {
            if twin.get().is_direct() {
                // It may be the pod alone that still has something to say.
                twin.seen(kernel.now(), 0);
            }
            NOT_OURS
        }
        None => UNKNOWN,
    }
}

/// What an entry says is to be done with a packet.
#[derive(Clone, Copy)]
enum Step {
    /// It is a backend's, and becomes the Service's.
    Back,
    /// Its source becomes the masquerade address.
    Masquerade,
    /// Nothing.
    Untouched,
    /// It must not go on just now.
    Held,
}

/// What the entry says; nothing if the source has still to be decided on, or anew.
#[inline(always)]
fn known<A: Wire, K: Tables<A>>(kernel: &K, headers: &Headers<A>, entry: &FlowRef<'_, A>) -> Option<Step> {
    let flow = entry.get();
    match Side::from_raw(flow.side) {
        Some(Side::Reply) => {
            entry.seen(kernel.now(), headers.state() | Flow::<A>::SEEN);
            Some(Step::Back)
        }
        Some(Side::Forward)
            if flow.flags & (Flow::<A>::MASQ_DONE | Flow::<A>::DNAT) == Flow::<A>::MASQ_DONE
                && headers.is_syn()
                && masquerade::is_over(kernel, flow) =>
        {
            None
        }
        Some(Side::Forward) if flow.flags & Flow::<A>::MASQ_DONE != 0 => {
            if entry.seen(kernel.now(), headers.state() | Flow::<A>::SEEN) {
                masquerade::renew(kernel, flow);
            }
            Some(Step::Masquerade)
        }
        Some(Side::Forward) if flow.flags & (Flow::<A>::MASQ_NEEDED | Flow::<A>::MASQ_UNDECIDED) == 0 => {
            entry.seen(kernel.now(), headers.state() | Flow::<A>::SEEN);
            Some(Step::Untouched)
        }
        Some(Side::Forward) => {
            entry.seen(kernel.now(), headers.state());
            None
        }
        Some(Side::Held) => Some(Step::Held),
        // Entries of the ingress hook: a packet that has not been through it.
        Some(Side::Front | Side::Back | Side::Foreign) | None => Some(Step::Untouched),
    }
}

/// A backend's packet becomes the Service's, to the port that the client knows as its own.
#[inline(always)]
pub(super) fn back<A: Wire, P: Packet>(
    packet: &mut P,
    headers: &Headers<A>,
    flow: &Flow<A>,
) -> Result<(), Reason> {
    rewrite(packet, headers, End::Source, flow.vip, flow.vip_port)?;
    if flow.client_port != headers.key.dport {
        new_port(packet, headers, End::Destination, flow.client_port)?;
    }
    Ok(())
}

/// The entry is missing: if it belongs to a translated flow, the entry of the other direction tells. (A reply that
/// went out with the backend's address would make its receiver reset the connection.)
#[inline(always)]
fn repair<A: Addr, K: Tables<A>>(kernel: &K, headers: &Headers<A>, twin: &Flow<A>) -> bool {
    let side = match Side::from_raw(twin.side) {
        Some(Side::Forward) => Side::Reply,
        Some(Side::Reply) => Side::Forward,
        _ => return false,
    };
    if twin.flags & Flow::<A>::DNAT == 0
        || kernel.put_flow(&headers.key, &twin.as_side(side), Put::New).is_err()
    {
        return false;
    }
    kernel.count(Reason::Repaired);
    true
}
