//! `loadBalancerSourceRanges` in the map: which clients a Service port's load balancer addresses admit.

use super::cidrs::{key4, key6};
use super::gone;
use super::names::Names;
use crate::kernel::tables::{NodeAddr, Tables};
use anyhow::{Context as _, Result};
use aya::maps::lpm_trie::Key;
use ipnet::IpNet;
use lb_common::maps::SourceKey;
use std::collections::{BTreeSet, HashMap};

/// Ranges by [`lb_common::maps::Frontend::service`].
#[derive(Debug, Default)]
pub(super) struct Sources(HashMap<u32, BTreeSet<IpNet>>);

impl Sources {
    pub(super) fn adopt(&mut self, tables: &Tables) -> Result<()> {
        for entry in tables.v4.sources.iter() {
            let (key, _) = entry.context("read the source ranges")?;
            self.add(key.data().service, IpNet::new(key.data().addr.into(), bits(key.prefix_len())));
        }
        for entry in tables.v6.sources.iter() {
            let (key, _) = entry.context("read the source ranges")?;
            self.add(key.data().service, IpNet::new(key.data().addr.into(), bits(key.prefix_len())));
        }
        Ok(())
    }

    /// How many are in the maps of both families.
    pub(super) fn len(&self) -> (usize, usize) {
        let of = |v4| self.0.values().flatten().filter(|range| range.addr().is_ipv4() == v4).count();
        (of(true), of(false))
    }

    fn add(&mut self, service: u32, range: Result<IpNet, ipnet::PrefixLenError>) {
        self.0.entry(service).or_default().extend(range.ok());
    }

    /// Makes `wanted` a Service port's ranges of one family: first what is new, then what has to go, so that nobody
    /// who is admitted before and after is kept out meanwhile.
    pub(super) fn set(
        &mut self,
        tables: &mut Tables,
        service: u32,
        v4: bool,
        wanted: &[IpNet],
    ) -> Result<()> {
        let wanted: BTreeSet<IpNet> = wanted.iter().map(IpNet::trunc).collect();
        let known = self.0.entry(service).or_default();
        for range in wanted.difference(&known.clone()) {
            match range {
                IpNet::V4(n) => tables.v4.sources.insert(&key(service, &key4(n)), 1, 0),
                IpNet::V6(n) => tables.v6.sources.insert(&key(service, &key6(n)), 1, 0),
            }
            .with_context(|| format!("write the source range {range}"))?;
            known.insert(*range);
        }
        let old: Vec<_> = known
            .iter()
            .filter(|range| range.addr().is_ipv4() == v4 && !wanted.contains(range))
            .copied()
            .collect();
        for range in old {
            remove(tables, service, &range)?;
            known.remove(&range);
        }
        Ok(())
    }

    /// Removes those of Service ports that are gone, which a killed agent left behind.
    pub(super) fn drop_orphans(&mut self, tables: &mut Tables, names: &Names) -> Result<()> {
        let orphans: Vec<_> = self.0.keys().filter(|id| !names.is_known(**id)).copied().collect();
        orphans.into_iter().try_for_each(|service| self.forget(tables, service))
    }

    /// Removes all of a Service port that is gone.
    pub(super) fn forget(&mut self, tables: &mut Tables, service: u32) -> Result<()> {
        for range in self.0.remove(&service).into_iter().flatten() {
            remove(tables, service, &range)?;
        }
        Ok(())
    }
}

fn remove(tables: &mut Tables, service: u32, range: &IpNet) -> Result<()> {
    gone(match range {
        IpNet::V4(n) => tables.v4.sources.remove(&key(service, &key4(n))),
        IpNet::V6(n) => tables.v6.sources.remove(&key(service, &key6(n))),
    })
    .with_context(|| format!("delete the source range {range}"))
}

/// The Service in front of the range.
fn key<A: NodeAddr>(service: u32, range: &Key<A>) -> Key<SourceKey<A>> {
    Key::new(u32::BITS + range.prefix_len(), SourceKey { service, addr: range.data() })
}

fn bits(prefix_len: u32) -> u8 {
    u8::try_from(prefix_len.saturating_sub(u32::BITS)).unwrap_or(u8::MAX)
}
