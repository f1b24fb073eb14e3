//! Where programs, maps and links are pinned, so that traffic goes on without the agent.
//!
//! `<bpffs>/lb/v<version>/{maps,programs,links}`. The version is that of the maps' layouts. What is in `programs` is what
//! the plugin attaches: without, it leaves devices to the agent.

use anyhow::{Context as _, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The BPF file system, unless told.
pub const DEFAULT_BPFFS: &str = "/sys/fs/bpf";

/// How long to wait for whoever attaches or takes off programs at the moment: it takes them milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

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
            mount(Some("bpf"), bpffs, Some("bpf"), MsFlags::empty(), Some("mode=0700")).with_context(
                || format!("mount a BPF file system at {0} (by hand: mount -t bpf bpf {0})", bpffs.display()),
            )?;
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

    /// Waits for our turn to attach programs, take them off, or pin others. The agent and every plugin do it one after
    /// the other, so that a device that two of them see at once has each program once.
    ///
    /// # Errors
    /// If there are no pins, or somebody keeps us waiting.
    pub fn lock(&self) -> Result<Turn> {
        let path = self.root.join("links");
        let dir = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match dir.try_lock() {
                Ok(()) => return Ok(Turn { _dir: dir }),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(error).with_context(|| format!("lock {}", path.display())),
            }
        }
    }

    /// The directory that holds all pins.
    pub fn root(&self) -> &Path {
        &self.root
    }
}

/// Our turn, until it is dropped.
#[derive(Debug)]
pub struct Turn {
    _dir: File,
}

fn is_bpffs(dir: &Path) -> Result<bool> {
    let stat = statfs(dir).with_context(|| format!("look at {}", dir.display()))?;
    Ok(stat.filesystem_type() == BPF_FS_MAGIC)
}
