//! `lbctl status`: whether it works, on what, and what was dropped.

use crate::kernel::pins::Pins;
use crate::kernel::tables::Tables;
use crate::kernel::xdp;
use anyhow::{Context as _, Result};
use lb_attach::records::Records;
use lb_attach::snapshot::Snapshot;
use lb_common::datapath::Reason;
use lb_common::maps::{Device as Entry, Side};
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The state of a node.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Where everything is pinned.
    pub pins: String,
    /// Whether an agent is at work. Packets are served either way.
    pub agent_running: bool,
    /// Devices that are served.
    pub devices: Vec<Device>,
    /// Socket hooks that are attached.
    pub socket_hooks: Vec<String>,
    /// Frontends in the maps.
    pub frontends: usize,
    /// Flows that are remembered.
    pub flows: usize,
    /// Entries of the flow tables: each flow has two to four.
    pub flow_entries: usize,
    /// Packets that were dropped or rejected, by reason; zeros are left out.
    pub drops: BTreeMap<&'static str, u64>,
    /// Other things that happened to packets; zeros are left out.
    pub events: BTreeMap<&'static str, u64>,
}

/// A device that is served.
#[derive(Clone, Debug, Serialize)]
pub struct Device {
    /// Interface index.
    pub index: u32,
    /// Interface name, if it is in this network namespace.
    pub name: Option<String>,
    /// `pod` or `node`.
    pub role: &'static str,
    /// The pod behind it, if the CNI plugin has met it.
    pub pod: Option<Pod>,
    /// Whether pods' traffic to the outside is masqueraded here.
    pub masquerade: bool,
    /// What flows are masqueraded to.
    pub masquerade_to: Vec<String>,
    /// How XDP sends on what only passes through: `native` (by the driver) or `generic`; nothing where it does not.
    pub xdp: Option<&'static str>,
}

/// What the CNI plugin has written down of a pod.
#[derive(Clone, Debug, Serialize)]
pub struct Pod {
    /// `namespace/name`; the container's id where the runtime gave no name.
    pub name: String,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
}

/// Reads it all.
///
/// # Errors
/// If a map cannot be read.
pub fn status(pins: &Pins, records: &Records, tables: &Tables) -> Result<Status> {
    let mut pods = pods(records)?;
    let (mut devices, snapshot) = (Vec::new(), Snapshot::take()?);
    for entry in tables.devices.iter() {
        let (index, device) = entry.context("read the device table")?;
        let mut to = Vec::new();
        let (v4, v6) = (Ipv4Addr::from(device.masq4), Ipv6Addr::from(device.masq6));
        if !v4.is_unspecified() {
            to.push(v4.to_string());
        }
        if !v6.is_unspecified() {
            to.push(v6.to_string());
        }
        let name = nix::net::if_::if_indextoname(index).ok().and_then(|n| n.into_string().ok());
        let pod = name.as_ref().and_then(|name| pods.remove(&(index, name.clone())));
        devices.push(Device {
            index,
            name,
            pod,
            role: if device.flags & Entry::POD != 0 { "pod" } else { "node" },
            masquerade: device.flags & Entry::MASQUERADE != 0,
            masquerade_to: to,
            xdp: snapshot.link(index).and_then(|link| xdp::mode(pins, link)),
        });
    }
    devices.sort_by_key(|d| d.index);
    let (mut flows, mut flow_entries) = (0, 0);
    let mut count = |side: u8| {
        flow_entries += 1;
        flows += usize::from(side == Side::Forward as u8);
    };
    tables.v4.for_each_flow(|_, flow| {
        count(flow.side);
        Ok(())
    })?;
    tables.v6.for_each_flow(|_, flow| {
        count(flow.side);
        Ok(())
    })?;
    let (mut drops, mut events) = (BTreeMap::new(), BTreeMap::new());
    for reason in Reason::ALL {
        let counter = tables.counter(reason)?;
        if counter > 0 {
            if reason.is_drop() { &mut drops } else { &mut events }.insert(reason.name(), counter);
        }
    }
    let mut socket_hooks: Vec<_> =
        pins.links().into_iter().filter_map(|name| Some(name.strip_prefix("cgroup-")?.to_owned())).collect();
    socket_hooks.sort();
    Ok(Status {
        pins: pins.root().display().to_string(),
        agent_running: File::open(pins.root()).is_ok_and(|dir| dir.try_lock().is_err()),
        devices,
        socket_hooks,
        frontends: tables.v4.frontends.keys().count() + tables.v6.frontends.keys().count(),
        flows,
        flow_entries,
        drops,
        events,
    })
}

/// Pods by their device.
fn pods(records: &Records) -> Result<HashMap<(u32, String), Pod>> {
    let mut pods = HashMap::new();
    for record in records.all()? {
        if let Some(device) = record.device {
            let pod = Pod { name: record.pod.unwrap_or(record.container_id), ips: record.ips };
            pods.insert((device.index, device.name), pod);
        }
    }
    Ok(pods)
}
