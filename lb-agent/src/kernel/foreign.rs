//! Connections that netfilter translated before we came (kube-proxy's rules did) stay with it to their end.
//!
//! The middle of a TCP connection that is none of ours is left to the host anyway. A datagram shows not whether it begins a
//! flow: those that `nf_conntrack` translates are entered into the flow table as [`Side::Foreign`], before their Service is
//! served, and again right after, for those that began meanwhile. An entry stays as long as `nf_conntrack`'s does, or until
//! the backend is gone: then the flow's next datagram is ours.
//!
//! (Adopting such flows, so that we translate them ourselves, was the other candidate. It cannot be done without a gap:
//! both would translate for a moment, or neither. And it cannot be done for the host's own processes, whose packets
//! meet no ingress hook.)

mod beside;
mod guard;
pub(super) mod sockets;
#[cfg(test)]
mod tests;

use super::netfilter::conntrack::{Connection, Conntrack, Tuple};
use super::pins::Pins;
use super::tables::{Family, NodeAddr, Tables, socket_addr};
use anyhow::{Context as _, Result};
use lb_common::addr::NetPort;
use lb_common::maps::{Flow, FlowKey, Frontend, FrontendKey, Side, SlotKey};
use sockets::{Here, Sockets};
use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

pub use beside::Beside;
pub use guard::Guard;

const UDP: u8 = 17;

/// Flows that netfilter translates, to frontends of ours.
pub struct Foreign {
    conntrack: Conntrack,
    tables: Tables,
    sockets: Sockets,
    /// As the ingress hook sees their packets.
    entered: HashSet<Tuple>,
}

/// What a look at netfilter's connections has shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Connections that it translates to endpoints of ours, TCP's too.
    pub translated: usize,
    /// Flows of datagrams that were entered.
    pub entered: usize,
}

impl Foreign {
    /// Opens a conversation with netfilter, and takes over what a former agent has entered.
    ///
    /// # Errors
    /// If the kernel does not track connections, or the flow table cannot be read.
    pub fn open(pins: &Pins) -> Result<Self> {
        let tables = Tables::open(pins)?;
        let conntrack = Conntrack::open().context("open a netlink socket")?;
        // A kernel without the netlink interface says so now.
        let any = SocketAddr::new(IpAddr::from([0, 0, 0, 0]), 0);
        conntrack.find(&Tuple { src: any, dst: any, proto: UDP }).context("ask for connections")?;
        let mut entered = HashSet::new();
        entered_in(&tables.v4, &mut entered)?;
        entered_in(&tables.v6, &mut entered)?;
        Ok(Self { conntrack, tables, sockets: Sockets::open(pins)?, entered })
    }

    /// Enters flows to frontends that will be served in a moment: whom their datagrams belong to, as far as `served` says
    /// that the backend is one of the Service's.
    ///
    /// # Errors
    /// If netfilter does not tell, or there is no room.
    pub fn before(&mut self, served: impl Fn(SocketAddr, SocketAddr) -> bool) -> Result<Seen> {
        let (mut seen, here) = (Seen::default(), Here::now()?);
        for connection in self.translated()? {
            let Connection { original, reply } = connection;
            if original.proto == UDP && served(original.dst, reply.src) {
                self.enter(&here, original, &connection, (0, 0))?;
                seen.entered += 1;
            }
        }
        Ok(seen)
    }

    /// The same for what began meanwhile, now that the frontends are there. Of `new` ones, a flow that we have entered
    /// ourselves was netfilter's first.
    ///
    /// # Errors
    /// If netfilter does not tell, or there is no room.
    pub fn after(&mut self, new: &HashSet<SocketAddr>) -> Result<Seen> {
        let (mut seen, here) = (Seen::default(), Here::now()?);
        for connection in self.translated()? {
            let Connection { original, reply } = connection;
            let backend = self.backend(&original, reply.src);
            seen.translated += usize::from(backend.is_some());
            if original.proto != UDP {
                continue;
            }
            match backend {
                Some(Some(liveness)) if new.contains(&original.dst) => {
                    self.enter(&here, original, &connection, liveness)?;
                    seen.entered += 1;
                }
                // The backend has left the Service since: whoever serves it now, the flow has to move on.
                Some(None) => self.forget(&original)?,
                _ => {}
            }
            // Where netfilter has taken one of our NodePorts for the client, answers are no requests.
            if connection.has_other_source() && new.contains(&reply.dst) && self.is_served(&reply) {
                self.enter(&here, reply, &connection, (0, 0))?;
            }
        }
        Ok(seen)
    }

    /// How many connections netfilter translates to frontends of ours.
    ///
    /// # Errors
    /// If netfilter does not tell.
    pub fn count(&self) -> Result<usize> {
        let translated = self.translated()?;
        Ok(translated.iter().filter(|connection| self.is_served(&connection.original)).count())
    }

    /// Ends entries of flows that netfilter does not translate any more.
    ///
    /// # Errors
    /// If netfilter does not tell, or the flow table cannot be written.
    pub fn tidy(&mut self) -> Result<()> {
        let mut over = Vec::new();
        let is_translated = |tuple: &Tuple| {
            let found = self.conntrack.find(tuple).context("ask for a connection")?;
            anyhow::Ok(found.is_some_and(|connection| connection.has_other_destination()))
        };
        for tuple in &self.entered {
            if !is_translated(tuple)? {
                over.push(*tuple);
            }
        }
        self.sockets.tidy(is_translated)?;
        over.iter().try_for_each(|tuple| self.forget(tuple))
    }

    /// How many flows of datagrams are entered.
    pub fn entered(&self) -> usize {
        self.entered.len()
    }

    fn translated(&self) -> Result<Vec<Connection>> {
        let mut all = Vec::new();
        let each = |connection: Connection| {
            if connection.has_other_destination() {
                all.push(connection);
            }
        };
        self.conntrack.for_each(each).context("list netfilter's connections")?;
        Ok(all)
    }

    fn enter(
        &mut self,
        here: &Here,
        tuple: Tuple,
        connection: &Connection,
        liveness: (u32, u32),
    ) -> Result<()> {
        if here.has(tuple.src.ip()) {
            // Its packets meet no ingress hook.
            return self.sockets.enter(here, tuple, liveness);
        }
        match tuple.src {
            SocketAddr::V4(_) => enter(&mut self.tables.v4, &tuple, connection, liveness)?,
            SocketAddr::V6(_) => enter(&mut self.tables.v6, &tuple, connection, liveness)?,
        }
        self.entered.insert(tuple);
        Ok(())
    }

    fn forget(&mut self, tuple: &Tuple) -> Result<()> {
        match tuple.src {
            SocketAddr::V4(_) => forget(&mut self.tables.v4, tuple)?,
            SocketAddr::V6(_) => forget(&mut self.tables.v6, tuple)?,
        }
        self.entered.remove(tuple);
        Ok(())
    }

    fn is_served(&self, tuple: &Tuple) -> bool {
        match tuple.src {
            SocketAddr::V4(_) => frontend(&self.tables.v4, tuple).is_some(),
            SocketAddr::V6(_) => frontend(&self.tables.v6, tuple).is_some(),
        }
    }

    /// Id and epoch of the backend, if it is one of the frontend's; nothing at all if there is no such frontend.
    fn backend(&self, tuple: &Tuple, backend: SocketAddr) -> Option<Option<(u32, u32)>> {
        match tuple.src {
            SocketAddr::V4(_) => Some(liveness(&self.tables.v4, &frontend(&self.tables.v4, tuple)?, backend)),
            SocketAddr::V6(_) => Some(liveness(&self.tables.v6, &frontend(&self.tables.v6, tuple)?, backend)),
        }
    }
}

fn entered_in<A: NodeAddr>(family: &Family<A>, all: &mut HashSet<Tuple>) -> Result<()> {
    family.for_each_flow(|key, flow| {
        if flow.side == Side::Foreign as u8 {
            let (src, dst) = (socket_addr(key.src, key.sport), socket_addr(key.dst, key.dport));
            all.insert(Tuple { src, dst, proto: key.proto });
        }
        Ok(())
    })
}

fn end<A: NodeAddr>(at: SocketAddr) -> (A, NetPort) {
    (A::from_ip(at.ip()).unwrap_or_default(), NetPort::new(at.port()))
}

fn key<A: NodeAddr>(tuple: &Tuple) -> FlowKey<A> {
    let ((src, sport), (dst, dport)) = (end(tuple.src), end(tuple.dst));
    FlowKey { src, dst, sport, dport, proto: tuple.proto, ..FlowKey::default() }
}

fn enter<A: NodeAddr>(
    family: &mut Family<A>,
    tuple: &Tuple,
    connection: &Connection,
    (backend_id, backend_epoch): (u32, u32),
) -> Result<()> {
    let key = key(tuple);
    let ((backend, backend_port), (masq, masq_port)) = (end(connection.reply.src), end(connection.reply.dst));
    let masqueraded = if connection.has_other_source() { Flow::<A>::MASQ_DONE } else { 0 };
    let service = frontend(family, tuple).map_or(0, |frontend| frontend.service);
    let flow = Flow {
        backend,
        backend_port,
        masq,
        masq_port,
        backend_id,
        backend_epoch,
        service,
        flags: Flow::<A>::DNAT | masqueraded,
        side: Side::Foreign as u8,
        ..Flow::straight(&key, super::sweep::monotonic_seconds())
    };
    let ours = family.flows.get(&key, 0).ok().filter(|flow| flow.side == Side::Front as u8);
    family.enter(key, flow, 0).context("enter a flow of netfilter's")?;
    if let Some(ours) = ours {
        for side in [Side::Forward, Side::Reply] {
            let key = ours.key(side);
            let Ok(entry) = family.flows.get(&key, 0) else { continue };
            if entry.same_origin(&ours) {
                let _ = family.flows.remove(&key);
                if entry.flags & Flow::<A>::MASQ_DONE != 0 {
                    let _ = family.flows.remove(&entry.key(Side::Back));
                }
            }
        }
    }
    Ok(())
}

fn forget<A: NodeAddr>(family: &mut Family<A>, tuple: &Tuple) -> Result<()> {
    let key = key::<A>(tuple);
    // A new flow of ours may have taken its place.
    if family.flows.get(&key, 0).is_ok_and(|flow| flow.side == Side::Foreign as u8) {
        super::writer::gone(family.flows.remove(&key)).context("remove a flow of netfilter's")?;
    }
    Ok(())
}

fn frontend<A: NodeAddr>(family: &Family<A>, tuple: &Tuple) -> Option<Frontend> {
    let (addr, port) = end::<A>(tuple.dst);
    family.frontends.get(&FrontendKey::new(addr, port, tuple.proto), 0).ok()
}

fn liveness<A: NodeAddr>(family: &Family<A>, frontend: &Frontend, backend: SocketAddr) -> Option<(u32, u32)> {
    let (addr, port) = end::<A>(backend);
    [frontend.internal, frontend.external].iter().find_map(|set| {
        (0..set.count).find_map(|index| {
            let slot = family.slot(&SlotKey { set: set.id, index }).ok()?;
            (slot.addr == addr && slot.port == port).then_some((slot.backend_id, slot.backend_epoch))
        })
    })
}
