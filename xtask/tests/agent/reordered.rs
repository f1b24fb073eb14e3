//! Fragments that come in another order than that of the datagram.

use std::net::SocketAddr;
use std::thread::ScopedJoinHandle;

use anyhow::{Context, Result};
use xtask::lab::Host;
use xtask::probe::{Ask, Order};

use super::fragments::{LARGE, arrive, server};
use super::support::{cluster, dns};

/// In flows that begin so, and in flows that there are.
fn arrive_in_any_order(from: &Host, to: SocketAddr) -> Result<()> {
    let both = ["dns-1", "dns-2"];
    arrive(from, Ask::udp(to).echo(LARGE).pieces(Order::Straight), &both)?;
    for (order, port) in Order::ODD.into_iter().zip(40_010..) {
        let ask = Ask::udp(to).echo(LARGE).pieces(order);
        arrive(from, ask.clone(), &both).with_context(|| format!("{order:?}"))?;
        let server = server(from, to, port)?;
        arrive(from, ask.source_port(port).keep(), &[&server]).with_context(|| format!("{order:?}, kept"))?;
    }
    Ok(())
}

#[test]
fn fragments_arrive_in_any_order() -> Result<()> {
    let cluster = cluster("fragany")?;
    let (pod, client) = (cluster.lab().pod(0, 0), cluster.lab().client());
    let node_port = cluster.lab().node(0).at(30053);
    std::thread::scope(|scope| {
        let both = |from, to: [SocketAddr; 2]| {
            scope.spawn(move || to.into_iter().try_for_each(|to| arrive_in_any_order(from, to)))
        };
        let threads = [both(&pod, dns()), both(client, node_port)];
        let join = |thread: ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().try_for_each(join)
    })
}
