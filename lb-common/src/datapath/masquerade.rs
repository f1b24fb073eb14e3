//! Source translation: whether, to which address, and a port for it.

use super::enter::FULL;
use super::ingress::done;
use super::parse::{Headers, Kind, Wire, tcp_flags};
use super::ports::{Ports, neighbour};
use super::reclaim::{is_closed, make_room};
use super::redirect::settle;
use super::rewrite::{End, rewrite};
use super::{FlowRef, Flows, Kernel, Outcome, Packet, Put, PutError, Reason, Tables, Taken, Verdict};
use crate::addr::NetPort;
use crate::maps::{Addr, Device, Flow, Side, cidr};

/// Ports tried before giving up. With one port in two taken, one new flow in four billion fails.
const PORT_TRIES: u32 = 32;
/// Ports looked at for one whose connection is over.
const CLOSED_TRIES: u32 = 16;
/// Ports looked at for the one that a flow has already: with one in two taken, it is among these 255 times of 256.
const OWN_TRIES: u32 = 8;

/// A packet of no known flow leaves that has to be masqueraded: it starts one, or has lost it.
#[inline(never)]
pub(super) fn new_flow<A: Wire, P: Packet, K: Tables<A>>(
    packet: &mut P,
    kernel: &K,
    headers: &Headers<A>,
    device: &Device,
) -> Outcome {
    let Some(draft) = kernel.draft() else { return Verdict::Pass.raw() };
    draft.write(Flow::straight(&headers.key, kernel.now()));
    if headers.starts_flow() {
        let taken = take_port(kernel, &draft, device);
        if taken != Verdict::Pass.raw() {
            if taken == FULL {
                // For the next packet. (Trying again here would double what there is to verify.)
                make_room(kernel);
            }
            return taken;
        }
    } else if !has_port(kernel, &draft, device) {
        return Verdict::Pass.raw();
    }
    enter(packet, kernel, headers, &draft)
}

/// Enters [`Side::Forward`] of a flow whose port is taken, and sends its packet from there.
#[inline(always)]
pub(super) fn enter<A: Wire, P: Packet, K: Tables<A>>(
    packet: &mut P,
    kernel: &K,
    headers: &Headers<A>,
    draft: &FlowRef<'_, A>,
) -> Outcome {
    let forward = draft.turn(Side::Forward);
    let flow = draft.get();
    if kernel.put_flow(&forward, flow, Put::Any).is_err() {
        kernel.remove_flow(&flow.key(Side::Back));
        return FULL;
    }
    kernel.count(Reason::NewFlow);
    kernel.remember(&forward);
    done(rewrite(packet, headers, End::Source, flow.masq, flow.masq_port)).raw()
}

/// The first packet of a translated flow leaves by the device that decides.
#[inline(never)]
pub(super) fn decide<A: Wire, P: Packet, K: Tables<A>>(
    packet: &mut P,
    kernel: &K,
    headers: &Headers<A>,
    entry: &FlowRef<'_, A>,
) -> Outcome {
    let flow = entry.get();
    let Some(device) = kernel.device() else { return Verdict::Pass.raw() };
    if flow.flags & Flow::<A>::MASQ_NEEDED == 0 && !wanted(kernel, headers, device) {
        entry.set_masquerade(flow.flags & Flow::<A>::DNAT, flow.client, flow.client_port);
        if kernel.redirects() {
            settle(kernel, entry.get());
        }
        return Verdict::Pass.raw();
    }
    let Some(draft) = kernel.draft() else { return Verdict::Pass.raw() };
    draft.write(*flow);
    let taken = take_port(kernel, &draft, device);
    if taken != Verdict::Pass.raw() {
        return taken;
    }
    let flow = draft.get();
    entry.set_masquerade(flow.flags, flow.masq, flow.masq_port);
    done(rewrite(packet, headers, End::Source, flow.masq, flow.masq_port)).raw()
}

/// Makes [`Side::Back`] again if it was lost: a reply that does not find it cannot tell whose it is. Once a second, not
/// for every packet.
#[inline(never)]
pub(super) fn renew<A: Addr, K: Flows<A>>(kernel: &K, flow: &Flow<A>) {
    let back = flow.as_side(Side::Back);
    if kernel.put_flow(&back.key(Side::Back), &back, Put::New).is_ok() {
        kernel.count(Reason::Repaired);
    }
}

/// Whether a connection that begins from the same port is another one: the last one was closed, or its port has been given
/// away since. (Where a Service was sent to, the ingress hook has found that out.)
#[inline(never)]
pub(super) fn is_over<A: Addr, K: Flows<A>>(kernel: &K, flow: &Flow<A>) -> bool {
    flow.state & Flow::<A>::CLOSING != 0
        || !kernel.flow(&flow.key(Side::Back)).is_some_and(|back| back.get().same_origin(flow))
}

/// Whether this starts a flow, or is the middle of a connection, whose entry may have been lost. If none of its ports was
/// ever taken, it is one that was exempt when it began, and stays as it is.
#[inline(always)]
pub(super) fn may_be_new_or_lost<A>(headers: &Headers<A>) -> bool {
    headers.starts_flow() || matches!(headers.kind, Kind::Tcp(flags) if flags & tcp_flags::RST == 0)
}

/// Whether nothing has to be found out about a packet between addresses that have no flows: the middle of a connection. If it
/// were masqueraded, it would have an entry still (whoever keeps one keeps the marks of all that the flow has had), and from
/// that port nobody else has masqueraded it to where we would.
#[inline(always)]
pub(super) fn is_nobodys<A: Addr, K: Kernel>(kernel: &K, headers: &Headers<A>) -> bool {
    matches!(headers.kind, Kind::Tcp(_))
        && !headers.starts_flow()
        && !is_masquerade_port(kernel, headers.key.sport)
}

/// Whether it is one of the ports that we masquerade to.
#[inline(always)]
pub(super) fn is_masquerade_port<K: Kernel>(kernel: &K, port: NetPort) -> bool {
    let (first, last) = kernel.masquerade_ports();
    (first..=last).contains(&port.get())
}

/// flannel's rule: from a pod of the cluster to anywhere else. The destination first: pods send to each other most.
#[inline(always)]
pub(super) fn wanted<A: Addr, K: Tables<A>>(kernel: &K, headers: &Headers<A>, device: &Device) -> bool {
    let (src, dst) = (headers.key.src, headers.key.dst);
    device.flags & Device::MASQUERADE != 0
        && src != A::masquerade_addr(device)
        && !dst.is_local_scope()
        && kernel.cidr(dst) & (cidr::CLUSTER | cidr::NO_MASQUERADE) == 0
        && kernel.cidr(src) & cidr::CLUSTER != 0
}

/// What there is to say without a port.
const EXHAUSTED: Outcome = Verdict::Drop(Reason::MasqueradePortsExhausted).raw();

/// Takes a port of the device's address for the flow, and enters [`Side::Back`] under it.
#[inline(always)]
pub(super) fn take_port<A: Addr, K: Tables<A>>(
    kernel: &K,
    draft: &FlowRef<'_, A>,
    device: &Device,
) -> Outcome {
    let addr = A::masquerade_addr(device);
    if addr == A::default() {
        return Verdict::Drop(Reason::NoMasqueradeAddress).raw();
    }
    draft.masquerade(addr, kernel.device_index());
    match kernel.free_port() {
        // One after the other, not one in the other: the stack is short.
        EXHAUSTED => kernel.port_of_closed(),
        outcome => outcome,
    }
}

/// A free port for the draft, whose masquerade address is set. See [`Apart::free_port`](super::Apart).
///
/// The candidates follow from the hash of the tuple, so that a flow whose forward entry was lost finds its own port
/// again.
#[inline(always)]
pub fn free_port<A: Addr, K: Tables<A>>(kernel: &K) -> Outcome {
    let Some(draft) = kernel.draft() else { return EXHAUSTED };
    let mut ports = Ports::new(kernel, &draft.get().key(Side::Forward));
    for _ in 0..PORT_TRIES {
        let Some(port) = ports.next_free(kernel) else { continue };
        draft.set_masq_port(NetPort::new(port));
        let flow = draft.get();
        let back = flow.key(Side::Back);
        if flow.proto != A::ICMP && kernel.socket_wants(&back) {
            continue;
        }
        match kernel.put_flow(&back, flow, Put::New) {
            Ok(()) => {
                kernel.note_taken(Taken::of(kernel, &back));
                return Verdict::Pass.raw();
            }
            Err(PutError::Full) => return FULL,
            Err(PutError::Taken) => {
                if kernel.flow(&back).is_some_and(|other| other.get().same_origin(flow)) {
                    return Verdict::Pass.raw();
                }
            }
        }
    }
    EXHAUSTED
}

/// No port was free: takes one from a connection that is over. netfilter uses such ports again, too (`nf_nat_used_tuple`).
/// See [`Apart::port_of_closed`](super::Apart).
#[inline(always)]
pub fn port_of_closed<A: Addr, K: Tables<A>>(kernel: &K) -> Outcome {
    let Some(draft) = kernel.draft() else { return EXHAUSTED };
    let mut ports = Ports::new(kernel, &draft.get().key(Side::Forward));
    for _ in 0..CLOSED_TRIES {
        let Some(port) = ports.next_free(kernel) else { continue };
        draft.set_masq_port(NetPort::new(port));
        let flow = draft.get();
        let mut key = flow.key(Side::Back);
        let Some(back) = kernel.flow(&key) else { continue };
        let back = back.get();
        if !is_closed(back, kernel.now()) {
            continue;
        }
        key = back.key(Side::Forward);
        if let Some(forward) = kernel.flow(&key)
            && forward.get().same_origin(back)
        {
            if back.state & Flow::<A>::RST == 0 && !is_closed(forward.get(), kernel.now()) {
                // The client has more to say.
                continue;
            }
            // What else there is of that flow leads nowhere without this one.
            kernel.remove_flow(&key);
        }
        key = flow.key(Side::Back);
        kernel.remove_flow(&key);
        if kernel.put_flow(&key, flow, Put::New).is_ok() {
            return Verdict::Pass.raw();
        }
    }
    EXHAUSTED
}

/// Finds the port that the flow has already, if it has one.
#[inline(always)]
pub(super) fn has_port<A: Addr, K: Tables<A>>(kernel: &K, draft: &FlowRef<'_, A>, device: &Device) -> bool {
    draft.masquerade(A::masquerade_addr(device), kernel.device_index());
    kernel.own_port() == FOUND
}

/// What [`own_port`] says if there is one.
const FOUND: Outcome = 1;

/// The port that the draft, whose masquerade address is set, has already. See [`Apart::own_port`](super::Apart).
#[inline(always)]
pub fn own_port<A: Addr, K: Tables<A>>(kernel: &K) -> Outcome {
    let Some(draft) = kernel.draft() else { return 0 };
    let mut ports = Ports::new(kernel, &draft.get().key(Side::Forward));
    let mut port = 0;
    for i in 0..2 * OWN_TRIES {
        // What is reserved now need not have been reserved then, nor the other way round.
        port = if i & 1 == 0 { ports.next() } else { neighbour(port) };
        draft.set_masq_port(NetPort::new(port));
        let flow = draft.get();
        if kernel.flow(&flow.key(Side::Back)).is_some_and(|other| other.get().same_origin(flow)) {
            return FOUND;
        }
    }
    0
}
