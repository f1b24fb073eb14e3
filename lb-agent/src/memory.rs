//! Gives memory back that was only used for a moment. The allocator keeps what was freed between pieces that are in use,
//! and what a first list or the kernel's type information take is more than all that is kept.

/// To be called after something large, not often: it looks at the whole heap.
pub fn give_back() {
    // Others than the GNU C library's give it back by themselves.
    #[cfg(target_env = "gnu")]
    // SAFETY: works on the allocator's own lists, under its locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
