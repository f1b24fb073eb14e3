//! Unconnected UDP sockets of the node's own processes, whose datagrams netfilter translates.
//!
//! For the socket hooks, such a socket is one that has been sent on to the Service's own address: they leave it as it is,
//! and netfilter does what it did before, until the backend is gone.

use crate::kernel::diag::Diag;
use crate::kernel::netfilter::conntrack::Tuple;
use crate::kernel::pins::Pins;
use crate::kernel::sockets::peers;
use anyhow::{Context as _, Result};
use aya::maps::{HashMap as BpfHashMap, MapData};
use lb_attach::snapshot::Snapshot;
use lb_common::addr::{Ip6, NetPort};
use lb_common::maps::{SocketKey, SocketPeer};
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

/// [`SocketKey::direction`] of the entry that says where a socket's datagrams to a Service go.
pub(crate) const TO_BACKEND: u8 = 1;

/// What the socket hooks know of such sockets.
pub(super) struct Sockets {
    map: BpfHashMap<MapData, SocketKey, SocketPeer>,
    entered: HashMap<Tuple, SocketKey>,
}

/// The sockets and addresses of the node, at the moment of a look.
pub(crate) struct Here {
    /// Cookie and address by port.
    sockets: HashMap<u16, Vec<(u64, IpAddr)>>,
    addresses: HashSet<IpAddr>,
}

impl Here {
    pub(crate) fn now() -> Result<Self> {
        let mut sockets: HashMap<_, Vec<_>> = HashMap::new();
        let all = Diag::open().and_then(|diag| diag.unconnected()).context("list the node's UDP sockets")?;
        for socket in all {
            let entry = sockets.entry(socket.id.source_port).or_default();
            entry.push((socket.cookie(), socket.id.source_address));
        }
        Ok(Self { sockets, addresses: Snapshot::take()?.all_addresses().collect() })
    }

    /// Whether it is the node's address.
    pub(crate) fn has(&self, ip: IpAddr) -> bool {
        self.addresses.contains(&ip)
    }

    /// Where an unconnected socket is bound to.
    pub(crate) fn bound(&self, cookie: u64) -> Option<SocketAddr> {
        self.sockets.iter().find_map(|(port, all)| {
            let (_, ip) = all.iter().find(|(c, _)| *c == cookie)?;
            Some(SocketAddr::new(ip.to_canonical(), *port))
        })
    }

    /// The unconnected socket that sends from there.
    fn cookie(&self, from: SocketAddr) -> Option<u64> {
        let at = |ip: &IpAddr| ip.is_unspecified() || ip.to_canonical() == from.ip();
        self.sockets.get(&from.port())?.iter().find(|(_, ip)| at(ip)).map(|(cookie, _)| *cookie)
    }
}

impl Sockets {
    pub(super) fn open(pins: &Pins) -> Result<Self> {
        let mut sockets = Self { map: peers(pins)?, entered: HashMap::new() };
        sockets.adopt()?;
        Ok(sockets)
    }

    /// Takes over what a former agent has entered.
    fn adopt(&mut self) -> Result<()> {
        let mut keys = Vec::new();
        for entry in self.map.iter() {
            let (key, peer) = entry.context("read the sockets")?;
            if key.direction == TO_BACKEND && (peer.addr, peer.port) == (key.addr, key.port) {
                keys.push(key);
            }
        }
        if keys.is_empty() {
            return Ok(());
        }
        let here = Here::now()?;
        for key in keys {
            let dst = SocketAddr::new(IpAddr::from(key.addr).to_canonical(), key.port.get());
            let found = here.sockets.iter().find_map(|(port, sockets)| {
                let (_, ip) = sockets.iter().find(|(cookie, _)| *cookie == key.cookie)?;
                Some((*port, *ip))
            });
            // From which of the node's addresses is not known: from each, as far as this table goes.
            let Some((port, ip)) = found else { continue };
            let sources = if ip.is_unspecified() { here.addresses.clone() } else { HashSet::from([ip]) };
            for ip in sources.into_iter().filter(|ip| ip.is_ipv4() == dst.is_ipv4()) {
                let src = SocketAddr::new(ip, port);
                self.entered.insert(Tuple { src, dst, proto: key.proto }, key);
            }
        }
        Ok(())
    }

    /// Leaves the socket that sends this to netfilter. (No hook runs for one that is connected.)
    pub(super) fn enter(
        &mut self,
        here: &Here,
        tuple: Tuple,
        (backend_id, backend_epoch): (u32, u32),
    ) -> Result<()> {
        let Some(cookie) = here.cookie(tuple.src) else { return Ok(()) };
        let addr = match tuple.dst.ip() {
            IpAddr::V4(ip) => Ip6::mapped(ip.into()),
            IpAddr::V6(ip) => ip.into(),
        };
        let port = NetPort::new(tuple.dst.port());
        let key = SocketKey { cookie, addr, port, proto: tuple.proto, direction: TO_BACKEND, pad: 0 };
        let peer = SocketPeer { addr, port, backend_id, backend_epoch, ..SocketPeer::default() };
        self.map.insert(key, peer, 0).context("enter a socket of netfilter's")?;
        self.entered.insert(tuple, key);
        Ok(())
    }

    /// Gives sockets back whose flows netfilter does not translate any more.
    pub(super) fn tidy(&mut self, mut is_translated: impl FnMut(&Tuple) -> Result<bool>) -> Result<()> {
        let (mut alive, mut over) = (HashSet::new(), Vec::new());
        for (tuple, key) in &self.entered {
            if is_translated(tuple)? {
                alive.insert(*key);
            } else {
                over.push((*tuple, *key));
            }
        }
        for (tuple, key) in over {
            self.entered.remove(&tuple);
            // Evicted, or the hooks have sent it elsewhere since.
            let still =
                self.map.get(&key, 0).is_ok_and(|peer| (peer.addr, peer.port) == (key.addr, key.port));
            if still && !alive.contains(&key) {
                let _ = self.map.remove(&key);
            }
        }
        Ok(())
    }
}
