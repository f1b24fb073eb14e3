//! Writes differences into the maps.
//!
//! A change of a frontend's endpoints is seen by packets entirely or not at all: the new set's slots are written
//! under an id that was never used, then the frontend is flipped to it, then the old set's slots are deleted. A
//! program that read the frontend just before reads it once more when it misses the slot.

mod cluster_ips;
pub(crate) mod names;
mod sets;
mod sources;
#[cfg(test)]
mod tests;

use super::tables::{NodeAddr, Tables};
use crate::model::{self, EndpointSet, FrontendAddr, FrontendKind, Protocol};
use crate::store::{LocalAddresses, Node};
use crate::sync::{Diff, Writer};
use anyhow::{Context as _, Result};
use aya::maps::MapError;
use aya::maps::lpm_trie::Key;
use cluster_ips::ClusterIps;
use ipnet::IpNet;
use lb_common::addr::{Ip4, Ip6, NetPort};
use lb_common::maps::{Frontend, FrontendKey, Set, cidr};
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
    frontends: HashMap<FrontendAddr, Frontend>,
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
}

impl MapWriter {
    /// A writer to `tables`.
    pub fn new(tables: Tables, cluster: Vec<IpNet>, no_masquerade: Vec<IpNet>) -> Self {
        Self {
            tables,
            frontends: HashMap::new(),
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

    fn adopt_family<A: Own>(&mut self) -> Result<()> {
        let entries: Vec<_> = A::tables(&mut self.tables).frontends.iter().collect();
        for entry in entries {
            let (key, frontend) = entry.context("read the frontends")?;
            if frontend.flags & Frontend::ADDRESS != 0 {
                A::cluster_ips(self).1.adopt(key.addr);
                continue;
            }
            let Some(protocol) = protocol(key.proto) else { continue };
            let addr = FrontendAddr { addr: SocketAddr::new(key.addr.into(), key.port.get()), protocol };
            self.frontends.insert(addr, frontend);
        }
        let mut slots: HashMap<u32, Vec<_>> = HashMap::new();
        for entry in A::tables(&mut self.tables).slots.iter() {
            let (key, slot) = entry.context("read the slots")?;
            slots.entry(key.set).or_default().push((key.index, slot));
        }
        self.sets.adopt::<A>(slots, &self.frontends)?;
        Ok(())
    }

    fn upsert<A: Own>(&mut self, at: &FrontendAddr, wanted: &model::Frontend) -> Result<()> {
        let service = self.names.id(&mut self.tables.names, &wanted.service)?;
        let udp = at.protocol == Protocol::Udp;
        let internal = self.sets.take::<A>(&mut self.tables, service, &wanted.internal, udp)?;
        let external = self.sets.take::<A>(&mut self.tables, service, &wanted.external, udp)?;
        // Before the old sets go: an endpoint that moves from one to the other must not be taken for gone.
        let lingered = self.linger(at, service, &wanted.lingering)?;
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
        if at.addr.ip().is_loopback() {
            flags |= Frontend::SOCKETS_ONLY;
        }
        if let Some(sources) = &wanted.sources {
            self.sources.set(&mut self.tables, service, A::IS_V4, &sources.ranges)?;
            flags |= Frontend::SOURCE_RANGES;
            if !sources.node {
                flags |= Frontend::NODE_OUTSIDE_RANGES;
            }
        }
        let value = Frontend {
            internal,
            external,
            service,
            affinity: wanted.affinity.map_or(0, |t| u32::try_from(t.as_secs()).unwrap_or(u32::MAX)),
            flags,
            kind: kind(wanted.kind),
            pad: 0,
        };
        let old = self.frontends.get(at).copied();
        if old != Some(value) {
            let key = frontend_key::<A>(at)?;
            A::tables(&mut self.tables)
                .frontends
                .insert(key, value, 0)
                .with_context(|| format!("write the frontend {} {}", at.addr, at.protocol))?;
            self.frontends.insert(*at, value);
            self.names.hold(service);
            self.hold_address::<A>(at, &value)?;
        } else {
            // The same sets were taken once more.
            self.sets.release::<A>(&mut self.tables, internal)?;
            self.sets.release::<A>(&mut self.tables, external)?;
            return self.end_lingering(lingered);
        }
        if let Some(old) = old {
            self.retire::<A>(at, &old)?;
        }
        self.end_lingering(lingered)
    }

    /// Keeps backends that get nothing new alive for the flows that they have. Returns those of before.
    fn linger(&mut self, at: &FrontendAddr, service: u32, addrs: &Arc<[SocketAddr]>) -> Result<Lingering> {
        for addr in addrs.iter() {
            self.sets.hold_backend(&mut self.tables, service, *addr)?;
        }
        let new = (!addrs.is_empty()).then(|| (service, addrs.clone()));
        let old = match new {
            Some(new) => self.lingering.insert(*at, new),
            None => self.lingering.remove(at),
        };
        Ok(old)
    }

    fn end_lingering(&mut self, old: Lingering) -> Result<()> {
        let Some((service, addrs)) = old else { return Ok(()) };
        addrs.iter().try_for_each(|addr| self.sets.release_backend(&mut self.tables, service, *addr))
    }

    fn delete<A: Own>(&mut self, at: &FrontendAddr) -> Result<()> {
        let Some(old) = self.frontends.get(at).copied() else { return Ok(()) };
        let key = frontend_key::<A>(at)?;
        gone(A::tables(&mut self.tables).frontends.remove(&key))
            .with_context(|| format!("delete the frontend {} {}", at.addr, at.protocol))?;
        self.frontends.remove(at);
        let lingered = self.lingering.remove(at);
        self.end_lingering(lingered)?;
        self.retire::<A>(at, &old)
    }

    /// Lets go of what a frontend value that is no longer in the map used.
    fn retire<A: Own>(&mut self, at: &FrontendAddr, old: &Frontend) -> Result<()> {
        if old.kind == kind(FrontendKind::ClusterIp) {
            let (tables, ips) = A::cluster_ips(self);
            ips.release(tables, addr(at.addr.ip())?)?;
        }
        self.sets.release::<A>(&mut self.tables, old.internal)?;
        self.sets.release::<A>(&mut self.tables, old.external)?;
        if self.names.release(&mut self.tables.names, old.service)? {
            self.sources.forget(&mut self.tables, old.service)?;
        }
        Ok(())
    }

    fn hold_address<A: Own>(&mut self, at: &FrontendAddr, value: &Frontend) -> Result<()> {
        if value.kind == kind(FrontendKind::ClusterIp) {
            let (tables, ips) = A::cluster_ips(self);
            ips.hold(tables, addr(at.addr.ip())?)?;
        }
        Ok(())
    }

    fn write_cidrs(&mut self, node: &Node) -> Result<()> {
        let cluster = if self.cluster.is_empty() { &node.pod_cidrs } else { &self.cluster };
        let mut wanted: BTreeMap<IpNet, u32> = BTreeMap::new();
        for net in cluster {
            *wanted.entry(net.trunc()).or_default() |= cidr::CLUSTER;
        }
        let bit = cidr::NO_MASQUERADE;
        let inherited = self.written_cidrs.iter().filter(|(_, bits)| self.inherit && **bits & bit != 0);
        let inherited: Vec<_> = inherited.map(|(net, _)| *net).collect();
        for net in if inherited.is_empty() { &self.no_masquerade } else { &inherited } {
            *wanted.entry(net.trunc()).or_default() |= bit;
        }
        // The longest match wins in the map: a prefix has all the bits of those that contain it.
        let nets: Vec<_> = wanted.iter().map(|(net, bits)| (*net, *bits)).collect();
        for (net, bits) in &mut wanted {
            for (outer, outer_bits) in &nets {
                if outer.contains(net) {
                    *bits |= outer_bits;
                }
            }
        }
        for (net, bits) in &wanted {
            if self.written_cidrs.get(net) != Some(bits) {
                match net {
                    IpNet::V4(n) => self.tables.v4.cidrs.insert(&key4(n), bits, 0),
                    IpNet::V6(n) => self.tables.v6.cidrs.insert(&key6(n), bits, 0),
                }
                .with_context(|| format!("write the address range {net}"))?;
            }
        }
        for net in self.written_cidrs.keys().filter(|net| !wanted.contains_key(net)) {
            gone(match net {
                IpNet::V4(n) => self.tables.v4.cidrs.remove(&key4(n)),
                IpNet::V6(n) => self.tables.v6.cidrs.remove(&key6(n)),
            })
            .with_context(|| format!("delete the address range {net}"))?;
        }
        self.written_cidrs = wanted;
        Ok(())
    }

    fn adopt_cidrs(&mut self) -> Result<()> {
        for entry in self.tables.v4.cidrs.iter() {
            let (key, bits) = entry.context("read the address ranges")?;
            if let Ok(net) = IpNet::new(key.data().into(), key.prefix_len() as u8) {
                self.written_cidrs.insert(net, bits);
            }
        }
        for entry in self.tables.v6.cidrs.iter() {
            let (key, bits) = entry.context("read the address ranges")?;
            if let Ok(net) = IpNet::new(key.data().into(), key.prefix_len() as u8) {
                self.written_cidrs.insert(net, bits);
            }
        }
        Ok(())
    }
}

impl Writer for MapWriter {
    fn adopt(&mut self) -> Result<Vec<FrontendAddr>> {
        self.names.adopt(&self.tables.names)?;
        self.adopt_family::<Ip4>()?;
        self.adopt_family::<Ip6>()?;
        self.sources.adopt(&self.tables)?;
        let frontends: Vec<_> = self.frontends.iter().map(|(at, value)| (*at, *value)).collect();
        for (at, frontend) in &frontends {
            self.names.hold(frontend.service);
            match at.addr {
                SocketAddr::V4(_) => self.hold_address::<Ip4>(at, frontend)?,
                SocketAddr::V6(_) => self.hold_address::<Ip6>(at, frontend)?,
            }
        }
        self.sets.drop_orphans(&mut self.tables)?;
        self.cluster_ips4.drop_orphans(&mut self.tables)?;
        self.cluster_ips6.drop_orphans(&mut self.tables)?;
        self.adopt_cidrs()?;
        Ok(self.frontends.keys().copied().collect())
    }

    fn apply(&mut self, diff: &Diff) -> Result<()> {
        for (at, frontend) in &diff.upserts {
            match at.addr {
                SocketAddr::V4(_) => self.upsert::<Ip4>(at, frontend)?,
                SocketAddr::V6(_) => self.upsert::<Ip6>(at, frontend)?,
            }
        }
        for at in &diff.deletes {
            match at.addr {
                SocketAddr::V4(_) => self.delete::<Ip4>(at)?,
                SocketAddr::V6(_) => self.delete::<Ip6>(at)?,
            }
        }
        self.sets.settle(&mut self.tables)
    }

    fn no_masquerade(&mut self, ranges: Vec<IpNet>) {
        self.no_masquerade = ranges;
        self.inherit = false;
    }

    fn node_changed(&mut self, node: &Node, _: &LocalAddresses) -> Result<()> {
        self.write_cidrs(node)
    }
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

fn key4(net: &ipnet::Ipv4Net) -> Key<Ip4> {
    Key::new(u32::from(net.prefix_len()), net.network().into())
}

fn key6(net: &ipnet::Ipv6Net) -> Key<Ip6> {
    Key::new(u32::from(net.prefix_len()), net.network().into())
}

fn frontend_key<A: NodeAddr>(at: &FrontendAddr) -> Result<FrontendKey<A>> {
    Ok(FrontendKey::new(addr(at.addr.ip())?, NetPort::new(at.addr.port()), at.protocol.number()))
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
fn gone(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::SyscallError(e)) if e.io_error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(MapError::KeyNotFound) => Ok(()),
        other => other,
    }
}

/// The empty set.
const NO_SET: Set = Set { id: 0, count: 0 };
