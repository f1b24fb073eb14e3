//! Host ports of pods, by CNI's portmap plugin itself.

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use xtask::demo::Cluster;
use xtask::lab::Host;
use xtask::probe::Ask;
use xtask::system::ensure_debian_packages;

use super::super::support::cluster;

/// Where Debian has it.
const PORTMAP: &str = "/usr/lib/cni/portmap";

/// Clear of the ports that we masquerade with.
const PORTS: [u16; 2] = [8088, 40_000];

/// Runs the plugin as a runtime would after the pod was plugged in.
fn map(node: &Host, pod: &Host, mappings: &serde_json::Value) -> Result<()> {
    ensure_debian_packages(&[("iptables", "iptables"), ("containernetworking-plugins", PORTMAP)])?;
    let sandbox = pod.netns_path();
    let config = json!({
        "cniVersion": "0.4.0",
        "name": "cbr0",
        "type": "portmap",
        // As flannel's conflist has it.
        "capabilities": { "portMappings": true },
        "runtimeConfig": { "portMappings": mappings },
        "prevResult": {
            "cniVersion": "0.4.0",
            "interfaces": [{ "name": "eth0", "sandbox": sandbox }],
            "ips": [
                { "version": "4", "interface": 0, "address": format!("{}/24", pod.v4()) },
                { "version": "6", "interface": 0, "address": format!("{}/64", pod.v6()) },
            ],
        },
    });
    let mut command = node.command(PORTMAP);
    command.env("CNI_COMMAND", "ADD").env("CNI_CONTAINERID", pod.name()).env("CNI_IFNAME", "eth0");
    command.env("CNI_NETNS", &sandbox).env("CNI_PATH", "/usr/lib/cni");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    child.stdin.take().context("no pipe")?.write_all(config.to_string().as_bytes())?;
    let out = child.wait_with_output()?;
    ensure!(out.status.success(), "{PORTMAP}: {}", String::from_utf8_lossy(&out.stdout));
    Ok(())
}

/// `web-1` and `dns-1`, on n1, at the same ports of the node: one for TCP and one for UDP.
fn mapped(name: &str, ports: &[u16]) -> Result<Cluster> {
    let cluster = cluster(name)?;
    let node = cluster.lab().node(0);
    for (pod, protocol, port) in [(0, "tcp", 8080), (2, "udp", 5353)] {
        let mapping = |host: &u16| json!({ "hostPort": host, "containerPort": port, "protocol": protocol });
        let mappings: Vec<_> = ports.iter().map(mapping).collect();
        map(node, &cluster.lab().pod(0, pod), &mappings.into())?;
    }
    Ok(cluster)
}

/// Several requests over one connection each, so that more than its first packet has to arrive.
fn answered(from: &Host, to: SocketAddr, source: Option<&Host>) -> Result<()> {
    for (ask, name) in [(Ask::tcp(to), "web-1"), (Ask::udp(to), "dns-1")] {
        for answer in from.ask(&ask.keep().count(4))? {
            let what = || format!("{} → {to}: {answer:?}", from.name());
            let reply = answer.0.as_ref().map_err(|_| anyhow::anyhow!(what()))?;
            ensure!(reply.name == name && reply.from == to, what());
            let seen = reply.peer.context("no source")?.ip();
            ensure!(source.is_none_or(|host| host.ips().contains(&seen)), what());
        }
    }
    Ok(())
}

fn from_everywhere(name: &str, ports: &[u16]) -> Result<()> {
    let cluster = mapped(name, ports)?;
    let lab = cluster.lab();
    let (node, there) = (lab.node(0), lab.node(1));
    for to in ports.iter().flat_map(|&port| node.at(port)) {
        answered(lab.client(), to, Some(lab.client()))?;
        // Masqueraded by us, and on n1 none of our business.
        answered(&lab.pod(1, 2), to, Some(there))?;
        answered(there, to, Some(there))?;
        answered(&lab.pod(0, 1), to, None)?;
    }
    Ok(())
}

#[test]
fn outside_our_range() -> Result<()> {
    from_everywhere("hostports", &PORTS)
}

#[test]
fn in_our_range() -> Result<()> {
    from_everywhere("hostports-range", &[12_345, 29_876])
}
