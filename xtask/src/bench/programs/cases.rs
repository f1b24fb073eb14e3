//! The packets that matter.

use anyhow::Result;
use lb_common::maps::{Flow, FlowKey, Side};

use super::super::packet::{self, End, Family, Transport, Who};
use super::Work;

/// The liveness entry of the UDP flow.
pub(super) const BACKEND_ID: u32 = 1;
/// Its epoch.
pub(super) const EPOCH: u32 = 7;

/// The cases that new flows are held against.
const REQUEST: &str = "pod → ClusterIP: request, at the client's device";
const OUT: &str = "pod → outside: request";

/// Where the established flows go. New ones go to other ports, so that none of them is one of these.
const VIP: End = End(Who::Vip, 81);
const BACKEND: End = End(Who::Backend, 8080);
const OUTSIDE: End = End(Who::Outside, 443);

/// The device that the packet is on.
#[derive(Clone, Copy, Debug)]
pub(super) enum On {
    Pod,
    Uplink,
}

/// What a packet's cost is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Floor {
    /// A bare program that does one look-up and one rewrite.
    Rewrite,
    /// A bare program whose two look-ups find nothing.
    Miss,
    /// This case's cost.
    Established(&'static str),
}

/// A packet, the flows that it belongs to, and what becomes of it.
pub(super) struct Case<A> {
    pub(super) name: &'static str,
    pub(super) hook: &'static str,
    pub(super) on: On,
    pub(super) work: Work,
    /// How many times the floor it may cost.
    pub(super) limit: (Floor, f64),
    pub(super) packet: Vec<u8>,
    pub(super) flows: Vec<(FlowKey<A>, Flow<A>)>,
}

/// All of them. No two share a flow entry: each has a client port of its own.
pub(super) fn all<A: Family>() -> Result<Vec<Case<A>>> {
    let client = |port| End(Who::Client, port);
    let node = |port| End(Who::Node, port);
    let stranger = |port| End(Who::Stranger, port);
    Ok(vec![
        established(REQUEST, "ingress", On::Pod, Side::Front, dnat(client(40001)))?,
        established(
            "– request, at the backend's device (nothing to do)",
            "egress",
            On::Pod,
            Side::Forward,
            dnat(client(40002)),
        )?,
        established(
            "– reply, at the backend's device (nothing to do)",
            "ingress",
            On::Pod,
            Side::Reply,
            dnat(client(40003)),
        )?,
        established("– reply, at the client's device", "egress", On::Pod, Side::Reply, dnat(client(40004)))?,
        established(
            "– UDP request, at the client's device",
            "ingress",
            On::Pod,
            Side::Front,
            udp(client(40005)),
        )?,
        established(OUT, "egress", On::Uplink, Side::Forward, masqueraded(40006))?,
        established("– reply", "ingress", On::Uplink, Side::Back, masqueraded(40007))?,
        other("none of ours, TCP", "ingress", On::Pod, stranger(40008), OUTSIDE)?,
        other(
            "none of ours, TCP, port as for masquerading",
            "ingress",
            On::Uplink,
            OUTSIDE,
            stranger(15000),
        )?,
        other("none of ours, TCP", "egress", On::Pod, OUTSIDE, stranger(40009))?,
        other("none of ours, the node's own", "egress", On::Uplink, node(40010), stranger(443))?,
        other("none of ours, pod to pod", "egress", On::Uplink, stranger(40011), BACKEND)?,
        other("none of ours, between two that have flows, TCP", "ingress", On::Pod, client(40008), OUTSIDE)?,
        other("none of ours, between two that have flows, TCP", "egress", On::Pod, OUTSIDE, client(40009))?,
        other(
            "none of ours, between two that have flows, pod to pod",
            "egress",
            On::Uplink,
            client(40011),
            BACKEND,
        )?,
        new("new flow: pod → ClusterIP", REQUEST, ("ingress", On::Pod), End(Who::Vip, 80), (60_000, 60_000))?,
        new(
            "new flow, 8 at a time: pod → ClusterIP",
            REQUEST,
            ("ingress", On::Pod),
            End(Who::Vip, 80),
            (800, 8),
        )?,
        // One destination has 20,000 ports to masquerade to.
        new("new flow: pod → outside", OUT, ("egress", On::Uplink), End(Who::Outside, 80), (8_000, 8_000))?,
        new(
            "new flow, 8 at a time: pod → outside",
            OUT,
            ("egress", On::Uplink),
            End(Who::Outside, 80),
            (800, 8),
        )?,
    ])
}

/// An established flow. Where the hook rewrites, so does its twin, back again.
fn established<A: Family>(
    name: &'static str,
    hook: &'static str,
    on: On,
    side: Side,
    flow: Flow<A>,
) -> Result<Case<A>> {
    let entry = |flow: Flow<A>| (flow.key(side), flow.as_side(side));
    let (work, back) = match (hook, side) {
        ("ingress", Side::Front) | ("egress", Side::Reply) => {
            let (vip, vip_port) = (flow.backend, flow.backend_port);
            let (backend, backend_port) = (flow.vip, flow.vip_port);
            (Work::Rewrite, Some(Flow { vip, vip_port, backend, backend_port, ..flow }))
        }
        ("ingress", Side::Back) | ("egress", Side::Forward) if flow.flags & Flow::<A>::MASQ_DONE != 0 => {
            let (client, client_port) = (flow.masq, flow.masq_port);
            let (masq, masq_port) = (flow.client, flow.client_port);
            (
                Work::Rewrite,
                Some(Flow { client, client_port, alias_port: client_port, masq, masq_port, ..flow }),
            )
        }
        _ => (Work::Pass, None),
    };
    let key = flow.key(side);
    let transport = if flow.proto == Transport::Udp.number() { Transport::Udp } else { Transport::Ack };
    let end = |addr: A, port: u16| -> End {
        let who = [Who::Client, Who::Vip, Who::Backend, Who::Node, Who::Outside, Who::Stranger];
        let who = who.into_iter().find(|&w| A::of(w) == addr).unwrap_or_else(|| unreachable!("{addr:?}"));
        End(who, port)
    };
    let packet =
        packet::build::<A>(end(key.src, key.sport.get()), end(key.dst, key.dport.get()), transport, false)?;
    let flows = std::iter::once(flow).chain(back).map(entry).collect();
    Ok(Case { name, hook, on, work, limit: (Floor::Rewrite, 1.4), packet, flows })
}

/// No flow at all.
fn other<A: Family>(name: &'static str, hook: &'static str, on: On, src: End, dst: End) -> Result<Case<A>> {
    let packet = packet::build::<A>(src, dst, Transport::Ack, false)?;
    Ok(Case { name, hook, on, work: Work::Pass, limit: (Floor::Miss, 1.3), packet, flows: Vec::new() })
}

/// The first packets of `count` flows, `at_once` without removing any; `then` is the case of the same flow's later packets.
fn new<A: Family>(
    name: &'static str,
    then: &'static str,
    (hook, on): (&'static str, On),
    dst: End,
    (count, at_once): (u32, u32),
) -> Result<Case<A>> {
    let packet = packet::build::<A>(End(Who::Client, 1), dst, Transport::Syn, true)?;
    let limit = (Floor::Established(then), 6.0);
    Ok(Case { name, hook, on, work: Work::Fresh { count, at_once }, limit, packet, flows: Vec::new() })
}

/// A flow from a pod to a ClusterIP; nothing to masquerade.
fn dnat<A: Family>(client: End) -> Flow<A> {
    Flow {
        client: client.addr(),
        vip: VIP.addr(),
        backend: BACKEND.addr(),
        masq: client.addr(),
        client_port: client.port(),
        alias_port: client.port(),
        vip_port: VIP.port(),
        backend_port: BACKEND.port(),
        masq_port: client.port(),
        service: 1,
        proto: Transport::Ack.number(),
        flags: Flow::<A>::DNAT,
        ..Flow::default()
    }
}

fn udp<A: Family>(client: End) -> Flow<A> {
    let proto = Transport::Udp.number();
    Flow { proto, backend_id: BACKEND_ID, backend_epoch: EPOCH, ..dnat(client) }
}

/// A flow from a pod to the outside, masqueraded to the node's address and another port.
fn masqueraded<A: Family>(port: u16) -> Flow<A> {
    let masq = End(Who::Node, port - 20_000);
    Flow {
        vip: OUTSIDE.addr(),
        backend: OUTSIDE.addr(),
        masq: masq.addr(),
        vip_port: OUTSIDE.port(),
        backend_port: OUTSIDE.port(),
        masq_port: masq.port(),
        service: 0,
        flags: Flow::<A>::MASQ_DONE,
        ..dnat(End(Who::Client, port))
    }
}
