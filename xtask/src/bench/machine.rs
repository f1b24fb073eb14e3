//! What it was measured on.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::system::{output, workspace};

/// Machine, kernel and versions.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Machine {
    pub(super) cpu: String,
    pub(super) cores: usize,
    /// The one that everything measured ran on.
    pub(super) core: usize,
    pub(super) kernel: String,
    /// Processes that wanted to run, on average over the last minute, as it began: how busy the machine was.
    pub(super) load_average: String,
    /// The measured commit, with a `+` if the files differ from it.
    pub(super) commit: String,
    pub(super) agent: String,
    pub(super) xtask: String,
}

pub(super) fn describe(agent: &Path, core: usize) -> Result<Machine> {
    let read = |path| fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ").map(|(_, m)| m));
    let build = if cfg!(debug_assertions) { "debug" } else { "release" };
    Ok(Machine {
        cpu: model.unwrap_or(std::env::consts::ARCH).to_owned(),
        cores: std::thread::available_parallelism()?.get(),
        core,
        kernel: read("/proc/sys/kernel/osrelease"),
        load_average: read("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned(),
        commit: commit(),
        agent: agent.display().to_string(),
        xtask: format!("{} ({build} build)", std::env::current_exe()?.display()),
    })
}

/// A source tree without git has no commit.
fn commit() -> String {
    let git = |args: &[&str]| output(Command::new("git").current_dir(workspace()).args(args));
    let Ok(head) = git(&["rev-parse", "--short", "HEAD"]) else { return "unknown".into() };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_ok_and(|s| !s.is_empty());
    format!("{}{}", head.trim(), if changed { "+" } else { "" })
}
