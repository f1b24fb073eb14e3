//! Networks and clients that are not as one would wish.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use rtnetlink::LinkUnspec;
use xtask::demo::Cluster;
use xtask::lab::{Host, Lab};
use xtask::probe::{Ask, Bulk, Direction};

use super::support::{agent_exe, cluster, store};

fn intact(from: &Host, to: SocketAddr, direction: Direction) -> Result<()> {
    let report = from.bulk(&Bulk::new(to, 10_000_000, direction))?;
    ensure!(report.ok, "{} → {to} {direction:?}: {report:?}", from.name());
    Ok(())
}

#[test]
fn pods_learn_of_the_overlays_smaller_mtu() -> Result<()> {
    let cluster = Cluster::on(Lab::builder("mtu").pods(3).pod_mtu(1500).build()?, agent_exe()?)?;
    let lab = cluster.lab();
    let (pod, client, node) = (lab.pod(0, 2), lab.client(), lab.node(0));
    for direction in [Direction::Up, Direction::Down] {
        for family in [0, 1] {
            intact(client, node.at(30081)[family], direction)?;
            intact(&pod, store()[family], direction)?;
            intact(node, store()[family], direction)?;
            intact(&pod, lab.inet().at(8080)[family], direction)?;
        }
    }
    Ok(())
}

/// Sets the MTU of a device.
pub(crate) fn set_mtu(host: &Host, device: &'static str, mtu: u32) -> Result<()> {
    host.run_in(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            tokio::spawn(connection);
            let message = LinkUnspec::new_with_name(device).mtu(mtu).build();
            Ok(handle.link().set(message).execute().await?)
        })
    })?
}

#[test]
fn backends_learn_of_a_smaller_mtu_before_the_client() -> Result<()> {
    let cluster = cluster("narrow")?;
    let lab = cluster.lab();
    // The router's device towards the client; the client itself does not know, and says so to nobody.
    set_mtu(lab.wire(), "client", 1300)?;
    set_mtu(lab.wire(), "inet", 1300)?;
    for family in [0, 1] {
        for port in [30080, 30080, 30080, 30081] {
            intact(lab.client(), lab.node(0).at(port)[family], Direction::Down)?;
        }
        // Masqueraded, and too big on its way out.
        intact(&lab.pod(0, 2), lab.inet().at(8080)[family], Direction::Up)?;
    }
    Ok(())
}

/// Asks both from the same source port at once, several times in turn.
fn both_work(from: &Host, one: Ask, other: Ask, port: u16) -> Result<()> {
    let prepare = |ask: Ask| {
        ask.source_port(port)
            .keep()
            .count(20)
            .interval(Duration::from_millis(10))
            .timeout(Duration::from_millis(800))
    };
    let mut talks = [from.start_asking(&prepare(one.clone()))?, from.start_asking(&prepare(other.clone()))?];
    for round in 0..20 {
        for (talk, to) in talks.iter_mut().zip([one.to, other.to]) {
            let answer = talk.next().ok_or_else(|| anyhow::anyhow!("no answer from {to}"))?;
            let reply = answer.0.map_err(|e| anyhow::anyhow!("{to} in round {round}, port {port}: {e}"))?;
            ensure!(reply.from == to, "{} answered what was sent to {to}", reply.from);
        }
    }
    Ok(())
}

#[test]
fn one_port_to_two_node_ports_and_addresses() -> Result<()> {
    let cluster = cluster("ports")?;
    let lab = cluster.lab();
    let (client, n1, n2) = (lab.client(), lab.node(0), lab.node(1));
    for family in [0, 1] {
        // Both lead to the one backend on n2, by way of n1 and directly.
        both_work(client, Ask::tcp(n1.at(30081)[family]), Ask::tcp(n2.at(30081)[family]), 40_003)?;
    }
    Ok(())
}
