//! Programs for the benchmark alone, never part of the agent: what running a program costs, the least that it can do
//! (`bare`), and a fresh packet for each repetition of `BPF_PROG_TEST_RUN`, which would otherwise go on with what the last
//! one left.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod bare;
#[cfg(target_arch = "bpf")]
mod driver;

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
    use aya_ebpf::macros::{classifier, map};
    use aya_ebpf::maps::{Array, ProgramArray};
    use aya_ebpf::programs::TcContext;

    /// The program to hand on to.
    #[map]
    static NEXT: ProgramArray = ProgramArray::with_max_entries(1, 0);
    /// Packets so far.
    #[map]
    static COUNTER: Array<u32> = Array::with_max_entries(1, 0);

    /// Length of the headers, and where their copy is.
    const HEADERS: usize = 80;

    /// Does nothing.
    #[classifier]
    pub(crate) fn empty(_: TcContext) -> i32 {
        TC_ACT_UNSPEC
    }

    /// Restores the headers from their copy, counts source port (32768 up) and address (last byte) on, and hands the
    /// packet to the program in [`NEXT`].
    #[classifier]
    pub(crate) fn fresh(ctx: TcContext) -> i32 {
        let data = ctx.data();
        if data + 2 * HEADERS > ctx.data_end() {
            return TC_ACT_SHOT;
        }
        let Some(counter) = COUNTER.get_ptr_mut(0) else { return TC_ACT_SHOT };
        // SAFETY: within the bounds just checked; the benchmark runs one packet at a time.
        unsafe {
            let words = data as *mut u64;
            for i in 0..HEADERS / 8 {
                *words.add(i) = *words.add(HEADERS / 8 + i);
            }
            let n = *counter;
            *counter = n.wrapping_add(1);
            let is_v4 = *((data + 12) as *const u16) == 0x0800u16.to_be();
            let (addr, port) = if is_v4 { (29, 34) } else { (37, 54) };
            *((data + addr) as *mut u8) += (n >> 15) as u8;
            *((data + port) as *mut u16) = ((n as u16) | 0x8000).to_be();
            NEXT.tail_call(&ctx, 0);
        }
        TC_ACT_SHOT
    }

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }

    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}

/// Cargo builds every member for the host too; there is nothing to run there.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
