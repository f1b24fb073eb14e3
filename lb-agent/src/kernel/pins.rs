//! Where programs, maps and links are pinned, so that traffic goes on without the agent.
//!
//! `<bpffs>/lb/v<version>/{maps,programs,links}`. The version is that of the maps' layouts.

use anyhow::{Context as _, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use std::fs;
use std::path::{Path, PathBuf};

/// The pin directory of one agent.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
}

impl Pins {
    /// The pins below a BPF file system, which need not exist.
    pub fn at(bpffs: &Path) -> Self {
        Self { root: bpffs.join("lb").join(format!("v{}", lb_common::maps::VERSION)) }
    }

    /// As [`Self::at`], mounting the BPF file system if nothing is mounted there, and making the directories.
    ///
    /// # Errors
    /// If it is not one and cannot be made one.
    pub fn prepare(bpffs: &Path) -> Result<Self> {
        fs::create_dir_all(bpffs).with_context(|| format!("create {}", bpffs.display()))?;
        if !is_bpffs(bpffs)? {
            if fs::read_dir(bpffs)?.next().is_some() {
                bail!(
                    "{} is not a BPF file system, and not empty: give another directory by --bpffs",
                    bpffs.display()
                );
            }
            mount(Some("bpf"), bpffs, Some("bpf"), MsFlags::empty(), None::<&str>).with_context(|| {
                format!("mount a BPF file system at {0} (by hand: mount -t bpf bpf {0})", bpffs.display())
            })?;
            tracing::info!("mounted a BPF file system at {}", bpffs.display());
        }
        let pins = Self::at(bpffs);
        for dir in ["maps", "programs", "links"] {
            let dir = pins.root.join(dir);
            fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        }
        Ok(pins)
    }

    /// Pin of a map.
    pub fn map(&self, name: &str) -> PathBuf {
        self.root.join("maps").join(name)
    }

    /// Pin of a program.
    pub fn program(&self, name: &str) -> PathBuf {
        self.root.join("programs").join(name)
    }

    /// Pin of a link.
    pub fn link(&self, name: &str) -> PathBuf {
        self.root.join("links").join(name)
    }

    /// Names of all pinned links.
    pub fn links(&self) -> Vec<String> {
        let Ok(dir) = fs::read_dir(self.root.join("links")) else { return Vec::new() };
        dir.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// The directory that holds all pins.
    pub fn root(&self) -> &Path {
        &self.root
    }
}

fn is_bpffs(dir: &Path) -> Result<bool> {
    let stat = statfs(dir).with_context(|| format!("look at {}", dir.display()))?;
    Ok(stat.filesystem_type() == BPF_FS_MAGIC)
}
