//! The node's own sockets. Connected ones know their backend, and need nobody. The datagrams of the others go over to
//! netfilter, from the same port to the same backend.

use super::flows::insert;
use crate::kernel::foreign::sockets::{Here, TO_BACKEND};
use crate::kernel::netfilter::conntrack::{Connection, Conntrack, Tuple};
use crate::kernel::pins::Pins;
use crate::kernel::sockets;
use anyhow::{Context as _, Result};
use lb_attach::snapshot;
use lb_common::addr::Ip6;
use lb_common::maps::SocketPeer;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

const UDP: u8 = 17;

/// Has netfilter translate what unconnected sockets send to Services.
pub(super) fn hand_over(pins: &Pins, conntrack: &Conntrack) -> Result<()> {
    let mut map = sockets::peers(pins)?;
    let mut sent = HashMap::new();
    for entry in map.iter() {
        let (key, peer) = entry.context("read the sockets")?;
        if key.proto == UDP && key.direction == TO_BACKEND && (peer.addr, peer.port) != (key.addr, key.port) {
            sent.insert(key, peer);
        }
    }
    if sent.is_empty() {
        return Ok(());
    }
    let here = Here::now()?;
    // Where a socket sends from is known to netfilter alone, if it has not been told to send from there.
    let mut sources: HashMap<(u16, SocketAddr), SocketAddr> = HashMap::new();
    conntrack
        .for_each(|Connection { original, .. }| {
            if original.proto == UDP && here.has(original.src.ip()) {
                sources.insert((original.src.port(), original.dst), original.src);
            }
        })
        .context("list netfilter's connections")?;
    for (key, peer) in sent {
        let (service, backend) = (at(key.addr, key.port.get()), at(peer.addr, peer.port.get()));
        let Some(bound) = here.bound(key.cookie) else { continue };
        // The way to the Service's address may begin at another of the node's than the one to the backend.
        let known = sources.get(&(bound.port(), backend)).copied();
        let (Some(src), Some(seen)) = (source(bound, service), known.or_else(|| source(bound, backend)))
        else {
            continue;
        };
        let inner = Tuple { src: seen, dst: backend, proto: UDP };
        let connection =
            Connection { original: Tuple { src, dst: service, proto: UDP }, reply: inner.reversed() };
        insert(conntrack, &connection, &inner)?;
        let itself = SocketPeer { addr: key.addr, port: key.port, ..peer };
        map.insert(key, itself, 0).context("leave a socket to netfilter")?;
    }
    Ok(())
}

/// Takes off the hooks that send on. Those that translate answers stay for what is under way.
pub(super) fn detach(pins: &Pins) -> Result<()> {
    sockets::SENDING.iter().try_for_each(|hook| sockets::take_off(pins, hook))
}

fn at(addr: Ip6, port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::from(addr).to_canonical(), port)
}

/// Where a socket that is bound like this sends from. (A socket of our own cannot tell: it would be sent on to a backend.)
fn source(bound: SocketAddr, to: SocketAddr) -> Option<SocketAddr> {
    if !bound.ip().is_unspecified() {
        return Some(bound);
    }
    snapshot::source(to.ip()).ok().flatten().map(|ip| SocketAddr::new(ip, bound.port()))
}
