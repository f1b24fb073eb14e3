//! One flow goes over to netfilter.

use crate::kernel::flows::Whole;
use crate::kernel::netfilter::conntrack::{Connection, Conntrack, Tuple};
use crate::kernel::tables::{Family, NodeAddr, socket_addr};
use anyhow::{Context as _, Result, bail};
use lb_common::addr::NetPort;
use lb_common::maps::{Flow, FlowKey, Side};
use std::io::ErrorKind;
use std::net::SocketAddr;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// How long netfilter remembers it without a packet: its own defaults, but for TCP's, which are kube-proxy's.
const TCP_TIMEOUT: u32 = 86_400;
const UDP_TIMEOUT: u32 = 120;

/// A packet that goes by at the wrong moment makes an entry that is in the way.
const ATTEMPTS: usize = 20;

/// Has netfilter translate a flow instead of us.
///
/// Where both translate a packet, netfilter has another port for it, since its own entry has the first one. To a TCP
/// connection that is the end, so its packets are dropped meanwhile, and sent again. A datagram is answered from the other
/// port as well, and would not be sent again.
///
/// Whether there was anything to hand over; in any case nothing of it is in
/// the flow table any more.
pub(super) fn hand_over<A: NodeAddr>(
    family: &mut Family<A>,
    conntrack: &Conntrack,
    whole: &Whole<A>,
) -> Result<bool> {
    let flow = &whole.entry;
    if flow.side == Side::Foreign as u8 {
        return Ok(false);
    }
    let keys = keys(flow);
    let inner = inner(flow);
    let known = match inner {
        Some(inner) if !whole.seen.is_over(flow.proto) => known(conntrack, &inner)?,
        _ => {
            remove(family, &keys, flow);
            return Ok(false);
        }
    };
    let Some(inner) = inner else { return Ok(false) };
    let connection = successor(flow, &inner, known.as_ref());
    let translates = connection.has_other_destination() || connection.has_other_source();
    if !translates {
        remove(family, &keys, flow);
        return Ok(false);
    }
    if flow.proto == TCP {
        for key in of_flow(family, &keys, flow) {
            // What other programs have seen of it meanwhile is of no use any more.
            family.flows.insert(key, flow.as_side(Side::Held), 0).context("hold a flow")?;
        }
    }
    let inserted = insert(conntrack, &connection, &inner);
    remove(family, &keys, flow);
    inserted.map(|()| true)
}

/// The flow between the hooks, as netfilter sees it now; nothing where it is no connection to netfilter either (echo).
fn inner<A: NodeAddr>(flow: &Flow<A>) -> Option<Tuple> {
    matches!(flow.proto, TCP | UDP).then(|| Tuple {
        src: at(flow.client, flow.alias_port),
        dst: at(flow.backend, flow.backend_port),
        proto: flow.proto,
    })
}

fn at<A: NodeAddr>(addr: A, port: NetPort) -> SocketAddr {
    socket_addr(addr, port)
}

/// Its entry, if the packet that made it went the same way.
fn known(conntrack: &Conntrack, inner: &Tuple) -> Result<Option<Connection>> {
    let find = |tuple: &Tuple| conntrack.find(tuple).context("ask for a connection");
    let found = match find(inner)? {
        // Somebody else translates the source, before our hook sees it leave.
        None => find(&inner.reversed())?,
        found => found,
    };
    Ok(found.filter(|connection| connection.original != inner.reversed()))
}

/// The connection as it has to be entered so that the client, the backend and whoever else translates notice nothing.
fn successor<A: NodeAddr>(flow: &Flow<A>, inner: &Tuple, known: Option<&Connection>) -> Connection {
    let untranslated = Connection { original: *inner, reply: inner.reversed() };
    let mut connection = *known.unwrap_or(&untranslated);
    if connection.original.src == inner.src {
        connection.original.src = at(flow.client, flow.client_port);
    }
    if flow.flags & Flow::<A>::DNAT != 0 {
        connection.original.dst = at(flow.vip, flow.vip_port);
    }
    if flow.flags & Flow::<A>::MASQ_DONE != 0 && connection.reply.dst == inner.src {
        connection.reply.dst = at(flow.masq, flow.masq_port);
    }
    connection
}

/// Enters the connection in place of whatever is in the way of it.
pub(super) fn insert(conntrack: &Conntrack, connection: &Connection, inner: &Tuple) -> Result<()> {
    let timeout = if inner.proto == TCP { TCP_TIMEOUT } else { UDP_TIMEOUT };
    for _ in 0..ATTEMPTS {
        for tuple in [*inner, inner.reversed(), connection.original, connection.reply] {
            conntrack.remove(&tuple).context("remove netfilter's own entry")?;
        }
        match conntrack.insert(connection, timeout) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            result => return result.with_context(|| format!("enter {connection:?}")),
        }
    }
    bail!("enter {connection:?}: others are always faster")
}

/// The keys of all entries that the flow can have.
fn keys<A: NodeAddr>(flow: &Flow<A>) -> Vec<FlowKey<A>> {
    [Side::Front, Side::Forward, Side::Back, Side::Reply].map(|side| flow.key(side)).to_vec()
}

/// Those that it has.
fn of_flow<A: NodeAddr>(family: &Family<A>, keys: &[FlowKey<A>], flow: &Flow<A>) -> Vec<FlowKey<A>> {
    let is = |key: &&FlowKey<A>| family.flows.get(key, 0).is_ok_and(|entry| entry.same_origin(flow));
    keys.iter().filter(is).copied().collect()
}

fn remove<A: NodeAddr>(family: &mut Family<A>, keys: &[FlowKey<A>], flow: &Flow<A>) {
    for key in of_flow(family, keys, flow) {
        // Gone already is as good.
        let _ = family.flows.remove(&key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lb_common::addr::Ip4;
    use std::net::Ipv4Addr;

    fn flow(flags: u8, alias: u16) -> Flow<Ip4> {
        let addr = |text: &str| Ip4::from(text.parse::<Ipv4Addr>().expect("an address"));
        Flow {
            client: addr("192.0.2.7"),
            client_port: NetPort::new(40000),
            vip: addr("10.96.0.1"),
            vip_port: NetPort::new(80),
            backend: addr("10.42.0.5"),
            backend_port: NetPort::new(8080),
            masq: addr("10.42.0.1"),
            masq_port: NetPort::new(12345),
            alias_port: NetPort::new(alias),
            proto: TCP,
            flags,
            ..Flow::default()
        }
    }

    fn connection(original: [&str; 2], reply: [&str; 2]) -> Connection {
        let tuple = |[src, dst]: [&str; 2]| Tuple {
            src: src.parse().expect("an address"),
            dst: dst.parse().expect("an address"),
            proto: TCP,
        };
        Connection { original: tuple(original), reply: tuple(reply) }
    }

    #[test]
    fn what_netfilter_has_to_enter() {
        let (dnat, masq) = (Flow::<Ip4>::DNAT, Flow::<Ip4>::MASQ_DONE);
        let (client, vip, backend, node) =
            ("192.0.2.7:40000", "10.96.0.1:80", "10.42.0.5:8080", "10.42.0.1:12345");
        let plain = |alias: &str| connection([alias, backend], [backend, alias]);
        for (what, flow, known, expected) in [
            ("a Service's", flow(dnat, 40000), None, connection([client, vip], [backend, client])),
            (
                "one that netfilter tracks",
                flow(dnat, 40000),
                Some(plain(client)),
                connection([client, vip], [backend, client]),
            ),
            ("masqueraded, too", flow(dnat | masq, 40000), None, connection([client, vip], [backend, node])),
            ("only masqueraded", flow(masq, 40000), None, connection([client, backend], [backend, node])),
            (
                "with an alias",
                flow(dnat, 11111),
                Some(plain("192.0.2.7:11111")),
                connection([client, vip], [backend, "192.0.2.7:11111"]),
            ),
            (
                "masqueraded by netfilter",
                flow(dnat, 40000),
                Some(connection([client, backend], [backend, "172.18.0.2:50000"])),
                connection([client, vip], [backend, "172.18.0.2:50000"]),
            ),
            (
                "masqueraded by netfilter, to a port that we had to change",
                flow(masq, 40000),
                Some(connection(["10.42.0.9:5000", backend], [backend, client])),
                connection(["10.42.0.9:5000", backend], [backend, node]),
            ),
            ("with nothing to translate", flow(0, 40000), None, plain(client)),
        ] {
            let inner = inner(&flow).expect("TCP");
            assert_eq!(successor(&flow, &inner, known.as_ref()), expected, "{what}");
        }
    }
}
