//! The BPF system calls on links that aya does not have.

use aya::programs::ProgramFd;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

const BPF_OBJ_GET: libc::c_long = 7;
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
