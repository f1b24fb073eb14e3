//! From changed Services to the smallest set of writes.

use super::{Config, Host, node_port_addresses, service};
use crate::memory;
use crate::model::{EndpointSet, Frontend, FrontendAddr, FrontendKind};
use crate::store::{ObjectName, Store, Warning};
use std::collections::btree_map::Entry;
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

/// What is kept of a Service's [`super::DesiredService`]: a sorted list is a tenth of a map's size.
#[derive(Debug, Default)]
struct Kept {
    created: i64,
    frontends: Box<[(FrontendAddr, Arc<Frontend>)]>,
}

/// What is known of an address: something, or it is not kept.
#[derive(Debug, Default)]
struct Address {
    /// The Service that has it.
    owner: Option<ObjectName>,
    written: Option<Arc<Frontend>>,
}

/// Keeps each Service's result, so that only what changed is computed and written.
#[derive(Debug)]
pub struct Reconciler {
    config: Config,
    node_addresses: Vec<IpAddr>,
    services: HashMap<ObjectName, Kept>,
    /// Of the few that have some.
    warnings: HashMap<ObjectName, Box<[Warning]>>,
    /// The few that have a `healthCheckNodePort`, and the number of ready endpoints on this node.
    health_checks: BTreeMap<ObjectName, (u16, usize)>,
    addresses: BTreeMap<FrontendAddr, Address>,
    /// Claims on addresses that another Service has.
    losers: BTreeSet<Claim>,
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
            warnings: HashMap::new(),
            health_checks: BTreeMap::new(),
            addresses: BTreeMap::new(),
            losers: BTreeSet::new(),
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
        let old_warnings = self.warnings.remove(&name).unwrap_or_default();
        let lost: HashSet<_> = self.lost(&old).map(|(address, loser, _)| (address, loser)).collect();
        self.count(&old, &old_warnings, false);
        for (address, frontend) in &old.frontends {
            self.release(&claim(*address, frontend, old.created, &name));
            let others = self.owner(*address).is_some();
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
        let new = Kept { created: found.created, frontends: desired.frontends.into_iter().collect() };
        for (address, frontend) in &new.frontends {
            let others = self.owner(*address).is_some();
            self.totals.unserved[Warning::TAKEN] += usize::from(others);
            self.claim(claim(*address, frontend, new.created, &name));
            self.pending.insert(*address);
        }
        let fresh = desired.warnings.iter().filter(|warning| !old_warnings.contains(warning));
        news.extend(fresh.map(|warning| (name.clone(), warning.clone())));
        let newly_lost =
            self.lost(&new).filter(|(address, loser, _)| !lost.contains(&(*address, loser.clone())));
        news.extend(newly_lost.map(|(_, loser, warning)| (loser, warning)));
        self.count(&new, &desired.warnings, true);
        if !desired.warnings.is_empty() {
            self.warnings.insert(name.clone(), desired.warnings.into());
        }
        self.services.insert(name, new);
    }

    /// Claims that lose against another one, on the addresses of `kept`.
    fn lost<'a>(&'a self, kept: &'a Kept) -> impl Iterator<Item = (FrontendAddr, ObjectName, Warning)> + 'a {
        kept.frontends.iter().flat_map(|&(frontend, _)| {
            let owner = self.owner(frontend);
            self.losers_on(frontend).filter_map(move |loser| {
                let owner = owner?.clone();
                Some((frontend, loser.name.clone(), Warning::Taken { frontend, owner }))
            })
        })
    }

    fn losers_on(&self, address: FrontendAddr) -> impl Iterator<Item = &Claim> {
        static LEAST: LazyLock<ObjectName> = LazyLock::new(|| ObjectName::new("", ""));
        let first = Claim { address, not_cluster_ip: false, created: i64::MIN, name: LEAST.clone() };
        self.losers.range(first..).take_while(move |claim| claim.address == address)
    }

    fn owner(&self, address: FrontendAddr) -> Option<&ObjectName> {
        self.addresses.get(&address)?.owner.as_ref()
    }

    /// Notes a claim of a Service that has none on this address.
    fn claim(&mut self, new: Claim) {
        match &mut self.addresses.entry(new.address).or_default().owner {
            free @ None => *free = Some(new.name),
            Some(owner) => {
                let kept = self.services.get(owner);
                let held = kept.and_then(|kept| {
                    Some(claim(new.address, kept.frontend(new.address)?, kept.created, owner))
                });
                self.losers.insert(match held {
                    Some(held) if new < held => {
                        *owner = new.name;
                        held
                    }
                    _ => new,
                });
            }
        }
    }

    /// Forgets a claim. If it was the owner's, the next in order has the address.
    fn release(&mut self, claim: &Claim) {
        if self.losers.remove(claim) {
            return;
        }
        let next = self.losers_on(claim.address).next().cloned();
        let next = next.and_then(|next| self.losers.take(&next));
        if let Entry::Occupied(mut address) = self.addresses.entry(claim.address) {
            address.get_mut().owner = next.map(|next| next.name);
            if address.get().owner.is_none() && address.get().written.is_none() {
                address.remove();
            }
        }
    }

    fn wanted(&self, address: FrontendAddr) -> Option<&Arc<Frontend>> {
        self.services.get(self.owner(address)?)?.frontend(address)
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
            let written = self.addresses.get(&address).and_then(|known| known.written.as_ref());
            match (wanted, written, self.unknown.contains(&address)) {
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
        let many = diff.upserts.len() > memory::MANY;
        for address in diff.addresses() {
            self.unknown.remove(&address);
            self.adopted.remove(&address);
        }
        for address in diff.deletes {
            if let Entry::Occupied(mut known) = self.addresses.entry(address) {
                self.totals.frontends -= usize::from(known.get_mut().written.take().is_some());
                if known.get().owner.is_none() {
                    known.remove();
                }
            }
        }
        for (address, frontend) in diff.upserts {
            let written = &mut self.addresses.entry(address).or_default().written;
            self.totals.frontends += usize::from(written.replace(frontend).is_none());
        }
        if many {
            memory::pack(&mut self.addresses);
        }
        // What is still withheld stays pending.
        self.pending.retain(|address| self.adopted.contains(address));
    }

    /// Writing failed somewhere in the middle: nobody knows what the kernel holds there.
    pub fn failed(&mut self, diff: &Diff) {
        self.unknown.extend(diff.addresses());
    }

    /// Everything that is written, sorted by address.
    pub fn written(&self) -> impl Iterator<Item = (FrontendAddr, &Arc<Frontend>)> {
        self.addresses.iter().filter_map(|(address, known)| Some((*address, known.written.as_ref()?)))
    }

    /// Counts, for metrics.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// All that is not served at the moment, addresses that another Service has included.
    pub fn warnings(&self) -> impl Iterator<Item = (ObjectName, Warning)> + '_ {
        let all = self.warnings.iter().flat_map(|(name, own)| own.iter().map(move |warning| (name, warning)));
        let lost = self.losers.iter().filter_map(|Claim { address: frontend, name, .. }| {
            let owner = self.owner(*frontend)?.clone();
            Some((name.clone(), Warning::Taken { frontend: *frontend, owner }))
        });
        all.map(|(name, warning)| (name.clone(), warning.clone())).chain(lost)
    }

    /// The health check servers that should run: Service, port, ready endpoints on this node.
    pub fn health_checks(&self) -> impl Iterator<Item = (&ObjectName, u16, usize)> {
        self.health_checks.iter().map(|(name, (port, ready))| (name, *port, *ready))
    }

    fn count(&mut self, kept: &Kept, warnings: &[Warning], add: bool) {
        let change = |total: &mut usize, by: usize| {
            *total = if add { *total + by } else { *total - by };
        };
        change(&mut self.totals.services, usize::from(!kept.frontends.is_empty()));
        for warning in warnings {
            change(&mut self.totals.unserved[warning.reason_index()], 1);
        }
        let (internal, external) = kept.without_local();
        change(&mut self.totals.without_local_internal, internal);
        change(&mut self.totals.without_local_external, external);
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
    fn frontend(&self, at: FrontendAddr) -> Option<&Arc<Frontend>> {
        let place = self.frontends.binary_search_by_key(&at, |(address, _)| *address).ok()?;
        Some(&self.frontends[place].1)
    }

    /// How many ports a `Local` policy leaves without an endpoint for clients inside and outside.
    fn without_local(&self) -> (usize, usize) {
        let (mut internal, mut external) = (BTreeSet::new(), BTreeSet::new());
        for (address, frontend) in &self.frontends {
            let key = (&frontend.service.port, address.addr().is_ipv4());
            let (inside, outside) = frontend.without_local();
            internal.extend(inside.then_some(key));
            external.extend(outside.then_some(key));
        }
        (internal.len(), external.len())
    }
}
