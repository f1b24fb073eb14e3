//! `lbctl flows`: what `conntrack -L` is asked for.

use super::{Tuple, service_names};
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
    /// `new`, `established` or `closing`.
    pub state: &'static str,
    /// Seconds since the client's last packet.
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
    let mut all = Vec::new();
    family.for_each_flow(|_, flow| {
        // Every flow has this entry, once.
        if flow.side == Side::Forward as u8 {
            all.push(show(flow, now, names));
        }
        Ok(())
    })?;
    Ok(all)
}

fn show<A: NodeAddr>(flow: &Value<A>, now: u32, names: &HashMap<u32, ServicePort>) -> Flow {
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
        state: match flow.state {
            s if s & Value::<A>::CLOSING != 0 => "closing",
            s if s & Value::<A>::SEEN != 0 => "established",
            _ => "new",
        },
        idle: now.saturating_sub(flow.last_seen),
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
