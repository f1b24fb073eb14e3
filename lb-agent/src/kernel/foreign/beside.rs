//! A writer that looks for netfilter's flows whenever it begins to serve addresses.

use super::{Guard, Seen};
use crate::model::{EndpointSet, FrontendAddr, Protocol};
use crate::store::{LocalAddresses, Node};
use crate::sync::{Diff, Writer};
use anyhow::Result;
use ipnet::IpNet;
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use tracing::{info, warn};

/// Has `W` write, and netfilter's flows left to netfilter.
pub struct Beside<W> {
    writer: W,
    guard: Guard,
    /// UDP addresses that are served.
    served: HashSet<SocketAddr>,
    first: bool,
}

impl<W> Beside<W> {
    /// Around a writer.
    pub fn new(writer: W, guard: Guard) -> Self {
        Self { writer, guard, served: HashSet::new(), first: true }
    }
}

impl<W: Writer> Writer for Beside<W> {
    fn adopt(&mut self) -> Result<Vec<FrontendAddr>> {
        let adopted = self.writer.adopt()?;
        self.served = adopted.iter().filter(|at| at.protocol == Protocol::Udp).map(|at| at.addr()).collect();
        Ok(adopted)
    }

    fn apply(&mut self, diff: &Diff) -> Result<()> {
        for at in diff.deletes.iter().filter(|at| at.protocol == Protocol::Udp) {
            self.served.remove(&at.addr());
        }
        let new = self.begin(diff);
        let look = !new.is_empty() && self.guard.expects(self.first) || self.first;
        if look {
            // Without, datagrams of flows that began before may go to another backend.
            let endpoints = endpoints(diff, &new);
            let served = |to, backend| endpoints.get(&to).is_some_and(|all| all.contains(&backend));
            if let Err(error) = self.guard.look(|foreign| foreign.before(served)) {
                warn!("look for netfilter's flows: {error:#}");
            }
        }
        self.writer.apply(diff)?;
        if look {
            match self.guard.look(|foreign| foreign.after(&new)) {
                Ok(seen) => self.found(seen),
                Err(error) => warn!("look for netfilter's flows: {error:#}"),
            }
        }
        self.served.extend(new);
        self.first = false;
        Ok(())
    }

    fn no_masquerade(&mut self, ranges: Vec<IpNet>) {
        self.writer.no_masquerade(ranges);
    }

    fn node_changed(&mut self, node: &Node, addresses: &LocalAddresses) -> Result<()> {
        self.writer.node_changed(node, addresses)
    }
}

impl<W> Beside<W> {
    /// UDP addresses that were not served.
    fn begin(&self, diff: &Diff) -> HashSet<SocketAddr> {
        let udp = diff.upserts.iter().filter(|(at, _)| at.protocol == Protocol::Udp);
        udp.map(|(at, _)| at.addr()).filter(|at| !self.served.contains(at)).collect()
    }

    fn found(&self, seen: Seen) {
        if seen.translated > 0 {
            info!(
                "{} connections to Services were translated by other rules before we came, and stay with them; {} are \
                 flows of datagrams",
                seen.translated, seen.entered
            );
        }
        self.guard.found(seen.translated);
    }
}

/// What the addresses will be served by.
fn endpoints(diff: &Diff, new: &HashSet<SocketAddr>) -> HashMap<SocketAddr, HashSet<SocketAddr>> {
    let of = |set: &EndpointSet| match set {
        EndpointSet::Endpoints(all) => all.iter().map(|endpoint| endpoint.addr).collect::<Vec<_>>(),
        EndpointSet::Reject | EndpointSet::Drop => Vec::new(),
    };
    let new = diff.upserts.iter().filter(|(at, _)| at.protocol == Protocol::Udp && new.contains(&at.addr()));
    new.map(|(at, frontend)| {
        let all = of(&frontend.internal).into_iter().chain(of(&frontend.external));
        (at.addr(), all.chain(frontend.lingering.iter().copied()).collect())
    })
    .collect()
}
