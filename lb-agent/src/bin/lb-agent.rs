//! The node agent.

use anyhow::Result;
use clap::{Parser, Subcommand};
use lb_agent::cli::{CleanupArgs, InstallArgs, RunArgs, log_filter};
use lb_agent::{install, kube_proxy};
use std::process::ExitCode;

#[derive(Parser)]
#[command(
    name = "lb-agent",
    version,
    about = "An eBPF Service load balancer: kube-proxy's work without iptables"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve this node's Services until told to stop; what is programmed outlives the agent
    Run(Box<RunArgs>),
    /// Prepare this node: the CNI plugin, its place in the network configuration, the file systems that the agent needs
    Install(InstallArgs),
    /// Take off this node whatever `install` and `run` have put on it, or kube-proxy's rules
    Cleanup(CleanupArgs),
    /// Do nothing until told to stop: a pod has to have a container that runs
    #[command(hide = true)]
    Wait,
}

pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = log_filter(std::env::var("RUST_LOG").ok().as_deref());
    let colour = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(colour)
        .with_writer(std::io::stderr)
        .init();
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        // What failed, on what, and why: not where in our code.
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build();
    match command {
        Command::Run(args) => runtime()?.block_on(lb_agent::run::run(*args)),
        Command::Wait => runtime()?.block_on(lb_agent::run::told_to_stop()),
        Command::Install(args) => install::install(&args),
        Command::Cleanup(args) if args.kube_proxy => kube_proxy::remove_rules(args.force),
        Command::Cleanup(args) => install::cleanup(&args),
    }
}
