//! What tests against real maps share.

use super::pins::Pins;
use super::programs::{MAPS, OBJECT};
use aya::EbpfLoader;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// Why a test cannot go on.
pub(crate) const WHY_ROOT: &str =
    "these tests make BPF maps and a mount namespace of their own: run them as root";

/// Pinned maps that nobody else sees: a mount namespace for this thread (and those that it starts), gone with it.
pub(crate) struct Bpffs {
    dir: tempfile::TempDir,
    pub(crate) pins: Pins,
}

impl Bpffs {
    /// With maps as large as they are by default.
    pub(crate) fn new() -> Self {
        Self::sized(&[])
    }

    /// With room for so many flow entries of each family.
    pub(crate) fn with_flows(entries: u32) -> Self {
        Self::sized(&[("LB_FLOW4", entries), ("LB_FLOW6", entries)])
    }

    /// With room for so much in some of the maps.
    pub(crate) fn sized(sizes: &[(&'static str, u32)]) -> Self {
        unshare(CloneFlags::CLONE_NEWNS).expect(WHY_ROOT);
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect(WHY_ROOT);
        let dir = tempfile::tempdir().expect("a directory");
        let pins = Pins::prepare(dir.path()).expect(WHY_ROOT);
        let mut loader = EbpfLoader::new();
        for map in MAPS {
            loader.map_pin_path(map, pins.map(map));
        }
        for (map, entries) in sizes {
            loader.map_max_entries(map, *entries);
        }
        loader.load(OBJECT).expect(WHY_ROOT);
        Self { dir, pins }
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        umount2(self.dir.path(), MntFlags::MNT_DETACH).expect("unmount");
    }
}
