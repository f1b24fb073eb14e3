//! Later fragments have no ports: they are the first one's.

use super::enter::stale;
use super::ingress::done;
use super::parse::{Headers, Wire};
use super::rewrite::{End, readdress};
use super::{Outcome, Packet, Reason, Tables, Verdict};
use crate::maps::{Flow, FlowKey, Fragment, FragmentKey, FrontendKey, Side};

/// Seconds that a datagram takes at most: its identification may be used again later (RFC 6864).
const LIFETIME: u32 = 10;

/// Remembers the first fragment's ports.
#[inline(never)]
pub(super) fn first_at_ingress<A: Wire, P: Packet, K: Tables<A>>(
    packet: &P,
    kernel: &K,
    headers: &Headers<A>,
) -> Outcome {
    first(packet, kernel, headers, End::Destination)
}

/// Remembers the first fragment's ports.
#[inline(never)]
pub(super) fn first_at_egress<A: Wire, P: Packet, K: Tables<A>>(
    packet: &P,
    kernel: &K,
    headers: &Headers<A>,
) -> Outcome {
    first(packet, kernel, headers, End::Source)
}

#[inline(always)]
fn first<A: Wire, P: Packet, K: Tables<A>>(
    packet: &P,
    kernel: &K,
    headers: &Headers<A>,
    end: End,
) -> Outcome {
    if let Some(key) = A::fragment_key(packet, end as u8) {
        let (sport, dport) = (headers.key.sport, headers.key.dport);
        let proto = u32::from(headers.key.proto);
        kernel.put_fragment(&key, &Fragment { sport, dport, proto, seen: kernel.now() });
    }
    Verdict::Pass.raw()
}

/// A fragment without ports comes in: its destination is that of the flow that the first one belongs to.
#[inline(never)]
pub(super) fn later_at_ingress<A: Wire, P: Packet, K: Tables<A>>(packet: &mut P, kernel: &K) -> Outcome {
    let Some(key) = whole_key(packet, kernel, End::Destination) else { return Verdict::Pass.raw() };
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
    let Some(key) = whole_key(packet, kernel, End::Source) else { return Verdict::Pass.raw() };
    let Some(entry) = kernel.flow(&key) else { return Verdict::Pass.raw() };
    let flow = entry.get();
    let addr = match Side::from_raw(flow.side) {
        Some(Side::Reply) => flow.vip,
        Some(Side::Forward) if flow.flags & Flow::<A>::MASQ_DONE != 0 => flow.masq,
        _ => return Verdict::Pass.raw(),
    };
    done(readdress(packet, End::Source, key.src, addr)).raw()
}

/// The tuple that the fragment would have.
#[inline(always)]
fn whole_key<A: Wire, P: Packet, K: Tables<A>>(packet: &P, kernel: &K, end: End) -> Option<FlowKey<A>> {
    let key = A::fragment_key(packet, end as u8)?;
    match kernel.fragment(&key) {
        Some(first) if kernel.now().wrapping_sub(first.seen) <= LIFETIME => Some(FlowKey {
            src: key.src,
            dst: key.dst,
            sport: first.sport,
            dport: first.dport,
            proto: first.proto as u8,
            variant: 0,
            pad: [0; 2],
        }),
        _ => {
            kernel.count(Reason::FragmentPassed);
            None
        }
    }
}

#[inline(always)]
pub(super) fn key<A>(src: A, dst: A, id: u32, proto: u8, hook: u8) -> FragmentKey<A> {
    FragmentKey { src, dst, id, proto, hook, pad: 0 }
}
