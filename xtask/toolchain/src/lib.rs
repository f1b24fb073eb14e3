//! Finds or installs what compiles the kernel programs, and compiles them.
//!
//! The programs need `core` built for `bpfel-unknown-none`, hence a compiler with its own library source, and
//! bpf-linker, which works on that compiler's LLVM bitcode. In this order: the rustup nightly that already has
//! `rust-src`; the pinned nightly from rustup; Debian's `rustc-web`, `cargo-web` and `rust-web-src`.
//! Used by `lb-agent/build.rs`, so that a plain `cargo build` works, and by `cargo xtask build`.

mod strip;

pub use strip::without_dwarf;

use anyhow::{Context as _, Result, anyhow, bail};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// bpf-linker is pinned: it has to understand the bitcode of the compiler above (LLVM 22).
const BPF_LINKER: &str = "0.10.2";
/// A nightly of the same LLVM, for machines where rustup can download.
const NIGHTLY: &str = "nightly-2026-05-20";
/// Where Debian puts its newer Rust, next to whatever rustup has.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];

/// A compiler that can build `core`, and the linker to go with it.
#[derive(Debug)]
pub struct Toolchain {
    compiler: Compiler,
    bpf_linker: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Compiler {
    Rustup(String),
    Debian,
}

impl std::fmt::Display for Toolchain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.compiler {
            Compiler::Rustup(name) => write!(f, "rustup's {name} with rust-src")?,
            Compiler::Debian => write!(f, "Debian's {}", DEBIAN_PACKAGES.join(", "))?,
        }
        write!(f, "; bpf-linker {BPF_LINKER} at {}", self.bpf_linker.display())
    }
}

impl Toolchain {
    /// Finds the toolchain, installing what is missing; `tools` is where bpf-linker goes.
    ///
    /// # Errors
    /// If there is no compiler with `core`'s source and none can be installed; the message lists what was tried.
    pub fn find_or_install(tools: &Path) -> Result<Self> {
        fs::create_dir_all(tools).with_context(|| format!("create {}", tools.display()))?;
        // Two cargo processes (clippy beside build, say) must not install into the same place at once.
        let lock = File::create(tools.join(".lock")).context("create the toolchain lock file")?;
        lock.lock().context("lock the toolchain directory")?;
        let compiler = compiler()?;
        let bpf_linker = bpf_linker(tools)?;
        Ok(Self { compiler, bpf_linker })
    }

    /// Builds `package` of the workspace at `root` for BPF, with these features, and returns the path of its object file.
    ///
    /// # Errors
    /// If cargo fails; its output has gone to stderr.
    pub fn build(&self, root: &Path, package: &str, target_dir: &Path, features: &[&str]) -> Result<PathBuf> {
        const TARGET: &str = "bpfel-unknown-none";
        let arch = std::env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_else(|_| std::env::consts::ARCH.into());
        let mut cargo = match &self.compiler {
            Compiler::Rustup(name) => {
                let mut c = Command::new("rustup");
                c.args(["run", name, "cargo"]);
                c
            }
            Compiler::Debian => {
                let mut c = Command::new("/usr/bin/cargo");
                // bpf-linker finds the compiler's LLVM by the dynamic linker's search path.
                c.env("LD_LIBRARY_PATH", debian_libdir()).env("RUSTC_BOOTSTRAP", "1");
                c
            }
        };
        // A build script inherits cargo's own compiler choice; this is another compiler.
        for var in
            ["RUSTC", "RUSTDOC", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTUP_TOOLCHAIN", "RUSTFLAGS"]
        {
            cargo.env_remove(var);
        }
        if self.compiler == Compiler::Debian {
            cargo.env("RUSTC", DEBIAN_RUSTC);
        }
        let linker_dir = self.bpf_linker.parent().expect("an absolute path");
        let path = std::env::var_os("PATH").unwrap_or_default();
        let paths = std::iter::once(linker_dir.to_owned()).chain(std::env::split_paths(&path));
        cargo.env("PATH", std::env::join_paths(paths)?);
        cargo.env(
            "CARGO_ENCODED_RUSTFLAGS",
            [
                "--cfg",
                &format!("bpf_target_arch=\"{arch}\""),
                "-Clink-arg=--btf",
                // Otherwise zeroing three bytes is a call of a loop, on every packet and one frame deeper.
                "-Clink-arg=--disable-expand-memcpy-in-order",
                "-Cdebuginfo=2",
            ]
            .join("\x1f"),
        );
        cargo
            .current_dir(root)
            .args(["build", "--profile", "ebpf", "-Z", "build-std=core", "--target", TARGET])
            .args(["--package", package, "--target-dir"])
            .arg(target_dir)
            .arg(format!("--features={}", features.join(",")))
            .stdout(Stdio::from(std::io::stderr()));
        let status = cargo.status().with_context(|| format!("run {cargo:?}"))?;
        if !status.success() {
            bail!("building the kernel programs with {self} failed ({status})");
        }
        Ok(target_dir.join(TARGET).join("ebpf").join(package))
    }
}

fn compiler() -> Result<Compiler> {
    let mut tried = Vec::new();
    for name in ["nightly", NIGHTLY] {
        if rustup_has_source(name) {
            return Ok(Compiler::Rustup(name.into()));
        }
    }
    if debian_has_source() {
        return Ok(Compiler::Debian);
    }
    if found("rustup") {
        say(&format!("installing {NIGHTLY} with rust-src by rustup"));
        let installed = run(Command::new("rustup").args(["toolchain", "install", NIGHTLY]).args([
            "--profile",
            "minimal",
            "--component",
            "rust-src",
        ]));
        match installed {
            Ok(()) if rustup_has_source(NIGHTLY) => return Ok(Compiler::Rustup(NIGHTLY.into())),
            Ok(()) => tried.push(format!("rustup: {NIGHTLY} came without rust-src")),
            Err(e) => tried.push(format!("rustup: {e:#}")),
        }
    }
    if found("apt-get") {
        say(&format!("installing {} by apt-get", DEBIAN_PACKAGES.join(", ")));
        let apt =
            |args: &[&str]| run(Command::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive").args(args));
        let mut install = vec!["install", "-y", "-qq", "--no-install-recommends"];
        install.extend(DEBIAN_PACKAGES);
        match apt(&["update", "-qq"]).and_then(|()| apt(&install)) {
            Ok(()) if debian_has_source() => return Ok(Compiler::Debian),
            Ok(()) => tried.push("apt-get: the packages came without the library source".into()),
            Err(e) => tried.push(format!("apt-get: {e:#}")),
        }
    }
    Err(anyhow!(
        "no compiler that can build `core` for BPF. Install one: `rustup toolchain install {NIGHTLY} --component \
         rust-src`, or Debian's {}. Tried: {}",
        DEBIAN_PACKAGES.join(" "),
        if tried.is_empty() { "neither rustup nor apt-get is here".into() } else { tried.join("; ") }
    ))
}

fn bpf_linker(tools: &Path) -> Result<PathBuf> {
    let path = tools.join("bin/bpf-linker");
    let wanted = format!("bpf-linker {BPF_LINKER}");
    let mut version = Command::new(&path);
    version.arg("--version").env("LD_LIBRARY_PATH", debian_libdir());
    if output(&mut version).is_some_and(|v| v.trim() == wanted) {
        return Ok(path);
    }
    say(&format!("installing {wanted} into {}", tools.display()));
    let mut cargo = Command::new("cargo");
    // The calling cargo's settings are for the workspace, not for this host tool.
    for var in ["CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS", "CARGO_BUILD_TARGET", "RUSTC", "CARGO_TARGET_DIR"] {
        cargo.env_remove(var);
    }
    // Linked statically, say, it could have no macros.
    for (var, _) in std::env::vars_os() {
        if var.to_str().is_some_and(|var| var.starts_with("CARGO_TARGET_") && var.ends_with("_RUSTFLAGS")) {
            cargo.env_remove(var);
        }
    }
    run(cargo
        .args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--force", "--quiet", "--root"])
        .arg(tools)
        .arg("--target-dir")
        .arg(tools.join("build")))
    .context("install bpf-linker")?;
    Ok(path)
}

fn rustup_has_source(name: &str) -> bool {
    output(
        Command::new("rustup")
            .args(["run", name, "rustc", "--print", "sysroot"])
            .env("RUSTUP_AUTO_INSTALL", "0"),
    )
    .is_some_and(|root| has_core(Path::new(root.trim())))
}

fn debian_has_source() -> bool {
    Path::new("/usr/bin/cargo").exists()
        && output(Command::new(DEBIAN_RUSTC).args(["--print", "sysroot"]))
            .is_some_and(|root| has_core(Path::new(root.trim())))
}

fn has_core(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").exists()
}

fn debian_libdir() -> PathBuf {
    PathBuf::from(format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH))
}

fn found(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|p| std::env::split_paths(&p).any(|dir| dir.join(program).is_file()))
}

fn output(command: &mut Command) -> Option<String> {
    let out = command.stderr(Stdio::null()).output().ok()?;
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned())
}

fn run(command: &mut Command) -> Result<()> {
    let status = command
        .stdin(Stdio::null())
        .stdout(Stdio::from(std::io::stderr()))
        .status()
        .with_context(|| format!("run {command:?}"))?;
    if status.success() { Ok(()) } else { Err(anyhow!("{command:?}: {status}")) }
}

/// Build scripts own stdout (cargo parses it), so people are told on stderr.
fn say(what: &str) {
    eprintln!("toolchain: {what}");
}
