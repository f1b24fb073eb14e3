//! Follows the node's devices by netlink: which are pods', which are uplinks and overlays, and what addresses they
//! masquerade to. Programs are attached to new ones and the device table is kept up to date.

mod classify;
mod stats;

pub use stats::Stats;

use super::pins::Pins;
use super::served::Masquerading;
use super::tables;
use super::xdp::Xdp;
use crate::cli::{BridgeShortcut, Redirect, RunArgs};
use crate::store::LocalAddresses;
use anyhow::{Context as _, Result};
use classify::{Role, classify};
use futures::StreamExt as _;
use lb_attach::attach::{Attacher, Hook};
use lb_attach::snapshot::{Link, Snapshot};
use lb_attach::vxlan::Vxlan;
use lb_common::addr::{Ip4, Ip6, NetPort};
use lb_common::maps::{Device as Entry, Overlay as Carrier};
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{MulticastGroup, new_multicast_connection};
use stats::Counts;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Sender;
use tracing::{info, warn};

/// Netlink messages come in bursts: this long after the first one we look.
const SETTLE: Duration = Duration::from_millis(10);
/// How often we look at what is attached, and at the devices though nothing was said: neither a lost message nor somebody
/// who takes our programs off must leave a pod without service.
const ANYWAY: Duration = Duration::from_secs(10);

/// How long to wait after a failure.
const AGAIN: Duration = Duration::from_secs(1);

/// How often we ask whether netfilter sees bridged packets: nobody tells.
const NETFILTER: Duration = Duration::from_secs(1);

/// The device manager.
pub struct Devices {
    attacher: Attacher,
    xdp: Option<Xdp>,
    pins: Pins,
    args: RunArgs,
    masquerading: Masquerading,
    attached: BTreeMap<u32, (String, Entry)>,
    /// When we last looked at what is attached.
    looked: Option<Instant>,
    /// What the programs know of the overlays.
    overlay: Option<Carrier>,
    /// That they cannot be told it has been said.
    overlay_failed: bool,
    stats: Stats,
}

impl Devices {
    /// A manager that attaches what is pinned, and keeps `stats` of it.
    ///
    /// # Errors
    /// If a map cannot be opened.
    pub fn new(
        attacher: Attacher,
        xdp: Option<Xdp>,
        pins: Pins,
        args: RunArgs,
        stats: Stats,
    ) -> Result<Self> {
        let masquerading = Masquerading::open(&pins)?;
        let attached = BTreeMap::new();
        let (looked, overlay, overlay_failed) = (None, None, false);
        Ok(Self { attacher, xdp, pins, args, masquerading, attached, looked, overlay, overlay_failed, stats })
    }

    /// Follows the devices until the receiver of the addresses is gone.
    ///
    /// # Errors
    /// If netlink cannot be used at all.
    pub async fn run(mut self, addresses: Sender<LocalAddresses>) -> Result<()> {
        let mut groups = vec![MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
        if self.xdp.is_some() {
            groups.push(MulticastGroup::Neigh);
        }
        let (connection, _, mut messages) =
            new_multicast_connection(&groups).context("listen to the kernel's news of devices (netlink)")?;
        tokio::spawn(connection);
        let mut known = None;
        loop {
            // System calls for every device, and maybe waiting for a plugin: nobody else is to wait.
            let short_cut = self.short_cut();
            let result;
            (self, result) = tokio::task::spawn_blocking(move || {
                let result = self.round(short_cut);
                (self, result)
            })
            .await?;
            let mut due = self.looked.map_or(SETTLE, |looked| ANYWAY.saturating_sub(looked.elapsed()));
            match result {
                Ok(local) if known.as_ref() == Some(&local) => {}
                Ok(local) => {
                    if addresses.send(local.clone()).await.is_err() {
                        return Ok(());
                    }
                    known = Some(local);
                }
                Err(error) => {
                    warn!("look at the devices: {error:#}; trying again");
                    due = AGAIN;
                }
            }
            let due = Instant::now() + due;
            let overlays = self.xdp.as_ref().map(Xdp::overlays).unwrap_or_default();
            while Instant::now() < due && short_cut == self.short_cut() {
                let rest = due.saturating_duration_since(Instant::now());
                match tokio::time::timeout(rest.min(NETFILTER), messages.next()).await {
                    Ok(None) => return Err(anyhow::anyhow!("netlink has closed the connection")),
                    Ok(Some((message, _))) if is_news(&message, &overlays) => break,
                    Ok(Some(_)) | Err(_) => {}
                }
            }
            tokio::time::sleep(SETTLE).await;
            while let Ok(Some(_)) = tokio::time::timeout(Duration::ZERO, messages.next()).await {}
        }
    }

    /// Looks at the devices once and does what is to be done.
    fn round(&mut self, short_cut: u32) -> Result<LocalAddresses> {
        // Before the devices: those that a plugin attaches from now on must not be taken for gone.
        let served = self.attacher.served();
        let snapshot = Snapshot::take()?;
        let look = self.looked.is_none_or(|looked| looked.elapsed() >= ANYWAY);
        let wanted: BTreeMap<u32, (&Link, Role)> = snapshot
            .links
            .iter()
            .filter_map(|link| Some((link.index, (link, classify(link, &snapshot, &self.args)?))))
            .collect();
        let mut counts = Counts::default();
        for (link, role) in wanted.values() {
            let entry = self.entry(link, *role, &snapshot, short_cut);
            let served = self.serve(link, *role, entry, look);
            counts.add(*role, served.is_ok());
            if let Err(error) = served {
                // Gone again, most likely; if not, the next round tries again.
                warn!("{}: {error:#}", link.name);
            }
        }
        self.stats.set(counts);
        let overlays = wanted.values().filter(|(_, role)| *role == Role::Overlay);
        let told =
            self.tell_overlay(carrier(overlays.filter_map(|(link, _)| link.vxlan.as_ref()), &snapshot));
        // Only a short cut: without it, packets take the way of all others.
        let failed = told.is_err();
        if let Err(error) = told
            && !self.overlay_failed
        {
            warn!("tell the programs of the overlays: {error:#}; trying again");
        }
        self.overlay_failed = failed;
        let known: BTreeSet<u32> = self.attached.keys().copied().collect();
        // Also what a former agent or a plugin attached: to devices that vanished since, or that are not to be served.
        let served = if look { &served | &known } else { known };
        for index in served.into_iter().filter(|index| !wanted.contains_key(index)) {
            self.take_off(index, snapshot.link(index));
        }
        if let Some(xdp) = &mut self.xdp {
            let of = |wanted_role| -> Vec<&Link> {
                let links = wanted.values().filter(|(_, role)| *role == wanted_role);
                links.map(|(link, _)| *link).collect()
            };
            if let Err(error) = xdp.round(&snapshot, &of(Role::Uplink), &of(Role::Overlay)) {
                warn!("XDP: {error:#}; trying again");
            }
        }
        if look {
            self.looked = Some(Instant::now());
        }
        Ok(LocalAddresses {
            all: snapshot.all_addresses().collect(),
            primary: snapshot.primary_addresses().collect(),
        })
    }

    fn tell_overlay(&mut self, overlay: Carrier) -> Result<()> {
        if self.overlay != Some(overlay) {
            tables::overlay(&self.pins)?.set(0, overlay, 0).context("write the map")?;
            self.overlay = Some(overlay);
        }
        Ok(())
    }

    fn entry(&self, link: &Link, role: Role, snapshot: &Snapshot, short_cut: u32) -> Entry {
        let flags = match role {
            Role::Pod if link.bridge.is_some() => Entry::POD | short_cut | self.redirect(link),
            Role::Pod => Entry::POD | self.redirect(link),
            Role::Uplink if self.args.masquerade => Entry::MASQUERADE,
            Role::Uplink => 0,
            Role::Overlay if self.args.redirect == Redirect::All => Entry::REDIRECT,
            Role::Overlay => 0,
        };
        snapshot.entry(link, flags)
    }

    /// Whether packets may be redirected to what is behind it: only to a veth's end in another network namespace.
    fn redirect(&self, link: &Link) -> u32 {
        let veth = link.kind.as_deref() == Some("veth") && link.peer_netns.is_some();
        if veth && self.args.redirect != Redirect::Off { Entry::REDIRECT } else { 0 }
    }

    /// Whether a bridge may carry what pods send to Services' endpoints on it: where bridged packets pass the FORWARD
    /// chain as routed ones do, so that NetworkPolicy sees them either way.
    fn short_cut(&self) -> u32 {
        let passes = |family: &str| match self.args.bridge_shortcut {
            BridgeShortcut::Auto => {
                let path = format!("/proc/sys/net/bridge/bridge-nf-call-{family}");
                std::fs::read_to_string(path).is_ok_and(|value| value.trim() == "1")
            }
            BridgeShortcut::On => true,
            BridgeShortcut::Off => false,
        };
        let flag = |family, flag| if passes(family) { flag } else { 0 };
        flag("iptables", Entry::BRIDGED4) | flag("ip6tables", Entry::BRIDGED6)
    }

    fn serve(&mut self, link: &Link, role: Role, entry: Entry, look: bool) -> Result<()> {
        self.masquerading.add(link.index, &entry)?;
        match self.attached.get(&link.index) {
            None => {
                self.attacher.attach(&self.pins.lock()?, link, entry)?;
                info!("serving {} ({role})", link.name);
            }
            Some((name, old)) if *name == link.name && *old == entry => {
                if !look {
                    return Ok(());
                }
                let missing = self.attacher.missing(link)?;
                if missing.is_empty() && self.attacher.entry(link.index) == Some(entry) {
                    return Ok(());
                }
                self.attacher.attach(&self.pins.lock()?, link, entry)?;
                let what: Vec<&str> = missing.into_iter().map(Hook::program).collect();
                let what =
                    if what.is_empty() { "its entry in the device table".into() } else { what.join(", ") };
                self.stats.repaired();
                warn!("{}: somebody else has removed {what}; put back", link.name);
            }
            Some(_) => self.attacher.set_entry(link.index, entry)?,
        }
        self.attached.insert(link.index, (link.name.clone(), entry));
        Ok(())
    }

    fn take_off(&mut self, index: u32, still: Option<&Link>) {
        let known = self.attached.remove(&index).map(|(name, _)| name);
        let name = still.map(|link| link.name.clone()).or(known);
        let name = name.unwrap_or_else(|| format!("device {index}"));
        let there = still.map(|link| link.name.as_str());
        match self.pins.lock().and_then(|turn| self.attacher.detach(&turn, index, there)) {
            Ok(()) => {
                info!("{name} is no longer served{}", if there.is_some() { "" } else { ": it is gone" })
            }
            Err(error) => warn!("{name}: {error:#}"),
        }
    }
}

/// What carries the packets of overlays. One port and one address of each family for all: nodes whose vxlan devices have more
/// are rare, and the others' packets are only looked up in vain.
fn carrier<'a>(overlays: impl Iterator<Item = &'a Vxlan>, snapshot: &Snapshot) -> Carrier {
    let mut carrier = Carrier::default();
    for overlay in overlays {
        let port = NetPort::new(overlay.port);
        if carrier.port == NetPort::default() {
            carrier.port = port;
        }
        if carrier.port != port {
            continue;
        }
        // Without one of its own it takes the one that the route says: mostly that of the device below.
        let below = || snapshot.link(overlay.link).map(|link| snapshot.masquerade_addresses(link));
        let (v4, v6) = match overlay.local {
            Some(IpAddr::V4(ip)) => (Some(ip), None),
            Some(IpAddr::V6(ip)) => (None, Some(ip)),
            None => below().unwrap_or_default(),
        };
        if let Some(ip) = v4.filter(|_| carrier.addr4 == Ip4::default()) {
            carrier.addr4 = ip.into();
        }
        if let Some(ip) = v6.filter(|_| carrier.addr6 == Ip6::default()) {
            carrier.addr6 = ip.into();
        }
    }
    carrier
}

/// Whether a message is a reason to look. Neighbours come and go all the time: only what overlays know of other nodes
/// matters.
fn is_news(message: &NetlinkMessage<RouteNetlinkMessage>, overlays: &BTreeSet<u32>) -> bool {
    match &message.payload {
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewNeighbour(entry) | RouteNetlinkMessage::DelNeighbour(entry),
        ) => entry.header.family == AddressFamily::Bridge && overlays.contains(&entry.header.ifindex),
        _ => true,
    }
}

#[cfg(test)]
mod tests;
