//! Where programs, maps and links are pinned, so that traffic goes on without the agent.
//!
//! `<bpffs>/lb/`: `v<version>/maps`, the version being that of the maps' layouts; and for all versions the same,
//! `devices`, the device table, `links`, and `programs`, which is what the plugin attaches: without, it leaves devices to the
//! agent. `front` has the programs of a version that takes over, as long as that takes: the plugin attaches them, too.

use anyhow::{Context as _, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

/// The BPF file system, unless told.
pub const DEFAULT_BPFFS: &str = "/sys/fs/bpf";

/// The device table, which is all versions'.
const DEVICES: &str = "LB_DEVICE";
const PROGRAMS: &str = "programs";
const FRONT: &str = "front";
const LINKS: &str = "links";

/// Which programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Those that serve.
    Main,
    /// Those of a version that takes over, in front of the others.
    Front,
}

impl Place {
    /// The directory of its programs.
    pub const fn dir(self) -> &'static str {
        match self {
            Self::Main => PROGRAMS,
            Self::Front => FRONT,
        }
    }
}
/// What the names of XDP's links begin with.
const XDP: &str = "xdp-";

/// How long to wait for those who attach or take off programs at the moment: each takes milliseconds, but on a machine
/// that is overloaded, where the kernel's own waits (RCU) take seconds, and many pods start at once.
const PATIENCE: Duration = Duration::from_secs(60);

/// The pin directory of one agent.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
    version: u32,
}

impl Pins {
    /// The pins below a BPF file system, which need not exist.
    pub fn at(bpffs: &Path) -> Self {
        Self { root: bpffs.join("lb"), version: lb_common::maps::VERSION }
    }

    /// The same with the maps of another version.
    pub fn of_version(&self, version: u32) -> Self {
        Self { version, ..self.clone() }
    }

    /// The version of the maps.
    pub const fn version(&self) -> u32 {
        self.version
    }

    /// All versions that have maps here.
    pub fn versions(&self) -> Vec<u32> {
        let Ok(dir) = fs::read_dir(&self.root) else { return Vec::new() };
        let number = |name: std::ffi::OsString| name.to_str()?.strip_prefix('v')?.parse().ok();
        dir.flatten().filter_map(|entry| number(entry.file_name())).collect()
    }

    /// Removes the maps of this version. Programs that use them go on with them.
    ///
    /// # Errors
    /// If they cannot be removed.
    pub fn remove_maps(&self) -> Result<()> {
        let dir = self.versioned();
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove {}", dir.display()))
            }
            _ => Ok(()),
        }
    }

    fn versioned(&self) -> PathBuf {
        self.root.join(format!("v{}", self.version))
    }

    /// Makes the directory of the maps.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn prepare_maps(&self) -> Result<()> {
        let dir = self.versioned().join("maps");
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))
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
        move_in(&pins.root)?;
        for dir in [PROGRAMS, FRONT, LINKS] {
            let dir = pins.root.join(dir);
            fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        }
        pins.prepare_maps()?;
        Ok(pins)
    }

    /// Whether an agent has ever made them.
    pub fn exist(&self) -> bool {
        self.root.join(LINKS).is_dir()
    }

    /// Pin of a map.
    pub fn map(&self, name: &str) -> PathBuf {
        if name == DEVICES { self.root.join("devices") } else { self.versioned().join("maps").join(name) }
    }

    /// Pin of a program.
    pub fn program(&self, place: Place, name: &str) -> PathBuf {
        self.root.join(place.dir()).join(name)
    }

    /// Pin of a link.
    pub fn link(&self, name: &str) -> PathBuf {
        self.root.join(LINKS).join(name)
    }

    /// Names of all pinned links.
    pub fn links(&self) -> Vec<String> {
        let Ok(dir) = fs::read_dir(self.root.join(LINKS)) else { return Vec::new() };
        dir.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// Pin of the link that holds the XDP program on a device.
    pub fn xdp(&self, index: u32) -> PathBuf {
        self.link(&format!("{XDP}{index}"))
    }

    /// Indexes of the devices that have such a pin.
    pub fn with_xdp(&self) -> BTreeSet<u32> {
        self.links().iter().filter_map(|name| name.strip_prefix(XDP)?.parse().ok()).collect()
    }

    /// Waits for our turn to attach programs, take them off, or pin others. The agent and every plugin do it one after
    /// the other, so that a device that two of them see at once has each program once.
    ///
    /// # Errors
    /// [`Busy`] if somebody keeps us waiting for too long; otherwise if there are no pins.
    pub fn lock(&self) -> Result<Turn> {
        self.lock_within(PATIENCE)
    }

    fn lock_within(&self, patience: Duration) -> Result<Turn> {
        let path = self.root.join(LINKS);
        let dir = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        let (sender, receiver) = mpsc::channel();
        // A wait that can be given up, yet keeps its place in the queue.
        std::thread::spawn(move || {
            let locked = dir.lock();
            // Let go at once if nobody waits any more.
            let _ = sender.send(locked.map(|()| Turn { _dir: dir }));
        });
        match receiver.recv_timeout(patience) {
            Ok(locked) => locked.with_context(|| format!("lock {}", path.display())),
            Err(_) => Err(Busy(path, patience).into()),
        }
    }

    /// The directory that holds all pins.
    pub fn root(&self) -> &Path {
        &self.root
    }
}

/// Pins of the time when every version had all of its own, the last of which was 3: what is everybody's now is brought to
/// where it is now. What is attached stays so. A start that ended in the middle of it is gone on with by the next.
fn move_in(root: &Path) -> Result<()> {
    let before = root.join("v3");
    for (from, to) in [("maps/LB_DEVICE", "devices"), (PROGRAMS, PROGRAMS), (LINKS, LINKS)] {
        let (from, to) = (before.join(from), root.join(to));
        if from.exists() && !to.exists() {
            fs::rename(&from, &to).with_context(|| format!("move {} to {}", from.display(), to.display()))?;
        }
    }
    Ok(())
}

/// Somebody else does not stop changing what is attached.
#[derive(Debug, thiserror::Error)]
#[error("{0} is locked, still after {1:?}: another plugin or lb-agent hangs")]
pub struct Busy(PathBuf, Duration);

/// Our turn, until it is dropped.
#[derive(Debug)]
pub struct Turn {
    _dir: File,
}

fn is_bpffs(dir: &Path) -> Result<bool> {
    let stat = statfs(dir).with_context(|| format!("look at {}", dir.display()))?;
    Ok(stat.filesystem_type() == BPF_FS_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_a_versions_is_everybodys() {
        let dir = tempfile::tempdir().unwrap();
        let (root, pins) = (dir.path().join("lb"), Pins::at(dir.path()));
        let old = root.join("v3");
        for file in ["maps/LB_FLOW4", "maps/LB_DEVICE", "programs/ingress", "links/7-ingress"] {
            fs::create_dir_all(old.join(file).parent().unwrap()).unwrap();
            fs::write(old.join(file), file).unwrap();
        }
        // The second time, there is nothing to do.
        for _ in 0..2 {
            move_in(&root).unwrap();
            let pins = pins.of_version(3);
            for (pin, was) in [
                (pins.map("LB_FLOW4"), "maps/LB_FLOW4"),
                (pins.map(DEVICES), "maps/LB_DEVICE"),
                (pins.program(Place::Main, "ingress"), "programs/ingress"),
                (pins.link("7-ingress"), "links/7-ingress"),
            ] {
                assert_eq!(fs::read_to_string(pin).unwrap(), was);
            }
        }
    }

    #[test]
    fn xdp_links() {
        let dir = tempfile::tempdir().unwrap();
        let pins = Pins::at(dir.path());
        assert!(pins.with_xdp().is_empty(), "there are no pins");
        fs::create_dir_all(pins.link("")).unwrap();
        for pin in [pins.xdp(7), pins.link("tc-7-ingress")] {
            fs::write(pin, "").unwrap();
        }
        assert_eq!(pins.with_xdp(), [7].into());
    }

    #[test]
    fn one_after_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let pins = Pins::at(dir.path());
        assert!(!pins.exist() && !pins.lock().unwrap_err().is::<Busy>(), "there are no pins");
        fs::create_dir_all(pins.link("")).unwrap();
        let first = pins.lock().unwrap();
        let error = pins.lock_within(Duration::from_millis(50)).unwrap_err();
        assert!(
            error.is::<Busy>() && error.to_string().contains("links is locked, still after 50ms"),
            "{error}"
        );
        // Those who gave up are not in the way of those who wait.
        let second = std::thread::spawn({
            let pins = pins.clone();
            move || pins.lock().map(drop)
        });
        std::thread::sleep(Duration::from_millis(20));
        assert!(!second.is_finished());
        drop(first);
        second.join().unwrap().unwrap();
        drop(pins.lock_within(Duration::from_secs(10)).unwrap());
    }
}
