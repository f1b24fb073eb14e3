//! Attaches the cgroup socket hooks, so that they stay there without us, and replaces them atomically.

use super::pins::Pins;
use super::tables::Tables;
use crate::cli::{RunArgs, SocketLb};
use anyhow::{Context as _, Result, anyhow};
use aya::Ebpf;
use aya::maps::{HashMap, Map, MapData};
use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, CgroupSockAddr};
use lb_attach::attach::remove;
use lb_attach::syscall;
use lb_common::maps::{SocketKey, SocketPeer};
use std::fs::{self, File};
use std::net::UdpSocket;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};

/// The programs, by the names of their hooks: those that send on to backends.
pub(super) const SENDING: [&str; 4] = ["connect4", "connect6", "sendmsg4", "sendmsg6"];
/// Those that say where it was sent to.
pub(super) const ANSWERING: [&str; 4] = ["recvmsg4", "recvmsg6", "getpeername4", "getpeername6"];

fn pin(pins: &Pins, hook: &str) -> PathBuf {
    pins.link(&format!("cgroup-{hook}"))
}

/// What the hooks know of sockets.
pub(super) fn peers(pins: &Pins) -> Result<HashMap<MapData, SocketKey, SocketPeer>> {
    let pin = pins.map("LB_SOCKET");
    let map = MapData::from_pin(&pin).with_context(|| format!("open the pinned map {}", pin.display()))?;
    HashMap::try_from(Map::LruHashMap(map)).context("the pinned map LB_SOCKET")
}

/// Takes a hook off; it need not be there.
pub(super) fn take_off(pins: &Pins, hook: &str) -> Result<()> {
    remove(&pin(pins, hook)).with_context(|| format!("take off the {hook} hook"))
}

/// Attaches the hooks to the node's cgroup root, or takes them off with `--socket-lb=off`.
///
/// # Errors
/// If there is no cgroup2 hierarchy, or the kernel refuses.
pub fn attach(ebpf: &mut Ebpf, pins: &Pins, args: &RunArgs) -> Result<()> {
    let mut hooks = SENDING.iter().chain(&ANSWERING).copied();
    if args.socket_lb == SocketLb::Off {
        return hooks.try_for_each(|hook| take_off(pins, hook));
    }
    let cgroup = Cgroup::open(args)?;
    hooks.try_for_each(|hook| cgroup.attach(ebpf, hook, &pin(pins, hook)))?;
    // What was beside them while one version took over from another.
    ANSWERING.iter().try_for_each(|hook| remove(&beside(pins, hook)))
}

/// Has our hooks do the work of another version's, whose sockets `copy` brings over. Those that answer come first: no
/// answer to what is sent meanwhile may meet hooks that all do not know it.
///
/// # Errors
/// If there is no cgroup2 hierarchy, or the kernel refuses.
pub fn take_over(ebpf: &mut Ebpf, pins: &Pins, args: &RunArgs, copy: impl Fn() -> Result<()>) -> Result<()> {
    let cgroup = Cgroup::open(args)?;
    ANSWERING.iter().try_for_each(|hook| cgroup.attach(ebpf, hook, &beside(pins, hook)))?;
    copy()?;
    SENDING.iter().try_for_each(|hook| cgroup.attach(ebpf, hook, &pin(pins, hook)))?;
    copy()
}

/// Where a hook is pinned that is there besides another version's.
fn beside(pins: &Pins, hook: &str) -> PathBuf {
    pins.link(&format!("beside-{hook}"))
}

/// The node's cgroup root.
struct Cgroup {
    root: PathBuf,
    dir: File,
}

impl Cgroup {
    fn open(args: &RunArgs) -> Result<Self> {
        let root = args.cgroup_root().map_err(|e| anyhow!(e))?;
        let dir = File::open(&root).with_context(|| format!("open the cgroup {}", root.display()))?;
        Ok(Self { root, dir })
    }

    /// Attaches a hook, or puts it in the place of the one that is pinned there.
    fn attach(&self, ebpf: &mut Ebpf, hook: &str, pin: &Path) -> Result<()> {
        let program: &mut CgroupSockAddr = ebpf
            .program_mut(hook)
            .with_context(|| format!("the object has no program {hook}"))?
            .try_into()?;
        if program.fd().is_err() {
            program.load().with_context(|| format!("load the socket hook {hook}"))?;
        }
        if pin.exists() {
            let program = program.fd()?;
            match syscall::obj_get(pin).and_then(|link| syscall::link_update(link.as_fd(), program)) {
                Ok(()) => return Ok(()),
                Err(error) => tracing::debug!("{}: {error}; attaching anew", pin.display()),
            }
            fs::remove_file(pin).with_context(|| format!("remove the old pin {}", pin.display()))?;
        }
        // No flags: links share a cgroup with others anyway, and the kernel refuses to be told so.
        let id = program.attach(&self.dir, CgroupAttachMode::Single).with_context(|| {
            format!("attach {hook} to the cgroup {} (cgroup2 is needed)", self.root.display())
        })?;
        let link: FdLink = program.take_link(id)?.try_into()?;
        link.pin(pin).with_context(|| format!("pin the link at {}", pin.display()))?;
        Ok(())
    }
}

/// Tells the hooks which network namespace is the node's where user space cannot ask for its cookie (before 5.14):
/// names a socket, and connects it.
///
/// # Errors
/// If the maps cannot be written.
pub fn learn_netns(tables: &mut Tables) -> Result<()> {
    const SO_COOKIE: libc::c_int = 57;
    let socket = UdpSocket::bind("127.0.0.1:0").context("open a socket")?;
    let (mut cookie, mut len) = (0u64, size_of::<u64>() as libc::socklen_t);
    // SAFETY: the kernel writes at most `len` bytes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(std::io::Error::last_os_error()).context("ask for a socket's cookie");
    }
    tables.netns.set(1, cookie, 0).context("name the socket")?;
    // Discard: nothing is sent by a connect.
    socket.connect("127.0.0.1:9").context("connect a socket")?;
    tables.netns.set(1, 0, 0).context("forget the socket")?;
    Ok(())
}
