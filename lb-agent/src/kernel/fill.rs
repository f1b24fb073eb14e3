//! How full the maps are. The kernel does not count a map's entries but for who walks through all of them, so whoever
//! writes a map, or walks through it anyway, says how many there are.

use super::pins::Pins;
use crate::metrics::{Collector, Kind, Sample};
use anyhow::{Context as _, Result};
use aya::maps::{MapData, MapInfo};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The maps that can be full. Others are arrays of a fixed meaning, or forget what is old.
const COUNTED: [&str; 13] = [
    "LB_FLOW4",
    "LB_FLOW6",
    "LB_AFFINITY",
    "LB_FRONT4",
    "LB_FRONT6",
    "LB_SLOT4",
    "LB_SLOT6",
    "LB_NAME",
    "LB_EPOCH",
    "LB_CIDR4",
    "LB_CIDR6",
    "LB_SOURCE4",
    "LB_SOURCE6",
];

/// What is known of the maps' entries; clones share it.
#[derive(Clone, Debug)]
pub struct Fill(Arc<[Counted]>);

#[derive(Debug)]
struct Counted {
    name: &'static str,
    map: MapData,
    max: u32,
    entries: AtomicU64,
}

impl Fill {
    /// Of the pinned maps. A map keeps the size that it was made with, whatever a flag says now.
    ///
    /// # Errors
    /// If they cannot be opened.
    pub fn open(pins: &Pins) -> Result<Self> {
        let open = |name: &'static str| {
            let map = MapData::from_pin(pins.map(name));
            let map = map.with_context(|| format!("open the pinned map {name}"))?;
            let info = MapInfo::from_pin(pins.map(name));
            let max = info.with_context(|| format!("ask for the size of {name}"))?.max_entries();
            Ok(Counted { name, map, max, entries: AtomicU64::new(0) })
        };
        COUNTED.into_iter().map(open).collect::<Result<_>>().map(Self)
    }

    /// So many entries are in it now.
    pub fn set(&self, name: &str, entries: usize) {
        if let Some(counted) = self.0.iter().find(|counted| counted.name == name) {
            counted.entries.store(entries as u64, Relaxed);
        }
    }

    /// Entries, room and memory of each map.
    pub fn samples(&self) -> Collector {
        let maps = Arc::clone(&self.0);
        Box::new(move || {
            let all = |name, help, value: &dyn Fn(&Counted) -> f64| {
                let of = |counted: &Counted| {
                    Sample::new(name, help, Kind::Gauge, value(counted)).with("map", counted.name)
                };
                maps.iter().map(of).collect::<Vec<_>>()
            };
            let entries = |counted: &Counted| counted.entries.load(Relaxed) as f64;
            let mut samples = all(
                "lb_map_entries",
                "Entries of a map; of flows and affinities, after the last sweep",
                &entries,
            );
            samples.extend(all("lb_map_max_entries", "Room of a map", &|counted| f64::from(counted.max)));
            let help = "Memory of a map as the kernel reckons it (before Linux 6.4: of a full one)";
            samples.extend(all("lb_map_memory_bytes", help, &|counted| {
                memory(&counted.map).unwrap_or(0) as f64
            }));
            samples
        })
    }
}

/// The kernel's own estimate.
fn memory(map: &MapData) -> Option<u64> {
    let path = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
    let text = std::fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix("memlock:"))?.trim().parse().ok()
}

#[cfg(test)]
impl Fill {
    /// Entries of a map.
    pub(crate) fn get(&self, name: &str) -> usize {
        let counted = self.0.iter().find(|counted| counted.name == name).expect("a counted map");
        counted.entries.load(Relaxed) as usize
    }
}
