//! Writes differences into the maps.
//!
//! A change of a frontend's endpoints is seen by packets entirely or not at all: the new set's slots are written
//! under an id that was never used, then the frontend is flipped to it, then the old set's slots are deleted. A
//! program that read the frontend just before reads it once more when it misses the slot.

mod cidrs;
mod cluster_ips;
pub(crate) mod names;
mod served;
mod sets;
mod sources;
#[cfg(test)]
mod tests;

use super::fill::Fill;
use super::tables::{NodeAddr, Tables};
use crate::memory;
use crate::model::{self, EndpointSet, FrontendAddr, FrontendKind, Protocol};
use crate::store::{LocalAddresses, Node};
use crate::sync::{Diff, Writer};
use anyhow::{Context as _, Result};
use aya::maps::MapError;
use cluster_ips::ClusterIps;
use ipnet::IpNet;
use lb_common::addr::{Ip4, Ip6, NetPort};
use lb_common::maps::{Frontend, FrontendKey, Set};
use names::Names;
use sets::Sets;
use sources::Sources;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

/// Writes to the pinned maps.
pub struct MapWriter {
    tables: Tables,
    /// How many there are: IPv4, IPv6. What they are is in the map, and read there when it is needed.
    frontends: [usize; 2],
    /// How many have gone since the bits of served addresses were made anew.
    gone: usize,
    names: Names,
    sets: Sets,
    sources: Sources,
    cluster_ips4: ClusterIps<Ip4>,
    cluster_ips6: ClusterIps<Ip6>,
    /// By frontend: endpoints that are in no set, but alive.
    lingering: HashMap<FrontendAddr, (u32, Arc<[SocketAddr]>)>,
    /// `--cluster-cidr`; the Node's pod CIDRs stand in where it is empty.
    cluster: Vec<IpNet>,
    no_masquerade: Vec<IpNet>,
    /// Rather what a former agent exempted, if it did.
    inherit: bool,
    written_cidrs: BTreeMap<IpNet, u32>,
    /// Told how much has been written.
    fill: Option<Fill>,
}

impl MapWriter {
    /// A writer to `tables`.
    pub fn new(tables: Tables, cluster: Vec<IpNet>, no_masquerade: Vec<IpNet>) -> Self {
        Self {
            tables,
            frontends: [0; 2],
            gone: 0,
            names: Names::default(),
            sets: Sets::default(),
            sources: Sources::default(),
            cluster_ips4: ClusterIps::default(),
            cluster_ips6: ClusterIps::default(),
            lingering: HashMap::new(),
            cluster,
            no_masquerade,
            inherit: false,
            written_cidrs: BTreeMap::new(),
            fill: None,
        }
    }

    /// What is not masqueraded to could not be learned: what a former agent wrote stays until it can.
    pub fn inherit_no_masquerade(&mut self) {
        self.inherit = true;
    }

    /// Tells when UDP backends are gone.
    pub fn tell_of_gone_backends(&mut self, gone: SyncSender<()>) {
        self.sets.raised = Some(gone);
    }

    /// Tells how full the maps are.
    pub fn tell_of_fill(&mut self, fill: Fill) {
        self.fill = Some(fill);
    }

    /// Says how much is in the maps now.
    fn count(&self) {
        let Some(fill) = &self.fill else { return };
        let [frontends4, frontends6] = self.frontends;
        fill.set("LB_FRONT4", frontends4 + self.cluster_ips4.len());
        fill.set("LB_FRONT6", frontends6 + self.cluster_ips6.len());
        fill.set("LB_SLOT4", self.sets.groups::<Ip4>());
        fill.set("LB_SLOT6", self.sets.groups::<Ip6>());
        fill.set("LB_EPOCH", self.sets.backends());
        fill.set("LB_NAME", self.names.len());
        let cidrs4 = self.written_cidrs.keys().filter(|range| range.addr().is_ipv4()).count();
        fill.set("LB_CIDR4", cidrs4);
        fill.set("LB_CIDR6", self.written_cidrs.len() - cidrs4);
        let (sources4, sources6) = self.sources.len();
        fill.set("LB_SOURCE4", sources4);
        fill.set("LB_SOURCE6", sources6);
    }

    fn adopt_family<A: Own>(&mut self) -> Result<HashMap<FrontendAddr, Frontend>> {
        let mut frontends = HashMap::new();
        let family = A::tables(&mut self.tables);
        let entries = family.all_frontends()?;
        // Of those among them that are orphans, bits stay that are not needed: as of any that goes.
        family.served.renew(entries.iter().map(|(key, _)| key.addr))?;
        for (key, frontend) in entries {
            if frontend.flags & Frontend::ADDRESS != 0 {
                A::cluster_ips(self).1.adopt(key.addr);
                continue;
            }
            let Some(protocol) = protocol(key.proto) else { continue };
            let addr = FrontendAddr::new(SocketAddr::new(key.addr.into(), key.port.get()), protocol);
            frontends.insert(addr, frontend);
        }
        let mut groups: HashMap<u32, Vec<_>> = HashMap::new();
        for entry in A::tables(&mut self.tables).slots.iter() {
            let (key, group) = entry.context("read the slots")?;
            groups.entry(key.set).or_default().push((key.group, group));
        }
        self.sets.adopt::<A>(groups, &frontends)?;
        self.frontends[usize::from(!A::IS_V4)] = frontends.len();
        Ok(frontends)
    }

    /// A frontend as it is in the map.
    fn written<A: Own>(&mut self, key: &FrontendKey<A>) -> Result<Option<Frontend>> {
        match A::tables(&mut self.tables).frontends.get(key, 0) {
            Ok(frontend) => Ok(Some(frontend)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).context("read a frontend"),
        }
    }

    /// Of a frontend that cannot be written nothing stays, or it would take the room of those that can.
    fn upsert<A: Own>(&mut self, at: &FrontendAddr, wanted: &model::Frontend) -> Result<()> {
        let service = self.names.id(&mut self.tables.names, &wanted.service)?;
        let result = self.upsert_of::<A>(at, wanted, service);
        if result.is_err() {
            let unused = self.names.drop_if_unused(&mut self.tables.names, service)?;
            if unused {
                self.sources.forget(&mut self.tables, service)?;
            }
        }
        result
    }

    fn upsert_of<A: Own>(&mut self, at: &FrontendAddr, wanted: &model::Frontend, service: u32) -> Result<()> {
        let udp = at.protocol == Protocol::Udp;
        let internal = self.sets.take::<A>(&mut self.tables, service, &wanted.internal, udp)?;
        let external = match self.sets.take::<A>(&mut self.tables, service, &wanted.external, udp) {
            Ok(set) => set,
            Err(error) => {
                self.sets.release::<A>(&mut self.tables, service, internal)?;
                return Err(error);
            }
        };
        // Before the old sets go: an endpoint that moves from one to the other must not be taken for gone.
        let lingered = match self.linger(at, service, &wanted.lingering) {
            Ok(lingered) => lingered,
            Err(error) => {
                self.sets.release::<A>(&mut self.tables, service, internal)?;
                self.sets.release::<A>(&mut self.tables, service, external)?;
                return Err(error);
            }
        };
        match self.flip::<A>(at, wanted, Frontend { internal, external, service, ..Frontend::default() }) {
            Ok(Flipped::From(old)) => {
                if let Some(old) = old {
                    self.retire::<A>(at, &old)?;
                }
                self.end_lingering(lingered)
            }
            Ok(Flipped::Not) => {
                // The same sets were taken once more.
                self.sets.release::<A>(&mut self.tables, service, internal)?;
                self.sets.release::<A>(&mut self.tables, service, external)?;
                self.end_lingering(lingered)
            }
            Err(error) => {
                self.sets.release::<A>(&mut self.tables, service, internal)?;
                self.sets.release::<A>(&mut self.tables, service, external)?;
                let new = self.now_lingering(at, lingered);
                self.end_lingering(new)?;
                Err(error)
            }
        }
    }

    /// Writes the frontend itself with what belongs to it, all or nothing.
    fn flip<A: Own>(
        &mut self,
        at: &FrontendAddr,
        wanted: &model::Frontend,
        sets: Frontend,
    ) -> Result<Flipped> {
        let mut flags = 0;
        for (set, bit) in
            [(&wanted.internal, Frontend::INTERNAL_DROP), (&wanted.external, Frontend::EXTERNAL_DROP)]
        {
            if matches!(set, EndpointSet::Drop) {
                flags |= bit;
            }
        }
        if wanted.masquerade_always {
            flags |= Frontend::MASQUERADE_ALWAYS;
        }
        if at.addr().ip().is_loopback() {
            flags |= Frontend::SOCKETS_ONLY;
        }
        if let Some(sources) = &wanted.sources {
            self.sources.set(&mut self.tables, sets.service, A::IS_V4, &sources.ranges)?;
            flags |= Frontend::SOURCE_RANGES;
            if !sources.node {
                flags |= Frontend::NODE_OUTSIDE_RANGES;
            }
        }
        let value = Frontend {
            affinity: wanted.affinity.map_or(0, |t| u32::try_from(t.as_secs()).unwrap_or(u32::MAX)),
            flags,
            kind: kind(wanted.kind),
            ..sets
        };
        let key = frontend_key::<A>(at)?;
        let old = self.written(&key)?;
        if old == Some(value) {
            return Ok(Flipped::Not);
        }
        let written = A::tables(&mut self.tables).serve(key, value);
        written.with_context(|| format!("write the frontend {} {}", at.addr(), at.protocol))?;
        self.hold_address::<A>(at, &value)?;
        self.frontends[usize::from(!A::IS_V4)] += usize::from(old.is_none());
        self.names.hold(sets.service);
        Ok(Flipped::From(old))
    }

    /// Keeps backends that get nothing new alive for the flows that they have. Returns those of before.
    fn linger(&mut self, at: &FrontendAddr, service: u32, addrs: &Arc<[SocketAddr]>) -> Result<Lingering> {
        for (held, addr) in addrs.iter().enumerate() {
            if let Err(error) = self.sets.hold_backend(&mut self.tables, service, *addr) {
                self.end_lingering(Some((service, addrs[..held].into())))?;
                return Err(error);
            }
        }
        Ok(self.now_lingering(at, (!addrs.is_empty()).then(|| (service, addrs.clone()))))
    }

    /// Notes them, and returns those of before.
    fn now_lingering(&mut self, at: &FrontendAddr, new: Lingering) -> Lingering {
        match new {
            Some(new) => self.lingering.insert(*at, new),
            None => self.lingering.remove(at),
        }
    }

    fn end_lingering(&mut self, old: Lingering) -> Result<()> {
        let Some((service, addrs)) = old else { return Ok(()) };
        addrs.iter().try_for_each(|addr| self.sets.release_backend(&mut self.tables, service, *addr))
    }

    fn delete<A: Own>(&mut self, at: &FrontendAddr) -> Result<()> {
        let key = frontend_key::<A>(at)?;
        let Some(old) = self.written(&key)? else { return Ok(()) };
        gone(A::tables(&mut self.tables).frontends.remove(&key))
            .with_context(|| format!("delete the frontend {} {}", at.addr(), at.protocol))?;
        self.frontends[usize::from(!A::IS_V4)] -= 1;
        self.gone += 1;
        let lingered = self.lingering.remove(at);
        self.end_lingering(lingered)?;
        self.retire::<A>(at, &old)
    }

    /// Lets go of what a frontend value that is no longer in the map used.
    fn retire<A: Own>(&mut self, at: &FrontendAddr, old: &Frontend) -> Result<()> {
        self.release_address::<A>(at, old)?;
        self.sets.release::<A>(&mut self.tables, old.service, old.internal)?;
        self.sets.release::<A>(&mut self.tables, old.service, old.external)?;
        if self.names.release(&mut self.tables.names, old.service)? {
            self.sources.forget(&mut self.tables, old.service)?;
        }
        Ok(())
    }

    fn hold_address<A: Own>(&mut self, at: &FrontendAddr, value: &Frontend) -> Result<()> {
        if value.kind == kind(FrontendKind::ClusterIp) {
            A::cluster_ips(self).1.hold(addr(at.addr().ip())?);
        }
        Ok(())
    }

    /// The new addresses themselves, all of whose ports are written.
    fn settle_addresses(&mut self) -> Result<()> {
        let v4 = self.cluster_ips4.settle(&mut self.tables);
        v4.and(self.cluster_ips6.settle(&mut self.tables))
    }

    fn release_address<A: Own>(&mut self, at: &FrontendAddr, value: &Frontend) -> Result<()> {
        if value.kind == kind(FrontendKind::ClusterIp) {
            let (tables, ips) = A::cluster_ips(self);
            ips.release(tables, addr(at.addr().ip())?)?;
        }
        Ok(())
    }
}

impl Writer for MapWriter {
    fn adopt(&mut self) -> Result<Vec<FrontendAddr>> {
        self.names.adopt(&self.tables.names)?;
        let mut frontends = self.adopt_family::<Ip4>()?;
        frontends.extend(self.adopt_family::<Ip6>()?);
        self.sources.adopt(&self.tables)?;
        for (at, frontend) in &frontends {
            self.names.hold(frontend.service);
            match at.addr() {
                SocketAddr::V4(_) => self.hold_address::<Ip4>(at, frontend)?,
                SocketAddr::V6(_) => self.hold_address::<Ip6>(at, frontend)?,
            }
        }
        self.names.drop_orphans(&mut self.tables.names)?;
        self.sources.drop_orphans(&mut self.tables, &self.names)?;
        self.sets.drop_orphans(&mut self.tables)?;
        self.cluster_ips4.drop_orphans(&mut self.tables)?;
        self.cluster_ips6.drop_orphans(&mut self.tables)?;
        self.settle_addresses()?;
        self.adopt_cidrs()?;
        self.count();
        Ok(frontends.into_keys().collect())
    }

    /// One that cannot be written keeps no other from being written, and least of all from being deleted: that may be
    /// what makes room for it.
    fn apply(&mut self, diff: &Diff) -> Result<()> {
        let mut failed = Vec::new();
        for (at, frontend) in &diff.upserts {
            let result = match at.addr() {
                SocketAddr::V4(_) => self.upsert::<Ip4>(at, frontend),
                SocketAddr::V6(_) => self.upsert::<Ip6>(at, frontend),
            };
            failed.extend(result.err());
        }
        for at in &diff.deletes {
            let result = match at.addr() {
                SocketAddr::V4(_) => self.delete::<Ip4>(at),
                SocketAddr::V6(_) => self.delete::<Ip6>(at),
            };
            failed.extend(result.err());
        }
        failed.extend(self.settle_addresses().err());
        let count = failed.len();
        let result = match failed.into_iter().next() {
            None => self.sets.settle(&mut self.tables),
            Some(first) if count > 1 => Err(first.context(format!("{count} failures, the first"))),
            Some(only) => Err(only),
        };
        let result = result.and_then(|()| self.forget_served());
        if diff.upserts.len() > memory::MANY {
            self.sets.pack();
        }
        self.count();
        result
    }

    fn no_masquerade(&mut self, ranges: Vec<IpNet>) {
        self.no_masquerade = ranges;
        self.inherit = false;
    }

    fn node_changed(&mut self, node: &Node, _: &LocalAddresses) -> Result<()> {
        let result = self.write_cidrs(node);
        self.count();
        result
    }
}

/// What became of a frontend.
enum Flipped {
    /// It is another one than this now.
    From(Option<Frontend>),
    /// It was so already.
    Not,
}

/// A Service port's lingering endpoints.
type Lingering = Option<(u32, Arc<[SocketAddr]>)>;

/// What the writer keeps of each family.
trait Own: NodeAddr {
    /// The addresses of ClusterIPs, and the maps to write them to.
    fn cluster_ips(writer: &mut MapWriter) -> (&mut Tables, &mut ClusterIps<Self>);
}

impl Own for Ip4 {
    fn cluster_ips(writer: &mut MapWriter) -> (&mut Tables, &mut ClusterIps<Self>) {
        (&mut writer.tables, &mut writer.cluster_ips4)
    }
}

impl Own for Ip6 {
    fn cluster_ips(writer: &mut MapWriter) -> (&mut Tables, &mut ClusterIps<Self>) {
        (&mut writer.tables, &mut writer.cluster_ips6)
    }
}

fn frontend_key<A: NodeAddr>(at: &FrontendAddr) -> Result<FrontendKey<A>> {
    Ok(FrontendKey::new(addr(at.addr().ip())?, NetPort::new(at.addr().port()), at.protocol.number()))
}

fn addr<A: NodeAddr>(ip: IpAddr) -> Result<A> {
    A::from_ip(ip).with_context(|| format!("{ip} is of the other family"))
}

fn protocol(number: u8) -> Option<Protocol> {
    [Protocol::Tcp, Protocol::Udp].into_iter().find(|p| p.number() == number)
}

const fn kind(kind: FrontendKind) -> u8 {
    match kind {
        FrontendKind::ClusterIp => 1,
        FrontendKind::NodePort => 2,
        FrontendKind::LoadBalancer => 3,
        FrontendKind::ExternalIp => 4,
    }
}

/// What is gone already has been deleted.
pub(super) fn gone(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::SyscallError(e)) if e.io_error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(MapError::KeyNotFound) => Ok(()),
        other => other,
    }
}

/// The empty set.
const NO_SET: Set = Set { id: 0, count: 0 };
