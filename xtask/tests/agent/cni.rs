//! The CNI plugin: every command by hand, and in chains with the plugins that clusters have.

mod chains;
mod parallel;
mod repair;
mod runtimes;
mod verbs;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use aya::programs::{SchedClassifier, TcAttachType};
use lb_common::maps::Device;
use serde_json::{Value, json};
use xtask::cni::{DEBIAN, Network};
use xtask::lab::Host;
use xtask::system::ensure_debian_packages;

use super::support::agent_exe;

fn plugins_of_debian() -> Result<()> {
    ensure_debian_packages(&[
        ("iptables", "iptables"),
        ("containernetworking-plugins", "/usr/lib/cni/bridge"),
    ])
}

fn plugin_exe() -> Result<PathBuf> {
    let exe = agent_exe()?.with_file_name("lb-cni");
    ensure!(exe.is_file(), "there is no {}: run `cargo build -p lb-cni`", exe.display());
    Ok(exe)
}

/// Where a node's pods are written down.
fn state_dir(node: &Host) -> PathBuf {
    node.state_dir().join("cni")
}

/// Our entry in a node's network configuration list.
fn ours(node: &Host) -> Value {
    json!({ "type": "lb-cni", "bpffs": node.bpffs_dir(), "stateDir": state_dir(node),
            "logFile": state_dir(node).join("cni.log") })
}

/// A list of these plugins on a node. `own` is a directory of plugins of the test's own.
fn network(node: &Host, name: &str, version: &str, plugins: &[Value], own: Option<&Path>) -> Result<Network> {
    plugins_of_debian()?;
    let list = json!({ "cniVersion": version, "name": name, "plugins": plugins });
    let ours = plugin_exe()?.with_file_name("");
    let path = own.map(Path::to_owned).into_iter().chain([ours, DEBIAN.into()]).collect();
    Ok(Network { node: node.clone(), list, path })
}

/// host-local, giving out the addresses of a node's pod networks.
fn ipam(node: &Host) -> Value {
    let number = if node.name() == "n1" { 1 } else { 2 };
    json!({
        "type": "host-local", "dataDir": node.state_dir().join("ipam"),
        "ranges": [[{ "subnet": format!("10.244.{number}.0/24") }], [{ "subnet": format!("fd00:10:244:{number}::/64") }]],
        "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
    })
}

/// The bridge that the lab's pods are on.
fn bridge(node: &Host) -> Value {
    json!({ "type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "mtu": 1450,
            "ipam": ipam(node), "capabilities": { "ips": true } })
}

/// The addresses that the lab has chosen for a pod.
fn ips(pod: &Host) -> Value {
    json!({ "ips": [format!("{}/24", pod.v4()), format!("{}/64", pod.v6())] })
}

fn pins(node: &Host) -> PathBuf {
    node.bpffs_dir().join("lb")
}

/// A node's device table.
fn device_table(node: &Host) -> Result<HashMap<MapData, u32, Device>> {
    let map = MapData::from_pin(pins(node).join("devices"))?;
    HashMap::try_from(Map::HashMap(map)).context("the device table")
}

/// The ids of the programs at both hooks of every veth of a node, and whether the device table has it for a pod's.
type Served = BTreeMap<String, ([Vec<u32>; 2], bool)>;

fn served(node: &Host) -> Result<Served> {
    let table = device_table(node)?;
    node.run_in(move || {
        let mut all = BTreeMap::new();
        for link in
            lb_attach::snapshot::links()?.into_iter().filter(|link| link.kind.as_deref() == Some("veth"))
        {
            let programs = |hook| -> Result<Vec<u32>> {
                let (_, programs) = SchedClassifier::query_tcx(&link.name, hook)?;
                Ok(programs.iter().map(aya::programs::ProgramInfo::id).collect())
            };
            let hooks = [programs(TcAttachType::Ingress)?, programs(TcAttachType::Egress)?];
            let pod = table.get(&link.index, 0).is_ok_and(|entry| entry.flags & Device::POD != 0);
            all.insert(link.name, (hooks, pod));
        }
        Ok(all)
    })?
}

/// Every pod of a node has each program exactly once, and they are the pinned ones.
fn all_served(node: &Host) -> Result<()> {
    let pinned = |name: &str| -> Result<u32> {
        Ok(SchedClassifier::from_pin(pins(node).join("programs").join(name))?.info()?.id())
    };
    let wanted = [vec![pinned("ingress")?], vec![pinned("egress")?]];
    for (name, (hooks, pod)) in served(node)?.iter().filter(|(name, _)| *name != "eth0") {
        ensure!(*hooks == wanted && *pod, "{name}: {hooks:?}, not {wanted:?}; in the table: {pod}");
    }
    Ok(())
}
