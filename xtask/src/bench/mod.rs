//! `cargo xtask bench`: what a connection through a Service costs: without any translation, with kube-proxy's iptables
//! rules, and with ours; and what each of our programs costs a packet.
//!
//! Everything that is compared is measured in turn, in one run, on one core: the machine may be busy, and a wake-up on
//! another core costs more than what we want to see. `docs/performance.md` says how to read the figures.

pub mod iptables;
mod machine;
mod packet;
mod programs;
mod report;
mod services;
mod site;
mod stats;
mod traffic;
mod worker;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Subcommand;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::agent;
use crate::system::workspace;
use report::Report;

/// Options of `bench`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    /// At most two minutes after the builds: fewer rounds
    #[arg(long)]
    quick: bool,
    /// Where to write bench.json and bench.md [default: target/bench]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Fail unless ours is ahead of iptables in every row
    #[arg(long)]
    check: bool,
    /// Numbers of Services
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 1000])]
    services: Vec<usize>,
    /// The core that client, server and programs run on [default: the last]
    #[arg(long, value_name = "CPU")]
    core: Option<usize>,
    /// Only the programs, without real traffic
    #[arg(long)]
    programs_only: bool,
    /// This lb-agent instead of a freshly built one
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    #[command(subcommand)]
    worker: Option<Worker>,
}

#[derive(Debug, Subcommand)]
enum Worker {
    /// The server in a pod
    #[command(hide = true)]
    Serve(worker::Serve),
    /// The client in a pod
    #[command(hide = true)]
    Drive(worker::Drive),
}

/// How much is measured.
#[derive(Clone, Copy, Debug)]
struct Effort {
    /// Turns that every mode gets.
    rounds: usize,
    /// New connections in a turn.
    connections: usize,
    /// Round trips over one connection in a turn.
    round_trips: usize,
    /// Turns that every program gets.
    program_rounds: usize,
    /// Packets in a turn of a program.
    packets: u32,
}

const QUICK: Effort =
    Effort { rounds: 24, connections: 500, round_trips: 5000, program_rounds: 7, packets: 1_000_000 };
const FULL: Effort =
    Effort { rounds: 120, connections: 500, round_trips: 5000, program_rounds: 21, packets: 2_000_000 };

/// Runs `bench`.
///
/// # Errors
/// If something cannot be set up or a connection fails; with `--check` also if ours is not ahead.
pub fn run(args: Args) -> Result<()> {
    match args.worker {
        Some(Worker::Serve(serve)) => return serve.run(),
        Some(Worker::Drive(drive)) => return drive.run(),
        None => {}
    }
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the benchmark loads kernel programs and makes network namespaces: run as root"
    );
    ensure!(args.services.iter().all(|&n| n > 0), "--services: at least one Service is needed");
    let exe = match &args.agent {
        Some(exe) => exe.canonicalize().with_context(|| format!("no agent at {}", exe.display()))?,
        None => agent::build()?,
    };
    let core = args.core.map_or_else(last_core, Ok)?;
    let effort = if args.quick { QUICK } else { FULL };
    let mut report = Report::new(machine::describe(&exe, core)?);
    report.print_head();
    if !args.programs_only {
        traffic::measure(&exe, core, effort, &args.services, &mut report)?;
    }
    report.programs = programs::measure(core, effort)?;
    report.print();
    let out = args.out.unwrap_or_else(|| workspace().join("target/bench"));
    report.write(&out)?;
    println!("\nwritten: {} and bench.json", shown(&out.join("bench.md")));
    ensure!(!args.check || report.all_ahead(), "ours is not ahead of iptables in every row");
    Ok(())
}

fn shown(path: &Path) -> String {
    path.canonicalize().unwrap_or_else(|_| path.to_owned()).display().to_string()
}

fn last_core() -> Result<usize> {
    let allowed =
        nix::sched::sched_getaffinity(Pid::from_raw(0)).context("asking for this process's cores")?;
    (0..CpuSet::count()).rev().find(|&cpu| allowed.is_set(cpu).unwrap_or(false)).context("no core to run on")
}

/// Keeps the calling thread, and what it starts, on one core.
fn pin(core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core).with_context(|| format!("core {core}"))?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("running on core {core} only"))
}
