//! The agent's maps, as the kernel shows them.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::maps::{Map, MapData, PerCpuArray};
use lb_common::datapath::Reason;

use crate::lab::Host;

/// The maps that an agent has pinned on a node.
pub(super) fn pinned(node: &Host) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    walk(&node.bpffs_dir(), &mut found)?;
    Ok(found)
}

fn walk(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            walk(&path, found)?;
        } else if entry.file_name().to_string_lossy().starts_with("LB_") {
            found.push(path);
        }
    }
    Ok(())
}

/// A pinned map by its name.
pub(super) fn open(node: &Host, name: &str) -> Result<MapData> {
    let pins = pinned(node)?;
    let pin = pins.iter().find(|pin| pin.file_name().is_some_and(|n| n == name));
    let pin = pin.with_context(|| format!("no map {name} on {}", node.name()))?;
    MapData::from_pin(pin).with_context(|| format!("opening {}", pin.display()))
}

/// How often an agent's programs have counted something.
pub(super) fn counted(node: &Host, reason: Reason) -> Result<u64> {
    let counters: PerCpuArray<_, u64> = Map::PerCpuArray(open(node, "LB_COUNT")?).try_into()?;
    Ok(counters.get(&(reason as u32), 0)?.iter().sum())
}

/// Bytes of kernel memory that the pinned maps take. Since Linux 6.4 what they use, before what they may use at most.
pub(super) fn memory(node: &Host) -> Result<u64> {
    let mut sum = 0;
    for pin in pinned(node)? {
        let map = MapData::from_pin(&pin).with_context(|| format!("opening {}", pin.display()))?;
        let fd = map.fd().as_fd().as_raw_fd();
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))?;
        sum += memlock(&text).with_context(|| format!("{}: no memlock", pin.display()))?;
    }
    Ok(sum)
}

fn memlock(fdinfo: &str) -> Option<u64> {
    fdinfo.lines().find_map(|line| line.strip_prefix("memlock:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn memory_is_what_the_kernel_says() {
        assert_eq!(super::memlock("pos:\t0\nmap_type:\t1\nmemlock:\t4096\nmap_id:\t7\n"), Some(4096));
        assert_eq!(super::memlock("pos:\t0\n"), None);
    }
}
