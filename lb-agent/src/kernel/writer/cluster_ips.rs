//! ClusterIPs as addresses: what is sent to a port that they do not have is refused, not routed somewhere.

use super::gone;
use crate::kernel::tables::{NodeAddr, Tables};
use anyhow::{Context as _, Result};
use ipnet::IpNet;
use lb_common::maps::{Frontend, FrontendKey, Range};
use std::collections::HashMap;
use std::net::IpAddr;

/// How many frontends each address has.
#[derive(Debug)]
pub(super) struct ClusterIps<A> {
    frontends: HashMap<A, u32>,
    /// Those of them that are not in the map yet. An address comes after all of its ports: before, it would refuse those that
    /// are still to come, and with them what kube-proxy's rules serve there.
    new: Vec<A>,
    /// Of all of them, as written. It only grows: too large costs a look-up now and then.
    range: Option<IpNet>,
}

impl<A> Default for ClusterIps<A> {
    fn default() -> Self {
        Self { frontends: HashMap::new(), new: Vec::new(), range: None }
    }
}

impl<A: NodeAddr> ClusterIps<A> {
    /// How many are in the map, or will be once they are [`settle`](Self::settle)d.
    pub(super) fn len(&self) -> usize {
        self.frontends.len()
    }

    /// An entry that a former agent wrote. Those that turn out to have no frontend go with [`Self::drop_orphans`].
    pub(super) fn adopt(&mut self, addr: A) {
        self.frontends.entry(addr).or_default();
    }

    pub(super) fn drop_orphans(&mut self, tables: &mut Tables) -> Result<()> {
        let orphans: Vec<A> =
            self.frontends.iter().filter(|(_, n)| **n == 0).map(|(addr, _)| *addr).collect();
        for addr in orphans {
            self.frontends.remove(&addr);
            delete(tables, addr)?;
        }
        Ok(())
    }

    /// Counts a frontend of the address.
    pub(super) fn hold(&mut self, addr: A) {
        let count = self.frontends.entry(addr).or_default();
        if *count == 0 {
            self.new.push(addr);
        }
        *count += 1;
    }

    /// Makes the other ports of addresses that are new refuse. What could not be written is tried again by the next call.
    pub(super) fn settle(&mut self, tables: &mut Tables) -> Result<()> {
        let mut result = Ok(());
        for addr in std::mem::take(&mut self.new) {
            // It may have gone again meanwhile.
            if !self.frontends.contains_key(&addr) {
                continue;
            }
            let written = self.write(tables, addr);
            if written.is_err() {
                self.new.push(addr);
            }
            result = result.and(written);
        }
        result
    }

    fn write(&mut self, tables: &mut Tables, addr: A) -> Result<()> {
        self.widen(tables, addr)?;
        let value = Frontend {
            flags: Frontend::ADDRESS | Frontend::REJECT_OTHER_PORTS,
            kind: super::kind(crate::model::FrontendKind::ClusterIp),
            ..Frontend::default()
        };
        let written = A::tables(tables).serve(FrontendKey::address(addr), value);
        written.with_context(|| format!("write the ClusterIP {}", addr.into()))
    }

    /// The last frontend of the address takes it with it.
    pub(super) fn release(&mut self, tables: &mut Tables, addr: A) -> Result<()> {
        let Some(count) = self.frontends.get_mut(&addr) else { return Ok(()) };
        *count = count.saturating_sub(1);
        if *count == 0 {
            self.frontends.remove(&addr);
            delete(tables, addr)?;
        }
        Ok(())
    }

    fn widen(&mut self, tables: &mut Tables, addr: A) -> Result<()> {
        let addr: IpAddr = addr.into();
        if self.range.is_some_and(|range| range.contains(&addr)) {
            return Ok(());
        }
        let mut range = self.range.unwrap_or(addr.into());
        while !range.contains(&addr) {
            // The one without a supernet contains everything.
            range = range.supernet().unwrap_or(range);
        }
        let (first, mask) = (A::from_ip(range.network()), A::from_ip(range.netmask()));
        let (Some(first), Some(mask)) = (first, mask) else { return Ok(()) };
        let written = A::tables(tables).cluster_ips.set(0, Range { first, mask }, 0);
        written.context("write the range of the ClusterIPs")?;
        self.range = Some(range);
        Ok(())
    }
}

fn delete<A: NodeAddr>(tables: &mut Tables, addr: A) -> Result<()> {
    gone(A::tables(tables).frontends.remove(&FrontendKey::address(addr)))
        .with_context(|| format!("delete the ClusterIP {}", addr.into()))
}
