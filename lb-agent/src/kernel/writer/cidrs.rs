//! Address ranges in the map: where the cluster's pods live, and what is not masqueraded to.

use super::{MapWriter, gone};
use crate::store::Node;
use anyhow::{Context as _, Result};
use aya::maps::lpm_trie::Key;
use ipnet::IpNet;
use lb_common::addr::{Ip4, Ip6};
use lb_common::maps::cidr;
use std::collections::BTreeMap;

impl MapWriter {
    pub(super) fn write_cidrs(&mut self, node: &Node) -> Result<()> {
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

    pub(super) fn adopt_cidrs(&mut self) -> Result<()> {
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

pub(super) fn key4(net: &ipnet::Ipv4Net) -> Key<Ip4> {
    Key::new(u32::from(net.prefix_len()), net.network().into())
}

pub(super) fn key6(net: &ipnet::Ipv6Net) -> Key<Ip6> {
    Key::new(u32::from(net.prefix_len()), net.network().into())
}
