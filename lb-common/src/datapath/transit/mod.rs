//! Established flows that only pass through this node, at the driver of the device that they come in by (XDP): both
//! rewrites at once, and on to the next hop.
//!
//! Look-ups come first and changes last: a packet that cannot be finished here, for whatever reason, goes on to the tc
//! hooks as it came. Nothing is decided here either; flows begin, move and end there.

mod overlay;
mod passage;

use super::parse::{ETH, TCP, UDP, Wire};
use super::{Context, Flows, Packet, Reason};
use crate::addr::{Ip4, Ip6, Mac};
use crate::maps::{Addr, FlowKey, XdpDevice};
use passage::Passage;

/// A packet as the driver has it, from its Ethernet header on.
pub trait RawPacket {
    /// Bytes that can be read and written.
    type Window: Packet;
    /// Length of the frame.
    fn length(&self) -> usize;
    /// So many bytes from there on, if there are as many.
    fn window(&self, from: usize, len: usize) -> Option<Self::Window>;
    /// Makes room for bytes in front, or does nothing. Windows from before do not hold any more.
    fn grow(&self, bytes: usize) -> Option<()>;
    /// Takes bytes away in front, or does nothing. Windows from before do not hold any more, but growing by as much brings
    /// the bytes back.
    fn shrink(&self, bytes: usize) -> Option<()>;
    /// Cuts what is behind so many bytes, or does nothing. Windows from before do not hold any more.
    fn trim(&self, len: usize) -> Option<()>;
}

/// A packet at the driver, and what surrounds it there.
pub trait Driver: RawPacket + Context + Copy {
    /// Index of the device that the packet came in by.
    fn arrival(&self) -> u32;
    /// What is known of a device.
    fn xdp_device(&self, index: u32) -> Option<&XdpDevice>;
    /// Where an overlay device sends what is for that address; mapped.
    fn vtep(&self, device: u32, mac: Mac) -> Option<Ip6>;
    /// Any number.
    fn random(&self) -> u32;
}

/// The kernel's routes and neighbours.
pub trait Routes<A: Addr>: Driver + Flows<A> {
    /// The way of a packet, if there is one that it fits through, and the next hop's address is known.
    fn route(&self, query: &Query<A>) -> Option<NextHop>;
}

/// Both families.
pub trait Both: Routes<Ip4> + Routes<Ip6> {}

impl<K: Routes<Ip4> + Routes<Ip6>> Both for K {}

/// What a route is asked for by.
#[derive(Clone, Copy, Debug)]
pub struct Query<A> {
    /// The packet's tuple.
    pub key: FlowKey<A>,
    /// The first word of its IP header, as in the packet.
    pub head: u32,
    /// Length of the IP packet.
    pub len: u16,
    /// The device that it comes in by; or leaves by, if it is the node's own.
    pub device: u32,
    /// Whether it is the node's own.
    pub own: bool,
}

/// Where a packet is to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// Index of the device.
    pub device: u32,
    /// The next hop's Ethernet address.
    pub dst: Mac,
    /// The device's own.
    pub src: Mac,
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// Nothing: as it came, it is for the other hooks.
    No,
    /// Ready to leave by the device with that index.
    By(u32),
    /// Changed, but not to the end: to be dropped. Must not happen.
    Lost(Reason),
}

/// A [`Sent`] in one register, as [`super::Outcome`] is a verdict. Indexes of devices have no highest bit.
type RawSent = u32;

impl Sent {
    const LOST: RawSent = 1 << 31;

    #[inline(always)]
    const fn raw(self) -> RawSent {
        match self {
            Self::No => 0,
            Self::By(device) => device,
            Self::Lost(reason) => Self::LOST | reason as u32,
        }
    }

    #[inline(always)]
    const fn from_raw(raw: RawSent) -> Self {
        match raw {
            0 => Self::No,
            raw if raw & Self::LOST != 0 => Self::Lost(Reason::from_index(raw & !Self::LOST)),
            device => Self::By(device),
        }
    }
}

const TCP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;

/// Family and protocol of what may be sent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Kind {
    Other,
    Tcp4,
    Udp4,
    Tcp6,
    Udp6,
}

impl Kind {
    /// Of a packet that begins there. More than its first bytes is not looked at.
    #[inline(always)]
    fn of<K: RawPacket>(driver: &K, from: usize) -> Self {
        // No packet that we send on is shorter.
        let Some(start) = driver.window(from, ETH + Ip4::HEADER + UDP_HEADER) else { return Self::Other };
        let proto = |offset| start.read::<u8>(ETH + offset);
        match start.read(12) {
            Some(Ip4::ETHERTYPE) => match proto(Ip4::PROTO) {
                Some(TCP) => Self::Tcp4,
                Some(UDP) => Self::Udp4,
                _ => Self::Other,
            },
            Some(Ip6::ETHERTYPE) => match proto(Ip6::PROTO) {
                Some(TCP) => Self::Tcp6,
                Some(UDP) => Self::Udp6,
                _ => Self::Other,
            },
            _ => Self::Other,
        }
    }
}

/// A packet comes in.
#[inline(always)]
pub fn transit<K: Both>(driver: K) -> Sent {
    let Some(arrival) = driver.xdp_device(driver.arrival()) else { return Sent::No };
    // Not what is for others, which a switch may show us.
    if driver.window(0, ETH).and_then(|start| start.read(0)) != Some(arrival.mac) {
        return Sent::No;
    }
    let kind = Kind::of(&driver, 0);
    let overlay = match kind {
        Kind::Udp4 => overlay::arrives::<Ip4, K>(&driver, arrival),
        Kind::Udp6 => overlay::arrives::<Ip6, K>(&driver, arrival),
        _ => None,
    };
    let Some(overlay) = overlay else { return Sent::from_raw(send_on(driver, kind, arrival, arrival.index)) };
    let around = if kind == Kind::Udp4 {
        overlay::open::<Ip4, K>(driver, overlay)
    } else {
        overlay::open::<Ip6, K>(driver, overlay)
    };
    if around == 0 {
        return Sent::No;
    }
    let inner = Kind::of(&driver, 0);
    match Sent::from_raw(send_on(driver, inner, arrival, overlay.index)) {
        // What was around it is still there.
        Sent::No if driver.grow(around as usize).is_none() => Sent::Lost(Reason::Malformed),
        sent => sent,
    }
}

#[inline(always)]
fn send_on<K: Both>(driver: K, kind: Kind, arrival: &XdpDevice, by: u32) -> RawSent {
    match kind {
        Kind::Tcp4 => through::<Ip4, K, TCP_HEADER>(driver, arrival, by),
        Kind::Udp4 => through::<Ip4, K, UDP_HEADER>(driver, arrival, by),
        Kind::Tcp6 => through::<Ip6, K, TCP_HEADER>(driver, arrival, by),
        Kind::Udp6 => through::<Ip6, K, UDP_HEADER>(driver, arrival, by),
        Kind::Other => Sent::No.raw(),
    }
}

/// A packet that came in by a device, maybe wrapped, and that has a transport header of that length.
#[inline(never)]
fn through<A: Wire, K: Both + Routes<A>, const TRANSPORT: usize>(
    driver: K,
    arrival: &XdpDevice,
    by: u32,
) -> RawSent {
    let len = ETH + A::HEADER + TRANSPORT;
    let Some(window) = driver.window(0, len) else { return Sent::No.raw() };
    let Some(passage) = Passage::<A, TRANSPORT>::find(&window, &driver, driver.length()) else {
        return Sent::No.raw();
    };
    let Some(hop) = driver.route(&passage.query(&window, by)) else { return left(&driver) };
    let Some(device) = leaves_by(&driver, arrival, hop.device) else { return left(&driver) };
    if device.flags & XdpDevice::OVERLAY != 0 {
        return overlay::send_into::<A, K, TRANSPORT>(driver, arrival, device, &passage, &hop);
    }
    if !device.sends(arrival.index) {
        return left(&driver);
    }
    passage.seen(&driver);
    let mut window = window;
    sent(hop.device, passage.write(&mut window, &hop))
}

#[inline(always)]
fn leaves_by<'a, K: Driver>(driver: &'a K, arrival: &'a XdpDevice, index: u32) -> Option<&'a XdpDevice> {
    if index == arrival.index { Some(arrival) } else { driver.xdp_device(index) }
}

/// A flow of ours, but this packet is for the other hooks.
#[inline(always)]
fn left<K: Context>(kernel: &K) -> RawSent {
    kernel.count(Reason::XdpLeft);
    Sent::No.raw()
}

#[inline(always)]
fn sent(device: u32, written: Result<(), Reason>) -> RawSent {
    match written {
        Ok(()) => Sent::By(device),
        Err(reason) => Sent::Lost(reason),
    }
    .raw()
}
