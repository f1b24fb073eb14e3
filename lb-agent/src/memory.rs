//! Gives memory back that was only used for a moment. The allocator keeps what was freed between pieces that are in use,
//! and what a first list or the kernel's type information take is more than all that is kept. Of the program itself, the
//! larger part is for starting: what reads flags, loads and verifies programs, and makes a connection safe.

use std::collections::BTreeMap;

/// So many Services at once take memory that is not needed later.
pub const MANY: usize = 500;

/// Fills the nodes of a tree, for after a large list: appended to, they stay little more than half full.
pub fn pack<K: Ord, V>(tree: &mut BTreeMap<K, V>) {
    *tree = std::mem::take(tree).into_iter().collect();
}

/// To be called after something large, not often: it looks at the whole heap, and what is used of the program has to be
/// found again.
pub fn give_back() {
    // Others than the GNU C library's give it back by themselves.
    #[cfg(target_env = "gnu")]
    // SAFETY: works on the allocator's own lists, under its locks.
    unsafe {
        libc::malloc_trim(0);
    }
    // SAFETY: `unmap_program` is such a function, and wants no data.
    unsafe {
        libc::dl_iterate_phdr(Some(unmap_program), std::ptr::null_mut());
    }
}

/// Lets go of the pages of one file that the process is made of. They are the file's own: whoever needs one finds it
/// again in the page cache, or on the disk.
unsafe extern "C" fn unmap_program(
    object: *mut libc::dl_phdr_info,
    _: libc::size_t,
    _: *mut libc::c_void,
) -> libc::c_int {
    // SAFETY: the C library hands over a description that is valid during this call, with that many headers.
    let (base, headers) = unsafe {
        let object = &*object;
        (object.dlpi_addr, std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into()))
    };
    let writable = |flags: u32| flags & libc::PF_W != 0;
    for part in headers.iter().filter(|h| h.p_type == libc::PT_LOAD && !writable(h.p_flags)) {
        let (start, end) = pages((base + part.p_vaddr) as usize, part.p_memsz as usize);
        // SAFETY: nobody can have written to these whole pages, so that they come back as they are. The kernel's own
        // (the vDSO) it refuses to drop.
        unsafe {
            libc::madvise(start as *mut libc::c_void, end.saturating_sub(start), libc::MADV_DONTNEED);
        }
    }
    0
}

/// The whole pages within a part of memory: first byte, and one past the last.
fn pages(start: usize, len: usize) -> (usize, usize) {
    // SAFETY: takes a number and returns one.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(65_536);
    (start.next_multiple_of(page), (start + len) / page * page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use procfs::process::Process;

    /// Kilobytes of files that this process has in its memory.
    fn of_files() -> u64 {
        Process::myself().unwrap().status().unwrap().rssfile.unwrap()
    }

    #[test]
    fn the_program_goes_and_comes_again() {
        let (start, end) = pages(4097, 3 * 65_536);
        assert!(start > 4097 && start < end && end <= 4097 + 3 * 65_536);
        let before = of_files();
        give_back();
        let after = of_files();
        assert!(after < before, "{before} KiB, then {after}");
        assert_eq!(format!("{:?}", "1.5".parse::<f64>()), "Ok(1.5)");
    }
}
