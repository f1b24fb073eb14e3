//! For packets that never leave the drivers: where they come from, the least that can be done to them, and where they end.

use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS};
use aya_ebpf::helpers::generated as helpers;
use aya_ebpf::macros::{map, xdp};
use aya_ebpf::maps::{Array, PerCpuArray};
use aya_ebpf::programs::XdpContext;

/// What is sent: its headers, all checksums as of source port zero.
#[map]
static SENT: Array<[u32; WORDS]> = Array::with_max_entries(1, 0);
/// Index of the device to send by; the first source port; how many there are.
#[map]
static SENDER: Array<u32> = Array::with_max_entries(3, 0);
/// Packets that were sent, and that have arrived.
#[map]
static SEEN: PerCpuArray<u64> = PerCpuArray::with_max_entries(2, 0);

/// Enough for all headers, and no more than the smallest frame has in IPv4: that one is a word shorter.
const WORDS: usize = 16;
const UDP: u8 = 17;

#[inline(always)]
fn count(which: u32) -> u64 {
    let Some(counter) = SEEN.get_ptr_mut(which) else { return 0 };
    // SAFETY: this CPU's own.
    unsafe {
        *counter += 1;
        *counter
    }
}

/// Sends the UDP packet of `SENT`, from one source port after the other. Run by `BPF_PROG_TEST_RUN` with live frames, whose
/// data is what the last user of their memory has left.
#[xdp]
pub(crate) fn send(ctx: XdpContext) -> u32 {
    let (data, end) = (ctx.data(), ctx.data_end());
    let (Some(frame), Some(device), Some(first), Some(ports)) =
        (SENT.get(0), SENDER.get(0), SENDER.get(1), SENDER.get(2))
    else {
        return XDP_ABORTED;
    };
    let port = (*first + (count(0) as u32).checked_rem(*ports).unwrap_or(0)) as u16;
    // SAFETY: within the bounds checked; BPF stores need no alignment.
    unsafe {
        for (i, word) in frame.iter().enumerate() {
            if data + 4 * (i + 1) > end {
                break;
            }
            *((data + 4 * i) as *mut u32) = *word;
        }
        if data + 12 + 2 > end {
            return XDP_ABORTED;
        }
        let is_v4 = *((data + 12) as *const u16) == 0x0800u16.to_be();
        let udp = data + if is_v4 { 34 } else { 54 };
        if udp + 8 > end {
            return XDP_ABORTED;
        }
        let (sport, checksum) = (udp as *mut u16, (udp + 6) as *mut u16);
        *sport = port.to_be();
        let sum = u32::from(!*checksum) + u32::from(port.to_be());
        *checksum = !((sum & 0xffff) as u16 + (sum >> 16) as u16);
        helpers::bpf_redirect(*device, 0) as u32
    }
}

/// Sends a packet back to where it came from, by way of a redirection.
#[xdp]
pub(crate) fn redirect(ctx: XdpContext) -> u32 {
    let (data, end) = (ctx.data(), ctx.data_end());
    if data + 14 > end {
        return XDP_ABORTED;
    }
    // SAFETY: within the bounds just checked; the context is valid.
    unsafe {
        let words = data as *mut [u16; 3];
        let (dst, src) = (*words, *words.add(1));
        *words = src;
        *words.add(1) = dst;
        helpers::bpf_redirect((*ctx.ctx).ingress_ifindex, 0) as u32
    }
}

/// Counts a UDP packet, which ends here. Others are not the benchmark's.
#[xdp]
pub(crate) fn sink(ctx: XdpContext) -> u32 {
    let (data, end) = (ctx.data(), ctx.data_end());
    if data + 24 > end {
        return XDP_PASS;
    }
    // SAFETY: within the bounds just checked.
    let (kind, v4, v6) =
        unsafe { (*((data + 12) as *const u16), *((data + 23) as *const u8), *((data + 20) as *const u8)) };
    let is_udp = kind == 0x0800u16.to_be() && v4 == UDP || kind == 0x86ddu16.to_be() && v6 == UDP;
    if !is_udp {
        return XDP_PASS;
    }
    count(1);
    XDP_DROP
}
