//! The maps. Their sizes here are defaults; the agent sets them when it creates the maps, and pins them.

use aya_ebpf::Global;
use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray};
use lb_common::addr::{Ip4, Ip6};
use lb_common::datapath::Reason;
use lb_common::maps::{
    Device, Flow, FlowKey, Frontend, FrontendKey, ServiceName, Slot, SlotKey, SocketKey, SocketPeer,
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
#[map]
pub(crate) static LB_FRONT4: HashMap<FrontendKey<Ip4>, Frontend> =
    HashMap::with_max_entries(1 << 17, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static LB_FRONT6: HashMap<FrontendKey<Ip6>, Frontend> =
    HashMap::with_max_entries(1 << 17, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static LB_SLOT4: HashMap<SlotKey, Slot<Ip4>> =
    HashMap::with_max_entries(1 << 20, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static LB_SLOT6: HashMap<SlotKey, Slot<Ip6>> =
    HashMap::with_max_entries(1 << 20, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static LB_CIDR4: LpmTrie<Ip4, u32> = LpmTrie::with_max_entries(4096, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static LB_CIDR6: LpmTrie<Ip6, u32> = LpmTrie::with_max_entries(4096, BPF_F_NO_PREALLOC);
/// Epochs of UDP backends.
#[map]
pub(crate) static LB_EPOCH: Array<u32> = Array::with_max_entries(1 << 17, 0);
/// By interface index.
#[map]
pub(crate) static LB_DEVICE: HashMap<u32, Device> = HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);
/// One bit a port: not to masquerade to.
#[map]
pub(crate) static LB_PORTS: Array<u64> = Array::with_max_entries(1024, 0);
#[map]
pub(crate) static LB_COUNT: PerCpuArray<u64> = PerCpuArray::with_max_entries(Reason::ALL.len() as u32, 0);
/// A value out of the verifier's sight: see `Kernel::launder`.
#[map]
pub(crate) static LB_SCRATCH: PerCpuArray<[u64; 16]> = PerCpuArray::with_max_entries(1, 0);
/// Names of Services, for tools. The programs never look.
#[map]
pub(crate) static LB_NAME: HashMap<u32, ServiceName> = HashMap::with_max_entries(1 << 17, BPF_F_NO_PREALLOC);
/// What the socket hooks remember of sockets.
#[map]
pub(crate) static LB_SOCKET: LruHashMap<SocketKey, SocketPeer> = LruHashMap::with_max_entries(1 << 15, 0);
/// The node's network namespace cookie, as learned, and the socket to learn it from (kernels before 5.14).
#[map]
pub(crate) static LB_NETNS: Array<u64> = Array::with_max_entries(2, 0);
