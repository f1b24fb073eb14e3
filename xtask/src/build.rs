//! Builds the kernel programs and the agent.

use crate::system::{cargo, workspace};
use anyhow::{Context as _, Result, ensure};
use lb_toolchain::Toolchain;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Options of this subcommand.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to ship: optimised, without debug information, linked statically
    #[arg(long)]
    release: bool,
}

/// Runs the subcommand.
///
/// # Errors
/// If the eBPF toolchain can neither be found nor installed, or cargo fails.
pub fn run(args: Args) -> Result<()> {
    let toolchain = Toolchain::find_or_install(&workspace().join("target/tools"))?;
    println!("eBPF toolchain: {toolchain}");
    let built = if args.release { release()? } else { workspace_bins()? };
    for name in ["lb-agent", "lb-cni", "lbctl"] {
        let path = built.binary(name)?;
        let size = path.metadata().with_context(|| path.display().to_string())?.len();
        println!("{} ({:.1} MB)", path.display(), size as f64 / 1e6);
    }
    Ok(())
}

/// What a build has left.
#[derive(Debug)]
pub struct Built {
    binaries: Vec<PathBuf>,
    programs: Option<PathBuf>,
}

impl Built {
    /// Where a program is.
    ///
    /// # Errors
    /// If it was not built.
    pub fn binary(&self, name: &str) -> Result<&Path> {
        let found = self.binaries.iter().find(|path| path.file_name().is_some_and(|file| file == name));
        found.map(PathBuf::as_path).with_context(|| format!("cargo did not say that it built {name}"))
    }

    /// Where the kernel programs' object file is, which is also inside `lb-agent`.
    ///
    /// # Errors
    /// If `lb-agent` was not among what was built.
    pub fn programs(&self) -> Result<&Path> {
        let programs = self.programs.as_deref();
        programs.context("cargo did not say where lb-agent's build script left the kernel programs")
    }
}

/// Builds every program of the workspace for development. Always all of them: cargo chooses the dependencies' features
/// for the packages that it builds together, so any other choice would be a second build of half of them.
///
/// # Errors
/// If cargo fails; what it said has been shown.
pub fn workspace_bins() -> Result<Built> {
    build(&["--workspace", "--bins"])
}

/// Builds the agent of the next version, whose maps are laid out differently, for tests of upgrades. As part of the
/// workspace, for the same reason.
///
/// # Errors
/// If cargo fails; what it said has been shown.
pub fn next_agent() -> Result<PathBuf> {
    let built = build(&["--workspace", "--bin", "lb-agent-next", "--features", "lb-agent/layout-next"])?;
    built.binary("lb-agent-next").map(Path::to_owned)
}

/// Builds what is shipped: optimised, and linked statically, so that it runs in an image of its own and on any node.
///
/// # Errors
/// If cargo fails; what it said has been shown.
pub fn release() -> Result<Built> {
    // Alone: what the builder's tool wants of a dependency does not belong into what is shipped.
    static_bins(&["--release", "--package", "lb-agent", "--package", "lb-cni"])
}

/// Builds programs that need nothing but the kernel.
///
/// # Errors
/// If cargo fails; what it said has been shown.
pub fn static_bins(args: &[&str]) -> Result<Built> {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    // With a target, so that build scripts and macros, which are libraries, are left out of it.
    let flags = format!("CARGO_TARGET_{}_RUSTFLAGS", target.to_uppercase().replace('-', "_"));
    let mut cargo = cargo();
    cargo.env(flags, "-C target-feature=+crt-static");
    build_by(cargo, &[&["--bins", "--target", &target], args].concat())
}

fn build(args: &[&str]) -> Result<Built> {
    build_by(cargo(), args)
}

fn build_by(mut cargo: Command, args: &[&str]) -> Result<Built> {
    let out = cargo
        .args(["build", "--message-format", "json-render-diagnostics"])
        .args(args)
        .stderr(Stdio::inherit())
        .output()
        .context("start cargo")?;
    ensure!(out.status.success(), "cargo build {} failed", args.join(" "));
    Ok(parse(&String::from_utf8_lossy(&out.stdout)))
}

/// Reads cargo's messages.
fn parse(messages: &str) -> Built {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let (mut binaries, mut programs) = (Vec::new(), None);
    for message in messages {
        if let Some(path) = message["executable"].as_str() {
            binaries.push(path.into());
        }
        let of_agent = message["package_id"].as_str().is_some_and(|id| id.contains("/lb-agent#"));
        if of_agent && let Some(dir) = message["out_dir"].as_str() {
            programs = Some(Path::new(dir).join("lb-ebpf.o"));
        }
    }
    Built { binaries, programs }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_where_cargo_says() {
        let messages = r#"{"reason":"build-script-executed","package_id":"registry+x#libc@0.2","out_dir":"/t/libc/out"}
{"reason":"build-script-executed","package_id":"path+file:///w/lb-agent#0.1.0","out_dir":"/t/lb-agent-1/out"}
{"reason":"compiler-artifact","package_id":"path+file:///w/lb-agent#0.1.0","executable":null}
{"reason":"compiler-artifact","package_id":"path+file:///w/lb-agent#0.1.0","executable":"/t/debug/lbctl"}
{"reason":"build-finished","success":true}"#;
        let built = parse(messages);
        assert_eq!(built.programs().unwrap(), Path::new("/t/lb-agent-1/out/lb-ebpf.o"));
        assert_eq!(built.binary("lbctl").unwrap(), Path::new("/t/debug/lbctl"));
        assert!(built.binary("lb-cni").unwrap_err().to_string().contains("lb-cni"));
        // This tool alone, say, for an image of it.
        let without = parse(
            r#"{"reason":"compiler-artifact","package_id":"path+file:///w/xtask#0.1.0","executable":"/t/debug/xtask"}"#,
        );
        assert_eq!(without.binary("xtask").unwrap(), Path::new("/t/debug/xtask"));
        assert!(without.programs().unwrap_err().to_string().contains("build script"));
    }
}
