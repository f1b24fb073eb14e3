//! The maps. Their sizes here are defaults; the agent sets them when it creates the maps, and pins them.

use aya_ebpf::Global;
use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::helpers::generated as helpers;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray};
use core::ptr::NonNull;
use lb_common::addr::{Ip4, Ip6};
use lb_common::datapath::{FlowRef, Put, PutError, Reason, Taken};
use lb_common::maps::{
    Addr, Affinity, AffinityKey, Device, Flow, FlowKey, Fragment, FragmentKey, Frontend, FrontendKey, Held,
    Masquerading, Overlay, Presence, Range, Served, ServiceName, SlotGroup, SlotGroupKey, SocketKey,
    SocketPeer, SourceKey, VtepKey, XdpDevice, flags,
};

// Written by the loader before the programs are verified, constant from then on.

/// Bits of [`lb_common::maps::flags`].
#[unsafe(no_mangle)]
pub(crate) static FLAGS: Global<u32> = Global::new(0);
/// Seed of all hashes.
#[unsafe(no_mangle)]
pub(crate) static HASH_SEED: Global<u32> = Global::new(0);
/// First port to masquerade to, host order.
#[unsafe(no_mangle)]
pub(crate) static MASQ_FIRST: Global<u32> = Global::new(10_000);
/// Last port to masquerade to, host order.
#[unsafe(no_mangle)]
pub(crate) static MASQ_LAST: Global<u32> = Global::new(29_999);
/// The node's network namespace, for the socket hooks.
#[unsafe(no_mangle)]
pub(crate) static NETNS_COOKIE: Global<u64> = Global::new(0);

#[map]
pub(crate) static LB_FLOW4: HashMap<FlowKey<Ip4>, Flow<Ip4>> =
    HashMap::with_max_entries(1 << 18, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static LB_FLOW6: HashMap<FlowKey<Ip6>, Flow<Ip6>> =
    HashMap::with_max_entries(1 << 18, BPF_F_NO_PREALLOC);
/// Marks of pairs of addresses: see [`Presence`].
#[map]
pub(crate) static LB_MARK: Array<u32> = Array::with_max_entries(Presence::PLACES, 0);
#[map]
pub(crate) static LB_PRESENCE: Array<Presence> = Array::with_max_entries(1, 0);
#[map]
pub(crate) static LB_FRONT4: HashMap<FrontendKey<Ip4>, Frontend> =
    HashMap::with_max_entries(1 << 17, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static LB_FRONT6: HashMap<FrontendKey<Ip6>, Frontend> =
    HashMap::with_max_entries(1 << 17, BPF_F_NO_PREALLOC);
/// Which addresses have frontends: see [`Served`].
#[map]
pub(crate) static LB_SERVED4: Array<u64> = Array::with_max_entries(Served::WORDS, 0);
#[map]
pub(crate) static LB_SERVED6: Array<u64> = Array::with_max_entries(Served::WORDS, 0);
#[map]
pub(crate) static LB_SLOT4: HashMap<SlotGroupKey, SlotGroup<Ip4>> =
    HashMap::with_max_entries(1 << 19, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static LB_SLOT6: HashMap<SlotGroupKey, SlotGroup<Ip6>> =
    HashMap::with_max_entries(1 << 19, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static LB_CIDR4: LpmTrie<Ip4, u32> = LpmTrie::with_max_entries(4096, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static LB_CIDR6: LpmTrie<Ip6, u32> = LpmTrie::with_max_entries(4096, BPF_F_NO_PREALLOC);
/// `loadBalancerSourceRanges`: one means admitted.
#[map]
pub(crate) static LB_SOURCE4: LpmTrie<SourceKey<Ip4>, u32> =
    LpmTrie::with_max_entries(1 << 16, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static LB_SOURCE6: LpmTrie<SourceKey<Ip6>, u32> =
    LpmTrie::with_max_entries(1 << 16, BPF_F_NO_PREALLOC);
/// The range of all ClusterIPs.
#[map]
pub(crate) static LB_RANGE4: Array<Range<Ip4>> = Array::with_max_entries(1, 0);
#[map]
pub(crate) static LB_RANGE6: Array<Range<Ip6>> = Array::with_max_entries(1, 0);
/// First fragments: short-lived, so the least recent is the one to lose.
#[map]
pub(crate) static LB_FRAG4: LruHashMap<FragmentKey<Ip4>, Fragment> = LruHashMap::with_max_entries(1 << 12, 0);
#[map]
pub(crate) static LB_FRAG6: LruHashMap<FragmentKey<Ip6>, Fragment> = LruHashMap::with_max_entries(1 << 12, 0);
/// Fragments that wait for the first one; `Held::PER_CPU` places for each CPU, one after the other.
#[map]
pub(crate) static LB_HELD: Array<Held> = Array::with_max_entries(Held::PER_CPU, 0);
/// How many each CPU has held.
#[map]
pub(crate) static LB_HOLDS: PerCpuArray<u32> = PerCpuArray::with_max_entries(1, 0);
/// The packet that is kept safe while those that waited for it take its place.
#[map]
pub(crate) static LB_FRAME: PerCpuArray<Held> = PerCpuArray::with_max_entries(1, 0);
/// `sessionAffinity: ClientIP`.
#[map]
pub(crate) static LB_AFFINITY: HashMap<AffinityKey, Affinity> =
    HashMap::with_max_entries(1 << 17, BPF_F_NO_PREALLOC);
/// Epochs of UDP backends.
#[map]
pub(crate) static LB_EPOCH: Array<u32> = Array::with_max_entries(1 << 17, 0);
/// By interface index.
#[map]
pub(crate) static LB_DEVICE: HashMap<u32, Device> = HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);
/// Which of them masquerade: see [`Masquerading`].
#[map]
pub(crate) static LB_MASQUERADE: Array<u64> = Array::with_max_entries(Masquerading::WORDS, 0);
/// What XDP has to know of devices: see `XdpDevice::place`.
#[map]
pub(crate) static LB_XDP: Array<XdpDevice> = Array::with_max_entries(XdpDevice::PLACES, 0);
/// What carries the packets of the node's overlays.
#[map]
pub(crate) static LB_OVERLAY: Array<Overlay> = Array::with_max_entries(1, 0);
/// Where overlays send what is for an Ethernet address; mapped.
#[map]
pub(crate) static LB_VTEP: HashMap<VtepKey, Ip6> = HashMap::with_max_entries(1 << 14, BPF_F_NO_PREALLOC);
/// One bit a port: not to masquerade to.
#[map]
pub(crate) static LB_PORTS: Array<u64> = Array::with_max_entries(1024, 0);
/// Masquerade ports that were taken: see `Taken`.
#[map]
pub(crate) static LB_TAKEN: Array<u32> = Array::with_max_entries(Taken::PLACES, 0);
#[map]
pub(crate) static LB_COUNT: PerCpuArray<u64> = PerCpuArray::with_max_entries(Reason::ALL.len() as u32, 0);
/// See [`lb_common::maps::stance`].
#[map]
pub(crate) static LB_STANCE: Array<u32> = Array::with_max_entries(1, 0);
/// What the maps look like, for other versions' agents. The programs never look.
#[map]
pub(crate) static LB_LAYOUT: Array<[u8; 16 << 10]> = Array::with_max_entries(1, 0);
/// A value out of the verifier's sight: see `Kernel::launder`.
#[map]
pub(crate) static LB_SCRATCH: PerCpuArray<[u64; 16]> = PerCpuArray::with_max_entries(1, 0);
/// The latest flows on each CPU, and how many there have been: IPv4, IPv6.
#[map]
pub(crate) static LB_RECENT4: PerCpuArray<FlowKey<Ip4>> = PerCpuArray::with_max_entries(RECENT, 0);
#[map]
pub(crate) static LB_RECENT6: PerCpuArray<FlowKey<Ip6>> = PerCpuArray::with_max_entries(RECENT, 0);
#[map]
pub(crate) static LB_BEGUN: PerCpuArray<u32> = PerCpuArray::with_max_entries(2, 0);
/// How many flows each CPU remembers.
pub(crate) const RECENT: u32 = 2048;
/// Flows that are being made up: see `Tables::draft`.
#[map]
pub(crate) static LB_DRAFT4: PerCpuArray<Flow<Ip4>> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub(crate) static LB_DRAFT6: PerCpuArray<Flow<Ip6>> = PerCpuArray::with_max_entries(1, 0);
/// Names of Services, for tools. The programs never look.
#[map]
pub(crate) static LB_NAME: HashMap<u32, ServiceName> = HashMap::with_max_entries(1 << 17, BPF_F_NO_PREALLOC);
/// What the socket hooks remember of sockets.
#[map]
pub(crate) static LB_SOCKET: LruHashMap<SocketKey, SocketPeer> = LruHashMap::with_max_entries(1 << 15, 0);
/// The node's network namespace cookie, as learned, and the socket to learn it from (kernels before 5.14).
#[map]
pub(crate) static LB_NETNS: Array<u64> = Array::with_max_entries(2, 0);

/// The maps of one family.
pub(crate) trait Maps: Addr {
    /// Length of a `struct bpf_sock_tuple`, which is what a [`FlowKey`] begins with.
    const TUPLE: u32;
    fn flows() -> &'static HashMap<FlowKey<Self>, Flow<Self>>;
    fn frontends() -> &'static HashMap<FrontendKey<Self>, Frontend>;
    fn served() -> &'static Array<u64>;
    fn slots() -> &'static HashMap<SlotGroupKey, SlotGroup<Self>>;
    fn cidrs() -> &'static LpmTrie<Self, u32>;
    fn sources() -> &'static LpmTrie<SourceKey<Self>, u32>;
    fn range() -> &'static Array<Range<Self>>;
    fn fragments() -> &'static LruHashMap<FragmentKey<Self>, Fragment>;
    fn draft() -> &'static PerCpuArray<Flow<Self>>;
    fn recent() -> &'static PerCpuArray<FlowKey<Self>>;
}

macro_rules! maps {
    ($addr:ty, $tuple:literal, $flows:ident, $fronts:ident, $served:ident, $slots:ident, $cidrs:ident, $sources:ident, $range:ident,
     $fragments:ident, $draft:ident, $recent:ident) => {
        impl Maps for $addr {
            const TUPLE: u32 = $tuple;

            #[inline(always)]
            fn flows() -> &'static HashMap<FlowKey<Self>, Flow<Self>> {
                &$flows
            }

            #[inline(always)]
            fn frontends() -> &'static HashMap<FrontendKey<Self>, Frontend> {
                &$fronts
            }

            #[inline(always)]
            fn served() -> &'static Array<u64> {
                &$served
            }

            #[inline(always)]
            fn slots() -> &'static HashMap<SlotGroupKey, SlotGroup<Self>> {
                &$slots
            }

            #[inline(always)]
            fn cidrs() -> &'static LpmTrie<Self, u32> {
                &$cidrs
            }

            #[inline(always)]
            fn sources() -> &'static LpmTrie<SourceKey<Self>, u32> {
                &$sources
            }

            #[inline(always)]
            fn range() -> &'static Array<Range<Self>> {
                &$range
            }

            #[inline(always)]
            fn fragments() -> &'static LruHashMap<FragmentKey<Self>, Fragment> {
                &$fragments
            }

            #[inline(always)]
            fn draft() -> &'static PerCpuArray<Flow<Self>> {
                &$draft
            }

            #[inline(always)]
            fn recent() -> &'static PerCpuArray<FlowKey<Self>> {
                &$recent
            }
        }
    };
}

maps!(
    Ip4, 12, LB_FLOW4, LB_FRONT4, LB_SERVED4, LB_SLOT4, LB_CIDR4, LB_SOURCE4, LB_RANGE4, LB_FRAG4, LB_DRAFT4,
    LB_RECENT4
);
maps!(
    Ip6, 36, LB_FLOW6, LB_FRONT6, LB_SERVED6, LB_SLOT6, LB_CIDR6, LB_SOURCE6, LB_RANGE6, LB_FRAG6, LB_DRAFT6,
    LB_RECENT6
);

/// What more than one kind of programs ask, for the type that stands for the kind. (The traits are another crate's: they
/// cannot be implemented for all types that are of a kind.)
macro_rules! by_tables {
    ($around:ty $(, const $constant:ident: $type:ty)?) => {
        impl$(<const $constant: $type>)? lb_common::datapath::Context for $around {
            #[inline(always)]
            fn now(&self) -> u32 {
                crate::tables::now()
            }

            #[inline(always)]
            fn count(&self, reason: lb_common::datapath::Reason) {
                crate::tables::count(reason);
            }

            #[inline(always)]
            fn backend_epoch(&self, id: u32) -> u32 {
                crate::tables::backend_epoch(id)
            }
        }

        impl<A: crate::tables::Maps $(, const $constant: $type)?> lb_common::datapath::Flows<A> for $around {
            #[inline(always)]
            fn flow(
                &self,
                key: &lb_common::maps::FlowKey<A>,
            ) -> Option<lb_common::datapath::FlowRef<'_, A>> {
                crate::tables::flow(key)
            }

            #[inline(always)]
            fn put_flow(
                &self,
                key: &lb_common::maps::FlowKey<A>,
                flow: &lb_common::maps::Flow<A>,
                how: lb_common::datapath::Put,
            ) -> Result<(), lb_common::datapath::PutError> {
                crate::tables::put_flow(key, flow, how)
            }
        }
    };
}
pub(crate) use by_tables;

#[inline(always)]
pub(crate) fn flow<'a, A: Maps>(key: &FlowKey<A>) -> Option<FlowRef<'a, A>> {
    // SAFETY: map values outlive the program's run (RCU), also when removed meanwhile.
    let at = key.in_words(|key| A::flows().get_ptr_mut(key));
    at.and_then(NonNull::new).map(|at| unsafe { FlowRef::new(at) })
}

/// A function of its own: the hooks' stack is full.
#[inline(never)]
pub(crate) fn may_have_flows<A: Maps>(key: &FlowKey<A>) -> bool {
    match (LB_PRESENCE.get(0), LB_MARK.get(key.mark())) {
        (Some(presence), Some(mark)) => presence.may_be(*mark),
        _ => true,
    }
}

/// See [`Presence`].
#[inline(always)]
fn mark<A: Maps>(key: &FlowKey<A>) {
    if let Some(presence) = LB_PRESENCE.get(0)
        && let Some(mark) = LB_MARK.get_ptr_mut(key.mark())
    {
        // SAFETY: a word of the map, written at once; it is left alone if nothing changes, because all processors read it.
        unsafe {
            if *mark != presence.round {
                *mark = presence.round;
            }
        }
    }
}

#[inline(always)]
pub(crate) fn put_flow<A: Maps>(key: &FlowKey<A>, flow: &Flow<A>, how: Put) -> Result<(), PutError> {
    let flags = match how {
        Put::New => aya_ebpf::bindings::BPF_NOEXIST,
        Put::Any => aya_ebpf::bindings::BPF_ANY,
    };
    const EEXIST: i32 = -17;
    mark(key);
    A::flows().insert(key, flow, u64::from(flags)).map_err(|e| match e {
        EEXIST => PutError::Taken,
        _ => PutError::Full,
    })
}

#[inline(always)]
pub(crate) fn may_be_served<A: Maps>(addr: A) -> bool {
    let bit = Served::bit(addr);
    A::served().get(bit.word).is_none_or(|word| bit.is_in(*word))
}

#[inline(always)]
pub(crate) fn frontend<A: Maps>(key: &FrontendKey<A>) -> Option<&'static Frontend> {
    // SAFETY: without preallocation an element is never reused under a reader.
    key.in_words(|key| unsafe { A::frontends().get(key) })
}

#[inline(always)]
pub(crate) fn slot_group<A: Maps>(key: &SlotGroupKey) -> Option<&'static SlotGroup<A>> {
    // SAFETY: as above.
    unsafe { A::slots().get(key) }
}

#[inline(always)]
pub(crate) fn backend_epoch(id: u32) -> u32 {
    LB_EPOCH.get(id).copied().unwrap_or(0)
}

#[inline(always)]
pub(crate) fn affinity(key: &AffinityKey) -> Option<&'static Affinity> {
    // SAFETY: as above.
    unsafe { LB_AFFINITY.get(key) }
}

#[inline(always)]
pub(crate) fn put_affinity(key: &AffinityKey, affinity: &Affinity) -> bool {
    LB_AFFINITY.insert(key, affinity, 0).is_ok()
}

#[inline(always)]
pub(crate) fn count(reason: Reason) {
    if let Some(counter) = LB_COUNT.get_ptr_mut(reason as u32) {
        // SAFETY: this CPU's own counter.
        unsafe { *counter += 1 };
    }
}

/// Seconds of the monotonic clock.
#[inline(always)]
pub(crate) fn now() -> u32 {
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
