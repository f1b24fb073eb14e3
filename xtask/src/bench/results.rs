//! What a run finds out, as it is written and read again.

use serde::{Deserialize, Serialize};

use super::family::IpFamily;
use super::load::Load;
use super::machine::Machine;
use super::mode::{Available, Mode};
use super::programs::Cost;
use super::stats::{Quantiles, Spread, Verdict};
use super::topology::Path;

/// Everything.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Results {
    pub(super) machine: Machine,
    pub(super) modes: Vec<Available>,
    pub(super) rows: Vec<Row>,
    pub(super) compared: Vec<Compared>,
    pub(super) programming: Vec<Programming>,
    pub(super) changes: Vec<Changes>,
    pub(super) processes: Vec<Process>,
    pub(super) programs: Vec<Cost>,
    /// What was left out, and why.
    pub(super) omitted: Vec<String>,
}

impl Results {
    pub(super) fn new(machine: Machine, modes: Vec<Available>) -> Self {
        let (rows, compared, programming, changes, processes, programs, omitted) = Default::default();
        Self { machine, modes, rows, compared, programming, changes, processes, programs, omitted }
    }
}

/// What a figure is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Of {
    pub(super) load: Load,
    pub(super) path: Path,
    pub(super) family: IpFamily,
    pub(super) services: usize,
}

/// One mode under one load.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Row {
    #[serde(flatten)]
    pub(super) of: Of,
    pub(super) mode: Mode,
    pub(super) turns: usize,
    /// The turns' figures, in the load's unit.
    pub(super) figure: Spread,
    /// The turns' figures over those of `direct`.
    pub(super) to_direct: Spread,
    /// Of all turns together, µs.
    pub(super) whole: Option<Quantiles>,
    /// Of connecting alone, µs.
    pub(super) connect: Option<Quantiles>,
    /// Operations a second.
    pub(super) rate: Spread,
    /// Processor time of an operation, µs.
    pub(super) cpu: Spread,
    /// Share of what was sent that did not arrive.
    pub(super) lost: f64,
}

/// One of our modes beside one of kube-proxy's.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Compared {
    #[serde(flatten)]
    pub(super) of: Of,
    pub(super) mode: Mode,
    pub(super) against: Mode,
    /// Time that an operation takes over the time that it takes there, turn by turn.
    pub(super) ratio: Spread,
    pub(super) verdict: Verdict,
}

/// How long a node took to serve all Services, from nothing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Programming {
    pub(super) services: usize,
    pub(super) family: IpFamily,
    pub(super) mode: Mode,
    /// Since the process or the command was started.
    pub(super) seconds: f64,
    /// Since the last object was sent to it.
    pub(super) seconds_after_list: Option<f64>,
}

/// How long it takes until connections go to other endpoints.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Changes {
    pub(super) services: usize,
    pub(super) mode: Mode,
    /// Changes of other Services a second, meanwhile.
    pub(super) churn: u32,
    pub(super) samples: usize,
    /// Milliseconds.
    pub(super) milliseconds: Quantiles,
    /// Whether it came by the API, or the rules were rewritten by hand.
    pub(super) by_api: bool,
}

/// What a node's process takes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Process {
    pub(super) services: usize,
    pub(super) mode: Mode,
    /// Resident memory, MB.
    pub(super) resident: f64,
    /// Memory of its maps in the kernel, MB.
    pub(super) maps: Option<f64>,
    /// Share of a core when nothing happens, percent.
    pub(super) idle: f64,
    /// The same with a hundred changes a second, where there is something to change.
    pub(super) churn: Option<f64>,
}
