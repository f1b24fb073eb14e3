//! The bridge short-cut: a packet from one pod to another on the same bridge is addressed to that pod, as if its client
//! had known it, instead of to the bridge's own address, from where it would be routed back into the bridge.

use crate::tc::Skb;
use aya_ebpf::bindings::bpf_fib_lookup;
use aya_ebpf::helpers::generated as helpers;
use lb_common::datapath::{Packet as _, Wire};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Length of an Ethernet header.
const ETH: usize = 14;

/// An Ethernet address: what a packet starts with.
type Mac = [u8; 6];

/// Asks the kernel where the packet will go. If that is out by the very device that it was sent to, the next hop can
/// have it at once. A route through another device, a neighbour that is not known yet: nothing happens, and the packet is
/// routed.
#[inline(never)]
pub(crate) fn bridge<A: Wire>(packet: &Skb) {
    // SAFETY: plain data; zero is valid for every field.
    let mut route: bpf_fib_lookup = unsafe { core::mem::zeroed() };
    route.family = if A::IS_V4 { AF_INET } else { AF_INET6 };
    let skb = packet.0;
    // SAFETY: the context is valid.
    route.ifindex = unsafe { (*skb).ifindex };
    let (Some(addressed), Some(src), Some(dst)) =
        (packet.read::<Mac>(0), packet.read::<A>(ETH + A::SRC), packet.read::<A>(ETH + A::DST))
    else {
        return;
    };
    // SAFETY: the addresses are of that family, in network order, and no longer than the fields.
    unsafe {
        (&raw mut route.__bindgen_anon_3).cast::<A>().write(src);
        (&raw mut route.__bindgen_anon_4).cast::<A>().write(dst);
    }
    let size = size_of::<bpf_fib_lookup>() as i32;
    // SAFETY: the helper reads and writes that structure.
    if unsafe { helpers::bpf_fib_lookup(skb.cast(), &raw mut route, size, 0) } == 0 && route.smac == addressed
    {
        let mac = (&raw const route.dmac).cast();
        // SAFETY: the helper reads that many bytes. If it fails, the packet is as it was.
        let _ = unsafe { helpers::bpf_skb_store_bytes(skb.cast(), 0, mac, size_of::<Mac>() as u32, 0) };
    }
}
