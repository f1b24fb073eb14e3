//! The logic of the programs that packets meet.
//!
//! One rule: an ingress hook may rewrite a packet's destination, an egress hook its source; nothing else. See
//! `docs/design.md`. Generic over the family ([`Addr`]), the packet ([`Packet`]) and what surrounds it ([`Kernel`]).

mod affinity;
mod choose;
mod egress;
mod enter;
mod fragments;
mod icmp_error;
mod ingress;
mod masquerade;
mod masqueraded;
mod overlay;
mod parse;
mod ports;
mod reclaim;
mod redirect;
mod reject;
mod rewrite;
#[cfg(test)]
mod tests;
mod transit;

use crate::addr::NetPort;
use crate::checksum::Sum;
use crate::maps::{
    Addr, Affinity, AffinityKey, Device, DeviceIndex, Flow, FlowKey, Fragment, FragmentKey, Frontend,
    FrontendKey, Overlay, Range, Side, Slot, SlotGroup, SlotGroupKey, SlotKey,
};
use bytemuck::Pod;
use core::marker::PhantomData;
use core::ptr::NonNull;

pub use egress::egress;
pub use ingress::ingress;
pub use parse::{ETH, Wire};
pub use redirect::{ROUTED, admitted, route};
pub use reject::{Reshape, reject};
pub use transit::{Both, Driver, NextHop, Query, RawPacket, Routes, Sent, transit};

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// On its way, rewritten or not.
    Pass,
    /// Nothing that is known here: if another version's program is behind, it may know more.
    Leave,
    /// The same, and to a backend that may be behind the bridge that the packet was sent to: if so, the bridge can carry it.
    Bridge,
    /// Gone, and counted under this reason.
    Drop(Reason),
    /// Answered with a TCP reset or an ICMP port unreachable, which replaces it and leaves where it came in.
    Reject(Reason),
}

/// A [`Verdict`] in one register: BPF functions that are not inlined can return no more.
///
/// The paths that are not every packet's are functions of their own, so that their variables do not add up on the
/// 512-byte stack.
pub type Outcome = u32;

impl Verdict {
    /// As [`Outcome`].
    #[inline(always)]
    pub(crate) const fn raw(self) -> Outcome {
        match self {
            Self::Pass => 0,
            Self::Leave => 0x800,
            Self::Bridge => 0x300,
            Self::Drop(reason) => 0x100 | reason as u32,
            Self::Reject(reason) => 0x200 | reason as u32,
        }
    }

    /// From [`Outcome`].
    #[inline(always)]
    pub(crate) fn from_raw(raw: Outcome) -> Self {
        let reason = Reason::from_index(raw & 0xff);
        match raw & 0x300 {
            0x100 => Self::Drop(reason),
            0x200 => Self::Reject(reason),
            _ if raw == Self::Leave.raw() => Self::Leave,
            0x300 => Self::Bridge,
            _ => Self::Pass,
        }
    }
}

/// Why a packet was dropped, or what else happened that is worth a counter: the index of the per-CPU counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Reason {
    /// No endpoint anywhere: rejected.
    NoEndpoint = 0,
    /// A `Local` policy and no endpoint here: dropped.
    NoLocalEndpoint,
    /// Sent to a port that the ClusterIP does not have: rejected.
    NoSuchPort,
    /// The client is not in `loadBalancerSourceRanges`: dropped.
    SourceRange,
    /// The flow table is full: a new flow was dropped.
    FlowTableFull,
    /// No free port to masquerade to: dropped.
    MasqueradePortsExhausted,
    /// The device has no address of the family to masquerade to: dropped.
    NoMasqueradeAddress,
    /// A reply to a masquerade port whose flow is not known: dropped, so that the node does not reset it.
    UnknownMasquerade,
    /// A frontend's slot was missing twice: dropped. Must stay zero.
    SlotMissing,
    /// Another flow has the same tuple after translation: dropped.
    Collision,
    /// A checksum or store helper failed, or a header was cut short: dropped.
    Malformed,
    /// The kernel would not make room for a rejection: dropped.
    RejectFailed,
    /// The first fragment of the datagram was dropped: so were the others.
    FragmentDropped,
    /// The flow was being handed over to netfilter at that moment: dropped.
    HandedOver,
    /// Not dropped: a mid-flow TCP packet to a frontend without a flow was left to the host.
    MidFlowPassed,
    /// Not dropped: a later fragment came without a first one and was left to the host.
    FragmentPassed,
    /// Not dropped: a fragment has to wait for the first one.
    FragmentHeld,
    /// Not dropped: a lost flow entry was made again from another.
    Repaired,
    /// Not dropped: a new flow was entered.
    NewFlow,
    /// Not dropped: a UDP flow left a backend that is gone.
    BackendGone,
    /// Not dropped: a flow that is over was removed for a new one, because the table was full.
    Reclaimed,
    /// Not dropped: XDP sent a packet on, past the tc hooks.
    XdpForwarded,
    /// Not dropped: XDP knew the packet's flow, but left it to the tc hooks.
    XdpLeft,
    /// Not dropped: packets of a new flow are redirected to pods from now on.
    Redirected,
}

impl Reason {
    /// All of them, in the counters' order.
    pub const ALL: [Self; 24] = [
        Self::NoEndpoint,
        Self::NoLocalEndpoint,
        Self::NoSuchPort,
        Self::SourceRange,
        Self::FlowTableFull,
        Self::MasqueradePortsExhausted,
        Self::NoMasqueradeAddress,
        Self::UnknownMasquerade,
        Self::SlotMissing,
        Self::Collision,
        Self::Malformed,
        Self::RejectFailed,
        Self::FragmentDropped,
        Self::HandedOver,
        Self::MidFlowPassed,
        Self::FragmentPassed,
        Self::FragmentHeld,
        Self::Repaired,
        Self::NewFlow,
        Self::BackendGone,
        Self::Reclaimed,
        Self::XdpForwarded,
        Self::XdpLeft,
        Self::Redirected,
    ];

    /// From the counter's index.
    #[inline(always)]
    pub const fn from_index(index: u32) -> Self {
        // A match, not a look-up in a table: constant data costs a map look-up in BPF.
        match index {
            0 => Self::NoEndpoint,
            1 => Self::NoLocalEndpoint,
            2 => Self::NoSuchPort,
            3 => Self::SourceRange,
            4 => Self::FlowTableFull,
            5 => Self::MasqueradePortsExhausted,
            6 => Self::NoMasqueradeAddress,
            7 => Self::UnknownMasquerade,
            8 => Self::SlotMissing,
            9 => Self::Collision,
            11 => Self::RejectFailed,
            12 => Self::FragmentDropped,
            13 => Self::HandedOver,
            14 => Self::MidFlowPassed,
            15 => Self::FragmentPassed,
            16 => Self::FragmentHeld,
            17 => Self::Repaired,
            18 => Self::NewFlow,
            19 => Self::BackendGone,
            20 => Self::Reclaimed,
            21 => Self::XdpForwarded,
            22 => Self::XdpLeft,
            23 => Self::Redirected,
            _ => Self::Malformed,
        }
    }

    /// The name in metrics and tools.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoEndpoint => "no_endpoint",
            Self::NoLocalEndpoint => "no_local_endpoint",
            Self::NoSuchPort => "no_such_port",
            Self::SourceRange => "source_range",
            Self::FlowTableFull => "flow_table_full",
            Self::MasqueradePortsExhausted => "masquerade_ports_exhausted",
            Self::NoMasqueradeAddress => "no_masquerade_address",
            Self::UnknownMasquerade => "unknown_masquerade",
            Self::SlotMissing => "slot_missing",
            Self::Collision => "collision",
            Self::Malformed => "malformed",
            Self::RejectFailed => "reject_failed",
            Self::FragmentDropped => "fragment_dropped",
            Self::HandedOver => "handed_over",
            Self::MidFlowPassed => "mid_flow_passed",
            Self::FragmentPassed => "fragment_passed",
            Self::FragmentHeld => "fragment_held",
            Self::Repaired => "repaired",
            Self::NewFlow => "new_flow",
            Self::BackendGone => "backend_gone",
            Self::Reclaimed => "reclaimed",
            Self::XdpForwarded => "xdp_forwarded",
            Self::XdpLeft => "xdp_left",
            Self::Redirected => "redirected",
        }
    }

    /// Whether packets counted here are gone.
    pub const fn is_drop(self) -> bool {
        (self as u32) < Self::MidFlowPassed as u32
    }
}

/// A packet that starts with an Ethernet header. Offsets are from its first byte.
pub trait Packet {
    /// Reads at an offset known at compile time.
    fn read<T: Pod>(&self, offset: usize) -> Option<T>;
    /// The same of the packet's linear part only, in which everything is up to what was written last: less code, and less stack.
    fn linear<T: Pod>(&self, offset: usize) -> Option<T> {
        self.read(offset)
    }
    /// Reads at any offset.
    fn load<T: Pod>(&self, offset: usize) -> Option<T>;
    /// Writes at any offset. Checksums are the caller's business.
    fn store<T: Pod>(&mut self, offset: usize, value: &T) -> Result<(), Reason>;
    /// Applies a change of the data to the IPv4 header checksum at `offset`.
    fn l3_checksum(&mut self, offset: usize, change: Sum) -> Result<(), Reason>;
    /// Applies a change to the transport checksum at `offset`. Knows that packets not yet checksummed by the
    /// hardware (`CHECKSUM_PARTIAL`) hold only the pseudo header's sum there.
    fn l4_checksum(&mut self, offset: usize, change: Sum, of: Covered) -> Result<(), Reason>;
}

/// What part of the data covered by a transport checksum a change was made to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Covered {
    /// An address, which is in the pseudo header.
    pub pseudo_header: bool,
    /// A checksum of zero means that there is none (UDP over IPv4).
    pub zero_is_none: bool,
}

/// What every program has around it.
pub trait Context {
    /// Seconds of the monotonic clock, cheap.
    fn now(&self) -> u32;
    /// Adds one to a counter.
    fn count(&self, reason: Reason);
    /// The present epoch of a liveness entry.
    fn backend_epoch(&self, id: u32) -> u32;
}

/// The flow table of one family.
pub trait Flows<A: Addr>: Context {
    /// Looks a flow entry up.
    fn flow(&self, key: &FlowKey<A>) -> Option<FlowRef<'_, A>>;
    /// Enters a flow entry.
    fn put_flow(&self, key: &FlowKey<A>, flow: &Flow<A>, how: Put) -> Result<(), PutError>;
}

/// Where the logic of the tc hooks meets the maps and helpers.
pub trait Kernel: Context {
    /// One of [`crate::maps::stance`].
    fn stance(&self) -> u32;
    /// Seed of all hashes; the same for the life of the node, so that choices can be made again.
    fn hash_seed(&self) -> u32;
    /// What carries the packets of the node's overlays.
    fn overlay(&self) -> Option<&Overlay>;
    /// First and last port to masquerade to, host order.
    fn masquerade_ports(&self) -> (u16, u16);
    /// The device that the hook is on.
    fn device(&self) -> Option<&Device>;
    /// Whether that device may have [`Device::MASQUERADE`].
    fn may_masquerade(&self) -> bool;
    /// Its index.
    fn device_index(&self) -> u32;
    /// Another device that is served.
    fn device_at(&self, index: u32) -> Option<&Device>;
    /// Whether packets may be redirected at all.
    fn redirects(&self) -> bool;
    /// The present packet, if it passes, is rewritten at both ends for the pod behind that device: into its own network
    /// namespace at once, if it is [`admitted`]. With [`ROUTED`]: out at once by the device that [`route`] says. Otherwise it
    /// goes on as what passes does.
    fn redirect(&self, to: u32);
    /// Whether the node reserves that port (host order).
    fn port_reserved(&self, port: u16) -> bool;
    /// Notes that a masquerade port was taken for a flow.
    fn note_taken(&self, taken: Taken);
    /// Whether that was noted, and nothing in its place since.
    fn was_taken(&self, taken: Taken) -> bool;
    /// What a client was sent to last.
    fn affinity(&self, key: &AffinityKey) -> Option<&Affinity>;
    /// Remembers it. False if there is no room.
    fn put_affinity(&self, key: &AffinityKey, affinity: &Affinity) -> bool;
    /// Keeps a packet that has to wait for another, behind the one with the number `previous` (zero for none). Its
    /// number, or `None` if it is too large.
    fn hold<P: Packet>(&self, packet: &mut P, previous: u32) -> Option<u32>;
    /// Sends that packet and those before it as if they came now: in, or out, by this hook's device. Leaves `packet` as
    /// it is.
    fn release<P: Packet>(&self, packet: &mut P, last: u32, incoming: bool);
    /// The same value, but the verifier does not know how it came about: one state to verify from there on, not one for
    /// each way through the parser. One value at a time; `None` only in theory.
    #[inline(always)]
    fn launder<'a, T: Copy>(&'a self, value: &'a T) -> Option<&'a T> {
        Some(value)
    }
    /// The same for a number, beside whatever [`Self::launder`] keeps: one that a search has found, say, of which the verifier
    /// would follow each step at which the search may end.
    #[inline(always)]
    fn launder_number(&self, number: u32) -> u32 {
        number
    }
}

/// The maps and helpers of one family.
pub trait Tables<A: Addr>: Kernel + Flows<A> + Apart<A> {
    /// A place to make a flow up in before it is entered: there is one, and little room on the stack.
    fn draft(&self) -> Option<FlowRef<'_, A>>;
    /// Remembers a new flow by its [`Side::Forward`] key, in place of the oldest that is remembered.
    fn remember(&self, forward: &FlowKey<A>);
    /// The flow that will be forgotten after so many more.
    fn old_flow(&self, after: u32) -> Option<&FlowKey<A>>;
    /// Whether there may be an entry between those two addresses, in either direction. What is entered is found from then on.
    fn may_have_flows(&self, key: &FlowKey<A>) -> bool;
    /// Removes a flow entry if it is there.
    fn remove_flow(&self, key: &FlowKey<A>);
    /// Whether an address may have frontends. What is entered is found from then on.
    fn may_be_served(&self, addr: A) -> bool;
    /// Looks a frontend up.
    fn frontend(&self, key: &FrontendKey<A>) -> Option<&Frontend>;
    /// Looks a group of slots up.
    fn slot_group(&self, key: &SlotGroupKey) -> Option<&SlotGroup<A>>;
    /// Looks a slot up.
    #[inline(always)]
    fn slot(&self, key: &SlotKey) -> Option<&Slot<A>> {
        let (group, place) = key.group();
        self.slot_group(&group)?.slots.get(place)
    }
    /// The bits of [`crate::maps::cidr`] that hold for an address.
    fn cidr(&self, addr: A) -> u32;
    /// Whether a socket of the node would take a packet with this tuple.
    fn socket_wants(&self, key: &FlowKey<A>) -> bool;
    /// Whether a TCP socket in that network namespace (its id as the node has it) has a connection with this tuple, as
    /// its peer sends.
    fn connected(&self, key: &FlowKey<A>, netns: u32) -> bool;
    /// The device by which the kernel sends the present packet on, if it goes between those addresses, fits through and the
    /// next hop's address is known; zero otherwise. That address is kept for who sends the packet there.
    fn route(&self, src: A, dst: A) -> u32;
    /// The range of all ClusterIPs.
    fn cluster_ips(&self) -> Option<&Range<A>>;
    /// Whether a Service port's `loadBalancerSourceRanges` admit a client.
    fn source_admitted(&self, service: u32, client: A) -> bool;
    /// A datagram's first fragment.
    fn fragment(&self, key: &FragmentKey<A>) -> Option<&Fragment>;
    /// Remembers it. Best effort: the table is an LRU one.
    fn put_fragment(&self, key: &FragmentKey<A>, fragment: &Fragment);
}

/// Work on the draft, which is all that it goes by: what a verifier can look at by itself, once, and not once for each way
/// that leads to it. Where there is a verifier, each calls the function of the same name in [`apart`], as a function of its
/// own.
pub trait Apart<A: Addr> {
    /// Enters it as one of the flow's [`Side`]s.
    fn put_draft(&self, side: u32) -> Outcome;
    /// Takes a free port of its masquerade address.
    fn free_port(&self) -> Outcome;
    /// Takes a port from a connection that is over.
    fn port_of_closed(&self) -> Outcome;
    /// Finds the port that it has already.
    fn own_port(&self) -> Outcome;
}

/// What [`Apart`] is.
pub mod apart {
    pub use super::enter::put_draft;
    pub use super::masquerade::{free_port, own_port, port_of_closed};
}

/// That a masquerade port was taken for a flow, in a table of fixed size: a place, and what tells it from others that
/// would be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Below [`Taken::PLACES`].
    pub place: u32,
    /// Not zero.
    pub tag: u32,
}

impl Taken {
    /// Size of the table.
    pub const PLACES: u32 = 1 << 16;

    /// The flow by the key of its [`Side::Back`].
    #[inline(always)]
    pub(crate) fn of<A: Addr, K: Kernel>(kernel: &K, back: &FlowKey<A>) -> Self {
        let seed = kernel.hash_seed();
        Self { place: back.hash(seed) % Self::PLACES, tag: back.hash(!seed) | 1 }
    }
}

/// How to enter a flow entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// Only if the key is free.
    New,
    /// Whatever was there.
    Any,
}

/// Why an entry was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutError {
    /// The key is taken.
    Taken,
    /// The table is full.
    Full,
}

/// A flow entry in place. Other CPUs may read and write it meanwhile: each field is a word of its own, and every
/// value that can be met is a valid one.
#[derive(Clone, Copy)]
pub struct FlowRef<'a, A> {
    at: NonNull<Flow<A>>,
    table: PhantomData<&'a Flow<A>>,
}

impl<'a, A: Addr> FlowRef<'a, A> {
    /// # Safety
    /// `at` points to a flow entry that stays readable and writable for `'a`.
    #[inline(always)]
    pub unsafe fn new(at: NonNull<Flow<A>>) -> Self {
        Self { at, table: PhantomData }
    }

    /// The entry.
    #[inline(always)]
    pub fn get(&self) -> &'a Flow<A> {
        // SAFETY: see `new`.
        unsafe { self.at.as_ref() }
    }

    /// Notes that a packet went by. Writes once a second and on a change, so that an established flow's cache line
    /// stays shared; returns whether it was the first of this second.
    #[inline(always)]
    pub fn seen(&self, now: u32, state: u8) -> bool {
        let flow = self.at.as_ptr();
        // SAFETY: see `new`; a lost race between two packets of one flow costs at most a second of its lifetime.
        unsafe {
            let first = (*flow).last_seen != now;
            if first {
                (*flow).last_seen = now;
            }
            let old = (*flow).state;
            let begins = state & Flow::<A>::SYN != 0 && old & Flow::<A>::CLOSING != 0;
            let new = (if begins { 0 } else { old } | state) & !Flow::<A>::SYN;
            if new != old {
                (*flow).state = new;
            }
            first
        }
    }

    /// Makes the draft up.
    #[inline(always)]
    pub fn write(&self, flow: Flow<A>) {
        // SAFETY: see `new`.
        unsafe { self.at.as_ptr().write(flow) }
    }

    /// Changes the draft's side, and says under which key it is entered then.
    #[inline(always)]
    pub fn turn(&self, side: Side) -> FlowKey<A> {
        // SAFETY: see `new`.
        unsafe { (*self.at.as_ptr()).side = side as u8 };
        self.get().key(side)
    }

    /// Makes the draft [`Side::Back`] of a flow that is masqueraded to `addr`, at the device with that index.
    #[inline(always)]
    pub fn masquerade(&self, addr: A, device: u32) {
        let flow = self.at.as_ptr();
        // SAFETY: see `new`.
        unsafe {
            (*flow).masq = addr;
            (*flow).masq_device = device as DeviceIndex;
            (*flow).flags = (*flow).flags & Flow::<A>::DNAT | Flow::<A>::MASQ_DONE;
            (*flow).side = Side::Back as u8;
            (*flow).state = 0;
        }
    }

    /// The port that the draft is masqueraded to.
    #[inline(always)]
    pub fn set_masq_port(&self, port: NetPort) {
        // SAFETY: see `new`.
        unsafe { (*self.at.as_ptr()).masq_port = port };
    }

    /// Gives the draft's client another port in front of the backend.
    #[inline(always)]
    pub fn set_alias(&self, port: NetPort) {
        // SAFETY: see `new`.
        unsafe { (*self.at.as_ptr()).alias_port = port };
    }

    /// As [`Flow::with_device`] and, for zero, [`Flow::without_device`], in place.
    #[inline(always)]
    fn set_device(&self, device: u32) {
        let flow = self.at.as_ptr();
        // SAFETY: see `new`. The flag is written last where it makes the rest valid.
        unsafe {
            let flags = (*flow).flags & !(Flow::<A>::DEVICE | Flow::<A>::REDIRECT);
            let port = if device == 0 { (*flow).client_port } else { Flow::<A>::device_port(device) };
            (*flow).masq_port = port;
            (*flow).masq_device = DeviceIndex::from(device as u16);
            (*flow).flags = if device == 0 { flags } else { flags | Flow::<A>::DEVICE };
        }
    }

    #[inline(always)]
    fn set_flags(&self, flags: u8) {
        // SAFETY: see `new`.
        unsafe { (*self.at.as_ptr()).flags = flags };
    }

    /// Notes the outcome of the masquerade decision.
    #[inline(always)]
    pub fn set_masquerade(&self, flags: u8, masq: A, port: NetPort) {
        let flow = self.at.as_ptr();
        // SAFETY: see `new`. The address is written before the flag that makes it valid; packets of one flow that
        // race here come to the same result, because ports are chosen by hash.
        unsafe {
            (*flow).masq = masq;
            (*flow).masq_port = port;
            (*flow).flags = flags;
        }
    }
}
