//! Later fragments have no ports: they are the first one's. Those that overtook it are kept until it comes.

use super::enter::stale;
use super::ingress::done;
use super::parse::{Headers, Wire};
use super::rewrite::{End, readdress};
use super::{Kernel, Outcome, Packet, Reason, Tables, Verdict};
use crate::maps::{Flow, FlowKey, Fragment, FragmentKey, FrontendKey, Side};

/// Seconds that a datagram takes at most: its identification may be used again later (RFC 6864).
const LIFETIME: u32 = 10;

/// See [`first`].
#[inline(never)]
pub(super) fn first_at_ingress<A: Wire, P: Packet, K: Tables<A>>(
    packet: &mut P,
    kernel: &K,
    headers: &Headers<A>,
) -> Outcome {
    first(packet, kernel, headers, End::Destination)
}

/// See [`first`].
#[inline(never)]
pub(super) fn first_at_egress<A: Wire, P: Packet, K: Tables<A>>(
    packet: &mut P,
    kernel: &K,
    headers: &Headers<A>,
) -> Outcome {
    first(packet, kernel, headers, End::Source)
}

/// Remembers the first fragment's ports, and lets those go that came before it.
#[inline(always)]
fn first<A: Wire, P: Packet, K: Tables<A>>(
    packet: &mut P,
    kernel: &K,
    headers: &Headers<A>,
    end: End,
) -> Outcome {
    let Some(key) = A::fragment_key(packet, end as u8) else { return Verdict::Pass.raw() };
    let held = match kernel.fragment(&key) {
        Some(waiting) if waiting.proto == 0 && is_recent(kernel, waiting) => waiting.held,
        _ => 0,
    };
    let (sport, dport) = (headers.key.sport, headers.key.dport);
    let proto = u32::from(headers.key.proto);
    kernel.put_fragment(&key, &Fragment { sport, dport, proto, seen: kernel.now(), held: 0 });
    if held != 0 {
        kernel.release(packet, held, matches!(end, End::Destination));
    }
    Verdict::Pass.raw()
}

#[inline(always)]
fn is_recent<K: Kernel>(kernel: &K, fragment: &Fragment) -> bool {
    kernel.now().wrapping_sub(fragment.seen) <= LIFETIME
}

/// A fragment without ports comes in: its destination is that of the flow that the first one belongs to.
#[inline(never)]
pub(super) fn later_at_ingress<A: Wire, P: Packet, K: Tables<A>>(packet: &mut P, kernel: &K) -> Outcome {
    let mut key = FlowKey::default();
    let outcome = whole_key(packet, kernel, End::Destination, &mut key);
    if outcome != KNOWN {
        return outcome;
    }
    let Some(entry) = kernel.flow(&key) else {
        if kernel.frontend(&FrontendKey::new(key.dst, key.dport, key.proto)).is_some() {
            // The first one was not let through.
            return Verdict::Drop(Reason::FragmentDropped).raw();
        }
        return Verdict::Pass.raw();
    };
    let flow = entry.get();
    let addr = match Side::from_raw(flow.side) {
        Some(Side::Front) if !stale(kernel, flow) => flow.backend,
        Some(Side::Back) => flow.client,
        _ => return Verdict::Pass.raw(),
    };
    done(readdress(packet, End::Destination, key.dst, addr)).raw()
}

/// A fragment without ports leaves: its source is that of the flow that the first one belongs to.
#[inline(never)]
pub(super) fn later_at_egress<A: Wire, P: Packet, K: Tables<A>>(packet: &mut P, kernel: &K) -> Outcome {
    let mut key = FlowKey::default();
    let outcome = whole_key(packet, kernel, End::Source, &mut key);
    if outcome != KNOWN {
        return outcome;
    }
    let Some(entry) = kernel.flow(&key) else { return Verdict::Pass.raw() };
    let flow = entry.get();
    let addr = match Side::from_raw(flow.side) {
        Some(Side::Reply) => flow.vip,
        Some(Side::Forward) if flow.flags & Flow::<A>::MASQ_DONE != 0 => flow.masq,
        _ => return Verdict::Pass.raw(),
    };
    done(readdress(packet, End::Source, key.src, addr)).raw()
}

/// What [`whole_key`] says if there is one.
const KNOWN: Outcome = 0x400;

/// The tuple that the fragment would have. Without one, it has to wait: alone it is of no use to anybody.
#[inline(always)]
fn whole_key<A: Wire, P: Packet, K: Tables<A>>(
    packet: &mut P,
    kernel: &K,
    end: End,
    whole: &mut FlowKey<A>,
) -> Outcome {
    let Some(key) = A::fragment_key(packet, end as u8) else { return Verdict::Pass.raw() };
    let mut previous = 0;
    if let Some(known) = kernel.fragment(&key)
        && is_recent(kernel, known)
    {
        if known.proto != 0 {
            (whole.src, whole.dst) = (key.src, key.dst);
            (whole.sport, whole.dport) = (known.sport, known.dport);
            whole.proto = known.proto as u8;
            return KNOWN;
        }
        previous = known.held;
    }
    let Some(held) = kernel.hold(packet, previous) else {
        kernel.count(Reason::FragmentPassed);
        return Verdict::Pass.raw();
    };
    kernel.put_fragment(&key, &Fragment { seen: kernel.now(), held, ..Fragment::default() });
    Verdict::Drop(Reason::FragmentHeld).raw()
}

#[inline(always)]
pub(super) fn key<A>(src: A, dst: A, id: u32, proto: u8, hook: u8) -> FragmentKey<A> {
    FragmentKey { src, dst, id, proto, hook, pad: 0 }
}
