//! What `lbctl` shows, read from the pinned maps: it works when the agent is down.

mod flows;
mod services;
mod status;

use crate::kernel::pins::Pins;
use crate::kernel::tables::Tables;
use crate::kernel::writer::names;
use crate::model::ServicePort;
use anyhow::{Context as _, Result};
use serde::Serialize;
use std::collections::HashMap;
use std::path::Path;

pub use flows::{Flow, flows};
pub use services::{Frontend, services};
pub use status::{Pod, Status, status};

/// Opens the maps below a BPF file system.
///
/// # Errors
/// If no agent has run here.
pub fn open(bpffs: &Path) -> Result<(Pins, Tables)> {
    let pins = Pins::at(bpffs);
    let tables = Tables::open(&pins).with_context(|| {
        format!(
            "nothing is pinned in {}: has lb-agent run on this node, with this --bpffs?",
            pins.root().display()
        )
    })?;
    Ok((pins, tables))
}

/// Names of Service ports by id.
fn service_names(tables: &Tables) -> Result<HashMap<u32, ServicePort>> {
    tables
        .names
        .iter()
        .map(|entry| entry.map(|(id, name)| (id, names::read(&name))).context("read the names of Services"))
        .collect()
}

/// A tuple as people write it.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct Tuple {
    /// Address and port.
    pub source: String,
    /// Address and port.
    pub destination: String,
}
