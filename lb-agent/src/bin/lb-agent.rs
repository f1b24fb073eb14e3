//! The node agent.

use anyhow::Result;
use clap::{Parser, Subcommand};
use lb_agent::cli::RunArgs;
use tracing_subscriber::EnvFilter;

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
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_target(false).with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match cli.command {
        Command::Run(args) => runtime.block_on(lb_agent::run::run(*args)),
    }
}
