//! The CNI plugin on a node whose agent is dead.

use super::PAYLOAD_DIR;
use crate::cni::Network;
use crate::lab::{Host, Lab};
use anyhow::Result;
use serde_json::{Value, json};

/// Adds a pod to the first node, hands it to the plugin, and has that look at it.
pub(super) fn add_pod(lab: &Lab) -> Result<Host> {
    let (node, pod) = (lab.node(0), lab.add_pod(0)?);
    let mut config = json!({
        "cniVersion": "1.1.0", "name": "lab", "type": "lb-cni",
        "bpffs": node.bpffs_dir(), "stateDir": node.state_dir(), "required": true,
    });
    let network = Network { node: node.clone(), list: Value::Null, path: vec![PAYLOAD_DIR.into()] };
    network.call(&config, "STATUS", &pod, &config)?;
    config["prevResult"] = json!({ "ips": pod.ips().map(|ip| json!({ "address": format!("{ip}/24") })) });
    // Twice: what is attached is replaced, and taken off and attached anew.
    for command in ["ADD", "ADD", "CHECK", "DEL", "ADD", "CHECK"] {
        network.call(&config, command, &pod, &config)?;
    }
    Ok(pod)
}
