//! `cargo xtask test`: every test of the workspace, as CI runs them.

use crate::build::{next_agent, workspace_bins};
use crate::system::cargo;
use anyhow::{Context as _, Result, ensure};
use std::io::{BufRead as _, BufReader};
use std::time::Instant;

/// Options of `test`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Check formatting, lints and documentation first, as CI does
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
        lint()?;
    }
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the tests load kernel programs and make network namespaces: run as root"
    );
    // Tests start these programs, which need not be of the package that is tested.
    workspace_bins()?;
    next_agent()?;
    let started = Instant::now();
    let mut summary = Summary::default();
    let (output, stdout) = std::io::pipe().context("make a pipe")?;
    let mut command = cargo();
    command.args(["test", "--workspace", "--no-fail-fast"]).args(&args.cargo_args);
    let mut child = command.stderr(stdout.try_clone()?).stdout(stdout).spawn().context("start cargo")?;
    // It holds the pipe's other end.
    drop(command);
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("read cargo's output")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        summary.read(&line);
    }
    let status = child.wait()?;
    println!("{summary}, {} s", started.elapsed().as_secs());
    ensure!(status.success(), "cargo test failed ({status})");
    Ok(())
}

fn lint() -> Result<()> {
    for args in [
        &["fmt", "--all", "--check"][..],
        &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"],
        &["doc", "--workspace", "--no-deps"],
    ] {
        println!("==> cargo {}", args.join(" "));
        let status = cargo().env("RUSTDOCFLAGS", "-D warnings").args(args).status().context("start cargo")?;
        ensure!(status.success(), "cargo {} failed", args.join(" "));
    }
    Ok(())
}

/// What all test programs together said.
#[derive(Debug, Default, PartialEq, Eq)]
struct Summary {
    programs: u32,
    passed: u32,
    ignored: u32,
    failed: Vec<String>,
}

impl Summary {
    /// Takes in a line of the test programs' output.
    fn read(&mut self, line: &str) {
        if let Some(counts) = line.strip_prefix("test result: ") {
            self.programs += 1;
            let count = |what: &str| {
                let before = counts.split(what).next()?.trim_end();
                before.rsplit(' ').next()?.parse::<u32>().ok()
            };
            self.passed += count("passed").unwrap_or(0);
            self.ignored += count("ignored").unwrap_or(0);
        } else if let Some(name) = line.strip_prefix("test ").and_then(|l| l.strip_suffix(" ... FAILED")) {
            self.failed.push(name.to_owned());
        }
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for name in &self.failed {
            writeln!(f, "FAILED  {name}")?;
        }
        write!(
            f,
            "==> {} test programs: {} passed, {} failed",
            self.programs,
            self.passed,
            self.failed.len()
        )?;
        if self.ignored != 0 {
            write!(f, ", {} ignored", self.ignored)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_adds_up() {
        let mut summary = Summary::default();
        for line in [
            "test a::b ... ok",
            "test a::c ... FAILED",
            "test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test result: ok. 12 passed; 0 failed; 2 ignored; 0 measured; 0 filtered out; finished in 1.20s",
        ] {
            summary.read(line);
        }
        assert_eq!(summary.to_string(), "FAILED  a::c\n==> 2 test programs: 13 passed, 1 failed, 2 ignored");
    }
}
