//! Fragments that come in another order than that of the datagram.

use std::net::SocketAddr;

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
fn fragments_of_a_pod_arrive_in_any_order() -> Result<()> {
    let cluster = cluster("fragpod")?;
    dns().into_iter().try_for_each(|to| arrive_in_any_order(&cluster.lab().pod(0, 0), to))
}

#[test]
fn fragments_from_outside_arrive_in_any_order() -> Result<()> {
    let cluster = cluster("fragout")?;
    let node = cluster.lab().node(0);
    node.at(30053).into_iter().try_for_each(|to| arrive_in_any_order(cluster.lab().client(), to))
}
