//! Later fragments have no ports: they are the first one's. Those that overtook it are kept until it comes.

use super::enter::stale;
use super::ingress::done;
use super::parse::{Headers, Wire};
use super::rewrite::{End, readdress};
use super::{Kernel, Outcome, Packet, Reason, Tables, Verdict};
use crate::maps::{Flow, FlowKey, Fragment, FragmentKey, FrontendKey, Side, stance};

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
    let Some(mut key) = A::fragment_key(packet, end as u8) else { return Verdict::Pass.raw() };
    let (sport, dport) = (headers.key.sport, headers.key.dport);
    let proto = u32::from(headers.key.proto);
    // First this, then a look at who waits: those on other processors look again after they have begun to.
    kernel.put_fragment(&key, &Fragment { sport, dport, proto, seen: kernel.now(), held: 0 });
    key.hook |= FragmentKey::<A>::WAITING;
    if let Some(waiting) = kernel.fragment(&key)
        && is_recent(kernel, waiting)
    {
        kernel.release(packet, waiting.held, matches!(end, End::Destination));
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
        if kernel.stance() == stance::SERVE
            && kernel.frontend(&FrontendKey::new(key.dst, key.dport, key.proto)).is_some()
        {
            // The first one was not let through.
            return Verdict::Drop(Reason::FragmentDropped).raw();
        }
        return Verdict::Leave.raw();
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
    let Some(entry) = kernel.flow(&key) else { return Verdict::Leave.raw() };
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
    if is_known(kernel, &key, whole) {
        return KNOWN;
    }
    let waiting = FragmentKey { hook: key.hook | FragmentKey::<A>::WAITING, ..key };
    let previous = match kernel.fragment(&waiting) {
        Some(others) if is_recent(kernel, others) => others.held,
        _ => 0,
    };
    let Some(held) = kernel.hold(packet, previous) else {
        kernel.count(Reason::FragmentPassed);
        return Verdict::Pass.raw();
    };
    kernel.put_fragment(&waiting, &Fragment { seen: kernel.now(), held, ..Fragment::default() });
    // The first one may have come meanwhile, on another processor, and not have seen us wait. If it has, this one arrives
    // twice, which does no harm.
    if is_known(kernel, &key, whole) { KNOWN } else { Verdict::Drop(Reason::FragmentHeld).raw() }
}

/// Whether the first fragment has come; then `whole` is the tuple.
#[inline(always)]
fn is_known<A: Wire, K: Tables<A>>(kernel: &K, key: &FragmentKey<A>, whole: &mut FlowKey<A>) -> bool {
    let Some(known) = kernel.fragment(key) else { return false };
    if !is_recent(kernel, known) {
        return false;
    }
    (whole.src, whole.dst) = (key.src, key.dst);
    (whole.sport, whole.dport) = (known.sport, known.dport);
    whole.proto = known.proto as u8;
    true
}

#[inline(always)]
pub(super) fn key<A>(src: A, dst: A, id: u32, proto: u8, hook: u8) -> FragmentKey<A> {
    FragmentKey { src, dst, id, proto, hook, pad: 0 }
}
