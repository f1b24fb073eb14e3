//! What there is to beat: the least that a program can do for a packet with the same maps and helpers. TCP and UDP
//! without options, nothing else; a packet of any other kind is dropped, so that a wrong one shows.

use aya_ebpf::bindings::{BPF_F_NO_PREALLOC, BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated as helpers;
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::HashMap;
use aya_ebpf::programs::TcContext;
use lb_common::addr::{Ip4, Ip6, NetPort};
use lb_common::checksum::update;
use lb_common::maps::{Addr, FlowKey, FrontendKey};

/// Where a destination becomes another.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct To<A> {
    addr: A,
    port: NetPort,
    pad: [u8; 2],
}

#[map]
static BARE_FLOW4: HashMap<FlowKey<Ip4>, To<Ip4>> = HashMap::with_max_entries(1 << 18, BPF_F_NO_PREALLOC);
#[map]
static BARE_FLOW6: HashMap<FlowKey<Ip6>, To<Ip6>> = HashMap::with_max_entries(1 << 18, BPF_F_NO_PREALLOC);
#[map]
static BARE_FRONT4: HashMap<FrontendKey<Ip4>, u64> = HashMap::with_max_entries(1 << 17, BPF_F_NO_PREALLOC);
#[map]
static BARE_FRONT6: HashMap<FrontendKey<Ip6>, u64> = HashMap::with_max_entries(1 << 17, BPF_F_NO_PREALLOC);

const ETHERNET: usize = 14;

trait Bare: Addr {
    /// End of the IP header.
    const IP: usize;
    /// Offsets of the destination address.
    const DST: usize;
    const PROTO: usize;
    fn flow(key: &FlowKey<Self>) -> Option<To<Self>>;
    fn front(key: &FrontendKey<Self>) -> bool;
    /// Writes the destination, and what lies between address and port, by one helper.
    fn store(ctx: &TcContext, key: &FlowKey<Self>, to: &To<Self>) -> Option<()>;
}

/// From an IPv4 header's time to live to the ports.
#[repr(C)]
struct Ends {
    ttl_and_proto: u16,
    checksum: u16,
    src: Ip4,
    dst: Ip4,
    sport: NetPort,
    dport: NetPort,
}

/// From an IPv6 header's destination to the ports.
#[repr(C, packed)]
struct End {
    dst: Ip6,
    sport: NetPort,
    dport: NetPort,
}

#[inline(always)]
fn store<T>(ctx: &TcContext, offset: usize, value: &T) -> Option<()> {
    // SAFETY: the helper reads as many bytes as it is told of.
    let result = unsafe {
        let from = (&raw const *value).cast();
        helpers::bpf_skb_store_bytes(ctx.skb.skb.cast(), offset as u32, from, size_of::<T>() as u32, 0)
    };
    (result == 0).then_some(())
}

impl Bare for Ip4 {
    const IP: usize = ETHERNET + 20;
    const DST: usize = ETHERNET + 16;
    const PROTO: usize = ETHERNET + 9;

    #[inline(always)]
    fn flow(key: &FlowKey<Self>) -> Option<To<Self>> {
        // SAFETY: nothing writes while the test runs.
        key.in_words(|key| unsafe { BARE_FLOW4.get(key) }).copied()
    }

    #[inline(always)]
    fn front(key: &FrontendKey<Self>) -> bool {
        key.in_words(|key| BARE_FRONT4.get_ptr(key)).is_some()
    }

    #[inline(always)]
    fn store(ctx: &TcContext, key: &FlowKey<Self>, to: &To<Self>) -> Option<()> {
        const AT: usize = ETHERNET + 8;
        let (data, end) = (ctx.data(), ctx.data_end());
        if data + AT + 4 > end {
            return None;
        }
        // SAFETY: within the bounds just checked; BPF loads need no alignment.
        let (ttl_and_proto, checksum) =
            unsafe { (*((data + AT) as *const u16), *((data + AT + 2) as *const u16)) };
        let checksum = update(checksum, Self::diff(key.dst, to.addr));
        let FlowKey { src, sport, .. } = *key;
        store(ctx, AT, &Ends { ttl_and_proto, checksum, src, dst: to.addr, sport, dport: to.port })
    }
}

impl Bare for Ip6 {
    const IP: usize = ETHERNET + 40;
    const DST: usize = ETHERNET + 24;
    const PROTO: usize = ETHERNET + 6;

    #[inline(always)]
    fn flow(key: &FlowKey<Self>) -> Option<To<Self>> {
        // SAFETY: as above.
        key.in_words(|key| unsafe { BARE_FLOW6.get(key) }).copied()
    }

    #[inline(always)]
    fn front(key: &FrontendKey<Self>) -> bool {
        key.in_words(|key| BARE_FRONT6.get_ptr(key)).is_some()
    }

    #[inline(always)]
    fn store(ctx: &TcContext, key: &FlowKey<Self>, to: &To<Self>) -> Option<()> {
        store(ctx, Self::DST, &End { dst: to.addr, sport: key.sport, dport: to.port })
    }
}

/// The tuple of a packet without options.
#[inline(always)]
fn parse<A: Bare>(ctx: &TcContext) -> Option<FlowKey<A>> {
    let (data, end) = (ctx.data(), ctx.data_end());
    if data + A::IP + 4 > end {
        return None;
    }
    // SAFETY: within the bounds just checked; BPF loads need no alignment.
    let key = unsafe {
        FlowKey {
            src: *((data + A::DST - size_of::<A>()) as *const A),
            dst: *((data + A::DST) as *const A),
            sport: *((data + A::IP) as *const NetPort),
            dport: *((data + A::IP + 2) as *const NetPort),
            proto: *((data + A::PROTO) as *const u8),
            variant: 0,
            pad: [0; 2],
        }
    };
    (key.proto == 6 || key.proto == 17).then_some(key)
}

#[inline(always)]
fn rewrite<A: Bare>(ctx: &TcContext) -> Option<()> {
    let key = parse::<A>(ctx)?;
    let to = A::flow(&key)?;
    let skb = ctx.skb.skb;
    let l4 = A::IP as u32 + if key.proto == 6 { 16 } else { 6 };
    let address = u64::from(A::diff(key.dst, to.addr).0);
    let (old, new) = (u64::from(key.dport.wire()), u64::from(to.port.wire()));
    // SAFETY: no pointers but the context.
    let done = unsafe {
        helpers::bpf_l4_csum_replace(skb, l4, 0, address, u64::from(BPF_F_PSEUDO_HDR)) == 0
            && helpers::bpf_l4_csum_replace(skb, l4, old, new, 2) == 0
    };
    if done { A::store(ctx, &key, &to) } else { None }
}

#[inline(always)]
fn miss<A: Bare>(ctx: &TcContext) -> Option<()> {
    let key = parse::<A>(ctx)?;
    let front = FrontendKey { addr: key.dst, port: key.dport, proto: key.proto, pad: [0; 5] };
    (A::flow(&key).is_none() && !A::front(&front)).then_some(())
}

#[inline(always)]
fn verdict(done: Option<()>) -> i32 {
    if done.is_some() { TC_ACT_UNSPEC } else { TC_ACT_SHOT }
}

/// One look-up, one rewrite of a destination.
#[classifier]
pub(crate) fn bare_rewrite4(ctx: TcContext) -> i32 {
    verdict(rewrite::<Ip4>(&ctx))
}

/// The same in IPv6.
#[classifier]
pub(crate) fn bare_rewrite6(ctx: TcContext) -> i32 {
    verdict(rewrite::<Ip6>(&ctx))
}

/// Two look-ups that find nothing.
#[classifier]
pub(crate) fn bare_miss4(ctx: TcContext) -> i32 {
    verdict(miss::<Ip4>(&ctx))
}

/// The same in IPv6.
#[classifier]
pub(crate) fn bare_miss6(ctx: TcContext) -> i32 {
    verdict(miss::<Ip6>(&ctx))
}
