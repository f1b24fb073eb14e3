//! The BPF system calls on maps that aya does not have; those on links are in [`lb_attach::syscall`].

use bytemuck::Pod;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;

/// The part of `union bpf_attr` for the batch operations.
#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// Reads a whole hash map in large steps (5.6): a system call per thousands of entries instead of two per entry.
/// Entries that come and go meanwhile may be met or not.
///
/// # Errors
/// If the kernel refuses, or `each` does.
pub fn for_each<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    mut each: impl FnMut(&K, &V) -> io::Result<()>,
) -> io::Result<()> {
    // More than the longest chain of a bucket: ENOSPC otherwise.
    const STEP: usize = 4096;
    let (mut keys, mut values) = (vec![K::zeroed(); STEP], vec![V::zeroed(); STEP]);
    let (mut position, mut next) = (0u32, 0u32);
    let mut first = true;
    loop {
        let mut attr = Batch {
            in_batch: if first { 0 } else { &raw const position as u64 },
            out_batch: &raw mut next as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: STEP as u32,
            map: map.as_raw_fd() as u32,
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: the buffers hold `count` keys and values of the map's sizes (typed maps are opened with these
        // types), and a position is a word for hash maps.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_BATCH, &raw mut attr, size_of::<Batch>()) };
        let error = (result < 0).then(io::Error::last_os_error);
        let last = error.as_ref().is_some_and(|e| e.raw_os_error() == Some(libc::ENOENT));
        if let Some(error) = error.filter(|_| !last) {
            return Err(error);
        }
        let count = (attr.count as usize).min(STEP);
        for (key, value) in keys.iter().zip(&values).take(count) {
            each(key, value)?;
        }
        if last {
            return Ok(());
        }
        (position, first) = (next, false);
    }
}
