//! The node's mounts, also from inside a container of the node's: by the mount namespace of process 1.
//!
//! Nothing is mounted through a volume (`mountPropagation: Bidirectional`): that takes a shared mount, which nodes that are
//! containers do not have.

mod cgroup;

use super::pins::Pins;
use anyhow::{Context as _, Result, bail};
use cgroup::FirstProcess;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, FsType, statfs};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use tracing::{info, warn};

/// Inodes of the namespaces that the kernel started with (`PROC_CGROUP_INIT_INO`, `PROC_PID_INIT_INO`).
const INITIAL_CGROUP_NS: u64 = 0xEFFF_FFFB;
const INITIAL_PID_NS: u64 = 0xEFFF_FFFC;

const NOTHING: Option<&str> = None;

/// Runs `work` on a thread in the mount and cgroup namespaces of process 1, which is the node's first process for whoever
/// sees the node's processes (a pod with `hostPID`).
///
/// # Errors
/// If we may not enter them, or `work` fails.
pub fn on_node<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter().context("enter the node's mount namespace")?;
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// What it takes to enter another process's namespaces.
const HINT: &str = "a pod needs hostPID, and the capabilities SYS_PTRACE, SYS_ADMIN and SYS_CHROOT";

fn enter() -> Result<()> {
    // The numbers of mounts are the same nowhere else, and everybody may read them.
    if root_mount("/proc/self/mountinfo")? == root_mount("/proc/1/mountinfo")? {
        return Ok(());
    }
    let open = |name: &str| {
        let path = format!("/proc/1/ns/{name}");
        File::open(&path).with_context(|| format!("open {path} ({HINT})"))
    };
    let (cgroup, mounts) = (open("cgroup")?, open("mnt")?);
    // Threads share their root and working directory: with those, the kernel lets nobody change namespaces.
    unshare(CloneFlags::CLONE_FS).context("leave the other threads' working directory")?;
    for (file, kind) in [(cgroup, CloneFlags::CLONE_NEWCGROUP), (mounts, CloneFlags::CLONE_NEWNS)] {
        setns(file.as_fd(), kind).with_context(|| format!("join a namespace of process 1 ({HINT})"))?;
    }
    Ok(())
}

/// The number of the mount that a process has as its root.
fn root_mount(mountinfo: &str) -> Result<Option<String>> {
    let text = fs::read_to_string(mountinfo).with_context(|| format!("read {mountinfo}"))?;
    let mut fields = text.lines().map(|line| line.split(' '));
    // The last one hides the others.
    let root = fields.rfind(|fields| fields.clone().nth(4) == Some("/"));
    Ok(root.and_then(|mut fields| fields.next().map(str::to_owned)))
}

fn inode(path: &str) -> Option<u64> {
    fs::metadata(path).ok().map(|meta| meta.ino())
}

fn is(dir: &Path, kind: FsType) -> bool {
    statfs(dir).is_ok_and(|stat| stat.filesystem_type() == kind)
}

/// Mounts a BPF file system if there is none. To be run on the node.
///
/// # Errors
/// If it cannot be mounted.
pub fn bpffs(dir: &Path) -> Result<()> {
    if std::process::id() == 1 && !is(dir, BPF_FS_MAGIC) {
        bail!(
            "a BPF file system that this container mounts would be gone with it: give the pod hostPID, or mount one at {} on the node",
            dir.display()
        );
    }
    Pins::prepare(dir).map(drop)
}

/// Whether a namespace of process 1 is the one that the kernel started with. Ours is the same where we may not ask: whoever
/// is kept from that is on a machine, not a node that is a container.
fn is_initial(name: &str, inode_of_initial: u64) -> bool {
    let of = |process: &str| inode(&format!("/proc/{process}/ns/{name}"));
    of("1").or_else(|| of("self")) == Some(inode_of_initial)
}

/// The node's own cgroup; mounts the hierarchy at `spare` if it is nowhere. To be run on the node.
fn own_cgroup(spare: &Path) -> Result<PathBuf> {
    let read = |name: &str| fs::read_to_string(name).with_context(|| format!("read {name}"));
    let (cgroup, mountinfo) = (read("/proc/1/cgroup")?, read("/proc/1/mountinfo")?);
    let first = FirstProcess {
        cgroup: &cgroup,
        mountinfo: &mountinfo,
        initial_cgroup_ns: is_initial("cgroup", INITIAL_CGROUP_NS),
        initial_pid_ns: is_initial("pid", INITIAL_PID_NS),
    };
    let own = first.own_cgroup().context("this kernel has no cgroup2: use --socket-lb=off")?;
    if first.is_shared() {
        warn!(
            "the node is a container without a cgroup2 of its own: it shares {own} with others, and so will the socket hooks (which leave the others' sockets alone)"
        );
    }
    let visible = |dir: &PathBuf| is(dir, CGROUP2_SUPER_MAGIC);
    if let Some(dir) = first.visible_at(own).into_iter().find(visible) {
        return Ok(dir);
    }
    // Only where there is none: a second mount would change the options of the first, which is the same file system.
    fs::create_dir_all(spare).with_context(|| format!("create {}", spare.display()))?;
    mount(Some("cgroup2"), spare, Some("cgroup2"), MsFlags::empty(), NOTHING)
        .with_context(|| format!("mount cgroup2 at {}", spare.display()))?;
    Ok(spare.join(own.trim_start_matches('/')))
}

/// The root of the cgroup2 hierarchy for this process's own use: the node's own cgroup, where that is visible here.
///
/// # Errors
/// If it is not.
pub fn visible_cgroup() -> Result<PathBuf> {
    let ns = |of: &str| inode(&format!("/proc/{of}/ns/cgroup"));
    if ns("1").is_some_and(|first| ns("self") != Some(first)) {
        bail!(
            "what is mounted here is this container's own cgroup, not the node's: name that with --cgroup DIR"
        );
    }
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    let cgroup = fs::read_to_string("/proc/1/cgroup").context("read /proc/1/cgroup")?;
    let first = FirstProcess {
        cgroup: &cgroup,
        mountinfo: &mountinfo,
        initial_cgroup_ns: is_initial("cgroup", INITIAL_CGROUP_NS),
        initial_pid_ns: is_initial("pid", INITIAL_PID_NS),
    };
    let places = first.own_cgroup().map(|own| first.visible_at(own)).unwrap_or_default();
    places.into_iter().find(|dir| is(dir, CGROUP2_SUPER_MAGIC)).context(
        "no cgroup2 hierarchy is mounted: mount one (mount -t cgroup2 none DIR) and name it with --cgroup DIR, \
         or use --socket-lb=off",
    )
}

/// Makes the node's own cgroup visible at `dir`, for containers that mount the directory above. To be run on the node.
///
/// # Errors
/// If it cannot be found or mounted.
pub fn show_cgroup(dir: &Path) -> Result<()> {
    let beside =
        |end: &str| dir.with_file_name(format!("{}{end}", dir.file_name().unwrap_or_default().display()));
    let spare = beside(".all");
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let same = |own: &Path| {
        let id = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
        is(dir, CGROUP2_SUPER_MAGIC) && id(dir) == id(own)
    };
    // Found anew each time: a node that is a container may have been restarted into another cgroup.
    let own = own_cgroup(&spare)?;
    if !same(&own) {
        unmount(dir)?;
        mount(Some(&own), dir, NOTHING, MsFlags::MS_BIND, NOTHING)
            .with_context(|| format!("show {} at {}", own.display(), dir.display()))?;
        info!("the node's own cgroup is at {}", dir.display());
    }
    // A bind mount needs its origin no more.
    if is(&spare, CGROUP2_SUPER_MAGIC) {
        unmount(&spare)?;
    }
    remove_if_empty(&spare)
}

/// Unmounts whatever is at a directory.
fn unmount(dir: &Path) -> Result<()> {
    loop {
        match umount2(dir, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            // Nothing is mounted there, or there is no there.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(error) => return Err(error).with_context(|| format!("unmount {}", dir.display())),
        }
    }
}

/// Unmounts a directory, and removes it and the one that it is in as far as they are empty. To be run on the node.
///
/// # Errors
/// If the kernel refuses.
pub fn hide(dir: &Path) -> Result<()> {
    unmount(dir)?;
    remove_if_empty(dir)?;
    dir.parent().map_or(Ok(()), remove_if_empty)
}

/// Removes a directory that nothing is in.
///
/// # Errors
/// If the kernel refuses for another reason than that something is.
pub fn remove_if_empty(dir: &Path) -> Result<()> {
    use io::ErrorKind::{DirectoryNotEmpty, NotFound, ResourceBusy};
    match fs::remove_dir(dir) {
        Err(error) if !matches!(error.kind(), NotFound | DirectoryNotEmpty | ResourceBusy) => {
            Err(error).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}
