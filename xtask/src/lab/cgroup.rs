//! cgroup2 directories: they tell a node's processes apart, and find whatever is still running in a lab.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The parent of all labs' directories.
pub(crate) const PARENT: &str = "lb-lab";

/// The cgroup2 mount point: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` beside version 1.
pub(crate) fn mount_point() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
    let mut fields = mounts.lines().map(|l| l.split(' ').collect::<Vec<_>>());
    match fields.find(|f| f.get(2) == Some(&"cgroup2")) {
        Some(f) => Ok(f[1].into()),
        None => bail!("no cgroup2 is mounted: mount -t cgroup2 none /sys/fs/cgroup"),
    }
}

/// The directory of a lab.
pub(crate) fn lab_dir(lab: &str) -> Result<PathBuf> {
    Ok(mount_point()?.join(PARENT).join(lab))
}

/// Creates a directory and its parents. Another lab may be removing the common parent at this moment.
pub(crate) fn create(dir: &Path) -> Result<()> {
    let once = || std::fs::create_dir_all(dir);
    once()
        .or_else(|_| once())
        .or_else(|_| once())
        .with_context(|| format!("creating cgroup {}", dir.display()))
}

/// Kills every process below `dir`, waits until they are gone and removes the directories.
pub(crate) fn destroy(dir: &Path) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    while let Err(e) = kill_and_remove(dir) {
        if Instant::now() > deadline {
            return Err(e).with_context(|| format!("emptying cgroup {}", dir.display()));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    // The last lab takes the common parent along; with others still there this fails, as it should.
    if let Some(parent) = dir.parent().filter(|p| p.ends_with(PARENT)) {
        let _ = std::fs::remove_dir(parent);
    }
    Ok(())
}

fn kill_and_remove(dir: &Path) -> std::io::Result<()> {
    let entries = match std::fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    let mut children = Vec::new();
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            children.push(entry.path());
        }
    }
    let (own, procs) = (std::process::id() as i32, dir.join("cgroup.procs"));
    // 0 stands for a process of another PID namespace.
    let pids = std::fs::read_to_string(procs).unwrap_or_default();
    for pid in pids.lines().filter_map(|l| l.parse().ok()).filter(|&p| p > 0 && p != own) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let results: Vec<_> = children.iter().map(|c| kill_and_remove(c)).collect();
    results.into_iter().collect::<std::io::Result<()>>()?;
    match std::fs::remove_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
