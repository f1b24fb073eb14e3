//! Maps of another version: bytes, of which a pinned description says what they are.

use super::flows::{Entries, ORDER, Others, Step};
use super::layout::{Layout, Layouts, Plan, ours};
use crate::kernel::pins::Pins;
use crate::kernel::syscall;
use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, Map, MapData, MapInfo, MapType};
use bytemuck::{bytes_of, bytes_of_mut};
use lb_common::layout::ROOM;
use lb_common::maps::Presence;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd as _;

/// The map with the description.
const LAYOUT: &str = "LB_LAYOUT";
/// The map that says whether the marks of flows are complete.
const PRESENCE: &str = "LB_PRESENCE";

/// Writes down what our maps look like.
pub(crate) fn describe(pins: &Pins) -> Result<()> {
    let mut text = serde_json::to_vec(&ours())?;
    ensure!(text.len() < ROOM, "the description of the maps is too long");
    text.resize(ROOM, 0);
    let map = open(pins, LAYOUT)?;
    syscall::update(map.fd().as_fd(), &0u32.to_ne_bytes(), &text, syscall::Update::Any)
        .context("write the description of the maps")
}

/// What another version's look like.
pub(super) fn described(pins: &Pins) -> Result<Layouts> {
    let map: Array<_, [u8; ROOM]> = Array::try_from(Map::Array(open(pins, LAYOUT)?))?;
    let text = map.get(&0, 0).context("read the description of the maps")?;
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(ROOM);
    serde_json::from_slice(&text[..end]).with_context(|| {
        format!("the maps of version {} are not described: its programs cannot be replaced", pins.version())
    })
}

pub(super) fn open(pins: &Pins, name: &str) -> Result<MapData> {
    let path = pins.map(name);
    MapData::from_pin(&path).with_context(|| format!("open the pinned map {}", path.display()))
}

/// The id of a version's map.
pub(super) fn id(pins: &Pins, name: &str) -> Option<u32> {
    MapInfo::from_pin(pins.map(name)).ok().map(|info| info.id())
}

/// Sets the only value of a version's `LB_STANCE`, whose layout is the same in all.
pub(super) fn set_stance(pins: &Pins, stance: u32) -> Result<()> {
    let map = open(pins, "LB_STANCE")?;
    syscall::update(map.fd().as_fd(), &0u32.to_ne_bytes(), &stance.to_ne_bytes(), syscall::Update::Any)
        .with_context(|| format!("tell the programs of version {} what is theirs", pins.version()))
}

/// Has a version's programs look up whatever they see, if they would not anyway (see [`Presence`], whose layout is the same in
/// all versions that have it), until its agent has been through the flow tables.
pub(super) fn distrust(pins: &Pins) -> Result<()> {
    if id(pins, PRESENCE).is_none() {
        return Ok(());
    }
    let (map, key) = (open(pins, PRESENCE)?, 0u32.to_ne_bytes());
    let mut presence = Presence::default();
    let what = || format!("have the programs of version {} look everything up", pins.version());
    syscall::lookup(map.fd().as_fd(), &key, bytes_of_mut(&mut presence)).with_context(what)?;
    presence.complete = 0;
    syscall::update(map.fd().as_fd(), &key, bytes_of(&presence), syscall::Update::Any).with_context(what)
}

/// What became of a table's records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Copied {
    pub(super) copied: usize,
    /// They were there.
    pub(super) known: usize,
    /// The other version has no words for them, or no room.
    pub(super) lost: usize,
}

impl Copied {
    pub(super) fn add(&mut self, other: Self) {
        self.copied += other.copied;
        self.known += other.known;
        self.lost += other.lost;
    }
}

/// From one version's maps to another's.
pub(super) struct Move<'a> {
    pub(super) from: &'a Pins,
    pub(super) to: &'a Pins,
    pub(super) layouts: (&'a Layouts, &'a Layouts),
    /// Whose record counts where both have one.
    pub(super) how: syscall::Update,
}

impl Move<'_> {
    /// One table.
    pub(super) fn table(&self, name: &str) -> Result<Copied> {
        self.with(name, |old, new| self.copy(name, old, new))
    }

    /// Several.
    pub(super) fn tables(&self, names: &[&str]) -> Result<Copied> {
        let mut all = Copied::default();
        names.iter().try_for_each(|name| self.table(name).map(|copied| all.add(copied)))?;
        Ok(all)
    }

    /// A table of flows, as far as the others have come.
    pub(super) fn flows(&self, name: &str, others: Others) -> Result<Copied> {
        self.with(name, |old, new| self.copy_flows(name, old, new, others))
    }

    /// What `copy` does with a table's layouts; nothing if either version has none of that name.
    fn with(&self, name: &str, copy: impl FnOnce(&Layout, &Layout) -> Result<Copied>) -> Result<Copied> {
        let (Some(old), Some(new)) = (self.layouts.0.get(name), self.layouts.1.get(name)) else {
            return Ok(Copied::default());
        };
        copy(old, new).with_context(|| {
            format!("bring {name} from version {} to version {}", self.from.version(), self.to.version())
        })
    }

    fn copy(&self, name: &str, old: &Layout, new: &Layout) -> Result<Copied> {
        let ends = Ends::open(self, name, old, new)?;
        let mut count = Copied::default();
        ends.each(old, new, |record| match record {
            Some((key, value)) => ends.put(key, value, self.how, &mut count),
            None => {
                count.lost += 1;
                Ok(())
            }
        })?;
        Ok(count)
    }

    fn copy_flows(&self, name: &str, old: &Layout, new: &Layout, others: Others) -> Result<Copied> {
        let ends = Ends::open(self, name, old, new)?;
        let entries = Entries::new(new);
        let mut count = Copied::default();
        // One reading for all sides: what begins meanwhile is met by the next.
        let mut all: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        ends.each(old, new, |record| {
            match record {
                Some((key, value)) => all.push((key.to_vec(), value.to_vec())),
                None => count.lost += 1,
            }
            Ok(())
        })?;
        for side in ORDER {
            for (key, value) in all.iter().filter(|(_, value)| entries.side(value) == Some(side)) {
                let now = match entries.step(value, others) {
                    Step::Copy => true,
                    Step::Leave => false,
                    Step::With(forward) => {
                        ends.lookup(&forward, new)?.is_some_and(|there| entries.same_origin(&there, value))
                    }
                };
                // The port of a closed one may be another flow's by now, there. If it is not, it is closed there, too.
                let how = match self.how {
                    syscall::Update::Any
                        if entries.closing(value)
                            && !ends
                                .lookup(key, new)?
                                .is_some_and(|there| entries.same_flow(&there, value)) =>
                    {
                        syscall::Update::New
                    }
                    how => how,
                };
                if now {
                    ends.put(key, value, how, &mut count)?;
                }
            }
        }
        Ok(count)
    }
}

/// A table in both versions.
struct Ends {
    from: MapData,
    to: MapData,
    kind: MapType,
}

impl Ends {
    fn open(of: &Move<'_>, name: &str, old: &Layout, new: &Layout) -> Result<Self> {
        let (from, to) = (open(of.from, name)?, open(of.to, name)?);
        for (map, layout) in [(&from, old), (&to, new)] {
            let info = map.info()?;
            let sizes = (info.key_size() as usize, info.value_size() as usize);
            ensure!(
                sizes == (layout.key.size, layout.value.size),
                "the description is another map's: {sizes:?}"
            );
        }
        let kind = from.info()?.map_type()?;
        Ok(Self { from, to, kind })
    }

    /// Every record in the other layout, or nothing if it cannot be said in that.
    fn each(
        &self,
        old: &Layout,
        new: &Layout,
        mut each: impl FnMut(Option<(&[u8], &[u8])>) -> io::Result<()>,
    ) -> io::Result<()> {
        let (key, value) = (Plan::new(&old.key, &new.key, true), Plan::new(&old.value, &new.value, false));
        let mut there = (Vec::new(), Vec::new());
        let one = |k: &[u8], v: &[u8]| {
            // An array has all its entries; those that nobody wrote are zero in ours, too.
            if self.kind == MapType::Array && v.iter().all(|byte| *byte == 0) {
                return Ok(());
            }
            let said = key.apply(k, &mut there.0) && value.apply(v, &mut there.1);
            each(said.then_some((&there.0, &there.1)))
        };
        let (from, sizes) = (self.from.fd().as_fd(), (old.key.size, old.value.size));
        if self.kind == MapType::LpmTrie {
            syscall::for_each_one(from, sizes.0, sizes.1, one)
        } else {
            syscall::for_each_raw(from, sizes.0, sizes.1, one)
        }
    }

    fn put(&self, key: &[u8], value: &[u8], how: syscall::Update, count: &mut Copied) -> io::Result<()> {
        let how = if self.kind == MapType::Array { syscall::Update::Any } else { how };
        match syscall::update(self.to.fd().as_fd(), key, value, how) {
            Ok(()) => count.copied += 1,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => count.known += 1,
            Err(error) if error.raw_os_error() == Some(libc::E2BIG) => count.lost += 1,
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn lookup(&self, key: &[u8], new: &Layout) -> io::Result<Option<Vec<u8>>> {
        let mut value = vec![0; new.value.size];
        Ok(syscall::lookup(self.to.fd().as_fd(), key, &mut value)?.then_some(value))
    }
}
