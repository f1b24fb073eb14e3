//! Flows that somebody else has masqueraded before they come to the egress hook: flannel's rule, kube-proxy's, a host
//! port's. Such a packet has the same source address as those that we masquerade, and any port. Were it one that a flow
//! of ours to the same destination has, nothing would tell the replies apart.
//!
//! So the two share one table of ports. What leaves from a port of ours without a socket of the node behind it takes
//! that port, as if we had given it; if it is taken, the flow gets another one, as any other would.

use super::enter::FULL;
use super::masquerade::{enter, has_port, take_port};
use super::parse::{Headers, Wire};
use super::{FlowRef, Kernel, Outcome, Packet, Put, PutError, Tables, Verdict};
use crate::maps::{Addr, Device, DeviceIndex, Flow, FrontendKey, Side};

/// Whether replies to what leaves here find that entry: the ports that we have given at this device. (A packet of ours
/// may leave by a second device, a VLAN's and then the one below it. There it is nobody else's.)
#[inline(always)]
pub(super) fn at_this_device<A: Addr, K: Kernel>(kernel: &K, entry: &Flow<A>) -> bool {
    entry.side == Side::Back as u8 && entry.masq_device == kernel.device_index() as DeviceIndex
}

/// A packet of no known flow leaves as [`may_be`] says, and is not to be masqueraded: keeps others off its port, or gives
/// it a free one.
#[inline(never)]
pub(super) fn keep_port<A: Wire, P: Packet, K: Tables<A>>(
    packet: &mut P,
    kernel: &K,
    headers: &Headers<A>,
    device: &Device,
) -> Outcome {
    if !is_masqueraded(kernel, headers) {
        return Verdict::Leave.raw();
    }
    let Some(draft) = kernel.draft() else { return Verdict::Pass.raw() };
    draft.write(Flow::straight(&headers.key, kernel.now()));
    let own = take_own(kernel, &draft);
    match own {
        Ok(()) => {}
        Err(PutError::Full) => return Verdict::Pass.raw(),
        Err(PutError::Taken) if headers.starts_flow() => {
            let taken = take_port(kernel, &draft, device);
            if taken != Verdict::Pass.raw() {
                return taken;
            }
        }
        Err(PutError::Taken) if has_port(kernel, &draft, device) => {}
        // The middle of a connection that began with this port, before we knew of it.
        Err(PutError::Taken) => return Verdict::Pass.raw(),
    }
    match enter(packet, kernel, headers, &draft) {
        // It works without an entry, as long as nobody comes for the port.
        FULL if own.is_ok() => Verdict::Pass.raw(),
        outcome => outcome,
    }
}

/// Whether what leaves from a port that we masquerade to leaves from an address that we might masquerade it to, too.
#[inline(always)]
pub(super) fn may_be<A: Addr>(headers: &Headers<A>, device: &Device) -> bool {
    let key = &headers.key;
    key.src == A::masquerade_addr(device) && !key.dst.is_local_scope()
}

/// Whether such a packet is neither from a socket of the node (whose ports we ask for) nor a Service's.
#[inline(always)]
fn is_masqueraded<A: Addr, K: Tables<A>>(kernel: &K, headers: &Headers<A>) -> bool {
    let key = &headers.key;
    let back = key.reversed();
    (kernel.flow(&back).is_some() || key.proto == A::ICMP || !kernel.socket_wants(&back))
        && kernel.frontend(&FrontendKey::new(key.src, key.sport, key.proto)).is_none()
}

/// Takes the port that the flow has already.
#[inline(always)]
fn take_own<A: Addr, K: Tables<A>>(kernel: &K, draft: &FlowRef<'_, A>) -> Result<(), PutError> {
    draft.masquerade(draft.get().client, kernel.device_index());
    let flow = draft.get();
    let back = flow.key(Side::Back);
    match kernel.put_flow(&back, flow, Put::New) {
        Err(PutError::Taken) if kernel.flow(&back).is_some_and(|other| other.get().same_origin(flow)) => {
            Ok(())
        }
        outcome => outcome,
    }
}
