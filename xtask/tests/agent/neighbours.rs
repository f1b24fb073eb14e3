//! Others who write rules on the same nodes.

mod flannel;
mod hostports;
mod kube_proxy;
mod policy;
mod shared_ports;

use anyhow::{Result, bail};
use xtask::demo::{Cluster, paths};

/// Everything that the demo observes, with whoever else is there.
fn everything_works(cluster: &Cluster) -> Result<()> {
    let mut wrong = String::new();
    for path in paths(cluster) {
        for check in path.checks {
            if let Some(what) = check.run()?.wrong {
                wrong += &format!("\n{}: {} {:?}: {what}", path.title, check.from.name(), check.action);
            }
        }
    }
    if wrong.is_empty() { Ok(()) } else { bail!("{wrong}") }
}

/// Has the nodes track connections as every node does on which somebody else has rules. (A node without any such rule
/// forgets its translations at once.)
fn track(cluster: &Cluster) -> Result<()> {
    let rules = "*filter\n-A FORWARD -m conntrack --ctstate INVALID -j DROP\nCOMMIT\n";
    for node in [cluster.lab().node(0), cluster.lab().node(1)] {
        [true, false].iter().try_for_each(|&v4| node.add_rules(v4, rules))?;
    }
    Ok(())
}

/// The pod networks, IPv4 first: the cluster's and a node's own, with the networks that nobody masquerades to.
fn pod_networks(node: usize) -> [(&'static str, String, &'static str); 2] {
    let n = node + 1;
    [
        ("10.244.0.0/16", format!("10.244.{n}.0/24"), "224.0.0.0/4"),
        ("fd00:10:244::/48", format!("fd00:10:244:{n}::/64"), "ff00::/8"),
    ]
}
