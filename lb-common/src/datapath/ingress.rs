//! The ingress hook: destinations.

use super::choose::{choose, forget, repair};
use super::parse::{Headers, Kind, NotOurs, Wire, parse};
use super::rewrite::{End, rewrite};
use super::{FlowRef, Packet, Reason, Tables, Verdict, icmp_error};
use crate::addr::NetPort;
use crate::maps::{Addr, Flow, FrontendKey, Side};

/// A packet comes in on a device.
#[inline(always)]
pub fn ingress<A: Wire, P: Packet, K: Tables<A>>(packet: &mut P, kernel: &K) -> Verdict {
    let headers = match parse::<A, P>(packet) {
        Ok(headers) => headers,
        Err(NotOurs::Other) => return Verdict::Pass,
        Err(NotOurs::Fragment) => {
            kernel.count(Reason::FragmentPassed);
            return Verdict::Pass;
        }
    };
    if headers.kind == Kind::IcmpError {
        return Verdict::from_raw(icmp_error::at_ingress(packet, kernel, &headers));
    }
    if let Some(entry) = kernel.flow(&headers.key)
        && let Some((addr, port)) = known(kernel, &headers, &entry)
    {
        return done(rewrite(packet, &headers, End::Destination, addr, port));
    }
    let front = FrontendKey::new(headers.key.dst, headers.key.dport, headers.key.proto);
    let Some(frontend) = kernel.frontend(&front) else {
        return not_a_service(kernel, &headers);
    };
    Verdict::from_raw(if headers.starts_flow() {
        choose(packet, kernel, &headers, frontend)
    } else {
        repair(packet, kernel, &headers, frontend)
    })
}

#[inline(always)]
pub(super) fn done(result: Result<(), Reason>) -> Verdict {
    match result {
        Ok(()) => Verdict::Pass,
        Err(reason) => Verdict::Drop(reason),
    }
}

/// The new destination that a flow entry says, if it says one here and still holds.
#[inline(always)]
fn known<A: Addr, K: Tables<A>>(
    kernel: &K,
    headers: &Headers<A>,
    entry: &FlowRef<'_, A>,
) -> Option<(A, NetPort)> {
    let flow = entry.get();
    match Side::from_raw(flow.side) {
        Some(Side::Front) => {
            if flow.backend_id != 0 && kernel.backend_epoch(flow.backend_id) != flow.backend_epoch {
                kernel.count(Reason::BackendGone);
                forget(kernel, flow);
                return None;
            }
            if flow.state & Flow::<A>::CLOSING != 0 && headers.starts_flow() {
                // The connection was closed and its port is used again.
                forget(kernel, flow);
                return None;
            }
            entry.seen(kernel.now(), headers.state() | Flow::<A>::SEEN);
            Some((flow.backend, flow.backend_port))
        }
        Some(Side::Back) => {
            entry.seen(kernel.now(), headers.state() | Flow::<A>::SEEN);
            // An echo's identifier is the source port of the request and the destination port of the reply.
            Some((flow.client, flow.client_port))
        }
        Some(Side::Forward) => {
            // Direct to a backend, with the port of a connection through a Service that is over: its entries must not
            // translate this one's replies.
            if flow.flags & Flow::<A>::DNAT != 0
                && flow.state & Flow::<A>::CLOSING != 0
                && headers.starts_flow()
            {
                forget(kernel, flow);
            }
            None
        }
        // An entry of the egress hook: a backend's reply on its way through.
        Some(Side::Reply) | None => None,
    }
}

/// Nothing that we serve. One thing must not reach the node's own stack: a reply to a masquerade port whose entry
/// was lost, which the node would reset. Dropped, it is sent again and finds the entry that the next packet the
/// other way has made anew.
#[inline(always)]
fn not_a_service<A: Addr, K: Tables<A>>(kernel: &K, headers: &Headers<A>) -> Verdict {
    let (first, last) = kernel.masquerade_ports();
    let port = headers.key.dport.get();
    if !matches!(headers.kind, Kind::Tcp(_)) || headers.starts_flow() || port < first || port > last {
        return Verdict::Pass;
    }
    let ours = kernel.device().is_some_and(|d| A::masquerade_addr(d) == headers.key.dst);
    if ours && !kernel.socket_wants(&headers.key) {
        Verdict::Drop(Reason::UnknownMasquerade)
    } else {
        Verdict::Pass
    }
}
