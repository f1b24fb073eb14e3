//! From changed Services to the smallest set of writes.

use super::{Config, DesiredService, Host, node_port_addresses, service};
use crate::model::{EndpointSet, Frontend, FrontendAddr, FrontendKind};
use crate::store::{ObjectName, Store, Warning};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

/// What has to be written. Both lists are sorted by address.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Diff {
    /// Frontends that are new or different. Those of one Service port share one value.
    pub upserts: Vec<(FrontendAddr, Arc<Frontend>)>,
    /// Frontends that have to go.
    pub deletes: Vec<FrontendAddr>,
}

impl Diff {
    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        self.upserts.is_empty() && self.deletes.is_empty()
    }

    fn addresses(&self) -> impl Iterator<Item = FrontendAddr> {
        self.upserts.iter().map(|(address, _)| *address).chain(self.deletes.iter().copied())
    }
}

/// Counts of what is served now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Services with at least one frontend.
    pub services: usize,
    /// Frontends written.
    pub frontends: usize,
    /// Service ports with `internalTrafficPolicy: Local` and endpoints elsewhere only.
    pub without_local_internal: usize,
    /// Service ports with `externalTrafficPolicy: Local` and endpoints elsewhere only.
    pub without_local_external: usize,
    /// Things that are not served, addresses that another Service has included: by reason, in the order of
    /// [`Warning::REASONS`].
    pub unserved: [usize; Warning::REASONS.len()],
}

/// A Service that wants an address. The first in order gets it: ClusterIPs before the rest (nobody may take over
/// another Service's ClusterIP with an external IP), then age, then name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    address: FrontendAddr,
    not_cluster_ip: bool,
    created: i64,
    name: ObjectName,
}

/// What is kept of a Service's [`DesiredService`]: a sorted list is a tenth of a map's size.
#[derive(Debug, Default)]
struct Kept {
    created: i64,
    frontends: Box<[(FrontendAddr, Arc<Frontend>)]>,
    warnings: Box<[Warning]>,
    without_local: (u32, u32),
}

/// Keeps each Service's result, so that only what changed is computed and written.
#[derive(Debug)]
pub struct Reconciler {
    config: Config,
    node_addresses: Vec<IpAddr>,
    services: HashMap<ObjectName, Kept>,
    /// The few that have a `healthCheckNodePort`, and the number of ready endpoints on this node.
    health_checks: BTreeMap<ObjectName, (u16, usize)>,
    claims: BTreeSet<Claim>,
    written: BTreeMap<FrontendAddr, Arc<Frontend>>,
    /// Where desired and written may differ.
    pending: BTreeSet<FrontendAddr>,
    /// Where the kernel may hold something else than `written` says: found at start, or a write failed.
    unknown: HashSet<FrontendAddr>,
    /// What a former agent wrote and we have not touched yet.
    adopted: HashSet<FrontendAddr>,
    partial: bool,
    totals: Totals,
}

impl Reconciler {
    /// `adopted`: the frontends that the kernel holds already, from a former run.
    pub fn new(config: Config, adopted: impl IntoIterator<Item = FrontendAddr>) -> Self {
        let adopted: HashSet<_> = adopted.into_iter().collect();
        Self {
            config,
            node_addresses: Vec::new(),
            services: HashMap::new(),
            health_checks: BTreeMap::new(),
            claims: BTreeSet::new(),
            written: BTreeMap::new(),
            pending: adopted.iter().copied().collect(),
            unknown: adopted.clone(),
            adopted,
            partial: false,
            totals: Totals::default(),
        }
    }

    /// While the source could not read everything, what a former agent wrote is neither removed nor made to refuse.
    pub fn set_partial(&mut self, partial: bool) {
        self.partial = partial;
    }

    /// Computes the given Services anew. Returns warnings that are new.
    pub fn update(
        &mut self,
        store: &Store,
        dirty: impl IntoIterator<Item = ObjectName>,
    ) -> Vec<(ObjectName, Warning)> {
        let localhost = self.config.localhost_node_ports;
        self.node_addresses =
            node_port_addresses(&self.config.node_port_addresses, localhost, store.addresses(), store.node());
        let mut news = Vec::new();
        for name in dirty {
            self.update_service(store, name, &mut news);
        }
        news
    }

    fn update_service(&mut self, store: &Store, name: ObjectName, news: &mut Vec<(ObjectName, Warning)>) {
        let old = self.services.remove(&name).unwrap_or_default();
        let lost: HashSet<_> = self.lost(&old).map(|(address, loser, _)| (address, loser)).collect();
        self.count(&old, false);
        for (address, frontend) in &old.frontends {
            self.claims.remove(&claim(*address, frontend, old.created, &name));
            let others = self.is_claimed(*address);
            self.totals.unserved[Warning::TAKEN] -= usize::from(others);
            self.pending.insert(*address);
        }
        self.health_checks.remove(&name);
        let Some(found) = store.service(&name) else { return };
        let slices = store.slices(&name).collect::<Vec<_>>();
        let host =
            Host { node: store.node(), node_ports: &self.node_addresses, addresses: store.addresses() };
        let desired = service(&name, found, slices.iter().copied(), &host, &self.config);
        self.health_checks.extend(desired.health_check.map(|check| (name.clone(), check)));
        let new = Kept::new(found.created, desired);
        for (address, frontend) in &new.frontends {
            let others = self.is_claimed(*address);
            self.totals.unserved[Warning::TAKEN] += usize::from(others);
            self.claims.insert(claim(*address, frontend, new.created, &name));
            self.pending.insert(*address);
        }
        let fresh = new.warnings.iter().filter(|warning| !old.warnings.contains(warning));
        news.extend(fresh.map(|warning| (name.clone(), warning.clone())));
        let newly_lost =
            self.lost(&new).filter(|(address, loser, _)| !lost.contains(&(*address, loser.clone())));
        news.extend(newly_lost.map(|(_, loser, warning)| (loser, warning)));
        self.count(&new, true);
        self.services.insert(name, new);
    }

    /// Claims that lose against another one, on the addresses of `kept`.
    fn lost<'a>(&'a self, kept: &'a Kept) -> impl Iterator<Item = (FrontendAddr, ObjectName, Warning)> + 'a {
        kept.frontends.iter().flat_map(|&(frontend, _)| {
            let owner = self.claims_on(frontend).next();
            let losers = self.claims_on(frontend).skip(1);
            losers.filter_map(move |loser| {
                let owner = owner?.name.clone();
                Some((frontend, loser.name.clone(), Warning::Taken { frontend, owner }))
            })
        })
    }

    fn claims_on(&self, address: FrontendAddr) -> impl Iterator<Item = &Claim> {
        static LEAST: LazyLock<ObjectName> = LazyLock::new(|| ObjectName::new("", ""));
        let first = Claim { address, not_cluster_ip: false, created: i64::MIN, name: LEAST.clone() };
        self.claims.range(first..).take_while(move |claim| claim.address == address)
    }

    fn is_claimed(&self, address: FrontendAddr) -> bool {
        self.claims_on(address).next().is_some()
    }

    fn wanted(&self, address: FrontendAddr) -> Option<&Arc<Frontend>> {
        let frontends = &self.services.get(&self.claims_on(address).next()?.name)?.frontends;
        let at = frontends.binary_search_by_key(&address, |(address, _)| *address).ok()?;
        Some(&frontends[at].1)
    }

    /// What has to be written to get from what is written to what is wanted.
    pub fn diff(&self) -> Diff {
        let mut diff = Diff::default();
        for &address in &self.pending {
            let wanted = self.wanted(address);
            if self.partial && self.adopted.contains(&address) && wanted.is_none_or(|wanted| refuses(wanted))
            {
                continue;
            }
            match (wanted, self.written.get(&address), self.unknown.contains(&address)) {
                (Some(wanted), Some(written), false) if wanted == written => {}
                (Some(wanted), _, _) => diff.upserts.push((address, wanted.clone())),
                (None, None, false) => {}
                (None, _, _) => diff.deletes.push(address),
            }
        }
        diff
    }

    /// The whole difference is written.
    pub fn committed(&mut self, diff: Diff) {
        for address in diff.addresses() {
            self.unknown.remove(&address);
            self.adopted.remove(&address);
        }
        for address in diff.deletes {
            self.written.remove(&address);
        }
        self.written.extend(diff.upserts);
        // What is still withheld stays pending.
        self.pending.retain(|address| self.adopted.contains(address));
    }

    /// Writing failed somewhere in the middle: nobody knows what the kernel holds there.
    pub fn failed(&mut self, diff: &Diff) {
        self.unknown.extend(diff.addresses());
    }

    /// Everything that is written.
    pub fn written(&self) -> &BTreeMap<FrontendAddr, Arc<Frontend>> {
        &self.written
    }

    /// Counts, for metrics.
    pub fn totals(&self) -> Totals {
        Totals { frontends: self.written.len(), ..self.totals }
    }

    /// All that is not served at the moment, addresses that another Service has included.
    pub fn warnings(&self) -> impl Iterator<Item = (ObjectName, Warning)> + '_ {
        self.services.iter().flat_map(|(name, kept)| {
            let own = kept.warnings.iter().map(|warning| (name.clone(), warning.clone()));
            let lost = self.lost(kept).filter(move |(_, loser, _)| loser == name);
            own.chain(lost.map(|(_, loser, warning)| (loser, warning)))
        })
    }

    /// The health check servers that should run: Service, port, ready endpoints on this node.
    pub fn health_checks(&self) -> impl Iterator<Item = (&ObjectName, u16, usize)> {
        self.health_checks.iter().map(|(name, (port, ready))| (name, *port, *ready))
    }

    fn count(&mut self, kept: &Kept, add: bool) {
        let change = |total: &mut usize, by: usize| {
            *total = if add { *total + by } else { *total - by };
        };
        change(&mut self.totals.services, usize::from(!kept.frontends.is_empty()));
        for warning in &kept.warnings {
            change(&mut self.totals.unserved[warning.reason_index()], 1);
        }
        change(&mut self.totals.without_local_internal, kept.without_local.0 as usize);
        change(&mut self.totals.without_local_external, kept.without_local.1 as usize);
    }
}

fn claim(address: FrontendAddr, frontend: &Frontend, created: i64, name: &ObjectName) -> Claim {
    let not_cluster_ip = frontend.kind != FrontendKind::ClusterIp;
    Claim { address, not_cluster_ip, created, name: name.clone() }
}

fn refuses(frontend: &Frontend) -> bool {
    frontend.internal == EndpointSet::Reject && frontend.external == EndpointSet::Reject
}

impl Kept {
    fn new(created: i64, desired: DesiredService) -> Self {
        let (mut internal, mut external) = (BTreeSet::new(), BTreeSet::new());
        for (address, frontend) in &desired.frontends {
            let key = (&frontend.service.port, address.addr().is_ipv4());
            let (inside, outside) = frontend.without_local();
            internal.extend(inside.then_some(key));
            external.extend(outside.then_some(key));
        }
        let without_local = (internal.len() as u32, external.len() as u32);
        Self {
            created,
            without_local,
            warnings: desired.warnings.into(),
            frontends: desired.frontends.into_iter().collect(),
        }
    }
}
