//! ICMP errors: the packet that an error quotes is one of a flow that we translate, seen from the other side.
//!
//! Look the *reversed* quoted tuple up: its entry says what this hook would do to a packet that travels the way the
//! error does. The same is done to the quoted packet's opposite end, and to the outer address where that is the
//! one being translated. Without this, path MTU discovery fails behind every NodePort (RFC 1191, RFC 8201,
//! nf_nat_icmp_reply_translation).

use super::ingress::done;
use super::parse::{Headers, Kind, Wire, checksum_offset, parse_quoted};
use super::rewrite::{End, rewrite};
use super::{Covered, Outcome, Packet, Reason, Tables, Verdict};
use crate::addr::NetPort;
use crate::checksum::{Sum, update};
use crate::maps::{Device, Flow, Side, cidr};

/// Length of the ICMP header in front of the quoted packet.
const ICMP_HEADER: usize = 8;
/// What an ICMP error has to quote of the transport header.
const QUOTED_TRANSPORT: usize = 8;

/// See [`translate`].
#[inline(never)]
pub(super) fn at_ingress<A: Wire, P: Packet, K: Tables<A>>(
    packet: &mut P,
    kernel: &K,
    outer: &Headers<A>,
) -> Outcome {
    translate(packet, kernel, outer, End::Destination).raw()
}

/// See [`translate`].
#[inline(never)]
pub(super) fn at_egress<A: Wire, P: Packet, K: Tables<A>>(
    packet: &mut P,
    kernel: &K,
    outer: &Headers<A>,
) -> Outcome {
    translate(packet, kernel, outer, End::Source).raw()
}

/// `end` is what the hook may rewrite: the destination at ingress, the source at egress.
#[inline(always)]
fn translate<A: Wire, P: Packet, K: Tables<A>>(
    packet: &mut P,
    kernel: &K,
    outer: &Headers<A>,
    end: End,
) -> Verdict {
    let at = outer.l4 + ICMP_HEADER;
    let Ok(quoted) = parse_quoted::<A, P>(packet, at) else { return Verdict::Pass };
    let Some(until) = A::end(packet) else { return Verdict::Pass };
    if quoted.l4 + QUOTED_TRANSPORT > until {
        return Verdict::Pass;
    }
    let Some(entry) = kernel.flow(&quoted.key.reversed()) else { return Verdict::Leave };
    let flow = entry.get();
    // The last is the port at the quoted packet's other end, which differs where the flow has an alias.
    let (addr, port, other) = match (end, Side::from_raw(flow.side)) {
        (End::Destination, Some(Side::Front)) => (flow.backend, flow.backend_port, flow.alias_port),
        (End::Destination, Some(Side::Back)) => (flow.client, flow.alias_port, quoted.key.dport),
        (End::Source, Some(Side::Reply)) => (flow.vip, flow.vip_port, flow.client_port),
        (End::Source, Some(Side::Forward)) if flow.flags & Flow::<A>::MASQ_DONE != 0 => {
            (flow.masq, flow.masq_port, quoted.key.sport)
        }
        _ => return Verdict::Pass,
    };
    // To a masqueraded flow the whole error belongs, whoever sent it: its sender may be on no way that the receiver's
    // reverse path filter accepts. (netfilter does the same.)
    // And no pod's address leaves the cluster by a device that masquerades.
    let always = matches!(end, End::Source)
        && (flow.side == Side::Forward as u8
            || kernel.device().is_some_and(|d| d.flags & Device::MASQUERADE != 0)
                && kernel.cidr(outer.key.src) & cidr::CLUSTER != 0);
    let result = apply(packet, outer, &quoted, (at, until), (end, always), (addr, port));
    let (_, known) = end.of(&quoted);
    if result.is_ok() && other != known && quoted.kind != Kind::EchoRequest && quoted.kind != Kind::EchoReply
    {
        return done(alias(packet, outer, &quoted, (until, end, other)));
    }
    done(result)
}

/// Puts the port of the client's own into the quoted packet, or the alias.
#[inline(always)]
fn alias<A: Wire, P: Packet>(
    packet: &mut P,
    outer: &Headers<A>,
    quoted: &Headers<A>,
    (until, end, port): (usize, End, NetPort),
) -> Result<(), Reason> {
    let (_, old) = end.of(quoted);
    let change = Sum::diff16(old.wire(), port.wire());
    packet.store(quoted.l4 + end.port_offset(quoted.kind), &port)?;
    let total = change.plus(transport(packet, quoted, until, change)?);
    icmp_checksum(packet, outer, total)
}

#[inline(always)]
fn apply<A: Wire, P: Packet>(
    packet: &mut P,
    outer: &Headers<A>,
    quoted: &Headers<A>,
    (at, until): (usize, usize),
    (end, always): (End, bool),
    (addr, port): (A, NetPort),
) -> Result<(), Reason> {
    let opposite = match end {
        End::Source => End::Destination,
        End::Destination => End::Source,
    };
    let (old_addr, old_port) = opposite.of(quoted);
    let addr_change = A::diff(old_addr, addr);
    let port_change = Sum::diff16(old_port.wire(), port.wire());
    // What all this does to the ICMP checksum, which covers the quoted packet.
    let mut total = addr_change.plus(port_change);
    packet.store(at + opposite.addr_offset::<A>(), &addr)?;
    packet.store(quoted.l4 + opposite.port_offset(quoted.kind), &port)?;
    if let Some(offset) = A::CHECKSUM {
        total = total.plus(patch(packet, at + offset, addr_change)?);
    }
    let covered = match quoted.kind {
        Kind::EchoRequest | Kind::EchoReply if A::IS_V4 => port_change,
        _ => addr_change.plus(port_change),
    };
    total = total.plus(transport(packet, quoted, until, covered)?);
    icmp_checksum(packet, outer, total)?;
    let (outer_addr, outer_port) = end.of(outer);
    if always || outer_addr == old_addr {
        rewrite(packet, outer, end, addr, outer_port)?;
    }
    Ok(())
}

/// Applies a change to the quoted packet's transport checksum, and returns what that changes.
///
/// Only the first eight bytes are sure to be quoted; TCP's checksum lies behind them. What lies behind the packet's
/// end is padding, which the outer checksum does not cover.
#[inline(always)]
fn transport<A: Wire, P: Packet>(
    packet: &mut P,
    quoted: &Headers<A>,
    until: usize,
    change: Sum,
) -> Result<Sum, Reason> {
    let checksum = quoted.l4 + checksum_offset(quoted.kind);
    if checksum + 2 <= until
        && packet.load::<u16>(checksum).is_some_and(|c| c != 0 || quoted.kind != Kind::Udp)
    {
        return patch(packet, checksum, change);
    }
    Ok(Sum(0))
}

#[inline(always)]
fn icmp_checksum<A: Wire, P: Packet>(packet: &mut P, outer: &Headers<A>, change: Sum) -> Result<(), Reason> {
    let covered = Covered { pseudo_header: false, zero_is_none: false };
    packet.l4_checksum(outer.l4 + checksum_offset(outer.kind), change, covered)
}

/// Updates a quoted checksum and returns by how much it changed.
#[inline(always)]
fn patch<P: Packet>(packet: &mut P, offset: usize, change: Sum) -> Result<Sum, Reason> {
    let old: u16 = packet.load(offset).ok_or(Reason::Malformed)?;
    let new = update(old, change);
    packet.store(offset, &new)?;
    Ok(Sum::diff16(old, new))
}
