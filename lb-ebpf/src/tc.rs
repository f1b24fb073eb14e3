//! The tc programs: packets and tables as `lb_common::datapath` wants them.

use crate::tables::{
    self, FLAGS, HASH_SEED, LB_BEGUN, LB_DEVICE, LB_MASQUERADE, LB_OVERLAY, LB_PORTS, LB_SCRATCH, LB_STANCE,
    LB_TAKEN, MASQ_FIRST, MASQ_LAST, Maps, RECENT, by_tables,
};
use crate::{apart, frames, next_hop};
use aya_ebpf::bindings::{
    __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_adj_room_mode,
    bpf_sock,
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
    self, Apart, Context as _, Covered, FlowRef, Kernel, Packet, Reason, Reshape, Tables, Taken, Verdict,
    Wire,
};
use lb_common::maps::{
    Addr, Affinity, AffinityKey, Device, FlowKey, Fragment, FragmentKey, Frontend, FrontendKey, Masquerading,
    Overlay, Range, SlotGroup, SlotGroupKey, SourceKey, flags, seen_to, stance,
};

/// Destinations.
#[classifier]
pub(crate) fn ingress(ctx: TcContext) -> i32 {
    run::<false>(&ctx, Hook::Ingress)
}

/// Sources.
#[classifier]
pub(crate) fn egress(ctx: TcContext) -> i32 {
    run::<false>(&ctx, Hook::Egress)
}

/// The same where packets may be redirected. Programs of their own: they need more stack than older kernels have.
#[classifier]
pub(crate) fn ingress_redirect(ctx: TcContext) -> i32 {
    run::<true>(&ctx, Hook::Ingress)
}

/// Its other half.
#[classifier]
pub(crate) fn egress_redirect(ctx: TcContext) -> i32 {
    run::<true>(&ctx, Hook::Egress)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Hook {
    Ingress,
    Egress,
}

impl Hook {
    #[inline(always)]
    const fn seen_to(self) -> u32 {
        match self {
            Self::Ingress => seen_to::INGRESS,
            Self::Egress => seen_to::EGRESS,
        }
    }
}

#[inline(always)]
fn run<const REDIRECTS: bool>(ctx: &TcContext, hook: Hook) -> i32 {
    let skb = Skb(ctx.skb.skb);
    if skb.has_been_seen_to(hook) {
        return TC_ACT_UNSPEC;
    }
    // SAFETY: the context is valid for the life of the program.
    let protocol = unsafe { (*skb.0).protocol } as u16;
    if protocol == Ip4::ETHERTYPE {
        family::<Ip4, REDIRECTS>(skb, hook)
    } else if protocol == Ip6::ETHERTYPE {
        family::<Ip6, REDIRECTS>(skb, hook)
    } else {
        TC_ACT_UNSPEC
    }
}

#[inline(always)]
fn family<A: Wire + Maps, const REDIRECTS: bool>(mut skb: Skb, hook: Hook) -> i32 {
    let around = Around::<REDIRECTS>(skb.0);
    if hook == Hook::Ingress && around.redirects() {
        around.redirect(0);
    }
    let verdict = match hook {
        Hook::Ingress => datapath::ingress::<A, _, _>(&mut skb, &around),
        Hook::Egress => datapath::egress::<A, _, _>(&mut skb, &around),
    };
    match verdict {
        // "Next": other programs on the device have their say.
        Verdict::Pass | Verdict::Bridge => {
            if hook == Hook::Ingress && around.redirects() {
                let done = next_hop::send_on::<A>(skb.0);
                if done != TC_ACT_UNSPEC {
                    return done;
                }
            }
            if verdict == Verdict::Bridge {
                next_hop::bridge::<A>(&skb);
            }
            if FLAGS.load() & flags::FRONT != 0 {
                skb.see_to(hook);
            }
            TC_ACT_UNSPEC
        }
        Verdict::Leave => TC_ACT_UNSPEC,
        Verdict::Drop(reason) => {
            around.count(reason);
            log(&skb, reason);
            TC_ACT_SHOT
        }
        Verdict::Reject(reason) => {
            around.count(reason);
            log(&skb, reason);
            reject::<A>(&mut skb)
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
fn reject<A: Wire>(skb: &mut Skb) -> i32 {
    match datapath::reject::<A, _>(skb) {
        // SAFETY: the context is valid for the life of the program.
        Ok(()) => unsafe { helpers::bpf_redirect((*skb.0).ifindex, 0) as i32 },
        Err(reason) => {
            tables::count(reason);
            TC_ACT_SHOT
        }
    }
}

/// A packet in the kernel.
#[derive(Clone, Copy)]
pub(crate) struct Skb(pub(crate) *mut __sk_buff);

impl Skb {
    /// Whether another version's program in front of this one has seen to the packet, as far as this hook goes.
    #[inline(always)]
    fn has_been_seen_to(self, hook: Hook) -> bool {
        // SAFETY: the context is valid.
        unsafe {
            if (*self.0).cb[0] != hook.seen_to() {
                return false;
            }
            (*self.0).cb[0] = 0;
        }
        true
    }

    /// Says so to the one behind.
    #[inline(always)]
    fn see_to(self, hook: Hook) {
        // SAFETY: the context is valid.
        unsafe { (*self.0).cb[0] = hook.seen_to() };
    }
}

impl Packet for Skb {
    #[inline(always)]
    fn read<T: Pod>(&self, offset: usize) -> Option<T> {
        // Else not linear, or too short.
        self.linear(offset).or_else(|| self.load(offset))
    }

    #[inline(always)]
    fn linear<T: Pod>(&self, offset: usize) -> Option<T> {
        // SAFETY: the context is valid; the verifier insists on the comparison before the access. Packet data is at
        // least two-byte aligned and the kernels that we run on read wider words at any address.
        unsafe {
            let data = (*self.0).data as usize;
            let end = (*self.0).data_end as usize;
            (data + offset + size_of::<T>() <= end).then(|| *((data + offset) as *const T))
        }
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
pub(crate) struct Around<const REDIRECTS: bool>(pub(crate) *mut __sk_buff);

by_tables!(Around<REDIRECTS>, const REDIRECTS: bool);

impl<const REDIRECTS: bool> Kernel for Around<REDIRECTS> {
    #[inline(always)]
    fn stance(&self) -> u32 {
        LB_STANCE.get(0).copied().unwrap_or(stance::SERVE)
    }

    #[inline(always)]
    fn hash_seed(&self) -> u32 {
        HASH_SEED.load()
    }

    #[inline(always)]
    fn overlay(&self) -> Option<&Overlay> {
        LB_OVERLAY.get(0)
    }

    #[inline(always)]
    fn masquerade_ports(&self) -> (u16, u16) {
        (MASQ_FIRST.load() as u16, MASQ_LAST.load() as u16)
    }

    #[inline(always)]
    fn device(&self) -> Option<&Device> {
        // SAFETY: without preallocation an element is never reused under a reader.
        unsafe { LB_DEVICE.get(self.device_index()) }
    }

    #[inline(always)]
    fn may_masquerade(&self) -> bool {
        let bit = Masquerading::bit(self.device_index());
        LB_MASQUERADE.get(bit.word).is_none_or(|word| bit.is_in(*word))
    }

    #[inline(always)]
    fn device_index(&self) -> u32 {
        // SAFETY: the context is valid.
        unsafe { (*self.0).ifindex }
    }

    #[inline(always)]
    fn device_at(&self, index: u32) -> Option<&Device> {
        // SAFETY: as above.
        unsafe { LB_DEVICE.get(index) }
    }

    #[inline(always)]
    fn redirects(&self) -> bool {
        REDIRECTS
    }

    #[inline(always)]
    fn redirect(&self, to: u32) {
        // SAFETY: the context is valid.
        unsafe { (*self.0).cb[1] = to };
    }

    #[inline(always)]
    fn note_taken(&self, taken: Taken) {
        if let Some(tag) = LB_TAKEN.get_ptr_mut(taken.place) {
            // SAFETY: a word of the map, written at once.
            unsafe { *tag = taken.tag };
        }
    }

    #[inline(always)]
    fn was_taken(&self, taken: Taken) -> bool {
        LB_TAKEN.get(taken.place).is_some_and(|tag| *tag == taken.tag)
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<&Affinity> {
        tables::affinity(key)
    }

    #[inline(always)]
    fn put_affinity(&self, key: &AffinityKey, affinity: &Affinity) -> bool {
        tables::put_affinity(key, affinity)
    }

    #[inline(always)]
    fn port_reserved(&self, port: u16) -> bool {
        LB_PORTS.get(u32::from(port >> 6)).is_some_and(|bits| bits >> (port & 63) & 1 != 0)
    }

    #[inline(always)]
    fn hold<P: Packet>(&self, _: &mut P, previous: u32) -> Option<u32> {
        let id = frames::hold(self.0, previous);
        (id != 0).then_some(id)
    }

    #[inline(always)]
    fn release<P: Packet>(&self, _: &mut P, last: u32, incoming: bool) {
        frames::release(self.0, last, incoming.into());
    }

    #[inline(always)]
    fn launder<'a, T: Copy>(&'a self, value: &'a T) -> Option<&'a T> {
        const { assert!(size_of::<T>() <= size_of::<[u64; NUMBER]>() && align_of::<T>() <= align_of::<u64>()) };
        let scratch = LB_SCRATCH.get_ptr_mut(0)?.cast::<T>();
        // SAFETY: large enough and aligned (above); this CPU's own, and no program of ours interrupts another.
        unsafe {
            scratch.write(*value);
            Some(&*scratch)
        }
    }

    #[inline(always)]
    fn launder_number(&self, number: u32) -> u32 {
        let Some(scratch) = LB_SCRATCH.get_ptr_mut(0) else { return 0 };
        // SAFETY: as above. Volatile, or the compiler would see through it.
        unsafe {
            let place = (&raw mut (*scratch)[NUMBER]).cast::<u32>();
            place.write_volatile(number);
            place.read_volatile()
        }
    }
}

impl<A: Maps, const REDIRECTS: bool> Apart<A> for Around<REDIRECTS> {
    #[inline(always)]
    fn put_draft(&self, side: u32) -> u32 {
        if A::IS_V4 { apart::put_draft4(side) } else { apart::put_draft6(side) }
    }

    #[inline(always)]
    fn free_port(&self) -> u32 {
        if A::IS_V4 { apart::free_port4(self.0) } else { apart::free_port6(self.0) }
    }

    #[inline(always)]
    fn port_of_closed(&self) -> u32 {
        if A::IS_V4 { apart::port_of_closed4() } else { apart::port_of_closed6() }
    }

    #[inline(always)]
    fn own_port(&self) -> u32 {
        if A::IS_V4 { apart::own_port4() } else { apart::own_port6() }
    }
}

impl<A: Maps, const REDIRECTS: bool> Tables<A> for Around<REDIRECTS> {
    #[inline(always)]
    fn draft(&self) -> Option<FlowRef<'_, A>> {
        // SAFETY: this CPU's own, and no program of ours interrupts another.
        A::draft().get_ptr_mut(0).and_then(NonNull::new).map(|at| unsafe { FlowRef::new(at) })
    }

    #[inline(always)]
    fn remember(&self, forward: &FlowKey<A>) {
        let Some(begun) = LB_BEGUN.get_ptr_mut(u32::from(!A::IS_V4)) else { return };
        // SAFETY: this CPU's own.
        unsafe {
            if let Some(place) = A::recent().get_ptr_mut(*begun % RECENT) {
                *place = *forward;
            }
            *begun = (*begun).wrapping_add(1);
        }
    }

    #[inline(always)]
    fn old_flow(&self, after: u32) -> Option<&FlowKey<A>> {
        let begun = LB_BEGUN.get(u32::from(!A::IS_V4))?;
        A::recent().get(begun.wrapping_add(after) % RECENT)
    }

    #[inline(always)]
    fn may_have_flows(&self, key: &FlowKey<A>) -> bool {
        tables::may_have_flows(key)
    }

    #[inline(always)]
    fn remove_flow(&self, key: &FlowKey<A>) {
        // Already gone is as good.
        let _ = A::flows().remove(key);
    }

    #[inline(always)]
    fn may_be_served(&self, addr: A) -> bool {
        tables::may_be_served(addr)
    }

    #[inline(always)]
    fn frontend(&self, key: &FrontendKey<A>) -> Option<&Frontend> {
        tables::frontend(key)
    }

    #[inline(always)]
    fn slot_group(&self, key: &SlotGroupKey) -> Option<&SlotGroup<A>> {
        tables::slot_group(key)
    }

    #[inline(always)]
    fn cidr(&self, addr: A) -> u32 {
        A::cidrs().get(Key::new(size_of::<A>() as u32 * 8, addr)).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn socket_wants(&self, key: &FlowKey<A>) -> bool {
        let socket = if key.proto == TCP {
            self.tcp_socket(key, CURRENT_NETNS)
        } else {
            let tuple = (&raw const *key).cast_mut().cast();
            // SAFETY: the start of a flow key is laid out as `struct bpf_sock_tuple`, of that length.
            unsafe { helpers::bpf_sk_lookup_udp(self.0.cast(), tuple, A::TUPLE, CURRENT_NETNS, 0).cast() }
        };
        if socket.is_null() {
            return false;
        }
        // SAFETY: from a look-up, and not used any more.
        unsafe { helpers::bpf_sk_release(socket.cast()) };
        true
    }

    #[inline(always)]
    fn connected(&self, key: &FlowKey<A>, netns: u32) -> bool {
        let socket: *mut bpf_sock = self.tcp_socket(key, u64::from(netns)).cast();
        if socket.is_null() {
            return false;
        }
        // SAFETY: from a look-up; not used any more after it is released.
        let state = unsafe {
            let state = core::ptr::read_volatile(&raw const (*socket).state);
            helpers::bpf_sk_release(socket.cast());
            state
        };
        !matches!(state, TCP_TIME_WAIT | TCP_CLOSE | TCP_LISTEN)
    }

    #[inline(always)]
    fn route(&self, src: A, dst: A) -> u32 {
        next_hop::device(self.0, src, dst)
    }

    #[inline(always)]
    fn cluster_ips(&self) -> Option<&Range<A>> {
        A::range().get(0)
    }

    #[inline(always)]
    fn source_admitted(&self, service: u32, client: A) -> bool {
        let bits = size_of::<SourceKey<A>>() as u32 * 8;
        A::sources().get(Key::new(bits, SourceKey { service, addr: client })).is_some()
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey<A>) -> Option<&Fragment> {
        // SAFETY: an entry that is evicted meanwhile may show another datagram's for a moment; by then hundreds
        // of others have begun.
        unsafe { A::fragments().get(key) }
    }

    #[inline(always)]
    fn put_fragment(&self, key: &FragmentKey<A>, fragment: &Fragment) {
        // A full table evicts: this cannot fail in a way that matters.
        let _ = A::fragments().insert(key, fragment, 0);
    }
}

/// Where in [`LB_SCRATCH`] numbers are laundered, behind everything else.
const NUMBER: usize = 15;

const TCP: u8 = 6;
const CURRENT_NETNS: u64 = -1i32 as u32 as u64;
// The kernel's enum.
const TCP_TIME_WAIT: u32 = 6;
const TCP_CLOSE: u32 = 7;
const TCP_LISTEN: u32 = 10;

impl<const REDIRECTS: bool> Around<REDIRECTS> {
    /// What [`Kernel::redirect`] was told last.
    #[inline(always)]
    pub(crate) fn goes_to(&self) -> u32 {
        // SAFETY: the context is valid.
        unsafe { (*self.0).cb[1] }
    }

    /// To be released, if there is one.
    #[inline(always)]
    fn tcp_socket<A: Maps>(&self, key: &FlowKey<A>, netns: u64) -> *mut core::ffi::c_void {
        let tuple = (&raw const *key).cast_mut().cast();
        // SAFETY: the start of a flow key is laid out as `struct bpf_sock_tuple`, of that length.
        unsafe { helpers::bpf_skc_lookup_tcp(self.0.cast(), tuple, A::TUPLE, netns, 0).cast() }
    }
}
