//! For packets that never leave the drivers: where they come from, the least that can be done to them, and where they end.

use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_TX};
use aya_ebpf::helpers::generated as helpers;
use aya_ebpf::macros::{map, xdp};
use aya_ebpf::maps::{Array, PerCpuArray};
use aya_ebpf::programs::XdpContext;

/// What is sent, up to its payload.
#[map]
static SENT: Array<[u64; WORDS]> = Array::with_max_entries(1, 0);
/// Index of the device to send by; the first source port; how many there are.
#[map]
static SENDER: Array<u32> = Array::with_max_entries(3, 0);
/// Packets that were sent, and that have arrived.
#[map]
static SEEN: PerCpuArray<u64> = PerCpuArray::with_max_entries(2, 0);

/// Enough for all headers.
const WORDS: usize = 16;

#[inline(always)]
fn count(which: u32) -> u64 {
    let Some(counter) = SEEN.get_ptr_mut(which) else { return 0 };
    // SAFETY: this CPU's own.
    unsafe {
        *counter += 1;
        *counter
    }
}

/// Sends the packet of `SENT`, with one source port after the other. Run by `BPF_PROG_TEST_RUN` with live frames, whose
/// data is what the last user of their memory has left.
#[xdp]
pub(crate) fn send(ctx: XdpContext) -> u32 {
    let (data, end) = (ctx.data(), ctx.data_end());
    let (Some(frame), Some(device), Some(first), Some(ports)) =
        (SENT.get(0), SENDER.get(0), SENDER.get(1), SENDER.get(2))
    else {
        return XDP_ABORTED;
    };
    if data + WORDS * 8 > end {
        return XDP_ABORTED;
    }
    let port = (*first + (count(0) as u32).checked_rem(*ports).unwrap_or(0)) as u16;
    // SAFETY: within the bounds just checked; BPF stores need no alignment.
    unsafe {
        let words = data as *mut u64;
        for (i, word) in frame.iter().enumerate() {
            *words.add(i) = *word;
        }
        let is_v4 = *((data + 12) as *const u16) == 0x0800u16.to_be();
        *((data + if is_v4 { 34 } else { 54 }) as *mut u16) = port.to_be();
        helpers::bpf_redirect(*device, 0) as u32
    }
}

/// Sends a packet back to where it came from.
#[xdp]
pub(crate) fn bounce(ctx: XdpContext) -> u32 {
    turn(&ctx)
}

#[inline(always)]
fn turn(ctx: &XdpContext) -> u32 {
    let (data, end) = (ctx.data(), ctx.data_end());
    if data + 14 > end {
        return XDP_ABORTED;
    }
    // SAFETY: within the bounds just checked.
    unsafe {
        let words = data as *mut [u16; 3];
        let (dst, src) = (*words, *words.add(1));
        *words = src;
        *words.add(1) = dst;
    }
    XDP_TX
}

/// The same by way of a redirection.
#[xdp]
pub(crate) fn redirect(ctx: XdpContext) -> u32 {
    if turn(&ctx) != XDP_TX {
        return XDP_ABORTED;
    }
    // SAFETY: the context is valid.
    unsafe { helpers::bpf_redirect((*ctx.ctx).ingress_ifindex, 0) as u32 }
}

/// Counts a packet, which ends here.
#[xdp]
pub(crate) fn sink(_: XdpContext) -> u32 {
    count(1);
    XDP_DROP
}
