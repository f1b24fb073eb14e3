//! Many pods at once, with the agent dead, alive, and on its way.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use xtask::cni::Attached;
use xtask::lab::Host;
use xtask::probe::Ask;

use super::super::support::{answered, cluster, eventually, web};
use super::repair::PATIENCE;
use super::{all_served, bridge, device_table, ips, network, ours, served, state_dir};

const PODS: usize = 20;

/// At the same time for every pod; all results, or the first error.
fn at_once<T: Send>(pods: &[Host], work: impl Fn(usize, &Host) -> Result<T> + Sync) -> Result<Vec<T>> {
    thread::scope(|scope| {
        let work = &work;
        let all: Vec<_> =
            pods.iter().enumerate().map(|(at, pod)| scope.spawn(move || work(at, pod))).collect();
        all.into_iter()
            .map(|one| one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

fn count(node: &Host) -> Result<usize> {
    // Besides the node's own uplink.
    Ok(served(node)?.keys().filter(|name| *name != "eth0").count())
}

fn all_ask(pods: &[Host]) -> Result<()> {
    pods.iter().try_for_each(|pod| answered(pod, &Ask::tcp(web()[0])).map(drop))
}

#[test]
fn twenty_pods_at_once() -> Result<()> {
    let mut cluster = cluster("twenty")?;
    let node = cluster.lab().node(0).clone();
    let before = (count(&node)?, device_table(&node)?.keys().count());
    let network = network(&node, "cbr0", "1.0.0", &[bridge(&node), ours(&node)], None)?;
    // Others each time: their neighbours may hold an address for the former pod's for a while.
    let pods: Vec<Host> = (0..3 * PODS).map(|_| cluster.lab().add_unplugged_pod(0)).collect::<Result<_>>()?;
    let (first, rest) = pods.split_at(PODS);
    let (second, third) = rest.split_at(PODS);
    let add = |_: usize, pod: &Host| network.add(pod, &ips(pod));
    let everybody_is_served = |node: &Host| {
        ensure!(count(node)? == before.0 + PODS, "{} pods", count(node)?);
        all_served(node)
    };
    let nobody_is_left = |node: &Host| {
        let now = (count(node)?, device_table(node)?.keys().count());
        ensure!(now == before, "devices and entries: {now:?}, before {before:?}");
        let records = std::fs::read_dir(state_dir(node).join("pods"))?.count();
        ensure!(records == 0, "{records} records are left");
        Ok(())
    };
    let again = |pods: &[Host], attached: &[Attached]| {
        // Our plugin alone: the others refuse an interface that is there.
        let ours = &network.list["plugins"][1];
        at_once(pods, |at, pod| network.call(ours, "ADD", pod, &network.config(ours, &attached[at])))
    };

    // While the agent runs, which finds the same devices at the same time.
    let attached = at_once(first, add)?;
    everybody_is_served(&node)?;
    all_ask(first).context("while the agent runs")?;
    again(first, &attached)?;
    everybody_is_served(&node)?;
    at_once(first, |at, pod| network.del(pod, &attached[at]))?;
    eventually(PATIENCE, || nobody_is_left(&node))?;

    // While none runs; both ways twice.
    cluster.kill_agent(0);
    let attached = at_once(second, add)?;
    everybody_is_served(&node)?;
    all_ask(second).context("while none runs")?;
    again(second, &attached)?;
    everybody_is_served(&node)?;
    for _ in 0..2 {
        at_once(second, |at, pod| network.del(pod, &attached[at]))?;
        nobody_is_left(&node)?;
    }

    // While agents come and go, each with programs of its own.
    let attached = thread::scope(|scope| -> Result<Vec<Attached>> {
        let adding = scope.spawn(|| {
            at_once(third, |at, pod| {
                thread::sleep(Duration::from_millis(100) * at as u32);
                network.add(pod, &ips(pod))
            })
        });
        while !adding.is_finished() {
            cluster.start_agent(0, &[])?;
            cluster.kill_agent(0);
        }
        let attached = adding.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        cluster.start_agent(0, &[])?;
        Ok(attached)
    })?;
    eventually(PATIENCE, || everybody_is_served(&node))?;
    all_ask(third).context("while agents come and go")?;
    for (pod, attached) in third.iter().zip(&attached) {
        network.check(pod, attached)?;
    }
    at_once(third, |at, pod| network.del(pod, &attached[at]))?;
    eventually(PATIENCE, || nobody_is_left(&node))
}
