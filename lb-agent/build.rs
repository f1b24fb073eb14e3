//! Compiles the kernel programs and leaves them where `include_bytes!` finds them.

use anyhow::{Context as _, Result, ensure};
use std::path::PathBuf;

fn main() -> Result<()> {
    println!("cargo:rerun-if-env-changed=LB_EBPF_SKIP");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").context("OUT_DIR")?).join("lb-ebpf.o");
    // docs.rs has no network, and a documentation build needs no programs.
    if std::env::var_os("DOCS_RS").is_some() || std::env::var_os("LB_EBPF_SKIP").is_some_and(|v| v == "1") {
        println!("cargo:warning=the kernel programs are left out of this build; lb-agent will refuse to run");
        std::fs::write(out, b"")?;
        return Ok(());
    }
    // Not `env!`: a shared target directory may hold a build script that was compiled in another clone.
    let here = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").context("CARGO_MANIFEST_DIR")?);
    let root = here.parent().context("the workspace")?;
    for watched in ["lb-ebpf", "lb-common", "Cargo.lock", "Cargo.toml"] {
        println!("cargo:rerun-if-changed={}", root.join(watched).display());
    }
    let target = root.join("target");
    let toolchain = lb_toolchain::Toolchain::find_or_install(&target.join("tools"))?;
    let next = std::env::var_os("CARGO_FEATURE_LAYOUT_NEXT").is_some();
    ensure!(
        !next || std::env::var("PROFILE").is_ok_and(|profile| profile == "debug"),
        "layout-next is for tests of upgrades: what is built with it must not be released"
    );
    let (dir, features): (_, &[&str]) = if next { ("ebpf-next", &["layout-next"]) } else { ("ebpf", &[]) };
    let object = toolchain.build(root, "lb-ebpf", &target.join(dir), features)?;
    let built = std::fs::read(&object).with_context(|| format!("read {}", object.display()))?;
    let shipped = lb_toolchain::without_dwarf(&built).with_context(|| object.display().to_string())?;
    std::fs::write(&out, shipped).with_context(|| format!("write {}", out.display()))
}
