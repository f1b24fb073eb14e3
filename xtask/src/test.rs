//! `cargo xtask test`: every test of the workspace, as CI runs them.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::system::workspace;

/// Options of `test`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Check formatting and lints first, as CI does
    #[arg(long)]
    lint: bool,
    /// What to hand on to `cargo test`
    #[arg(last = true)]
    cargo_args: Vec<String>,
}

/// Runs `test`.
///
/// # Errors
/// If a check or a test fails; all tests have run by then.
pub fn run(args: Args) -> Result<()> {
    if args.lint {
        cargo(&["fmt", "--all", "--check"])?;
        cargo(&["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
    }
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the tests load kernel programs and make network namespaces: run as root"
    );
    // Tests start these programs, which need not be of the package that is tested.
    cargo(&["build", "--quiet", "--package", "xtask", "--package", "lb-agent", "--bins"])?;
    let mut all = vec!["test", "--workspace", "--no-fail-fast"];
    all.extend(args.cargo_args.iter().map(String::as_str));
    cargo(&all)
}

fn cargo(args: &[&str]) -> Result<()> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let status = cargo.current_dir(workspace()).args(args).status().context("starting cargo")?;
    ensure!(status.success(), "cargo {} failed", args.join(" "));
    Ok(())
}
