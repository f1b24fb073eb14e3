//! Network namespaces with a name, as `ip netns` makes them, and threads that work inside them.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// Where `ip netns` keeps its namespaces.
pub(crate) const DIR: &str = "/run/netns";

const NOTHING: Option<&str> = None;

/// Path of a namespace by its name.
pub(crate) fn path(name: &str) -> PathBuf {
    Path::new(DIR).join(name)
}

/// Makes the directory of namespaces a shared mount, as `ip netns add` does, so that namespaces deleted here
/// disappear from the mount namespaces of `ip netns exec` too.
fn prepare_dir() -> Result<()> {
    std::fs::create_dir_all(DIR).with_context(|| format!("creating {DIR}"))?;
    let lock = Flock::lock(File::open(DIR)?, FlockArg::LockExclusive).map_err(|(_, e)| e)?;
    let share = || mount(NOTHING, DIR, NOTHING, MsFlags::MS_SHARED | MsFlags::MS_REC, NOTHING);
    if share() == Err(Errno::EINVAL) {
        mount(Some(DIR), DIR, NOTHING, MsFlags::MS_BIND | MsFlags::MS_REC, NOTHING)
            .and_then(|()| share())
            .with_context(|| format!("making {DIR} a shared mount (root is needed)"))?;
    }
    drop(lock);
    Ok(())
}

/// Creates a namespace and runs `setup` inside.
pub(crate) fn create<T: Send>(name: &str, setup: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    prepare_dir()?;
    let path = path(name);
    on_thread(|| {
        File::create_new(&path).with_context(|| format!("creating {}", path.display()))?;
        unshare(CloneFlags::CLONE_NEWNET).context("creating a network namespace (root is needed)")?;
        mount(Some("/proc/thread-self/ns/net"), &path, NOTHING, MsFlags::MS_BIND, NOTHING)
            .with_context(|| format!("mounting the namespace at {}", path.display()))?;
        setup()
    })
}

/// Deletes the name; the namespace goes with its last process and socket. No error where there is none.
pub(crate) fn delete(name: &str) {
    let path = path(name);
    // A name may be mounted more than once if `ip netns` re-mounted the directory in between.
    while umount2(&path, MntFlags::MNT_DETACH).is_ok() {}
    let _ = std::fs::remove_file(&path);
}

/// Moves the calling thread, for good, into the namespace at `path`.
pub(crate) fn enter(path: &Path) -> Result<()> {
    let ns = File::open(path).with_context(|| format!("opening namespace {}", path.display()))?;
    setns(ns.as_fd(), CloneFlags::CLONE_NEWNET).with_context(|| format!("entering {}", path.display()))
}

/// Runs `f` on a thread of its own inside the namespace at `path`.
pub(crate) fn run_in<T: Send>(path: &Path, f: impl FnOnce() -> T + Send) -> Result<T> {
    on_thread(|| enter(path).map(|()| f()))
}

/// Runs `f` on a thread of its own, so that what it does to its namespaces ends with it.
pub(crate) fn on_thread<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|s| s.spawn(f).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}
