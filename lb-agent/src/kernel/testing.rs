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
    /// With room for so many flow entries of each family.
    pub(crate) fn new(flow_entries: u32) -> Self {
        unshare(CloneFlags::CLONE_NEWNS).expect(WHY_ROOT);
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect(WHY_ROOT);
        let dir = tempfile::tempdir().expect("a directory");
        let pins = Pins::prepare(dir.path()).expect(WHY_ROOT);
        let mut loader = EbpfLoader::new();
        for map in MAPS {
            loader.map_pin_path(map, pins.map(map));
        }
        loader.map_max_entries("LB_FLOW4", flow_entries).map_max_entries("LB_FLOW6", flow_entries);
        loader.load(OBJECT).expect(WHY_ROOT);
        Self { dir, pins }
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        umount2(self.dir.path(), MntFlags::MNT_DETACH).expect("unmount");
    }
}
