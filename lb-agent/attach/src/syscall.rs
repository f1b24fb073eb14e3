//! The BPF system calls on links that aya does not have.

use crate::attach::Hook;
use aya::programs::ProgramFd;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;

/// The part of `union bpf_attr` for `BPF_OBJ_GET`.
#[repr(C)]
struct ObjGet {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Opens a pinned object.
///
/// # Errors
/// If nothing is pinned there.
pub fn obj_get(pin: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let attr = ObjGet { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the kernel reads the attributes, whose size it is told, and the path, which ends with NUL.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const attr, size_of::<ObjGet>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The part of `union bpf_attr` for `BPF_LINK_UPDATE`.
#[repr(C)]
struct LinkUpdate {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// Puts another program behind a link, atomically.
///
/// # Errors
/// `ENOLINK` if what the link was on is gone.
pub fn link_update(link: BorrowedFd<'_>, program: &ProgramFd) -> io::Result<()> {
    let attr = LinkUpdate {
        link: link.as_raw_fd() as u32,
        program: program.as_fd().as_raw_fd() as u32,
        flags: 0,
        old_program: 0,
    };
    // SAFETY: the kernel reads the attributes, whose size it is told, and nothing else.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_UPDATE, &raw const attr, size_of::<LinkUpdate>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes a link off at once. Without, it is taken off some time after the last who holds it has let go.
///
/// # Errors
/// `ENOLINK` if what the link was on is gone.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let attr = link.as_raw_fd() as u32;
    // SAFETY: the attributes of this call are one word, which the kernel reads.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_DETACH, &raw const attr, size_of::<u32>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The part of `union bpf_attr` for `BPF_PROG_QUERY`.
#[repr(C)]
struct ProgQuery {
    index: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    padding: u32,
    // Flags of programs, links and flags of links are not asked for.
    others: [u64; 3],
    revision: u64,
}

/// The ids of the programs that are on a device by tcx, in their order. aya's question asks for more of each program, which
/// takes `SYS_ADMIN`.
///
/// # Errors
/// If there is no such device, or the kernel has no tcx.
pub fn tcx_programs(index: u32, hook: Hook) -> io::Result<Vec<u32>> {
    /// As many as the kernel lets there be.
    const MOST: usize = 64;
    let mut ids = [0_u32; MOST];
    let mut attr = ProgQuery {
        index,
        attach_type: match hook {
            Hook::Ingress => 46,
            Hook::Egress => 47,
        },
        query_flags: 0,
        attach_flags: 0,
        ids: ids.as_mut_ptr() as u64,
        count: MOST as u32,
        padding: 0,
        others: [0; 3],
        revision: 0,
    };
    // SAFETY: the kernel writes into the attributes, whose size it is told, and at most `count` ids.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut attr, size_of::<ProgQuery>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(ids.into_iter().take(attr.count as usize).collect())
}

/// The part of `union bpf_attr` for `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct ObjGetInfo {
    fd: u32,
    len: u32,
    info: u64,
}

/// The start of `struct bpf_prog_info`.
#[repr(C)]
struct ProgInfo {
    /// Kind, id, tag, sizes and addresses of instructions, time, owner.
    others: [u32; 13],
    map_count: u32,
    map_ids: u64,
}

/// The ids of the maps that a program uses. (aya opens the program once more by its id, which takes `SYS_ADMIN`.)
///
/// # Errors
/// If it is no program.
pub fn map_ids(program: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    /// As many as the kernel lets there be.
    const MOST: usize = 64;
    let mut ids = [0_u32; MOST];
    let mut info = ProgInfo { others: [0; 13], map_count: MOST as u32, map_ids: ids.as_mut_ptr() as u64 };
    let attr = ObjGetInfo {
        fd: program.as_raw_fd() as u32,
        len: size_of::<ProgInfo>() as u32,
        info: &raw mut info as u64,
    };
    // SAFETY: the kernel writes into the information, whose size it is told, and at most `map_count` ids.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_OBJ_GET_INFO_BY_FD, &raw const attr, size_of::<ObjGetInfo>())
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(ids.into_iter().take(info.map_count as usize).collect())
}
