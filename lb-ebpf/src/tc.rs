//! The tc programs: packets and tables as `lb_common::datapath` wants them.

use crate::tables::{
    FLAGS, HASH_SEED, LB_CIDR4, LB_CIDR6, LB_COUNT, LB_DEVICE, LB_EPOCH, LB_FLOW4, LB_FLOW6, LB_FRONT4,
    LB_FRONT6, LB_PORTS, LB_SCRATCH, LB_SLOT4, LB_SLOT6, MASQ_FIRST, MASQ_LAST,
};
use aya_ebpf::bindings::{
    __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_adj_room_mode,
};
use aya_ebpf::helpers::generated as helpers;
use aya_ebpf::macros::classifier;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::info;
use bytemuck::Pod;
use core::ptr::NonNull;
use lb_common::addr::{Ip4, Ip6};
use lb_common::checksum::Sum;
use lb_common::datapath::{
    self, Covered, FlowRef, Kernel, Packet, Put, PutError, Reason, Reshape, Tables, Verdict, Wire,
};
use lb_common::maps::{Addr, Device, Flow, FlowKey, Frontend, FrontendKey, Slot, SlotKey, flags};

/// Destinations.
#[classifier]
pub(crate) fn ingress(ctx: TcContext) -> i32 {
    run(&ctx, Hook::Ingress)
}

/// Sources.
#[classifier]
pub(crate) fn egress(ctx: TcContext) -> i32 {
    run(&ctx, Hook::Egress)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Hook {
    Ingress,
    Egress,
}

#[inline(always)]
fn run(ctx: &TcContext, hook: Hook) -> i32 {
    let skb = Skb(ctx.skb.skb);
    // SAFETY: the context is valid for the life of the program.
    let protocol = unsafe { (*skb.0).protocol } as u16;
    if protocol == Ip4::ETHERTYPE {
        family::<Ip4>(skb, hook)
    } else if protocol == Ip6::ETHERTYPE {
        family::<Ip6>(skb, hook)
    } else {
        TC_ACT_UNSPEC
    }
}

#[inline(always)]
fn family<A: Wire>(mut skb: Skb, hook: Hook) -> i32
where
    Around: Tables<A>,
{
    let around = Around(skb.0);
    let verdict = match hook {
        Hook::Ingress => datapath::ingress::<A, _, _>(&mut skb, &around),
        Hook::Egress => datapath::egress::<A, _, _>(&mut skb, &around),
    };
    match verdict {
        // "Next": other programs on the device have their say.
        Verdict::Pass => TC_ACT_UNSPEC,
        Verdict::Drop(reason) => {
            around.count(reason);
            log(&skb, reason);
            TC_ACT_SHOT
        }
        Verdict::Reject(reason) => {
            around.count(reason);
            log(&skb, reason);
            reject::<A>(&mut skb, &around)
        }
    }
}

/// One line for a packet that went no further, if asked for at load: where not, this is not even verified.
#[inline(always)]
fn log(skb: &Skb, reason: Reason) {
    if FLAGS.load() & flags::LOG != 0 {
        write_log(skb.0, reason as u32);
    }
}

/// Few arguments: each costs stack, of which there is little left here.
#[inline(never)]
fn write_log(skb: *mut __sk_buff, reason: u32) {
    // SAFETY: the context is valid.
    let (device, len) = unsafe { ((*skb).ifindex, (*skb).len) };
    let name = Reason::from_index(reason).name();
    info!(&TcContext::new(skb), "{}: a packet of {} bytes on device {}", name, len, device);
}

#[inline(never)]
fn reject<A: Wire>(skb: &mut Skb, around: &Around) -> i32 {
    match datapath::reject::<A, _>(skb) {
        // SAFETY: the context is valid for the life of the program.
        Ok(()) => unsafe { helpers::bpf_redirect((*skb.0).ifindex, 0) as i32 },
        Err(reason) => {
            around.count(reason);
            TC_ACT_SHOT
        }
    }
}

/// A packet in the kernel.
#[derive(Clone, Copy)]
struct Skb(*mut __sk_buff);

impl Packet for Skb {
    #[inline(always)]
    fn read<T: Pod>(&self, offset: usize) -> Option<T> {
        // SAFETY: the context is valid; the verifier insists on the comparison before the access. Packet data is at
        // least two-byte aligned and the kernels that we run on read wider words at any address.
        unsafe {
            let data = (*self.0).data as usize;
            let end = (*self.0).data_end as usize;
            if data + offset + size_of::<T>() <= end {
                return Some(*((data + offset) as *const T));
            }
        }
        // Not linear, or too short.
        self.load(offset)
    }

    #[inline(always)]
    fn load<T: Pod>(&self, offset: usize) -> Option<T> {
        let mut value = T::zeroed();
        // SAFETY: the helper writes exactly that many bytes, and any bytes are a valid T.
        let result = unsafe {
            helpers::bpf_skb_load_bytes(
                self.0.cast(),
                offset as u32,
                (&raw mut value).cast(),
                size_of::<T>() as u32,
            )
        };
        (result == 0).then_some(value)
    }

    #[inline(always)]
    fn store<T: Pod>(&mut self, offset: usize, value: &T) -> Result<(), Reason> {
        // SAFETY: the helper reads exactly that many bytes, all initialised.
        check(unsafe {
            helpers::bpf_skb_store_bytes(
                self.0.cast(),
                offset as u32,
                (&raw const *value).cast(),
                size_of::<T>() as u32,
                0,
            )
        })
    }

    #[inline(always)]
    fn l3_checksum(&mut self, offset: usize, change: Sum) -> Result<(), Reason> {
        // SAFETY: no pointers but the context.
        check(unsafe {
            helpers::bpf_l3_csum_replace(self.0.cast(), offset as u32, 0, u64::from(change.0), 0)
        })
    }

    #[inline(always)]
    fn l4_checksum(&mut self, offset: usize, change: Sum, of: Covered) -> Result<(), Reason> {
        let mut flags = 0;
        if of.pseudo_header {
            flags |= BPF_F_PSEUDO_HDR;
        }
        if of.zero_is_none {
            flags |= BPF_F_MARK_MANGLED_0;
        }
        // SAFETY: no pointers but the context.
        check(unsafe {
            helpers::bpf_l4_csum_replace(
                self.0.cast(),
                offset as u32,
                0,
                u64::from(change.0),
                u64::from(flags),
            )
        })
    }
}

impl Reshape for Skb {
    #[inline(always)]
    fn truncate(&mut self, len: usize) -> Result<(), Reason> {
        // SAFETY: no pointers but the context.
        check(unsafe { helpers::bpf_skb_change_tail(self.0.cast(), len as u32, 0) })
            .map_err(|_| Reason::RejectFailed)
    }

    #[inline(always)]
    fn insert_after_ethernet(&mut self, len: usize) -> Result<(), Reason> {
        // SAFETY: no pointers but the context.
        check(unsafe {
            helpers::bpf_skb_adjust_room(self.0.cast(), len as i32, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, 0)
        })
        .map_err(|_| Reason::RejectFailed)
    }

    #[inline(always)]
    fn checksum_is_partial(&mut self, offset: usize) -> bool {
        // No field of the context says so. But a change outside the pseudo header leaves a partial checksum alone.
        let Some(before) = self.load::<u16>(offset) else { return false };
        let any = Covered { pseudo_header: false, zero_is_none: false };
        if self.l4_checksum(offset, Sum(1), any).is_err() {
            return false;
        }
        self.load::<u16>(offset) == Some(before)
    }
}

#[inline(always)]
fn check(result: i64) -> Result<(), Reason> {
    if result == 0 { Ok(()) } else { Err(Reason::Malformed) }
}

/// What surrounds a packet: maps and helpers.
#[derive(Clone, Copy)]
struct Around(*mut __sk_buff);

impl Kernel for Around {
    #[inline(always)]
    fn hash_seed(&self) -> u32 {
        HASH_SEED.load()
    }

    #[inline(always)]
    fn masquerade_ports(&self) -> (u16, u16) {
        (MASQ_FIRST.load() as u16, MASQ_LAST.load() as u16)
    }

    #[inline(always)]
    fn now(&self) -> u32 {
        // SAFETY: no arguments. Which branch is compiled in is decided by a constant at load time.
        let ns = unsafe {
            if FLAGS.load() & flags::COARSE_CLOCK != 0 {
                helpers::bpf_ktime_get_coarse_ns()
            } else {
                helpers::bpf_ktime_get_ns()
            }
        };
        (ns / 1_000_000_000) as u32
    }

    #[inline(always)]
    fn device(&self) -> Option<&Device> {
        // SAFETY: the context is valid; without preallocation an element is never reused under a reader.
        unsafe { LB_DEVICE.get((*self.0).ifindex) }
    }

    #[inline(always)]
    fn count(&self, reason: Reason) {
        if let Some(counter) = LB_COUNT.get_ptr_mut(reason as u32) {
            // SAFETY: this CPU's own counter.
            unsafe { *counter += 1 };
        }
    }

    #[inline(always)]
    fn backend_epoch(&self, id: u32) -> u32 {
        LB_EPOCH.get(id).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn port_reserved(&self, port: u16) -> bool {
        LB_PORTS.get(u32::from(port >> 6)).is_some_and(|bits| bits >> (port & 63) & 1 != 0)
    }

    #[inline(always)]
    fn launder<'a, T: Copy>(&'a self, value: &'a T) -> Option<&'a T> {
        const { assert!(size_of::<T>() <= size_of::<[u64; 16]>() && align_of::<T>() <= align_of::<u64>()) };
        let scratch = LB_SCRATCH.get_ptr_mut(0)?.cast::<T>();
        // SAFETY: large enough and aligned (above); this CPU's own, and no program of ours interrupts another.
        unsafe {
            scratch.write(*value);
            Some(&*scratch)
        }
    }
}

macro_rules! tables {
    ($addr:ty, $flows:ident, $fronts:ident, $slots:ident, $cidrs:ident, $tuple:literal) => {
        impl Tables<$addr> for Around {
            #[inline(always)]
            fn flow(&self, key: &FlowKey<$addr>) -> Option<FlowRef<'_, $addr>> {
                // SAFETY: map values outlive the program's run (RCU), also when removed meanwhile.
                $flows.get_ptr_mut(key).and_then(NonNull::new).map(|at| unsafe { FlowRef::new(at) })
            }

            #[inline(always)]
            fn put_flow(&self, key: &FlowKey<$addr>, flow: &Flow<$addr>, how: Put) -> Result<(), PutError> {
                let flags = match how {
                    Put::New => aya_ebpf::bindings::BPF_NOEXIST,
                    Put::Any => aya_ebpf::bindings::BPF_ANY,
                };
                const EEXIST: i32 = -17;
                $flows.insert(key, flow, u64::from(flags)).map_err(|e| match e {
                    EEXIST => PutError::Taken,
                    _ => PutError::Full,
                })
            }

            #[inline(always)]
            fn remove_flow(&self, key: &FlowKey<$addr>) {
                // Already gone is as good.
                let _ = $flows.remove(key);
            }

            #[inline(always)]
            fn frontend(&self, key: &FrontendKey<$addr>) -> Option<&Frontend> {
                // SAFETY: without preallocation an element is never reused under a reader.
                unsafe { $fronts.get(key) }
            }

            #[inline(always)]
            fn slot(&self, key: &SlotKey) -> Option<&Slot<$addr>> {
                // SAFETY: as above.
                unsafe { $slots.get(key) }
            }

            #[inline(always)]
            fn cidr(&self, addr: $addr) -> u32 {
                $cidrs.get(Key::new(size_of::<$addr>() as u32 * 8, addr)).copied().unwrap_or(0)
            }

            #[inline(always)]
            fn socket_wants(&self, key: &FlowKey<$addr>) -> bool {
                // The start of a flow key is laid out as `struct bpf_sock_tuple`.
                const CURRENT_NETNS: u64 = -1i32 as u32 as u64;
                let tuple = (&raw const *key).cast_mut().cast();
                // SAFETY: the helper reads the tuple's size from an initialised key; the socket is released.
                unsafe {
                    let socket = if key.proto == 6 {
                        helpers::bpf_skc_lookup_tcp(self.0.cast(), tuple, $tuple, CURRENT_NETNS, 0)
                    } else {
                        helpers::bpf_sk_lookup_udp(self.0.cast(), tuple, $tuple, CURRENT_NETNS, 0)
                    };
                    if socket.is_null() {
                        return false;
                    }
                    helpers::bpf_sk_release(socket.cast());
                }
                true
            }
        }
    };
}

tables!(Ip4, LB_FLOW4, LB_FRONT4, LB_SLOT4, LB_CIDR4, 12);
tables!(Ip6, LB_FLOW6, LB_FRONT6, LB_SLOT6, LB_CIDR6, 36);
