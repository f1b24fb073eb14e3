//! Follows the node's devices by netlink: which are pods', which are uplinks and overlays, and what addresses they
//! masquerade to. Programs are attached to new ones and the device table is kept up to date.

mod classify;
mod snapshot;

use super::attach::{self, Hook};
use super::pins::Pins;
use super::programs::Features;
use super::tables::Tables;
use crate::cli::RunArgs;
use crate::store::LocalAddresses;
use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya::programs::SchedClassifier;
use classify::{Role, classify};
use futures::StreamExt as _;
use lb_common::maps::Device as Entry;
use rtnetlink::{MulticastGroup, new_multicast_connection};
pub use snapshot::{Link, Snapshot};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::mpsc::Sender;
use tracing::{info, warn};

/// Netlink messages come in bursts: this long after the first one we look.
const SETTLE: Duration = Duration::from_millis(10);
/// We look also when nothing was said: a lost message must not leave a pod without service.
const ANYWAY: Duration = Duration::from_secs(30);

/// The device manager.
pub struct Devices {
    ebpf: Ebpf,
    pins: Pins,
    features: Features,
    args: RunArgs,
    tables: Tables,
    attached: BTreeMap<u32, (String, Entry)>,
}

impl Devices {
    /// A manager that attaches the programs of `ebpf`.
    pub fn new(ebpf: Ebpf, pins: Pins, features: Features, args: RunArgs, tables: Tables) -> Self {
        Self { ebpf, pins, features, args, tables, attached: BTreeMap::new() }
    }

    /// Follows the devices until the receiver of the addresses is gone.
    ///
    /// # Errors
    /// If netlink cannot be used at all.
    pub async fn run(mut self, addresses: Sender<LocalAddresses>) -> Result<()> {
        let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
        let (connection, handle, mut messages) =
            new_multicast_connection(&groups).context("listen to the kernel's news of devices (netlink)")?;
        tokio::spawn(connection);
        let mut known = None;
        loop {
            match Snapshot::take(&handle).await {
                Ok(snapshot) => {
                    self.update(&snapshot);
                    if known.is_none() {
                        self.drop_leftovers(&snapshot);
                    }
                    let local = snapshot.local_addresses();
                    if known.as_ref() != Some(&local) {
                        if addresses.send(local.clone()).await.is_err() {
                            return Ok(());
                        }
                        known = Some(local);
                    }
                }
                Err(error) => warn!("look at the devices: {error:#}; trying again"),
            }
            if let Ok(None) = tokio::time::timeout(ANYWAY, messages.next()).await {
                return Err(anyhow::anyhow!("netlink has closed the connection"));
            }
            tokio::time::sleep(SETTLE).await;
            while let Ok(Some(_)) = tokio::time::timeout(Duration::ZERO, messages.next()).await {}
        }
    }

    /// Brings what is attached in line with what is there.
    fn update(&mut self, snapshot: &Snapshot) {
        let wanted: BTreeMap<u32, (&Link, Role)> = snapshot
            .links
            .iter()
            .filter_map(|link| Some((link.index, (link, classify(link, snapshot, &self.args)?))))
            .collect();
        for (index, (link, role)) in &wanted {
            let entry = self.entry(link, *role, snapshot);
            let known = self.attached.get(index);
            if known.is_some_and(|(name, old)| *name == link.name && *old == entry) {
                continue;
            }
            let new = known.is_none();
            match self.put(link, entry, new) {
                Ok(()) if new => info!("serving {} ({role})", link.name),
                Ok(()) => {}
                // Gone again, most likely; if not, the next round tries again.
                Err(error) => warn!("{}: {error:#}", link.name),
            }
        }
        let gone: Vec<u32> =
            self.attached.keys().filter(|index| !wanted.contains_key(index)).copied().collect();
        for index in gone {
            if let Some((name, _)) = self.attached.remove(&index) {
                let still_there = snapshot.links.iter().any(|link| link.index == index);
                self.take_off(index, &name, still_there);
            }
        }
    }

    /// Takes programs off that a former agent attached: to devices that vanished since, or that are not to be served
    /// any more.
    fn drop_leftovers(&self, snapshot: &Snapshot) {
        // Not by what is attached: where that failed, the former agent's program had better stay.
        let wanted = |index| {
            let link = snapshot.links.iter().find(|link| link.index == index);
            link.is_some_and(|link| classify(link, snapshot, &self.args).is_some())
        };
        for name in self.pins.links() {
            if attach::link_index(&name).is_some_and(|index| !wanted(index))
                && let Err(error) = std::fs::remove_file(self.pins.link(&name))
            {
                warn!("remove the pin {name} of a former run: {error}");
            }
        }
    }

    fn entry(&self, link: &Link, role: Role, snapshot: &Snapshot) -> Entry {
        let (v4, v6) = snapshot.masquerade_addresses(link);
        let flags = match role {
            Role::Pod => Entry::POD,
            Role::Uplink if self.args.masquerade => Entry::MASQUERADE,
            Role::Uplink | Role::Overlay => 0,
        };
        Entry {
            flags,
            masq4: v4.map(Into::into).unwrap_or_default(),
            masq6: v6.map(Into::into).unwrap_or_default(),
            netns: match role {
                Role::Pod => link.peer_netns.and_then(|id| u32::try_from(id).ok()).map_or(0, |id| id + 1),
                Role::Uplink | Role::Overlay => 0,
            },
            pad: 0,
        }
    }

    fn put(&mut self, link: &Link, entry: Entry, attach: bool) -> Result<()> {
        // The table first: a program must not meet a device that it knows nothing of.
        self.tables.devices.insert(link.index, entry, 0).context("write the device table")?;
        if attach {
            set_no_redirects(&link.name);
            if let Some(bridge) = &link.bridge_name {
                set_no_redirects(bridge);
            }
            for hook in Hook::BOTH {
                let program: &mut SchedClassifier = self
                    .ebpf
                    .program_mut(hook.program())
                    .with_context(|| format!("the program {}", hook.program()))?
                    .try_into()?;
                if self.features.tcx {
                    attach::tcx(program, &self.pins, &link.name, link.index, hook)?;
                } else {
                    attach::clsact(program, &link.name, hook)?;
                }
            }
        }
        self.attached.insert(link.index, (link.name.clone(), entry));
        Ok(())
    }

    fn take_off(&mut self, index: u32, name: &str, still_there: bool) {
        for hook in Hook::BOTH {
            if (still_there || self.features.tcx)
                && let Err(error) = attach::detach(&self.pins, name, index, hook, self.features.tcx)
            {
                warn!("{name}: {error:#}");
            }
        }
        // An entry of a device that is gone harms nobody.
        let _ = self.tables.devices.remove(&index);
        info!("{name} is no longer served{}", if still_there { "" } else { ": it is gone" });
    }
}

/// Packets that enter and leave by one device are normal here, and no reason to tell pods of a better way.
fn set_no_redirects(device: &str) {
    for name in ["all", device] {
        let path = format!("/proc/sys/net/ipv4/conf/{name}/send_redirects");
        if std::fs::read_to_string(&path).is_ok_and(|value| value.trim() == "0") {
            continue;
        }
        match std::fs::write(&path, "0") {
            Ok(()) => info!("switched off ICMP redirects: {path} = 0"),
            Err(error) => warn!("{path}: {error}; clients on the same segment may be sent redirects"),
        }
    }
}
