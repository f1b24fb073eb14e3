//! What runs in the guest: the programs of the ordinary build, stripped, with the shared libraries that they need.

use super::{OBJECT_FILE, PAYLOAD_DIR};
use crate::build::{next_agent, workspace_bins};
use crate::system::output;
use anyhow::{Context as _, Result, ensure};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The agent of the next version.
pub(super) const NEXT: &str = "lb-agent-next";

/// A file of the guest's.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct File {
    /// Where its contents are.
    pub(super) here: PathBuf,
    /// Its path in the guest.
    pub(super) there: PathBuf,
}

/// Builds the programs and leaves stripped copies in `dir`.
pub(super) fn prepare(dir: &Path) -> Result<Vec<File>> {
    let built = workspace_bins()?;
    let next = next_agent()?;
    let mut files = vec![File { here: built.programs()?.to_owned(), there: OBJECT_FILE.into() }];
    let mut libraries = BTreeSet::new();
    for name in ["xtask", "lb-agent", "lb-cni", "lbctl", NEXT] {
        let binary = if name == NEXT { &next } else { built.binary(name)? };
        libraries.extend(libraries_of(binary)?);
        let here = dir.join(name);
        // Four fifths of a program are debug information, which an emulated guest would take long to unpack.
        output(Command::new("strip").arg("--strip-debug").arg("-o").arg(&here).arg(binary))?;
        files.push(File { here, there: Path::new(PAYLOAD_DIR).join(name) });
    }
    // At the same paths: the loader's built-in list of directories is that of this machine.
    files.extend(libraries.into_iter().map(|path| File { here: path.clone(), there: path }));
    Ok(files)
}

/// The dynamic loader and the libraries of a program, as the loader itself finds them.
fn libraries_of(binary: &Path) -> Result<BTreeSet<PathBuf>> {
    let listed = output(Command::new("ldd").arg(binary))?;
    let libraries = parse(&listed).with_context(|| format!("libraries of {}", binary.display()))?;
    ensure!(!libraries.is_empty(), "ldd {} lists no library: {listed}", binary.display());
    Ok(libraries)
}

/// Reads what ldd writes: `NAME => PATH (ADDRESS)`, `PATH (ADDRESS)` for the loader, `NAME (ADDRESS)` for the vDSO.
fn parse(ldd: &str) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    for line in ldd.lines().map(str::trim) {
        let (_, path) = line.split_once(" => ").unwrap_or(("", line));
        ensure!(path != "not found", "{line}");
        if path.starts_with('/') {
            found.insert(path.split(" (").next().unwrap_or(path).into());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loader_and_the_libraries_are_needed_the_vdso_is_not() {
        let ldd = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\t\
                   /lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let found = parse(ldd).unwrap();
        let wanted = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(found, wanted.map(PathBuf::from).into());
        assert!(parse("\tlibz.so.1 => not found\n").unwrap_err().to_string().contains("libz.so.1"));
    }
}
