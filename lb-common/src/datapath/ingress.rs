//! The ingress hook: destinations.

use super::choose::{choose, repair};
use super::enter::{LOOK_ON, forget, stale, straight};
use super::masquerade::is_masquerade_port;
use super::parse::{Headers, Kind, NotOurs, UDP, Wire, parse};
use super::rewrite::{End, new_port, rewrite};
use super::{
    FlowRef, Kernel, Packet, Put, Reason, Tables, Taken, Verdict, fragments, icmp_error, overlay, redirect,
};
use crate::maps::{Addr, Device, Flow, FlowKey, Frontend, FrontendKey, Side, cidr, stance};

/// A packet comes in on a device.
#[inline(always)]
pub fn ingress<A: Wire, P: Packet, K: Tables<A>>(packet: &mut P, kernel: &K) -> Verdict {
    let headers = match parse::<A, P>(packet) {
        Ok(headers) => headers,
        Err(NotOurs::Other) => return Verdict::Pass,
        Err(NotOurs::Fragment) => return Verdict::from_raw(fragments::later_at_ingress(packet, kernel)),
    };
    if headers.more_fragments != 0 {
        // Never the headers' own address, so that they stay in registers.
        let Some(headers) = kernel.launder(&headers) else { return Verdict::Pass };
        fragments::first_at_ingress(packet, kernel, headers);
    }
    whole(packet, kernel, &headers)
}

#[inline(always)]
fn whole<A: Wire, P: Packet, K: Tables<A>>(packet: &mut P, kernel: &K, headers: &Headers<A>) -> Verdict {
    if headers.kind == Kind::IcmpError {
        let Some(headers) = kernel.launder(headers) else { return Verdict::Pass };
        return Verdict::from_raw(icmp_error::at_ingress(packet, kernel, headers));
    }
    if overlay::carries(kernel, headers, headers.key.dst) {
        return Verdict::Leave;
    }
    if kernel.may_have_flows(&headers.key)
        && let Some(entry) = kernel.flow(&headers.key)
    {
        match known(kernel, headers, &entry) {
            Known::Translate => return redirect::request(packet, kernel, headers, entry.get()),
            Known::Reply => return redirect::reply(packet, kernel, headers, &entry),
            Known::Untouched => return Verdict::Pass,
            Known::Held => return Verdict::Drop(Reason::HandedOver),
            Known::Straight => match straight(packet, kernel, headers, entry.get()) {
                LOOK_ON => {}
                outcome => return Verdict::from_raw(outcome),
            },
            Known::Over => {}
        }
    }
    let Some(frontend) = frontend(kernel, &headers.key) else { return not_a_service(kernel, headers) };
    let Some(headers) = kernel.launder(headers) else { return Verdict::Pass };
    Verdict::from_raw(if !headers.starts_flow() {
        repair(packet, kernel, headers, frontend)
    } else if begins_here(kernel, headers) {
        choose(packet, kernel, headers, frontend)
    } else {
        Verdict::Leave.raw()
    })
}

/// What the packet was sent to, if it is served.
#[inline(always)]
fn frontend<'k, A: Addr, K: Tables<A>>(kernel: &'k K, key: &FlowKey<A>) -> Option<&'k Frontend> {
    if !kernel.may_be_served(key.dst) {
        return None;
    }
    kernel.frontend(&FrontendKey::new(key.dst, key.dport, key.proto))
}

/// Whether what is known of no flow is ours at present, be it that it begins one.
#[inline(always)]
pub(super) fn begins_here<A: Addr, K: Kernel>(kernel: &K, headers: &Headers<A>) -> bool {
    kernel.stance() == stance::ADOPT || leaves_here(kernel, headers)
}

/// The same at the egress hook.
#[inline(always)]
pub(super) fn leaves_here<A: Addr, K: Kernel>(kernel: &K, headers: &Headers<A>) -> bool {
    match kernel.stance() {
        stance::SERVE => true,
        stance::BEGIN | stance::ADOPT => headers.is_syn(),
        _ => false,
    }
}

#[inline(always)]
pub(super) fn done(result: Result<(), Reason>) -> Verdict {
    match result {
        Ok(()) => Verdict::Pass,
        Err(reason) => Verdict::Drop(reason),
    }
}

/// What an entry is to a packet that comes in.
enum Known {
    /// It says the new destination.
    Translate,
    /// A backend's reply on its way through.
    Reply,
    /// A flow whose destination is not translated, or not that way.
    Untouched,
    /// Sent to a backend that a Service's flow with the same tuple has, too.
    Straight,
    /// A flow that is over: this may be a new one.
    Over,
    /// A flow that must not be translated just now.
    Held,
}

#[inline(always)]
fn known<A: Addr, K: Tables<A>>(kernel: &K, headers: &Headers<A>, entry: &FlowRef<'_, A>) -> Known {
    let flow = entry.get();
    match Side::from_raw(flow.side) {
        Some(Side::Front) => {
            if stale(kernel, flow) {
                kernel.count(Reason::BackendGone);
                forget(kernel, flow);
                return Known::Over;
            }
            if used_again(headers, flow) {
                forget(kernel, flow);
                return Known::Over;
            }
            entry.seen(kernel.now(), headers.state() | Flow::<A>::SEEN);
            Known::Translate
        }
        Some(Side::Back) => {
            entry.seen(kernel.now(), headers.state() | Flow::<A>::SEEN);
            Known::Translate
        }
        Some(Side::Forward) if flow.is_direct() => {
            entry.seen(kernel.now(), Flow::<A>::SEEN);
            Known::Untouched
        }
        // Entries of the egress hook.
        Some(Side::Forward) if flow.flags & Flow::<A>::DNAT != 0 => Known::Straight,
        Some(Side::Forward) if headers.starts_flow() => Known::Over,
        Some(Side::Forward) => Known::Untouched,
        Some(Side::Reply) => Known::Reply,
        // Netfilter's, as long as the connection lasts, or the backend of the datagrams.
        Some(Side::Foreign) if headers.is_syn() => Known::Over,
        Some(Side::Foreign) if stale(kernel, flow) => {
            kernel.count(Reason::BackendGone);
            Known::Over
        }
        Some(Side::Foreign) => Known::Untouched,
        Some(Side::Held) => Known::Held,
        None => Known::Over,
    }
}

/// Whether the connection was closed, and the packet opens another one from the same port.
#[inline(always)]
pub(super) fn used_again<A: Addr>(headers: &Headers<A>, flow: &Flow<A>) -> bool {
    flow.state & Flow::<A>::CLOSING != 0 && headers.starts_flow()
}

/// Sends a packet on to where its flow goes, with the client's port that the flow has there.
#[inline(always)]
pub(super) fn onward<A: Wire, P: Packet>(packet: &mut P, headers: &Headers<A>, flow: &Flow<A>) -> Verdict {
    match translate(packet, headers, flow) {
        Ok(()) if flow.flags & Flow::<A>::BRIDGED != 0 => Verdict::Bridge,
        translated => done(translated),
    }
}

#[inline(always)]
fn translate<A: Wire, P: Packet>(packet: &mut P, headers: &Headers<A>, flow: &Flow<A>) -> Result<(), Reason> {
    let is_back = flow.side == Side::Back as u8;
    // One rewrite in the program. An echo's identifier is the source port of the request and the destination port of the reply.
    let (addr, port) =
        if is_back { (flow.client, flow.alias_port) } else { (flow.backend, flow.backend_port) };
    rewrite(packet, headers, End::Destination, addr, port)?;
    if !is_back && flow.alias_port != headers.key.sport {
        new_port(packet, headers, End::Source, flow.alias_port)?;
    }
    Ok(())
}

/// Nothing that we serve. Two things must not go on, though: a packet to a ClusterIP, whose address is nobody's, and
/// a reply to a masquerade port whose entry was lost, which the node would reset. (Dropped, it is sent again and finds
/// the entry that the next packet the other way has made anew.)
#[inline(always)]
fn not_a_service<A: Addr, K: Tables<A>>(kernel: &K, headers: &Headers<A>) -> Verdict {
    if headers.starts_flow() {
        if headers.key.proto == UDP && kernel.may_masquerade() {
            note_direct(kernel, headers);
        }
        return if headers.kind != Kind::EchoRequest
            && refused_port(kernel, headers.key.dst)
            && kernel.stance() == stance::SERVE
        {
            Verdict::Reject(Reason::NoSuchPort)
        } else {
            Verdict::Leave
        };
    }
    // Others masquerade and forward ports, too: not every packet to an address of the node that none of its sockets
    // wants is a reply that we have lost.
    if matches!(headers.kind, Kind::Tcp(_))
        && is_masquerade_port(kernel, headers.key.dport)
        && was_taken(kernel, &headers.key)
        && kernel.stance() == stance::SERVE
    {
        Verdict::Drop(Reason::UnknownMasquerade)
    } else {
        Verdict::Leave
    }
}

/// A datagram that comes to a pod's own address from where pods' flows are masqueraded to: from a node, say, where nodes
/// route to each other's pods. Its answers would look as if the pod began a flow, so they are entered as what they are.
/// (Not where it leaves for the pod: there the replies to masqueraded flows look the same.) Without room, they are not.
#[inline(never)]
fn note_direct<A: Addr, K: Tables<A>>(kernel: &K, headers: &Headers<A>) {
    let (src, dst) = (headers.key.src, headers.key.dst);
    // In the order of what tells most packets apart: those of pods, then those to the node itself.
    let Some(device) = kernel.device() else { return };
    if device.flags & Device::MASQUERADE == 0
        || dst == A::masquerade_addr(device)
        || src.is_local_scope()
        || kernel.cidr(dst) & cidr::CLUSTER == 0
        || kernel.cidr(src) & (cidr::CLUSTER | cidr::NO_MASQUERADE) != 0
        || kernel.stance() == stance::DRAIN
    {
        return;
    }
    // An answer that was taken for a flow of the pod's before we knew: replies to one go to the node.
    let answers = headers.key.reversed();
    if let Some(taken) = kernel.flow(&answers)
        && taken.get().flags & Flow::<A>::DNAT == 0
    {
        kernel.remove_flow(&taken.get().key(Side::Back));
        kernel.remove_flow(&answers);
    }
    let Some(draft) = kernel.draft() else { return };
    draft.write(Flow::straight(&headers.key, kernel.now()));
    let forward = draft.turn(Side::Forward);
    if kernel.put_flow(&forward, draft.get(), Put::New).is_ok() {
        kernel.count(Reason::NewFlow);
        kernel.remember(&forward);
    }
}

/// Whether the tuple is that of replies to a flow that we have masqueraded. A lost entry is made again from the flow's other
/// one, if there is any, before the addresses' mark ends; without any, dropping would only put the end off.
#[inline(never)]
fn was_taken<A: Addr, K: Tables<A>>(kernel: &K, key: &FlowKey<A>) -> bool {
    kernel.may_have_flows(key) && kernel.was_taken(Taken::of(kernel, key))
}

/// Whether the address is a ClusterIP, so that what is sent to a port that it does not have is refused.
#[inline(always)]
fn refused_port<A: Addr, K: Tables<A>>(kernel: &K, addr: A) -> bool {
    kernel.cluster_ips().is_some_and(|range| addr.is_in(range))
        && kernel
            .frontend(&FrontendKey::address(addr))
            .is_some_and(|frontend| frontend.flags & Frontend::REJECT_OTHER_PORTS != 0)
}
