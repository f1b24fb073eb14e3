//! `lbctl flows`: what `conntrack -L` is asked for.

use super::{Tuple, service_names};
use crate::kernel::flows::{self, Whole};
use crate::kernel::sweep::monotonic_seconds;
use crate::kernel::tables::{Family, NodeAddr, Tables, socket_addr};
use crate::model::ServicePort;
use anyhow::Result;
use lb_common::maps::{Flow as Value, Side};
use serde::Serialize;
use std::collections::HashMap;

/// A flow that the programs translate.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct Flow {
    /// `TCP`, `UDP`, `ICMP` or `ICMPv6`.
    pub protocol: String,
    /// As the client sent it.
    pub original: Tuple,
    /// As the backend sees it.
    pub translated: Tuple,
    /// The Service port, if one is involved.
    pub service: Option<String>,
    /// `nf_conntrack`'s word: `SYN_SENT`, `SYN_RECV`, `ESTABLISHED`, `CLOSE_WAIT` (one end has sent its FIN), `TIME_WAIT`
    /// (both have), `CLOSE` (reset). Without connections: `UNREPLIED`, `REPLIED`, `ASSURED` (a stream both ways). `FOREIGN`
    /// if `nf_conntrack` translates it, from before we came. `DIRECT` if nothing is done to it: datagrams from outside straight
    /// to a pod, whose answers would be masqueraded otherwise.
    pub state: &'static str,
    /// Seconds since the last packet of either end.
    pub idle: u32,
}

/// All flows.
///
/// # Errors
/// If a map cannot be read.
pub fn flows(tables: &Tables) -> Result<Vec<Flow>> {
    let names = service_names(tables)?;
    let mut all = family(&tables.v4, &names)?;
    all.extend(family(&tables.v6, &names)?);
    Ok(all)
}

fn family<A: NodeAddr>(family: &Family<A>, names: &HashMap<u32, ServicePort>) -> Result<Vec<Flow>> {
    let now = monotonic_seconds();
    Ok(flows::all(family)?.iter().map(|whole| show(whole, now, names)).collect())
}

fn show<A: NodeAddr>(whole: &Whole<A>, now: u32, names: &HashMap<u32, ServicePort>) -> Flow {
    let flow = &whole.entry;
    let masqueraded = flow.flags & Value::<A>::MASQ_DONE != 0;
    let client = socket_addr(flow.client, flow.client_port).to_string();
    let translated = if masqueraded { (flow.masq, flow.masq_port) } else { (flow.client, flow.alias_port) };
    Flow {
        protocol: protocol(flow.proto),
        original: Tuple { source: client, destination: socket_addr(flow.vip, flow.vip_port).to_string() },
        translated: Tuple {
            source: socket_addr(translated.0, translated.1).to_string(),
            destination: socket_addr(flow.backend, flow.backend_port).to_string(),
        },
        service: (flow.service != 0).then(|| {
            names.get(&flow.service).map_or_else(|| format!("#{}", flow.service), ToString::to_string)
        }),
        state: match Side::from_raw(flow.side) {
            Some(Side::Foreign) => "FOREIGN",
            _ if flow.is_direct() => "DIRECT",
            _ => whole.seen.state(flow.proto),
        },
        idle: now.saturating_sub(whole.last_seen),
    }
}

/// An IP protocol's name.
pub(super) fn protocol(number: u8) -> String {
    match number {
        1 => "ICMP".into(),
        6 => "TCP".into(),
        17 => "UDP".into(),
        58 => "ICMPv6".into(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testing::Bpffs;
    use lb_common::addr::{Ip4, Ip6, NetPort};

    const SEEN: u8 = Value::<Ip4>::SEEN;
    const FIN: u8 = Value::<Ip4>::FIN;

    fn put<A: NodeAddr>(family: &mut Family<A>, flow: &Value<A>, sides: &[(Side, u8, u32)]) {
        for (side, state, last_seen) in sides {
            let entry = Value { state: *state, last_seen: *last_seen, ..flow.as_side(*side) };
            // As the programs leave it: who came before the masquerade port does not know it.
            let early = matches!(side, Side::Front | Side::Reply);
            let flags = if early { entry.flags & !Value::<A>::MASQ_DONE } else { entry.flags };
            family.flows.insert(flow.key(*side), Value { flags, ..entry }, 0).expect("room");
        }
    }

    #[test]
    fn a_flow_is_what_all_its_entries_say() {
        let bpffs = Bpffs::with_flows(1024);
        let mut tables = Tables::open(&bpffs.pins).expect("the pinned maps");
        let now = monotonic_seconds();
        let ip = |text: &str| Ip4::from(text.parse::<std::net::Ipv4Addr>().expect("an address"));
        let port = NetPort::new;
        let node_port = Value {
            client: ip("192.0.2.10"),
            vip: ip("172.18.0.11"),
            backend: ip("10.244.2.12"),
            masq: ip("10.244.1.0"),
            client_port: port(40_000),
            alias_port: port(40_000),
            vip_port: port(30_081),
            backend_port: port(8080),
            masq_port: port(12_345),
            proto: 6,
            flags: Value::<Ip4>::DNAT | Value::<Ip4>::MASQ_DONE,
            ..Value::default()
        };
        // The server has closed its end; the client's side alone looks established. Its last packet was long ago.
        let sides = [
            (Side::Front, SEEN, now - 90),
            (Side::Forward, SEEN, now - 90),
            (Side::Back, SEEN | FIN, now - 7),
            (Side::Reply, SEEN | FIN, now - 7),
        ];
        put(&mut tables.v4, &node_port, &sides);
        // Same client and backend, straight: another flow. And one whose forward entry is lost.
        let straight = Value {
            vip: node_port.backend,
            vip_port: node_port.backend_port,
            alias_port: port(20_000),
            flags: Value::<Ip4>::DNAT,
            proto: 17,
            ..node_port
        };
        put(
            &mut tables.v4,
            &straight,
            &[(Side::Front, SEEN, now), (Side::Forward, 0, now), (Side::Reply, 0, now)],
        );
        let lost = Value {
            client_port: port(40_001),
            alias_port: port(40_001),
            masq_port: port(12_346),
            ..node_port
        };
        put(
            &mut tables.v4,
            &lost,
            &[(Side::Front, SEEN, now), (Side::Back, SEEN, now), (Side::Reply, 0, now)],
        );
        let flags = Value::<Ip6>::MASQ_DONE;
        let (client_port, alias_port, masq_port) = (port(1), port(1), port(1));
        let echo = Value::<Ip6> { proto: 58, client_port, alias_port, masq_port, flags, ..Value::default() };
        put(&mut tables.v6, &echo, &[(Side::Forward, 0, now), (Side::Back, SEEN, now)]);

        let mut all = flows(&tables).expect("flows");
        all.sort_by_key(|flow| (flow.protocol.clone(), flow.original.source.clone()));
        let line = |flow: &Flow| {
            let (from, to) = (&flow.original, &flow.translated);
            format!(
                "{} {} > {}, {} > {}: {}",
                flow.protocol, from.source, from.destination, to.source, to.destination, flow.state
            )
        };
        assert_eq!(
            all.iter().map(line).collect::<Vec<_>>(),
            [
                "ICMPv6 [::]:1 > [::]:0, [::]:1 > [::]:0: REPLIED",
                "TCP 192.0.2.10:40000 > 172.18.0.11:30081, 10.244.1.0:12345 > 10.244.2.12:8080: CLOSE_WAIT",
                "TCP 192.0.2.10:40001 > 172.18.0.11:30081, 10.244.1.0:12346 > 10.244.2.12:8080: ESTABLISHED",
                "UDP 192.0.2.10:40000 > 10.244.2.12:8080, 192.0.2.10:20000 > 10.244.2.12:8080: UNREPLIED",
            ]
        );
        assert!((7..90).contains(&all[1].idle), "{}", all[1].idle);
    }
}
