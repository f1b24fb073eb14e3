//! Sets of slots, shared by the frontends of a Service port, and the liveness of UDP backends.

use super::{NO_SET, addr, gone};
use crate::kernel::tables::{NodeAddr, Tables, socket_addr};
use crate::model::{Endpoint, EndpointSet, FrontendAddr};
use anyhow::{Context as _, Result, bail};
use lb_common::addr::{Ip4, Ip6, NetPort};
use lb_common::maps::{Frontend, Set, Slot, SlotKey};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

#[derive(Debug, Default)]
pub(super) struct Sets {
    by_content: HashMap<(u32, Arc<[Endpoint]>, bool), u32>,
    by_id: HashMap<u32, Held>,
    last: u32,
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
    service: u32,
    endpoints: Arc<[Endpoint]>,
    udp: bool,
    v4: bool,
    frontends: usize,
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
        let content = (service, Arc::clone(endpoints), udp);
        if let Some(id) = self.by_content.get(&content) {
            if let Some(held) = self.by_id.get_mut(id) {
                held.frontends += 1;
            }
            return Ok(Set { id: *id, count });
        }
        let id = self.last.checked_add(1).context("set ids are used up: remove the pinned maps")?;
        self.last = id;
        for (index, endpoint) in (0..).zip(endpoints.iter()) {
            if let Err(error) =
                self.write_slot::<A>(tables, service, SlotKey { set: id, index }, endpoint, udp)
            {
                self.undo::<A>(tables, service, id, &endpoints[..index as usize], udp)?;
                return Err(error);
            }
        }
        self.by_content.insert(content, id);
        let held =
            Held { service, endpoints: Arc::clone(endpoints), udp, v4: A::IS_V4, frontends: 1, slots: count };
        self.by_id.insert(id, held);
        Ok(Set { id, count })
    }

    fn write_slot<A: NodeAddr>(
        &mut self,
        tables: &mut Tables,
        service: u32,
        key: SlotKey,
        endpoint: &Endpoint,
        udp: bool,
    ) -> Result<()> {
        let ip = addr::<A>(endpoint.addr().ip())?;
        let (backend_id, backend_epoch) =
            if udp { self.backend(tables, service, endpoint.addr())? } else { (0, 0) };
        let slot = Slot {
            addr: ip,
            port: NetPort::new(endpoint.addr().port()),
            flags: if endpoint.local { Slot::<A>::LOCAL } else { 0 },
            backend_id,
            backend_epoch,
            pad: 0,
        };
        if let Err(error) = A::tables(tables).slots.insert(key, slot, 0) {
            if udp {
                self.release_backend(tables, service, endpoint.addr())?;
            }
            return Err(error).with_context(|| format!("write the endpoint {}", endpoint.addr()));
        }
        Ok(())
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
        for (index, endpoint) in (0..).zip(written) {
            gone(A::tables(tables).slots.remove(&SlotKey { set: id, index })).context("delete a slot")?;
            if udp {
                self.release_backend(tables, service, endpoint.addr())?;
            }
        }
        Ok(())
    }

    /// Gives back one use of a set; the last one deletes its slots.
    pub(super) fn release<A: NodeAddr>(&mut self, tables: &mut Tables, set: Set) -> Result<()> {
        let Some(held) = self.by_id.get_mut(&set.id) else { return Ok(()) };
        held.frontends = held.frontends.saturating_sub(1);
        if held.frontends > 0 {
            return Ok(());
        }
        let Some(held) = self.by_id.remove(&set.id) else { return Ok(()) };
        self.by_content.remove(&(held.service, Arc::clone(&held.endpoints), held.udp));
        for index in 0..set.count {
            gone(A::tables(tables).slots.remove(&SlotKey { set: set.id, index })).context("delete a slot")?;
        }
        if held.udp {
            for endpoint in held.endpoints.iter() {
                self.release_backend(tables, held.service, endpoint.addr())?;
            }
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
        slots: HashMap<u32, Vec<(u32, Slot<A>)>>,
        frontends: &HashMap<FrontendAddr, Frontend>,
    ) -> Result<()> {
        let mut users: BTreeMap<u32, (u32, bool, usize)> = BTreeMap::new();
        for (at, frontend) in frontends.iter().filter(|(at, _)| at.addr.is_ipv4() == A::IS_V4) {
            for set in [frontend.internal, frontend.external] {
                let udp = at.protocol == crate::model::Protocol::Udp;
                users.entry(set.id).or_insert((frontend.service, udp, 0)).2 += 1;
            }
        }
        for (id, mut slots) in slots {
            self.last = self.last.max(id);
            slots.sort_by_key(|(index, _)| *index);
            let endpoints: Arc<[Endpoint]> = slots
                .iter()
                .map(|(_, slot)| {
                    let local = slot.flags & Slot::<A>::LOCAL != 0;
                    Endpoint::new(socket_addr(slot.addr, slot.port), local)
                })
                .collect();
            let (service, udp, frontends) = users.get(&id).copied().unwrap_or((0, false, 0));
            for (_, slot) in slots.iter().filter(|(_, slot)| slot.backend_id != 0) {
                self.last_backend = self.last_backend.max(slot.backend_id);
                if frontends > 0 {
                    let backend = Backend { id: slot.backend_id, epoch: slot.backend_epoch, sets: 0 };
                    let at = (service, socket_addr(slot.addr, slot.port));
                    self.backends.entry(at).or_insert(backend).sets += 1;
                } else {
                    self.orphans.push((slot.backend_id, slot.backend_epoch));
                }
            }
            if frontends > 0 {
                self.by_content.insert((service, Arc::clone(&endpoints), udp), id);
            }
            let end = slots.last().map_or(0, |(index, _)| index + 1);
            self.by_id.insert(id, Held { service, endpoints, udp, v4: A::IS_V4, frontends, slots: end });
        }
        Ok(())
    }

    /// Deletes what an agent left behind that was killed between two steps.
    pub(super) fn drop_orphans(&mut self, tables: &mut Tables) -> Result<()> {
        let orphans: Vec<_> = self
            .by_id
            .iter()
            .filter(|(_, held)| held.frontends == 0)
            .map(|(id, held)| (Set { id: *id, count: held.slots }, held.v4))
            .collect();
        for (set, v4) in orphans {
            if v4 { self.release::<Ip4>(tables, set)? } else { self.release::<Ip6>(tables, set)? }
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
