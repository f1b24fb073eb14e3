//! Shorter ways to where a packet goes than the kernel would take.

use crate::tables::{LB_SCRATCH, Maps};
use crate::tc::{Around, Skb};
use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_fib_lookup};
use aya_ebpf::helpers::generated as helpers;
use lb_common::datapath::{ETH, Packet as _, ROUTED, Wire, admitted, route};
use lb_common::maps::Addr;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// An Ethernet address: what a packet starts with.
type Mac = [u8; 6];

/// `PACKET_HOST`
const TO_US: u32 = 0;

/// To where the datapath said ([`lb_common::datapath::Kernel::redirect`]), if it said so and that is admitted; otherwise
/// `TC_ACT_UNSPEC`.
#[inline(never)]
pub(crate) fn send_on<A: Wire + Maps>(packet: *mut __sk_buff) -> i32 {
    let around = Around::<true>(packet);
    match around.goes_to() {
        0 => TC_ACT_UNSPEC,
        ROUTED => out::<A>(packet, &around),
        device if admitted(&around, device) => redirect(packet, device),
        _ => TC_ACT_UNSPEC,
    }
}

/// Into the network namespace of the pod behind that device, as if it had come out of the pod's end of the veth. There, a packet
/// is looked at only if its Ethernet address was the receiver's: here it may have been the bridge's.
#[inline(always)]
fn redirect(packet: *mut __sk_buff, device: u32) -> i32 {
    // SAFETY: no pointers but the context. (A type that it has already changes nothing.)
    unsafe {
        helpers::bpf_skb_change_type(packet, TO_US);
        helpers::bpf_redirect_peer(device, 0) as i32
    }
}

/// Out by the device that the kernel would send the packet by, if that is admitted.
#[inline(always)]
fn out<A: Wire + Maps>(packet: *mut __sk_buff, around: &Around<true>) -> i32 {
    let device = match route::<A, _, _>(&mut Skb(packet), around) {
        Ok(0) => return TC_ACT_UNSPEC,
        Ok(device) => device,
        Err(_) => return TC_ACT_SHOT,
    };
    let Some(found) = place() else { return TC_ACT_SHOT };
    // SAFETY: what `look` has found is there still. The helper reads that many bytes. If it fails, the packet goes where
    // nobody takes it.
    unsafe {
        // As in a packet: the destination first.
        let macs: [Mac; 2] = [(*found).dmac, (*found).smac];
        helpers::bpf_skb_store_bytes(packet.cast(), 0, (&raw const macs).cast(), 12, 0);
        helpers::bpf_redirect(device, 0) as i32
    }
}

/// The device by which the kernel would send the packet on between these addresses; zero if it has none, the packet does not fit
/// through, or the next hop is not known yet.
#[inline(always)]
pub(crate) fn device<A: Addr>(packet: *mut __sk_buff, src: A, dst: A) -> u32 {
    // SAFETY: what `look` returns is this CPU's own, and nobody else's until the program ends.
    look(packet, src, dst).map_or(0, |found| unsafe { (*found).ifindex })
}

/// The bridge short-cut: a packet from one pod to another on the same bridge is addressed to that pod, as if its client
/// had known it, instead of to the bridge's own address, from where it would be routed back into the bridge.
///
/// Asks the kernel where the packet will go. If that is out by the very device that it was sent to, the next hop can
/// have it at once. A route through another device, a neighbour that is not known yet: nothing happens, and the packet is
/// routed.
#[inline(never)]
pub(crate) fn bridge<A: Wire>(packet: &Skb) {
    let (Some(addressed), Some(src), Some(dst)) =
        (packet.read::<Mac>(0), packet.read::<A>(ETH + A::SRC), packet.read::<A>(ETH + A::DST))
    else {
        return;
    };
    let Some(found) = look(packet.0, src, dst) else { return };
    // SAFETY: as above. If the helper fails, the packet is as it was.
    unsafe {
        if (*found).smac == addressed {
            let mac = (*found).dmac;
            let _ = helpers::bpf_skb_store_bytes(
                packet.0.cast(),
                0,
                (&raw const mac).cast(),
                size_of::<Mac>() as u32,
                0,
            );
        }
    }
}

/// The kernel's structure, not on the stack. Packets that come here have nothing laundered there
/// ([`lb_common::datapath::Kernel::launder`]), or are done with it.
#[inline(always)]
fn place() -> Option<*mut bpf_fib_lookup> {
    const { assert!(size_of::<bpf_fib_lookup>() <= size_of::<[u64; 16]>()) };
    Some(LB_SCRATCH.get_ptr_mut(0)?.cast())
}

/// Asks the kernel for the way between these addresses. (It also looks whether the packet fits through.)
#[inline(always)]
fn look<A: Addr>(packet: *mut __sk_buff, src: A, dst: A) -> Option<*mut bpf_fib_lookup> {
    let found = place()?;
    // SAFETY: large enough and aligned; plain data, of which zero is valid for every field; this CPU's own. The addresses
    // are of that family, in network order, and no longer than the fields. The context is valid. The helper reads and writes
    // that structure.
    let result = unsafe {
        found.write(core::mem::zeroed());
        (*found).family = if A::IS_V4 { AF_INET } else { AF_INET6 };
        (*found).ifindex = (*packet).ifindex;
        (&raw mut (*found).__bindgen_anon_3).cast::<A>().write_unaligned(src);
        (&raw mut (*found).__bindgen_anon_4).cast::<A>().write_unaligned(dst);
        helpers::bpf_fib_lookup(packet.cast(), found, size_of::<bpf_fib_lookup>() as i32, 0)
    };
    (result == 0).then_some(found)
}
