//! `lbctl services`: what `iptables -t nat -L` and `kubectl get endpoints` are asked for.

use super::service_names;
use crate::kernel::tables::{Family, NodeAddr, Tables, socket_addr};
use crate::model::ServicePort;
use anyhow::{Context as _, Result};
use lb_common::maps::{Frontend as Value, Set, Slot, SlotKey};
use serde::Serialize;
use std::collections::HashMap;
use std::net::IpAddr;

/// One address that is served.
#[derive(Clone, Debug, Serialize, PartialEq, Eq, PartialOrd, Ord)]
pub struct Frontend {
    /// Namespace of the Service.
    pub namespace: String,
    /// Name of the Service.
    pub name: String,
    /// Name of the port.
    pub port: String,
    /// `ClusterIP`, `NodePort`, `LoadBalancer`, `ExternalIP`.
    pub kind: &'static str,
    /// Address and port.
    pub address: String,
    /// `TCP` or `UDP`.
    pub protocol: String,
    /// Where pods and processes of this node are sent.
    pub internal: Endpoints,
    /// Where everybody else is sent.
    pub external: Endpoints,
    /// Session affinity in seconds, zero for none.
    pub affinity: u32,
    /// The only clients that are admitted (`loadBalancerSourceRanges`); empty: everybody is.
    pub source_ranges: Vec<String>,
}

/// A set of endpoints.
#[derive(Clone, Debug, Serialize, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoints {
    /// `forward`, `reject` or `drop`.
    pub action: &'static str,
    /// Address and port; those on this node have a `*` behind.
    pub endpoints: Vec<String>,
}

impl std::fmt::Display for Endpoints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.endpoints.is_empty() {
            f.write_str(self.action)
        } else {
            f.write_str(&self.endpoints.join("\n"))
        }
    }
}

/// All frontends, sorted.
///
/// # Errors
/// If a map cannot be read.
pub fn services(tables: &Tables) -> Result<Vec<Frontend>> {
    let names = service_names(tables)?;
    let mut all = family(&tables.v4, &names)?;
    all.extend(family(&tables.v6, &names)?);
    all.sort();
    Ok(all)
}

fn family<A: NodeAddr>(family: &Family<A>, names: &HashMap<u32, ServicePort>) -> Result<Vec<Frontend>> {
    let mut all = Vec::new();
    let ranges = source_ranges(family)?;
    for entry in family.frontends.iter() {
        let (key, value) = entry.context("read the frontends")?;
        if value.flags & Value::ADDRESS != 0 {
            continue;
        }
        let service = names.get(&value.service);
        let (namespace, name, port) = match service {
            Some(ServicePort { service, port }) => (service.namespace(), service.name().to_owned(), &**port),
            None => ("", format!("#{}", value.service), ""),
        };
        all.push(Frontend {
            namespace: namespace.into(),
            name,
            port: port.into(),
            kind: match value.kind {
                1 => "ClusterIP",
                2 => "NodePort",
                3 => "LoadBalancer",
                4 => "ExternalIP",
                _ => "?",
            },
            address: socket_addr(key.addr, key.port).to_string(),
            protocol: super::flows::protocol(key.proto),
            internal: endpoints(family, value.internal, value.flags & Value::INTERNAL_DROP != 0),
            external: endpoints(family, value.external, value.flags & Value::EXTERNAL_DROP != 0),
            affinity: value.affinity,
            source_ranges: if value.flags & Value::SOURCE_RANGES != 0 {
                ranges.get(&value.service).cloned().unwrap_or_default()
            } else {
                Vec::new()
            },
        });
    }
    Ok(all)
}

/// By [`Value::service`].
fn source_ranges<A: NodeAddr>(family: &Family<A>) -> Result<HashMap<u32, Vec<String>>> {
    let mut all: HashMap<u32, Vec<String>> = HashMap::new();
    for entry in family.sources.iter() {
        let (key, _) = entry.context("read the source ranges")?;
        let source = key.data();
        let (service, addr): (u32, IpAddr) = (source.service, { source.addr }.into());
        let range = format!("{addr}/{}", key.prefix_len().saturating_sub(u32::BITS));
        all.entry(service).or_default().push(range);
    }
    Ok(all)
}

fn endpoints<A: NodeAddr>(family: &Family<A>, set: Set, drop: bool) -> Endpoints {
    let endpoints: Vec<String> = (0..set.count)
        .map(|index| match family.slot(&SlotKey { set: set.id, index }) {
            Ok(slot) => {
                let here = if slot.flags & Slot::<A>::LOCAL != 0 { "*" } else { "" };
                format!("{}{here}", socket_addr(slot.addr, slot.port))
            }
            Err(_) => "missing!".into(),
        })
        .collect();
    let action = match (endpoints.is_empty(), drop) {
        (false, _) => "forward",
        (true, true) => "drop",
        (true, false) => "reject",
    };
    Endpoints { action, endpoints }
}
