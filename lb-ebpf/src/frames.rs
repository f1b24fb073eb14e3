//! Whole frames, kept and sent again: fragments that overtook the first one.

use crate::tables::{LB_FRAME, LB_HELD, LB_HOLDS};
use aya_ebpf::bindings::{__sk_buff, BPF_F_INGRESS, BPF_F_RECOMPUTE_CSUM};
use aya_ebpf::helpers::generated as helpers;
use lb_common::maps::Held;

/// Most fragments of a datagram: 64 KiB in frames of 1400 bytes, and some.
const MAX_HELD: u32 = 60;
/// A number's low bits are its CPU's, plus one; the rest counts.
const CPU_BITS: u32 = 12;

/// The place of a number.
#[inline(always)]
fn place(id: u32) -> u32 {
    let cpu = (id & ((1 << CPU_BITS) - 1)).wrapping_sub(1);
    cpu * Held::PER_CPU + (id >> CPU_BITS) % Held::PER_CPU
}

/// Keeps a copy of the packet. Zero if there is no place for it.
#[inline(never)]
pub(crate) fn hold(skb: *mut __sk_buff, previous: u32) -> u32 {
    let Some(count) = LB_HOLDS.get_ptr_mut(0) else { return 0 };
    // SAFETY: this CPU's own.
    let number = unsafe {
        *count = (*count).wrapping_add(1);
        *count
    };
    // SAFETY: no arguments.
    let cpu = unsafe { helpers::bpf_get_smp_processor_id() };
    let id = number << CPU_BITS | (cpu + 1) & ((1 << CPU_BITS) - 1);
    let Some(held) = LB_HELD.get_ptr_mut(place(id)) else { return 0 };
    // SAFETY: this CPU's own place; a reader elsewhere compares the number before and after.
    unsafe {
        (*held).id = 0;
        if !copy(skb, held) {
            return 0;
        }
        (*held).previous = previous;
        (*held).id = id;
    }
    id
}

/// Copies the packet into a place.
///
/// # Safety
/// `held` is valid for writes, and nobody else writes it.
#[inline(always)]
unsafe fn copy(skb: *mut __sk_buff, held: *mut Held) -> bool {
    // SAFETY: the context is valid; the helper writes no more than there is room for.
    unsafe {
        let len = (*skb).len;
        if len == 0 || len > Held::MAX as u32 {
            return false;
        }
        (*held).len = len;
        // Told once more, for the verifier: the length is no longer in the register that was compared.
        let len = ((len - 1) & 0x7ff) + 1;
        let to = (&raw mut (*held).frame).cast();
        len <= Held::MAX as u32 && helpers::bpf_skb_load_bytes(skb.cast(), 0, to, len) == 0
    }
}

/// Makes the packet what is in a place.
///
/// # Safety
/// `held` is valid for reads.
#[inline(always)]
unsafe fn become_copy(skb: *mut __sk_buff, held: *const Held) -> bool {
    // SAFETY: the context is valid; the helper reads no more than there is.
    unsafe {
        let len = (*held).len;
        if len == 0 || len > Held::MAX as u32 || helpers::bpf_skb_change_tail(skb.cast(), len, 0) != 0 {
            return false;
        }
        let len = ((len - 1) & 0x7ff) + 1;
        let from = (&raw const (*held).frame).cast_mut().cast();
        let flags = u64::from(BPF_F_RECOMPUTE_CSUM);
        len <= Held::MAX as u32 && helpers::bpf_skb_store_bytes(skb.cast(), 0, from, len, flags) == 0
    }
}

/// Sends what was kept, and then leaves the packet as it was. Verified by itself, as what is in [`crate::apart`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn release(skb: *mut __sk_buff, last: u32, incoming: u32) -> u32 {
    let Some(own) = LB_FRAME.get_ptr_mut(0) else { return 0 };
    // SAFETY: this CPU's own; what is sent below runs our programs again, but those are later fragments, which do not
    // come here.
    if !unsafe { copy(skb, own) } {
        return 0;
    }
    let flags = if incoming != 0 { u64::from(BPF_F_INGRESS) } else { 0 };
    let mut id = last;
    for _ in 0..MAX_HELD {
        let Some(held) = LB_HELD.get_ptr_mut(place(id)) else { break };
        // SAFETY: a place of the map; that of another CPU may change at any moment, which its number tells.
        unsafe {
            if id == 0 || (*held).id != id {
                break;
            }
            let previous = (*held).previous;
            if !become_copy(skb, held) || (*held).id != id {
                break;
            }
            (*held).id = 0;
            let _ = helpers::bpf_clone_redirect(skb.cast(), (*skb).ifindex, flags);
            id = previous;
        }
    }
    // SAFETY: as above.
    u32::from(unsafe { become_copy(skb, own) })
}
