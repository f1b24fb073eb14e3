//! Sets of slots, shared by the frontends of a Service port, and the liveness of UDP backends.

use super::{NO_SET, addr, gone};
use crate::kernel::tables::{NodeAddr, Tables, socket_addr};
use crate::memory;
use crate::model::{Endpoint, EndpointSet, Endpoints, FrontendAddr};
use anyhow::{Context as _, Result, bail};
use lb_common::addr::{Ip4, Ip6, NetPort};
use lb_common::maps::{Frontend, SLOT_GROUP, Set, Slot, SlotGroup, SlotGroupKey};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::mpsc::SyncSender;

#[derive(Debug, Default)]
pub(super) struct Sets {
    /// By [`Frontend::service`], of which each has a few, and id.
    held: BTreeMap<(u32, u32), Held>,
    last: u32,
    /// Entries of the slot tables: IPv4, IPv6.
    groups: [usize; 2],
    backends: HashMap<(u32, SocketAddr), Backend>,
    free_backends: Vec<u32>,
    last_backend: u32,
    /// There may be adopted backends that nobody uses.
    unsettled: bool,
    /// Ids and epochs of the backends of sets that no frontend uses, while adopting.
    orphans: Vec<(u32, u32)>,
    /// Told when an epoch was raised.
    pub(super) raised: Option<SyncSender<()>>,
}

#[derive(Debug)]
struct Held {
    endpoints: Endpoints,
    udp: bool,
    v4: bool,
    frontends: u32,
    /// One past the last slot: more than there are endpoints where a killed agent had begun to delete them.
    slots: u32,
}

/// A UDP backend of a Service port. Flows remember id and epoch; when the last set without it is gone the epoch is
/// raised, and its flows choose again with their next packet.
#[derive(Debug)]
struct Backend {
    id: u32,
    epoch: u32,
    sets: usize,
}

impl Sets {
    /// How many entries the family's slot table has.
    pub(super) fn groups<A: NodeAddr>(&self) -> usize {
        self.groups[usize::from(!A::IS_V4)]
    }

    /// Takes less memory, after many new ones.
    pub(super) fn pack(&mut self) {
        memory::pack(&mut self.held);
    }

    /// How many UDP backends there are.
    pub(super) fn backends(&self) -> usize {
        self.backends.len()
    }

    /// A set with these endpoints, in the map already when this returns. Counts as used once more.
    pub(super) fn take<A: NodeAddr>(
        &mut self,
        tables: &mut Tables,
        service: u32,
        wanted: &EndpointSet,
        udp: bool,
    ) -> Result<Set> {
        let EndpointSet::Endpoints(endpoints) = wanted else { return Ok(NO_SET) };
        let count = u32::try_from(endpoints.len())?;
        let mut of_service = self.held.range_mut((service, 0)..=(service, u32::MAX));
        let same = |held: &Held| held.udp == udp && held.endpoints == *endpoints;
        if let Some(((_, id), held)) = of_service.find(|(_, held)| same(held)) {
            held.frontends += 1;
            return Ok(Set { id: *id, count });
        }
        let id = self.last.checked_add(1).context("set ids are used up: remove the pinned maps")?;
        self.last = id;
        let list: Vec<_> = endpoints.iter().collect();
        for (group, some) in (0..).zip(list.chunks(SLOT_GROUP)) {
            let key = SlotGroupKey { set: id, group };
            if let Err(error) = self.write_group::<A>(tables, service, key, some, udp) {
                self.undo::<A>(tables, service, id, &list[..group as usize * SLOT_GROUP], udp)?;
                return Err(error);
            }
        }
        let held = Held { endpoints: endpoints.clone(), udp, v4: A::IS_V4, frontends: 1, slots: count };
        self.held.insert((service, id), held);
        Ok(Set { id, count })
    }

    fn write_group<A: NodeAddr>(
        &mut self,
        tables: &mut Tables,
        service: u32,
        key: SlotGroupKey,
        endpoints: &[Endpoint],
        udp: bool,
    ) -> Result<()> {
        let mut backends = [(0, 0); SLOT_GROUP];
        for (held, (backend, endpoint)) in backends.iter_mut().zip(endpoints).enumerate().filter(|_| udp) {
            match self.backend(tables, service, endpoint.addr) {
                Ok(taken) => *backend = taken,
                Err(error) => {
                    self.release_backends(tables, service, &endpoints[..held], udp)?;
                    return Err(error);
                }
            }
        }
        let written = group::<A>(endpoints, &backends).and_then(|group| {
            A::tables(tables).slots.insert(key, group, 0).context("write to the slot table")
        });
        match &written {
            Ok(()) => self.groups[usize::from(!A::IS_V4)] += 1,
            Err(_) => self.release_backends(tables, service, endpoints, udp)?,
        }
        written.with_context(|| format!("write the endpoints {}", names(endpoints)))
    }

    fn release_backends(
        &mut self,
        tables: &mut Tables,
        service: u32,
        endpoints: &[Endpoint],
        udp: bool,
    ) -> Result<()> {
        endpoints
            .iter()
            .filter(|_| udp)
            .try_for_each(|endpoint| self.release_backend(tables, service, endpoint.addr))
    }

    /// Takes back a set of which only that much could be written.
    fn undo<A: NodeAddr>(
        &mut self,
        tables: &mut Tables,
        service: u32,
        id: u32,
        written: &[Endpoint],
        udp: bool,
    ) -> Result<()> {
        self.remove_groups::<A>(tables, id, written.len())?;
        self.release_backends(tables, service, written, udp)
    }

    /// Gives back one use of a set; the last one deletes its slots.
    pub(super) fn release<A: NodeAddr>(&mut self, tables: &mut Tables, service: u32, set: Set) -> Result<()> {
        let Entry::Occupied(mut held) = self.held.entry((service, set.id)) else { return Ok(()) };
        held.get_mut().frontends = held.get().frontends.saturating_sub(1);
        if held.get().frontends > 0 {
            return Ok(());
        }
        let held = held.remove();
        self.remove_groups::<A>(tables, set.id, set.count as usize)?;
        self.release_backends(tables, service, &held.endpoints.iter().collect::<Vec<_>>(), held.udp)
    }

    /// Deletes the entries that a set of so many slots has.
    fn remove_groups<A: NodeAddr>(&mut self, tables: &mut Tables, set: u32, slots: usize) -> Result<()> {
        for (group, _) in (0..).zip((0..slots).step_by(SLOT_GROUP)) {
            let removed = A::tables(tables).slots.remove(&SlotGroupKey { set, group });
            self.groups[usize::from(!A::IS_V4)] -= usize::from(removed.is_ok());
            gone(removed).context("delete slots")?;
        }
        Ok(())
    }

    /// Backends that are in no set but that flows go to: a former agent may have kept them for those flows.
    fn adopt_lingering<A: NodeAddr>(&mut self, tables: &mut Tables) -> Result<()> {
        // Of a backend that came back there are flows of former epochs, too.
        let mut found = HashSet::new();
        A::tables(tables).for_each_flow(|_, flow| {
            if flow.backend_id != 0 {
                let at = (flow.service, socket_addr(flow.backend, flow.backend_port));
                found.insert((at, flow.backend_id, flow.backend_epoch));
            }
            Ok(())
        })?;
        for (at, id, epoch) in found {
            if !self.backends.contains_key(&at) && tables.epochs.get(&id, 0).is_ok_and(|now| now == epoch) {
                self.last_backend = self.last_backend.max(id);
                self.backends.insert(at, Backend { id, epoch, sets: 0 });
                self.unsettled = true;
            }
        }
        Ok(())
    }

    /// All frontends are written: adopted backends that nobody uses are gone.
    pub(super) fn settle(&mut self, tables: &mut Tables) -> Result<()> {
        if !std::mem::take(&mut self.unsettled) {
            return Ok(());
        }
        let unused: Vec<_> =
            self.backends.iter().filter(|(_, backend)| backend.sets == 0).map(|(at, _)| *at).collect();
        unused.into_iter().try_for_each(|(service, addr)| self.release_backend(tables, service, addr))
    }

    fn backend(&mut self, tables: &mut Tables, service: u32, addr: SocketAddr) -> Result<(u32, u32)> {
        if let Some(backend) = self.backends.get_mut(&(service, addr)) {
            backend.sets += 1;
            return Ok((backend.id, backend.epoch));
        }
        let id = match self.free_backends.pop() {
            Some(id) => id,
            None => {
                // Zero means that nobody asks.
                self.last_backend += 1;
                self.last_backend
            }
        };
        if id >= tables.epochs.len() {
            bail!("more than {} UDP endpoints", tables.epochs.len());
        }
        let epoch = tables.epochs.get(&id, 0).context("read a backend's epoch")?;
        self.backends.insert((service, addr), Backend { id, epoch, sets: 1 });
        Ok((id, epoch))
    }

    /// A use of a backend that is in no set.
    pub(super) fn hold_backend(&mut self, tables: &mut Tables, service: u32, addr: SocketAddr) -> Result<()> {
        self.backend(tables, service, addr).map(drop)
    }

    /// Gives back one use of a backend. The last one ends its flows.
    pub(super) fn release_backend(
        &mut self,
        tables: &mut Tables,
        service: u32,
        addr: SocketAddr,
    ) -> Result<()> {
        let Some(backend) = self.backends.get_mut(&(service, addr)) else { return Ok(()) };
        backend.sets = backend.sets.saturating_sub(1);
        if backend.sets == 0
            && let Some(backend) = self.backends.remove(&(service, addr))
        {
            tables
                .epochs
                .set(backend.id, backend.epoch.wrapping_add(1), 0)
                .context("raise a backend's epoch")?;
            self.free_backends.push(backend.id);
            self.tell();
        }
        Ok(())
    }

    /// One look at everything is as good as many: a full line is no loss.
    fn tell(&self) {
        if let Some(raised) = &self.raised {
            let _ = raised.try_send(());
        }
    }

    /// Takes over the sets that a former agent's frontends use.
    pub(super) fn adopt<A: NodeAddr>(
        &mut self,
        groups: HashMap<u32, Vec<(u32, SlotGroup<A>)>>,
        frontends: &HashMap<FrontendAddr, Frontend>,
    ) -> Result<()> {
        let mut users: BTreeMap<u32, (u32, bool, u32)> = BTreeMap::new();
        for (at, frontend) in frontends.iter().filter(|(at, _)| at.addr().is_ipv4() == A::IS_V4) {
            for set in [frontend.internal, frontend.external] {
                let udp = at.protocol == crate::model::Protocol::Udp;
                users.entry(set.id).or_insert((frontend.service, udp, 0)).2 += 1;
            }
        }
        for (id, mut groups) in groups {
            self.groups[usize::from(!A::IS_V4)] += groups.len();
            self.last = self.last.max(id);
            groups.sort_by_key(|(group, _)| *group);
            // No endpoint has port 0: these are beyond the end.
            let slots =
                || groups.iter().flat_map(|(_, group)| &group.slots).filter(|slot| slot.port.get() != 0);
            let endpoints: Endpoints = slots()
                .map(|slot| Endpoint {
                    addr: socket_addr(slot.addr, slot.port),
                    local: slot.flags & Slot::<A>::LOCAL != 0,
                })
                .collect();
            let (service, udp, frontends) = users.get(&id).copied().unwrap_or((0, false, 0));
            for slot in slots().filter(|slot| slot.backend_id != 0) {
                self.last_backend = self.last_backend.max(slot.backend_id);
                if frontends > 0 {
                    let backend = Backend { id: slot.backend_id, epoch: slot.backend_epoch, sets: 0 };
                    let at = (service, socket_addr(slot.addr, slot.port));
                    self.backends.entry(at).or_insert(backend).sets += 1;
                } else {
                    self.orphans.push((slot.backend_id, slot.backend_epoch));
                }
            }
            let end = groups.last().map_or(0, |(group, _)| (group + 1) * SLOT_GROUP as u32);
            let held = Held { endpoints, udp, v4: A::IS_V4, frontends, slots: end };
            self.held.insert((service, id), held);
        }
        Ok(())
    }

    /// Deletes what an agent left behind that was killed between two steps.
    pub(super) fn drop_orphans(&mut self, tables: &mut Tables) -> Result<()> {
        let orphans: Vec<_> = self
            .held
            .iter()
            .filter(|(_, held)| held.frontends == 0)
            .map(|((service, id), held)| (*service, Set { id: *id, count: held.slots }, held.v4))
            .collect();
        for (service, set, v4) in orphans {
            match v4 {
                true => self.release::<Ip4>(tables, service, set)?,
                false => self.release::<Ip6>(tables, service, set)?,
            }
        }
        self.adopt_lingering::<Ip4>(tables)?;
        self.adopt_lingering::<Ip6>(tables)?;
        let used: HashSet<u32> = self.backends.values().map(|b| b.id).collect();
        for (id, epoch) in std::mem::take(&mut self.orphans) {
            if !used.contains(&id) {
                tables.epochs.set(id, epoch.wrapping_add(1), 0).context("raise a backend's epoch")?;
                self.tell();
            }
        }
        self.free_backends = (1..=self.last_backend).filter(|id| !used.contains(id)).collect();
        Ok(())
    }
}

/// Endpoints as the programs read them, with id and epoch of their backends (zeros for TCP).
fn group<A: NodeAddr>(endpoints: &[Endpoint], backends: &[(u32, u32); SLOT_GROUP]) -> Result<SlotGroup<A>> {
    let mut group = SlotGroup::default();
    for (slot, (endpoint, backend)) in group.slots.iter_mut().zip(endpoints.iter().zip(backends)) {
        *slot = Slot {
            addr: addr::<A>(endpoint.addr.ip())?,
            port: NetPort::new(endpoint.addr.port()),
            flags: if endpoint.local { Slot::<A>::LOCAL } else { 0 },
            backend_id: backend.0,
            backend_epoch: backend.1,
            pad: 0,
        };
    }
    Ok(group)
}

fn names(endpoints: &[Endpoint]) -> String {
    endpoints.iter().map(|endpoint| endpoint.addr.to_string()).collect::<Vec<_>>().join(", ")
}
