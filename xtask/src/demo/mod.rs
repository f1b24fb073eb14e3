//! `cargo xtask demo`: every path through the load balancer, with real sockets, checked and explained.

mod check;
mod cluster;
mod experiments;
mod paths;
mod report;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::agent;

pub use check::{Action, Check, Expect, Seen};
pub use cluster::{Cluster, vip};
pub use paths::{Path, paths};
use report::Report;

/// Options of `demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// This lb-agent instead of a freshly built one
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// Leave lab, servers and agents running, to look around and to experiment
    #[arg(long)]
    keep: bool,
    /// Only the paths, without the experiments
    #[arg(long)]
    paths_only: bool,
    /// Do without the process that cleans up should this one be killed
    #[arg(long, hide = true)]
    no_reaper: bool,
}

/// Runs `demo`.
///
/// # Errors
/// If the lab or the agents cannot be started, or anything observed is not what it should be.
pub fn run(args: Args) -> Result<()> {
    let exe = match args.agent {
        Some(exe) => exe.canonicalize().with_context(|| format!("no agent at {}", exe.display()))?,
        None => agent::build()?,
    };
    let started = Instant::now();
    let mut report = Report::new();
    report.intro();
    let mut cluster = Cluster::start(exe, !args.no_reaper)?;
    report.cluster(&cluster);
    for path in paths(&cluster) {
        report.heading(path.title, path.how);
        for check in path.checks {
            report.checked(&check, check.run()?);
        }
    }
    if !args.paths_only {
        experiments::masquerade(&mut cluster, &mut report)?;
        experiments::endpoints(&cluster, &mut report)?;
    }
    let (count, wrong) = report.end(started.elapsed());
    if wrong > 0 {
        eprint!("{}", cluster.logs());
    }
    if args.keep {
        report.kept(&cluster);
        cluster.keep()?;
    }
    ensure!(wrong == 0, "{wrong} of {count} observations are not what they should be");
    Ok(())
}
