//! Everything that the demo observes, path by path and family by family, in one lab.

use std::sync::LazyLock;

use anyhow::{Context, Result, ensure};
use xtask::demo::{Action, Cluster, paths};

use super::support::cluster;

/// Never dropped: the lab's reaper takes it down when the tests have ended.
static CLUSTER: LazyLock<Result<Cluster>> = LazyLock::new(|| cluster("paths"));

fn is_v4(action: &Action) -> bool {
    match action {
        Action::Ask(ask) => ask.to.is_ipv4(),
        Action::Bulk(bulk) => bulk.to.is_ipv4(),
        Action::Ping(ping) => ping.to.is_ipv4(),
    }
}

fn shared() -> Result<&'static Cluster> {
    CLUSTER.as_ref().map_err(|e| anyhow::anyhow!("{e:#}"))
}

fn observe(title: &str, v4: bool) -> Result<()> {
    let cluster = shared()?;
    let path = paths(cluster).into_iter().find(|p| p.title == title).context("no such path")?;
    let checks: Vec<_> = path.checks.iter().filter(|check| is_v4(&check.action) == v4).collect();
    ensure!(!checks.is_empty(), "nothing is observed");
    for check in checks {
        let outcome = check.run()?;
        ensure!(outcome.wrong.is_none(), "{} {:?}: {outcome:?}", check.from.name(), check.action);
    }
    Ok(())
}

macro_rules! path_tests {
    ($($test:ident: $title:literal;)*) => {
        const TITLES: &[&str] = &[$($title),*];
        $(mod $test {
            #[test]
            fn v4() -> anyhow::Result<()> {
                super::observe($title, true)
            }

            #[test]
            fn v6() -> anyhow::Result<()> {
                super::observe($title, false)
            }
        })*
    };
}

path_tests! {
    pod_to_cluster_ip: "pod → ClusterIP";
    outside_to_service: "outside → NodePort, LoadBalancer and external IP";
    outside_in_bulk: "outside → NodePort → overlay, in bulk";
    masquerade: "pod → outside, masqueraded";
    hairpin: "pod → ClusterIP → itself (hairpin)";
    host_process: "host process → ClusterIP and NodePort";
    external_backend: "pod → ClusterIP → backend outside the cluster";
    no_endpoints: "a Service without endpoints";
}

#[test]
fn no_path_is_forgotten() -> Result<()> {
    let titles: Vec<_> = paths(shared()?).into_iter().map(|p| p.title).collect();
    ensure!(titles == TITLES, "{titles:?}");
    Ok(())
}
