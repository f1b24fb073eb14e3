//! Takes out of the kernel what agents of any version have put there.

use anyhow::{Context as _, Result, bail};
use lb_attach::attach::detach_filters;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tracing::info;

/// How long an agent that was told to stop may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Directories of the versions of our pins. Nothing if the BPF file system is not there.
fn versions(bpffs: &Path) -> Result<Vec<PathBuf>> {
    let all = bpffs.join("lb");
    let entries = match fs::read_dir(&all) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("read {}", all.display()))?,
    };
    Ok(entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect())
}

/// Waits for agents to stop. No new one gets to work on these pins while the result lives.
///
/// # Errors
/// If one does not stop.
pub fn wait_for_agents(bpffs: &Path) -> Result<Vec<File>> {
    let deadline = Instant::now() + PATIENCE;
    let lock = |path: PathBuf| {
        let dir = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        let mut told = false;
        while dir.try_lock().is_err() {
            if !std::mem::replace(&mut told, true) {
                info!("an agent is in charge of {}: waiting for it to stop", path.display());
            }
            if Instant::now() > deadline {
                bail!("an agent is in charge of {}: stop it first", path.display());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(dir)
    };
    versions(bpffs)?.into_iter().map(lock).collect()
}

/// Takes all programs off, then removes the maps with everything in them. Whether there was anything.
///
/// # Errors
/// If the kernel refuses.
pub fn everything(bpffs: &Path) -> Result<bool> {
    let mut links = 0;
    for version in versions(bpffs)? {
        // A plugin may be at work: see `lb_attach::pins::Turn`.
        let turn = File::open(version.join("links"));
        let _turn = turn.and_then(|dir| dir.lock().map(|()| dir));
        // The programs first: from now on the plugin puts none on new devices.
        for kind in ["programs", "links"] {
            for entry in fs::read_dir(version.join(kind)).into_iter().flatten().flatten() {
                let pin = entry.path();
                fs::remove_file(&pin).with_context(|| format!("remove {}", pin.display()))?;
                links += usize::from(kind == "links");
            }
        }
    }
    // Filters (before 6.6) are pinned nowhere: the devices alone know of them.
    for device in nix::net::if_::if_nameindex().context("list the devices")?.iter() {
        detach_filters(&device.name().to_string_lossy());
    }
    let all = bpffs.join("lb");
    match fs::remove_dir_all(&all) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        result => result.with_context(|| format!("remove {}", all.display()))?,
    }
    info!("removed {}, and {links} attachments with it", all.display());
    Ok(true)
}
