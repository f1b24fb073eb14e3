//! vxlan (RFC 7348) as the kernel does it: into an overlay, and out of one.

use super::passage::Passage;
use super::{Both, Driver, NextHop, Packet, Query, RawSent, Routes, Sent, UDP_HEADER, leaves_by, left, sent};
use crate::addr::{Ip4, Ip6, Mac, NetPort};
use crate::affinity::scale;
use crate::checksum::Sum;
use crate::datapath::parse::{ETH, UDP, Wire, pseudo_header, sum_words};
use crate::datapath::{Context, Reason};
use crate::maps::{Addr, FlowKey, XdpDevice};
use bytemuck::{Pod, Zeroable};

/// The UDP header, and vxlan's.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Wrapping {
    sport: NetPort,
    dport: NetPort,
    len: u16,
    checksum: u16,
    flags: u32,
    vni: u32,
}

/// "The identifier is valid", and nothing else is said.
const VALID: u32 = 0x0800_0000u32.to_be();

/// All that comes before the inner packet.
const fn outside<B: Wire>() -> usize {
    ETH + B::HEADER + size_of::<Wrapping>()
}

/// "Congestion experienced" (RFC 3168). The kernel has to tell the inner packet, or drop it.
const CONGESTED: u8 = 3;
/// "Capable of it."
const CAPABLE: u8 = 2;

/// The overlay that a UDP packet is from, by its port.
#[inline(always)]
pub(super) fn arrives<'a, B: Wire, K: Driver>(driver: &'a K, arrival: &XdpDevice) -> Option<&'a XdpDevice> {
    let index = if B::IS_V4 { arrival.overlay4 } else { arrival.overlay6 };
    if index == 0 {
        return None;
    }
    let overlay = driver.xdp_device(index)?;
    let udp = driver.window(ETH + B::HEADER, UDP_HEADER)?;
    (udp.read::<NetPort>(2)? == overlay.port).then_some(overlay)
}

/// Takes off what is around a packet that came by the overlay. How much that was; nothing if anything is unusual.
#[inline(never)]
pub(super) fn open<B: Wire, K: Driver>(driver: K, overlay: &XdpDevice) -> u32 {
    let around = outside::<B>();
    match is_for_us::<B, K>(&driver, overlay) {
        Some(true) if driver.shrink(around).is_some() => around as u32,
        _ => 0,
    }
}

/// Whether a packet is of this overlay and for us, and all of it as the kernel's own devices send it.
#[inline(always)]
fn is_for_us<B: Wire, K: Driver>(driver: &K, overlay: &XdpDevice) -> Option<bool> {
    let at = outside::<B>();
    let window = driver.window(0, at + ETH + Ip4::HEADER + UDP_HEADER)?;
    let (len, header) = (B::plain(&window)?, window.read::<Wrapping>(ETH + B::HEADER)?);
    let right = B::from_mapped(overlay.local) == window.read(ETH + B::DST)
        && B::ecn(window.read(ETH)?) != CONGESTED
        && ETH + len as usize == driver.length()
        && u16::from_be(header.len) == len.wrapping_sub(B::HEADER as u16)
        && header.flags == VALID
        && header.vni == overlay.vni
        && window.read(at) == Some(overlay.mac)
        && is_current(driver, overlay);
    // The outer checksum, which is not looked at here, may be all that there is. In IPv6 there has to be one.
    let checked = if header.checksum == 0 { B::IS_V4 } else { has_checksum(driver, at)? };
    Some(right && checked)
}

/// Whether the packet that begins there has a checksum of its own, if it is one that may be sent on.
#[inline(always)]
fn has_checksum<K: Driver>(driver: &K, at: usize) -> Option<bool> {
    let start = driver.window(at, ETH + Ip4::HEADER + UDP_HEADER)?;
    let (header, proto) = match start.read(12)? {
        Ip4::ETHERTYPE => (Ip4::HEADER, Ip4::PROTO),
        Ip6::ETHERTYPE => (Ip6::HEADER, Ip6::PROTO),
        _ => return Some(false),
    };
    if start.read::<u8>(ETH + proto)? != UDP {
        return Some(true);
    }
    Some(driver.window(at + ETH + header, UDP_HEADER)?.read::<u16>(6)? != 0)
}

/// What an agent that is away cannot keep up to date is not used for long.
#[inline(always)]
fn is_current<K: Context>(kernel: &K, overlay: &XdpDevice) -> bool {
    overlay.until.wrapping_sub(kernel.now()) <= XdpDevice::FRESH
}

/// What has to be said around a packet.
struct Outer {
    /// The inner next hop.
    to: Mac,
    /// Where that is, mapped.
    remote: Ip6,
    hop: NextHop,
    sport: NetPort,
    /// Of the UDP packet.
    len: u16,
    ecn: u8,
    /// The sum over what is inside, if the packet has to have a checksum.
    sum: Sum,
}

/// Sends a packet on into the overlay.
#[inline(always)]
pub(super) fn send_into<A: Wire, K: Both + Routes<A>, const TRANSPORT: usize>(
    driver: K,
    arrival: &XdpDevice,
    overlay: &XdpDevice,
    passage: &Passage<'_, A, TRANSPORT>,
    hop: &NextHop,
) -> RawSent {
    // A checksum over all of the packet follows from the inner one.
    let checked = overlay.flags & XdpDevice::CHECKSUM != 0;
    if checked && has_checksum(&driver, 0) != Some(true) || !without_padding::<A, K>(&driver) {
        return left(&driver);
    }
    let mut outer = Outer {
        to: hop.dst,
        remote: Ip6::default(),
        hop: *hop,
        sport: source_port(passage.ports(), overlay),
        len: 0,
        ecn: 0,
        sum: Sum(0),
    };
    let over_v4 = Ip4::from_mapped(overlay.local).is_some();
    let at = if over_v4 {
        make_room::<Ip4, K>(driver, arrival, overlay, &mut outer)
    } else {
        make_room::<Ip6, K>(driver, arrival, overlay, &mut outer)
    } as usize;
    if at == 0 {
        return left(&driver);
    }
    passage.seen(&driver);
    let Some(mut window) = driver.window(at, ETH + A::HEADER + TRANSPORT) else {
        return Sent::Lost(Reason::Malformed).raw();
    };
    let written = passage.write(&mut window, hop);
    outer.ecn = match A::ecn(window.read(ETH).unwrap_or(0)) {
        CONGESTED => CAPABLE,
        ecn => ecn,
    };
    if checked {
        outer.sum = inner_sum::<A, _, TRANSPORT>(&window);
    }
    let wrapped = if over_v4 {
        wrap::<Ip4, K>(driver, overlay, &outer)
    } else {
        wrap::<Ip6, K>(driver, overlay, &outer)
    };
    sent(outer.hop.device, if wrapped == DONE { written } else { Err(Reason::Malformed) })
}

/// Cuts what follows the IP packet, as the kernel does: Ethernet frames have a least length. Nothing is lost by it, whatever
/// becomes of the packet.
#[inline(always)]
fn without_padding<A: Wire, K: Driver>(driver: &K) -> bool {
    let len = driver.window(0, ETH + A::HEADER).and_then(|window| A::plain(&window));
    let Some(end) = len.map(|len| ETH + len as usize) else { return false };
    driver.length() == end || driver.trim(end).is_some()
}

const DONE: u32 = 0;

/// More than a device's MTU can be, with headers.
const LONGEST: usize = 0xff00;

/// Finds the way to the overlay's other end, and makes room for what has to be around the packet. How much; nothing if it
/// cannot be done.
#[inline(never)]
fn make_room<B: Wire, K: Routes<B>>(
    driver: K,
    arrival: &XdpDevice,
    overlay: &XdpDevice,
    outer: &mut Outer,
) -> u32 {
    let (around, len) = (outside::<B>(), driver.length() + size_of::<Wrapping>());
    let remote =
        driver.vtep(overlay.index, outer.to).filter(|_| len <= LONGEST && is_current(&driver, overlay));
    let Some(remote) = remote else { return 0 };
    let key = tuple::<B>(overlay, &remote, outer.sport);
    let device = if overlay.link == 0 { arrival.index } else { overlay.link };
    let query = Query { key, head: 0, len: (len + B::HEADER) as u16, device, own: overlay.link != 0 };
    let Some(hop) = driver.route(&query) else { return 0 };
    let by = leaves_by(&driver, arrival, hop.device);
    if by.is_none_or(|device| !device.sends(arrival.index)) || driver.grow(around).is_none() {
        return 0;
    }
    (outer.remote, outer.hop, outer.len) = (remote, hop, len as u16);
    around as u32
}

#[inline(always)]
fn tuple<B: Wire>(overlay: &XdpDevice, remote: &Ip6, sport: NetPort) -> FlowKey<B> {
    FlowKey {
        src: B::from_mapped(overlay.local).unwrap_or_default(),
        dst: B::from_mapped(*remote).unwrap_or_default(),
        sport,
        dport: overlay.port,
        proto: UDP,
        variant: 0,
        pad: [0; 2],
    }
}

/// Writes what is around a packet.
#[inline(never)]
fn wrap<B: Wire, K: Driver>(driver: K, overlay: &XdpDevice, outer: &Outer) -> u32 {
    let Some(mut window) = driver.window(0, outside::<B>()) else { return Reason::Malformed as u32 };
    let key = tuple::<B>(overlay, &outer.remote, outer.sport);
    let mut header = Wrapping {
        sport: key.sport,
        dport: key.dport,
        len: outer.len.to_be(),
        checksum: 0,
        flags: VALID,
        vni: overlay.vni,
    };
    if overlay.flags & XdpDevice::CHECKSUM != 0 {
        let words: [u32; 4] = bytemuck::cast(header);
        let sum = pseudo_header(&key, outer.len).plus(sum_words(&words)).plus(outer.sum);
        header.checksum = match !sum.fold() {
            0 => 0xffff,
            checksum => checksum,
        };
    }
    let id = if B::IS_V4 { driver.random() as u16 } else { 0 };
    let ip = B::carrier(key.src, key.dst, outer.len, (overlay.ttl, outer.ecn), id);
    let written = window
        .store(0, &[outer.hop.dst, outer.hop.src])
        .and_then(|()| window.store(12, &B::ETHERTYPE))
        .and_then(|()| window.store(ETH, &ip))
        .and_then(|()| window.store(ETH + B::HEADER, &header));
    if written.is_ok() { DONE } else { Reason::Malformed as u32 }
}

/// The same for all packets of a flow, so that they take one way; different for others.
#[inline(always)]
fn source_port([sport, dport]: [NetPort; 2], overlay: &XdpDevice) -> NetPort {
    let hash = (u32::from(sport.wire()) << 16 | u32::from(dport.wire())).wrapping_mul(0x9e37_79b1);
    NetPort::new(overlay.first_port.wrapping_add(scale(hash, u32::from(overlay.ports)) as u16))
}

/// The sum over a packet without a look at its payload: with its pseudo header and its own checksum, the transport part
/// sums up to nothing, and so does an IPv4 header.
#[inline(always)]
fn inner_sum<A: Wire, W: Packet, const TRANSPORT: usize>(window: &W) -> Sum {
    let ethernet: [u16; 7] = window.read(0).unwrap_or_default();
    let ethernet = ethernet.iter().fold(0, |sum, word| sum + u32::from(*word));
    let header =
        if A::IS_V4 { Sum(0) } else { window.read(ETH).map_or(Sum(0), |words| sum_words::<10>(&words)) };
    let (src, dst): (A, A) =
        (window.read(ETH + A::SRC).unwrap_or_default(), window.read(ETH + A::DST).unwrap_or_default());
    let proto = window.read(ETH + A::PROTO).unwrap_or(0);
    let key = FlowKey { src, dst, proto, ..FlowKey::default() };
    let pseudo = pseudo_header(&key, A::plain(window).unwrap_or(0).wrapping_sub(A::HEADER as u16));
    header.plus(Sum(ethernet)).plus(Sum(!pseudo.0))
}
