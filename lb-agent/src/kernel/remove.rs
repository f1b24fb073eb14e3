//! Takes out of the kernel what agents of any version have put there.

use anyhow::{Context as _, Result, bail};
use lb_attach::attach::detach_filters;
use lb_attach::pins::Place;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};
use tracing::info;

/// How long an agent that was told to stop may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for agents to stop. No new one gets to work on these pins while the result lives.
///
/// # Errors
/// If one does not stop.
pub fn wait_for_agents(bpffs: &Path) -> Result<Option<File>> {
    let all = bpffs.join("lb");
    let dir = match File::open(&all) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        dir => dir.with_context(|| format!("open {}", all.display()))?,
    };
    let (deadline, mut told) = (Instant::now() + PATIENCE, false);
    while dir.try_lock().is_err() {
        if !std::mem::replace(&mut told, true) {
            info!("an agent is in charge of {}: waiting for it to stop", all.display());
        }
        if Instant::now() > deadline {
            bail!("an agent is in charge of {}: stop it first", all.display());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(Some(dir))
}

/// Takes all programs off, then removes the maps with everything in them. Whether there was anything.
///
/// # Errors
/// If the kernel refuses.
pub fn everything(bpffs: &Path) -> Result<bool> {
    let mut links = 0;
    let root = bpffs.join("lb");
    // A plugin may be at work: see `lb_attach::pins::Turn`.
    let turn = File::open(root.join("links"));
    let _turn = turn.and_then(|dir| dir.lock().map(|()| dir));
    // The programs first: from now on the plugin puts none on new devices.
    for kind in [Place::Front.dir(), Place::Main.dir(), "links"] {
        for entry in fs::read_dir(root.join(kind)).into_iter().flatten().flatten() {
            let pin = entry.path();
            fs::remove_file(&pin).with_context(|| format!("remove {}", pin.display()))?;
            links += usize::from(kind == "links");
        }
    }
    // Filters (before 6.6) are pinned nowhere: the devices alone know of them.
    for device in nix::net::if_::if_nameindex().context("list the devices")?.iter() {
        detach_filters(&device.name().to_string_lossy());
    }
    match fs::remove_dir_all(&root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        result => result.with_context(|| format!("remove {}", root.display()))?,
    }
    info!("removed {}, and {links} attachments with it", root.display());
    Ok(true)
}
