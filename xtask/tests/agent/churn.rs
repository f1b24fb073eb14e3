//! Many connections and long streams while endpoints come and go.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use xtask::demo::Cluster;
use xtask::lab::Host;
use xtask::probe::{Bulk, Churn, Direction};

use super::support::{cluster, store, web};

/// Connections and bytes; a hundred thousand and ten billion with `LB_TEST_LONG=1`.
fn size() -> (usize, u64) {
    match std::env::var_os("LB_TEST_LONG") {
        Some(_) => (100_000, 10_000_000_000),
        None => (20_000, 2_000_000_000),
    }
}

/// Changes the endpoints of two Services 20 times a second while `work` runs.
fn while_endpoints_change(cluster: &Cluster, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let lab = cluster.lab();
    let web = [lab.pod(0, 0), lab.pod(0, 1), lab.pod(1, 0)];
    let dns = [lab.pod(0, 2), lab.pod(1, 1)];
    // At least one endpoint stays.
    let missing: Vec<Vec<Host>> = (0..7u8)
        .map(|bits| (0..3).filter(|i| bits & 1 << i != 0).map(|i| web[i].clone()).collect())
        .collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let changes = scope.spawn(|| -> Result<usize> {
            let mut n = 0;
            while !stop.load(Ordering::Relaxed) {
                cluster.without("web.yaml", &missing[n * 3 % 7])?;
                cluster.without("dns.yaml", &dns[n % 2..=n % 2])?;
                std::thread::sleep(Duration::from_millis(50));
                n += 1;
            }
            Ok(n)
        });
        let result = work();
        stop.store(true, Ordering::Relaxed);
        let changed = changes.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        result?;
        ensure!(changed > 5, "only {changed} changes");
        Ok(())
    })
}

/// Short connections, in both families, to the Service that changes.
fn connections(from: &Host, to: [std::net::SocketAddr; 2]) -> Result<()> {
    let (count, _) = size();
    // With 100,000 the client's ports are used again: it may as soon as time stamps tell connections apart.
    from.sysctl("ipv4.tcp_tw_reuse", "1")?;
    for (to, count) in [(to[0], count * 3 / 4), (to[1], count / 4)] {
        let report =
            from.churn(&Churn { timeout: Duration::from_millis(900), ..Churn::new(to, count, 4) })?;
        ensure!(report.ok == count && report.errors.is_empty(), "{} → {to}: {report:?}", from.name());
        ensure!(report.names.len() == 3, "all endpoints had their turns: {report:?}");
    }
    Ok(())
}

#[test]
fn pods_connections_survive_changes() -> Result<()> {
    let cluster = cluster("churnpod")?;
    let pod = cluster.lab().pod(0, 2);
    while_endpoints_change(&cluster, || connections(&pod, web()))
}

#[test]
fn clients_connections_survive_changes() -> Result<()> {
    let cluster = cluster("churncl")?;
    let lab = cluster.lab();
    while_endpoints_change(&cluster, || connections(lab.client(), lab.node(0).at(30080)))
}

#[test]
fn host_connections_survive_changes() -> Result<()> {
    let cluster = cluster("churnho")?;
    while_endpoints_change(&cluster, || connections(cluster.lab().node(0), web()))
}

/// All connections go to one backend by way of the other node's masquerading: more than there are ports, in time.
#[test]
fn masquerade_ports_are_used_again() -> Result<()> {
    let cluster = cluster("churnma")?;
    let (client, (count, _)) = (cluster.lab().client(), size());
    client.sysctl("ipv4.tcp_tw_reuse", "1")?;
    let count = count.max(21_000);
    let to = cluster.lab().node(0).at(30081)[0];
    let report = client.churn(&Churn { timeout: Duration::from_millis(900), ..Churn::new(to, count, 4) })?;
    ensure!(report.ok == count, "{report:?}");
    Ok(())
}

#[test]
fn streams_survive_changes() -> Result<()> {
    let cluster = cluster("stream")?;
    let lab = cluster.lab();
    let (_, bytes) = size();
    let (pod, client, node) = (lab.pod(0, 2), lab.client(), lab.node(0));
    while_endpoints_change(&cluster, || {
        std::thread::scope(|scope| {
            let runs = [
                (&pod, web()[0], bytes, Direction::Up),
                (client, node.at(30081)[0], bytes, Direction::Down),
                (&pod, store()[1], bytes / 10, Direction::Down),
                (client, node.at(30080)[1], bytes / 10, Direction::Up),
            ];
            let runs = runs.map(|(from, to, bytes, direction)| {
                scope.spawn(move || (from.bulk(&Bulk::new(to, bytes, direction)), from, to))
            });
            for run in runs {
                let (report, from, to) = run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                let report = report?;
                ensure!(report.ok, "{} → {to}: {report:?}", from.name());
            }
            Ok(())
        })
    })
}
