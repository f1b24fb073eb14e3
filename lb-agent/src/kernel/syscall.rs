//! The BPF system calls on maps that aya does not have; those on links are in [`lb_attach::syscall`].

use bytemuck::Pod;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
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

/// Reads a whole hash map or array in large steps (5.6): a system call per thousands of entries instead of two per entry.
/// Entries that come and go meanwhile may be met or not.
///
/// # Errors
/// If the kernel refuses, or `each` does.
pub fn for_each<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    mut each: impl FnMut(&K, &V) -> io::Result<()>,
) -> io::Result<()> {
    for_each_raw(map, size_of::<K>(), size_of::<V>(), |key, value| {
        each(&bytemuck::pod_read_unaligned(key), &bytemuck::pod_read_unaligned(value))
    })
}

/// As [`for_each`], for keys and values of those sizes, which must be the map's.
///
/// # Errors
/// If the kernel refuses, or `each` does.
pub fn for_each_raw(
    map: BorrowedFd<'_>,
    key_size: usize,
    value_size: usize,
    mut each: impl FnMut(&[u8], &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    // More than the longest chain of a bucket: ENOSPC otherwise.
    const STEP: usize = 4096;
    let (mut keys, mut values) =
        (vec![0u8; STEP * key_size], vec![0u8; STEP * value_size.next_multiple_of(8)]);
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
        // SAFETY: the buffers hold `count` keys and values of the map's sizes (the caller's promise, which typed maps
        // keep), and a position is a word for hash maps and arrays.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_BATCH, &raw mut attr, size_of::<Batch>()) };
        let error = (result < 0).then(io::Error::last_os_error);
        let last = error.as_ref().is_some_and(|e| e.raw_os_error() == Some(libc::ENOENT));
        if let Some(error) = error.filter(|_| !last) {
            return Err(error);
        }
        let count = (attr.count as usize).min(STEP);
        for (key, value) in keys.chunks_exact(key_size).zip(values.chunks_exact(value_size)).take(count) {
            each(key, value)?;
        }
        if last {
            return Ok(());
        }
        (position, first) = (next, false);
    }
}

/// As [`for_each_raw`], one by one: tries are read in large steps from 5.13 on only.
///
/// # Errors
/// If the kernel refuses, or `each` does.
pub fn for_each_one(
    map: BorrowedFd<'_>,
    key_size: usize,
    value_size: usize,
    mut each: impl FnMut(&[u8], &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let (mut key, mut next, mut value) = (vec![0u8; key_size], vec![0u8; key_size], vec![0u8; value_size]);
    let mut first = true;
    loop {
        let before = if first { 0 } else { key.as_ptr() as u64 };
        match element(BPF_MAP_GET_NEXT_KEY, map, before, next.as_mut_ptr() as u64, 0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            result => result?,
        }
        (key, next, first) = (next, key, false);
        if lookup(map, &key, &mut value)? {
            each(&key, &value)?;
        }
    }
}

/// Reads an entry, whose key and value are of the map's sizes; false if there is none.
///
/// # Errors
/// If the kernel refuses.
pub fn lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    match element(BPF_MAP_LOOKUP_ELEM, map, key.as_ptr() as u64, value.as_mut_ptr() as u64, 0) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        result => result.map(|()| true),
    }
}

/// How to write an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Update {
    /// Whatever was there.
    Any = 0,
    /// Only if there is none.
    New = 1,
}

/// Writes an entry, whose key and value are of the map's sizes.
///
/// # Errors
/// If the kernel refuses.
pub fn update(map: BorrowedFd<'_>, key: &[u8], value: &[u8], how: Update) -> io::Result<()> {
    element(BPF_MAP_UPDATE_ELEM, map, key.as_ptr() as u64, value.as_ptr() as u64, how as u64)
}

/// The part of `union bpf_attr` for single entries.
#[repr(C)]
struct Element {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

fn element(call: libc::c_long, map: BorrowedFd<'_>, key: u64, value: u64, flags: u64) -> io::Result<()> {
    let attr = Element { map: map.as_raw_fd() as u32, pad: 0, key, value, flags };
    // SAFETY: the callers' buffers are of the sizes that the map has.
    let result = unsafe { libc::syscall(libc::SYS_bpf, call, &raw const attr, size_of::<Element>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
