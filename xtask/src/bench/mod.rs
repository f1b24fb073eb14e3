//! `cargo xtask bench`: what Services cost: without any translation, with kube-proxy's modes, and with ours; how soon changes
//! are seen; and what each of our programs costs a packet.
//!
//! Everything that is compared is measured in turn, in one run, on one core: the machine may be busy, and a wake-up on
//! another core costs more than what we want to see. `docs/performance.md` says how to read the figures.

mod control;
mod cores;
mod family;
pub mod iptables;
mod load;
mod machine;
mod maps;
mod mode;
mod nftables;
mod packet;
mod plan;
mod programs;
mod report;
mod results;
mod services;
mod stats;
mod through;
mod topology;
mod traffic;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Subcommand;

use crate::agent;
use crate::system::workspace;
use family::IpFamily;
use load::Load;
use mode::{Mode, Tools};
use plan::{Budget, Depth};
use results::Results;
use traffic::Run;

/// Options of `bench`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    /// Every way and every load once, in about two minutes after the builds
    #[arg(long)]
    quick: bool,
    /// As little as shows that the benchmark works; its figures mean nothing
    #[arg(long, hide = true)]
    smoke: bool,
    /// The time that it may take [default: 60, with --quick 2]
    #[arg(long, value_name = "N")]
    minutes: Option<f64>,
    /// Where to write the results [default: target/bench]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Fail unless ours is ahead of iptables and nftables in every row that both have
    #[arg(long)]
    check: bool,
    /// Numbers of Services [default: 1,100,1000,10000,30000, with --quick 1,1000]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    services: Vec<usize>,
    /// The core that clients, servers and programs run on [default: the last]
    #[arg(long, value_name = "CPU")]
    core: Option<usize>,
    /// Only the programs, without real traffic
    #[arg(long)]
    programs_only: bool,
    /// This lb-agent instead of a freshly built one
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// A real kube-proxy to compare with [default: that on PATH; without any, rules as it writes them]
    #[arg(long, value_name = "FILE")]
    kube_proxy: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Compare two results: fails if ours has become slower
    Compare(report::compare::Args),
    /// Draw a result's plots again
    Plot(report::Plot),
    /// The server in a pod
    #[command(hide = true)]
    Serve(load::Serve),
    /// The client in a pod
    #[command(hide = true)]
    Drive(load::Drive),
}

/// Runs `bench`.
///
/// # Errors
/// If something cannot be set up or a connection fails; with `--check` also if ours is not ahead.
pub fn run(args: Args) -> Result<()> {
    match args.command {
        Some(Command::Serve(serve)) => return serve.run(),
        Some(Command::Drive(drive)) => return drive.run(),
        Some(Command::Compare(compare)) => return compare.run(),
        Some(Command::Plot(plot)) => return plot.run(),
        None => {}
    }
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the benchmark loads kernel programs and makes network namespaces: run as root"
    );
    let exe = match &args.agent {
        Some(exe) => exe.canonicalize().with_context(|| format!("no agent at {}", exe.display()))?,
        None => agent::build()?,
    };
    let core = args.core.map_or_else(cores::last, Ok)?;
    let depth = args.depth();
    let machine = machine::describe(&exe, core)?;
    let tools = (!args.programs_only).then(|| Tools::find(&exe, args.kube_proxy.as_deref())).transpose()?;
    let available = tools.as_ref().map(Tools::available).unwrap_or_default();
    let modes: Vec<Mode> = available.iter().filter(|a| a.by.is_ok()).map(|a| a.mode).collect();
    let mut results = Results::new(machine, available);
    print!("{}", report::head(&results));
    let forwards = through::possible(&results.machine.kernel);
    if let Err(why) = &forwards {
        results.omitted.push(format!("{}, forwarded by XDP: {why}", Load::Forwarded.name()));
    }
    let traffic = tools.as_ref().map_or(Ok(()), |tools| {
        let mut blocks = plan::blocks(depth, &args.services()?, &IpFamily::ALL);
        for block in &mut blocks {
            block.cells.retain(|cell| cell.load != Load::Forwarded || forwards.is_ok());
        }
        let budget = Budget::new(args.time());
        traffic::measure(&mut Run { tools, depth, core, modes, budget }, &blocks, &mut results)
    });
    let programs = measure_programs(&exe, core, depth, forwards.is_ok(), &mut results);
    // An hour's figures are not lost with the one that cannot be had.
    for (what, result) in [("the rest of the traffic", &traffic), ("the rest of the programs", &programs)] {
        if let Err(error) = result {
            results.omitted.push(format!("{what}: {error:#}"));
        }
    }
    print!("{}", report::body(&results));
    let out = args.out.unwrap_or_else(|| workspace().join("target/bench"));
    report::write(&results, &out)?;
    println!("\nwritten: {}, bench.json and plots", shown(&out.join("bench.md")));
    traffic?;
    programs?;
    if args.check { report::check(&results) } else { Ok(()) }
}

fn measure_programs(
    agent: &Path,
    core: usize,
    depth: Depth,
    forwards: bool,
    results: &mut Results,
) -> Result<()> {
    results.programs = programs::measure(core, depth)?;
    if forwards {
        results.programs.extend(programs::forwarded(agent, core, depth)?);
    }
    Ok(())
}

impl Args {
    fn depth(&self) -> Depth {
        match (self.smoke, self.quick) {
            (true, _) => Depth::Smoke,
            (_, true) => Depth::Quick,
            _ => Depth::Full,
        }
    }

    fn time(&self) -> Duration {
        let minutes = self.minutes.unwrap_or(match self.depth() {
            Depth::Full => 60.0,
            Depth::Quick => 2.0,
            Depth::Smoke => 1.0,
        });
        Duration::from_secs_f64(minutes.max(0.0) * 60.0)
    }

    fn services(&self) -> Result<Vec<usize>> {
        ensure!(!self.services.contains(&0), "--services: at least one Service is needed");
        if !self.services.is_empty() {
            return Ok(self.services.clone());
        }
        Ok(match self.depth() {
            Depth::Full => vec![1, 100, 1000, 10_000, 30_000],
            Depth::Quick => vec![1, 1000],
            Depth::Smoke => vec![20],
        })
    }
}

fn shown(path: &Path) -> String {
    path.canonicalize().unwrap_or_else(|_| path.to_owned()).display().to_string()
}
