//! Whatever somebody takes off a device, the agent puts back.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xtask::lab::Host;
use xtask::system::{ensure_debian_packages, output};

use super::super::support::{cluster, eventually, logged};
use super::{all_served, device_table, pins};

/// It looks every ten seconds.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

pub(super) fn index(node: &Host, device: &str) -> Result<u32> {
    node.run_in(|| nix::net::if_::if_nametoindex(device))?.with_context(|| format!("no device {device}"))
}

#[test]
fn the_agent_puts_back_what_somebody_has_taken_off() -> Result<()> {
    ensure_debian_packages(&[("bpftool", "bpftool"), ("iproute2", "ip")])?;
    let cluster = cluster("repair")?;
    let (lab, node) = (cluster.lab(), cluster.lab().node(0));
    all_served(node)?;
    let devices = [0, 1, 2].map(|pod| lab.veth_of(&lab.pod(0, pod)));
    let indexes = devices.iter().map(|device| index(node, device)).collect::<Result<Vec<_>>>()?;
    let link = |at: usize, hook: &str| pins(node).join(format!("links/tc-{}-{hook}", indexes[at]));
    // Its pin, and with it the link; the link, which leaves the pin; the table's entry; the device itself.
    fs::remove_file(link(0, "ingress"))?;
    output(Command::new("bpftool").args(["link", "detach", "pinned"]).arg(link(1, "egress")))?;
    device_table(node)?.remove(&indexes[2])?;
    ensure!(all_served(node).is_err(), "nothing was taken off");
    let pod = lab.add_pod(0)?;
    eventually(PATIENCE, || all_served(node))?;
    for (at, what) in [(0, "ingress"), (1, "egress"), (2, "its entry in the device table")] {
        logged(node, &[&devices[at], "somebody else has removed", what])?;
    }
    // The same name and index for another device: what a container that is restored gets.
    let (name, index) = (lab.veth_of(&pod), index(node, &lab.veth_of(&pod))?.to_string());
    node.run_in(|| -> Result<()> {
        output(Command::new("ip").args(["link", "del", &name]))?;
        let peer = pod.netns_name();
        let add =
            ["link", "add", &name, "index", &index, "type", "veth", "peer", "name", "eth0", "netns", &peer];
        output(Command::new("ip").args(add))?;
        output(Command::new("ip").args(["link", "set", &name, "up"])).map(drop)
    })??;
    eventually(PATIENCE, || all_served(node))
}
