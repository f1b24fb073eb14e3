//! Keys and values of the BPF maps. Pinned maps outlive the process that made them: a change of a layout is a
//! change of [`VERSION`], and the size assertions at the end make it a deliberate one.

use crate::addr::{Ip4, Ip6, Mac, NetPort};
use bytemuck::{Pod, Zeroable};

/// Version of all layouts here; part of the pin directory's name.
pub const VERSION: u32 = if cfg!(feature = "layout-next") { 4 } else { 3 };

/// What a family's address type has to know for the generic code.
pub trait Addr: Pod + Eq + core::fmt::Debug + Default {
    /// Ethernet type, in network order read as a native integer.
    const ETHERTYPE: u16;
    /// Whether the family is IPv4 (for the few things that differ beyond the header).
    const IS_V4: bool;
    /// The ICMP protocol number of the family.
    const ICMP: u8;

    /// The one's-complement difference between two addresses.
    fn diff(old: Self, new: Self) -> crate::checksum::Sum;
    /// The sum of the address's words, unfolded.
    fn sum(self) -> u64;
    /// The address's words, mixed into a hash.
    fn mix(self, hash: u32) -> u32;
    /// A hash of two addresses, whichever comes first: a number below 2 to the power of 16.
    fn pair(self, other: Self) -> u32;
    /// A hash of the address, whose first bits are the best: for [`Served`].
    fn spread(self) -> u64;
    /// This device's address to masquerade to.
    fn masquerade_addr(device: &Device) -> Self;
    /// The node's address that packets of overlays are carried between.
    fn carrier_addr(overlay: &Overlay) -> Self;
    /// Addresses that are never masqueraded to: multicast, loopback, unspecified, broadcast. (Link-local is a matter
    /// of configuration: the agent enters it into the CIDR table.)
    fn is_local_scope(self) -> bool;
    /// Whether the address lies in a range.
    fn is_in(self, range: &Range<Self>) -> bool;
    /// Whether it comes first in the order of slots: the one that people would sort addresses in.
    fn precedes(self, other: Self) -> bool;
    /// IPv4 as `::ffff:a.b.c.d`: the form of tables that both families share.
    fn mapped(self) -> Ip6;
    /// The reverse, for an address of this family.
    fn from_mapped(ip: Ip6) -> Option<Self>;
}

/// A five-tuple as a hook sees it: the key of the flow table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey<A> {
    /// Source address.
    pub src: A,
    /// Destination address.
    pub dst: A,
    /// Source port; for an ICMP echo request its identifier, for a reply zero.
    pub sport: NetPort,
    /// Destination port; for an ICMP echo reply its identifier, for a request zero.
    pub dport: NetPort,
    /// IP protocol.
    pub proto: u8,
    /// One for [`Side::Front`] of a flow whose destination stays as it is ([`Flow::is_straight`]): without it, the key
    /// would be its own [`Side::Forward`]'s. Zero otherwise.
    pub variant: u8,
    /// Always zero.
    pub pad: [u8; 2],
}

impl<A: Addr> FlowKey<A> {
    /// The tuple of the packets that go the other way.
    #[inline(always)]
    pub fn reversed(&self) -> Self {
        Self { src: self.dst, dst: self.src, sport: self.dport, dport: self.sport, ..*self }
    }

    /// Hands on the same key, written a word at a time, which is how the kernel reads it at once to hash it. A processor waits
    /// when it is to read as a word what it is still writing in pieces. (In IPv6, where this takes more room on the stack than
    /// there is, the words before have been written by then: nothing is gained.)
    #[inline(always)]
    pub fn in_words<T>(&self, f: impl FnOnce(&Self) -> T) -> T {
        #[repr(C)]
        struct Words<A> {
            addresses: [A; 2],
            ports: u32,
            rest: u32,
        }
        const {
            assert!(
                size_of::<Words<A>>() == size_of::<Self>() && align_of::<Words<A>>() >= align_of::<Self>()
            )
        };
        if !A::IS_V4 {
            return f(self);
        }
        let ([a, b], [c, d]) = (self.sport.wire().to_ne_bytes(), self.dport.wire().to_ne_bytes());
        let words = Words {
            addresses: [self.src, self.dst],
            ports: u32::from_ne_bytes([a, b, c, d]),
            rest: u32::from_ne_bytes([self.proto, self.variant, 0, 0]),
        };
        // SAFETY: of the same size and layout, and any bytes are a valid key.
        f(unsafe { &*(&raw const words).cast() })
    }

    /// The place of the mark that there are flows between those two addresses: see [`Presence`].
    #[inline(always)]
    pub fn mark(&self) -> u32 {
        self.src.pair(self.dst) % Presence::PLACES
    }

    /// A well-mixed hash (murmur3's steps), the same on the host and in the kernel.
    #[inline(always)]
    pub fn hash(&self, seed: u32) -> u32 {
        let ports = (self.sport.wire() as u32) << 16 | self.dport.wire() as u32;
        let h = mix_word(mix_word(self.dst.mix(self.src.mix(seed)), ports), self.proto as u32);
        let h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
        let h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
        h ^ (h >> 16)
    }
}

#[inline(always)]
fn mix_word(hash: u32, word: u32) -> u32 {
    let k = word.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
    (hash ^ k).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64)
}

/// A hash of two words, whichever comes first: 16 bits. (A product, not a sum: words that follow each other have hashes
/// that nearly do, and sums of those would be few.)
#[inline(always)]
fn mix_pair(a: u64, b: u64) -> u32 {
    ((mix_one(a) | 1).wrapping_mul(mix_one(b) | 1) >> 48) as u32
}

#[inline(always)]
fn mix_one(word: u64) -> u64 {
    let word = word.wrapping_mul(GOLDEN);
    word ^ word >> 32
}

/// A hash of a word, whose first bits depend on all of it.
#[inline(always)]
fn spread(word: u64) -> u64 {
    // Once would spread neighbours evenly, and put ranges of addresses on top of each other.
    mix_one(word).wrapping_mul(GOLDEN)
}

/// 2 to the power of 64, over the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// An IPv6 address as a word. What differs is at the end of each half: so that it is not the same byte of both.
#[inline(always)]
fn one_word(ip: Ip6) -> u64 {
    let (high, low) = ip.wire();
    low ^ u64::from_be(high).wrapping_mul(0x94d0_49bb_1331_11eb)
}

/// Which of a flow's entries this is, by the packets that find it.
///
/// `docs/design.md` has the picture. A flow has at most these four; each holds the whole flow, so that any of them
/// can be made again from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Side {
    /// client → VIP, at ingress: the destination becomes the backend.
    Front = 1,
    /// client → backend, at egress: the source becomes the masquerade address, if there is one.
    Forward = 2,
    /// backend → masquerade address, at ingress: the destination becomes the client.
    Back = 3,
    /// backend → client, at egress: the source becomes the VIP.
    Reply = 4,
    /// client → VIP, under [`Side::Front`]'s key and by itself: somebody else (netfilter) translates this flow and has done
    /// so before we came. Left alone.
    Foreign = 5,
    /// Under the key of any side: the flow is being handed over to netfilter. For these microseconds its packets go
    /// nowhere, or both would translate them.
    Held = 6,
}

impl Side {
    /// From [`Flow::side`].
    pub const fn from_raw(raw: u8) -> Option<Self> {
        match raw {
            1 => Some(Self::Front),
            2 => Some(Self::Forward),
            3 => Some(Self::Back),
            4 => Some(Self::Reply),
            5 => Some(Self::Foreign),
            6 => Some(Self::Held),
            _ => None,
        }
    }
}

/// As much of a device's index as a flow remembers.
#[cfg(not(feature = "layout-next"))]
pub type DeviceIndex = u16;
/// As much of a device's index as a flow remembers.
#[cfg(feature = "layout-next")]
pub type DeviceIndex = u32;

/// What the programs remember of a flow. All four entries of a flow have the same content but for `side`,
/// `last_seen` and `state`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow<A> {
    /// Who sent the first packet.
    pub client: A,
    /// Where it sent it to. The backend itself where only the source is translated.
    pub vip: A,
    /// Where it was sent on to.
    pub backend: A,
    /// The source that the backend sees; meaningful with [`Flow::MASQ_DONE`].
    pub masq: A,
    /// Port of `client`.
    pub client_port: NetPort,
    /// Port of `vip`.
    pub vip_port: NetPort,
    /// Port of `backend`.
    pub backend_port: NetPort,
    /// Port of `masq`. (With [`Flow::DEVICE`] part of [`Flow::device`].)
    pub masq_port: NetPort,
    /// When a packet last found this entry: seconds of the kernel's monotonic clock.
    pub last_seen: u32,
    /// The backend's entry in the liveness table (UDP), zero for none.
    pub backend_id: u32,
    /// The liveness entry's epoch when the flow was made; another one now means that the backend is gone.
    pub backend_epoch: u32,
    /// The Service port, a key of the names map; zero where no Service is involved.
    pub service: u32,
    /// The client's port as the backend's side knows it: `client_port`, unless another flow of the client to the backend
    /// has that one already.
    pub alias_port: NetPort,
    /// Nothing, but what comes after it is elsewhere.
    #[cfg(feature = "layout-next")]
    pub spare: [u16; 3],
    /// Low half of the index of the device that the source is translated at; with [`Flow::MASQ_DONE`]. (With
    /// [`Flow::DEVICE`] part of [`Flow::device`].)
    pub masq_device: DeviceIndex,
    /// IP protocol.
    pub proto: u8,
    /// [`Side`] as a number.
    pub side: u8,
    /// `DNAT`, `BRIDGED`, `DEVICE`, `REDIRECT` and the `MASQ_*` bits.
    pub flags: u8,
    /// [`Flow::FIN`], [`Flow::RST`] and [`Flow::SEEN`], per entry.
    pub state: u8,
}

impl<A: Addr> Flow<A> {
    /// The destination is translated: `Front` and `Reply` exist.
    pub const DNAT: u8 = 1;
    /// The source has to be translated at whichever device the packet leaves by.
    pub const MASQ_NEEDED: u8 = 2;
    /// Whether the source has to be translated is for the device's policy to say.
    pub const MASQ_UNDECIDED: u8 = 4;
    /// The source is translated: `masq` is set and `Back` exists.
    pub const MASQ_DONE: u8 = 8;
    /// Client and backend may be behind one bridge, which can carry the packets.
    pub const BRIDGED: u8 = 16;
    /// [`Flow::device`] says behind which device the pod is that this entry's packets are for. Of this entry alone, and
    /// never with [`Flow::MASQ_DONE`].
    pub const DEVICE: u8 = 32;
    /// Packets that find this entry at ingress may be redirected: to that pod, or where the kernel routes them. Of this
    /// entry alone.
    pub const REDIRECT: u8 = 64;

    /// A TCP FIN went by in this entry's direction.
    pub const FIN: u8 = 1;
    /// A TCP RST went by in this entry's direction.
    pub const RST: u8 = 2;
    /// A packet found this entry after the one that made it.
    pub const SEEN: u8 = 4;
    /// Either end is closing: the port may be used again.
    pub const CLOSING: u8 = Self::FIN | Self::RST;
    /// Of a packet, not of an entry: a connection begins. What closed the one before from the same port is over with it.
    pub const SYN: u8 = 128;

    /// The key under which the entry of that side is found.
    #[inline(always)]
    pub fn key(&self, side: Side) -> FlowKey<A> {
        let (src, sport, dst, dport) = match side {
            Side::Front | Side::Foreign | Side::Held => {
                (self.client, self.client_port, self.vip, self.vip_port)
            }
            Side::Forward => (self.client, self.alias_port, self.backend, self.backend_port),
            Side::Back => (self.backend, self.backend_port, self.masq, self.masq_port),
            Side::Reply => (self.backend, self.backend_port, self.client, self.alias_port),
        };
        let variant = u8::from(side as u8 == Side::Front as u8 && self.is_straight());
        FlowKey { src, dst, sport, dport, proto: self.proto, variant, pad: [0; 2] }
    }

    /// The keys of all entries that the flow has, as far as this one knows. (For who looks after the table, not for programs.)
    pub fn entries(&self) -> [Option<FlowKey<A>>; 4] {
        let dnat = self.flags & Self::DNAT != 0;
        let masqueraded = self.flags & Self::MASQ_DONE != 0;
        [
            Some(self.key(Side::Forward)),
            dnat.then(|| self.key(Side::Front)),
            dnat.then(|| self.key(Side::Reply)),
            masqueraded.then(|| self.key(Side::Back)),
        ]
    }

    /// Whether it is one of a flow's own entries, not one that stands for somebody else's.
    pub const fn is_ours(&self) -> bool {
        self.side != Side::Foreign as u8 && self.side != Side::Held as u8
    }

    /// Sent to the backend itself: by a client that does without the Service, or to a Service whose address is its
    /// endpoint's.
    #[inline(always)]
    pub fn is_straight(&self) -> bool {
        self.vip_port == self.backend_port && self.vip == self.backend
    }

    /// An entry that only says that nothing is done to the flow, nor to its answers.
    #[inline(always)]
    pub fn is_direct(&self) -> bool {
        self.side == Side::Forward as u8 && self.flags == 0
    }

    /// A flow that nothing is done to yet.
    #[inline(always)]
    pub fn straight(key: &FlowKey<A>, now: u32) -> Self {
        Self {
            client: key.src,
            vip: key.dst,
            backend: key.dst,
            masq: key.src,
            client_port: key.sport,
            vip_port: key.dport,
            backend_port: key.dport,
            masq_port: key.sport,
            last_seen: now,
            backend_id: 0,
            backend_epoch: 0,
            service: 0,
            alias_port: key.sport,
            masq_device: 0,
            #[cfg(feature = "layout-next")]
            spare: [0; 3],
            proto: key.proto,
            side: 0,
            flags: 0,
            state: 0,
        }
    }

    /// Whether this is the [`Side::Forward`] entry of the flow whose first packet has that tuple.
    #[inline(always)]
    pub fn is_forward_of(&self, front: &FlowKey<A>) -> bool {
        self.side == Side::Forward as u8
            && self.flags & Self::DNAT != 0
            && self.vip == front.dst
            && self.vip_port == front.dport
            && self.client_port == front.sport
    }

    /// The same flow as an entry of that side.
    #[inline(always)]
    pub fn as_side(&self, side: Side) -> Self {
        let entry = Self { side: side as u8, state: 0, ..*self };
        if self.flags & (Self::DEVICE | Self::REDIRECT) != 0 { entry.without_device() } else { entry }
    }

    /// Index of the device that [`Flow::DEVICE`] speaks of. It has the place of the masquerade port and of the device
    /// that goes with it, which such an entry has not.
    #[inline(always)]
    pub fn device(&self) -> u32 {
        u32::from(self.masq_port.wire()) << 16 | u32::from(self.masq_device) & 0xffff
    }

    /// What stands for the upper half of an index.
    #[inline(always)]
    pub fn device_port(device: u32) -> NetPort {
        NetPort::from_wire((device >> 16) as u16)
    }

    /// The same entry with [`Flow::DEVICE`].
    #[inline(always)]
    pub fn with_device(self, device: u32) -> Self {
        let masq_port = Self::device_port(device);
        Self {
            masq_port,
            masq_device: DeviceIndex::from(device as u16),
            flags: self.flags | Self::DEVICE,
            ..self
        }
    }

    /// The same entry without.
    #[inline(always)]
    pub fn without_device(self) -> Self {
        let flags = self.flags & !(Self::DEVICE | Self::REDIRECT);
        Self { masq_port: self.client_port, masq_device: 0, flags, ..self }
    }

    /// Whether `other` is an entry of the same connection.
    #[inline(always)]
    pub fn same_origin(&self, other: &Self) -> bool {
        self.client == other.client
            && self.vip == other.vip
            && self.client_port == other.client_port
            && self.vip_port == other.vip_port
            && self.proto == other.proto
    }
}

/// Whether packets between two addresses need not be looked up in the flow table, because nothing there is between those:
/// most packets of most pods are none of ours, and a look-up that finds nothing costs more than all else about them.
///
/// Who enters a flow marks its entries' pairs of addresses with the present round *before*; who goes through the whole
/// table marks again what is there, and then begins another round. A mark of the last two rounds counts, too: that of a flow
/// which was entered behind the back of who went through the table, by a processor that had read the round before the last one
/// ended. So no mark is ever taken away, and no flow is without one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Presence {
    /// Not zero if the marks are complete. They may not be as long as there are programs that do not mark.
    pub complete: u32,
    /// The present round.
    pub round: u32,
}

impl Presence {
    /// How many marks there are.
    pub const PLACES: u32 = 1 << 15;
    /// The first round: no mark that was never made looks like one of before.
    pub const FIRST: u32 = 3;

    /// Whether there may be flows, if that is the pair's mark.
    #[inline(always)]
    pub fn may_be(&self, mark: u32) -> bool {
        self.complete == 0 || self.round.wrapping_sub(mark) <= 2
    }
}

/// A bit in an array of words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bit {
    /// Index of the word.
    pub word: u32,
    /// The bit in it.
    pub mask: u64,
}

impl Bit {
    const fn at(place: u32) -> Self {
        Self { word: place / u64::BITS, mask: 1 << (place % u64::BITS) }
    }

    /// Whether it is set, if that is the word.
    #[inline(always)]
    pub const fn is_in(self, word: u64) -> bool {
        word & self.mask != 0
    }
}

/// Which addresses have frontends, a bit for each of their hashes: most packets are for none, and a bit costs less than a
/// look-up in the frontend table that finds nothing.
///
/// Who enters a frontend sets its address's bit *before*. A bit that is set and should not be costs a look-up.
#[derive(Clone, Copy, Debug)]
pub struct Served;

impl Served {
    /// How many words there are. With a frontend on each of 30,000 addresses, one in nine others has its bit set.
    pub const WORDS: u32 = 1 << 12;

    /// An address's bit.
    #[inline(always)]
    pub fn bit<A: Addr>(addr: A) -> Bit {
        Bit::at((addr.spread() >> (u64::BITS - Self::WORDS.ilog2() - u64::BITS.ilog2())) as u32)
    }
}

/// Which devices have [`Device::MASQUERADE`], a bit for each index's end: most packets are on none of them.
///
/// Who gives a device the flag sets the bit *before*. A bit that is set and should not be costs a look-up.
#[derive(Clone, Copy, Debug)]
pub struct Masquerading;

impl Masquerading {
    /// How many words there are: room for 4096 indexes.
    pub const WORDS: u32 = 1 << 6;

    /// A device's bit, by its index.
    #[inline(always)]
    pub const fn bit(index: u32) -> Bit {
        Bit::at(index % (Self::WORDS * u64::BITS))
    }
}

/// What carries the packets of the node's overlays: UDP between an address of this node and other nodes'.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Overlay {
    /// The address of overlays over IPv6; unspecified if there are none.
    pub addr6: Ip6,
    /// Of those over IPv4.
    pub addr4: Ip4,
    /// The port that they send to; zero if there are none.
    pub port: NetPort,
    /// Always zero.
    pub pad: u16,
}

/// Key of the frontend table: what a packet was sent to.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FrontendKey<A> {
    /// Destination address.
    pub addr: A,
    /// Destination port.
    pub port: NetPort,
    /// IP protocol.
    pub proto: u8,
    /// Always zero.
    pub pad: [u8; 5],
}

impl<A> FrontendKey<A> {
    /// The key of an address, a port and a protocol.
    #[inline(always)]
    pub const fn new(addr: A, port: NetPort, proto: u8) -> Self {
        Self { addr, port, proto, pad: [0; 5] }
    }

    /// The key of an address as such, see [`Frontend::ADDRESS`].
    #[inline(always)]
    pub const fn address(addr: A) -> Self {
        Self::new(addr, NetPort::from_wire(0), 0)
    }
}

impl<A: Addr> FrontendKey<A> {
    /// As [`FlowKey::in_words`].
    #[inline(always)]
    pub fn in_words<T>(&self, f: impl FnOnce(&Self) -> T) -> T {
        #[repr(C)]
        struct Words<A> {
            addr: A,
            rest: [u32; 2],
        }
        const {
            assert!(
                size_of::<Words<A>>() == size_of::<Self>() && align_of::<Words<A>>() >= align_of::<Self>()
            )
        };
        if !A::IS_V4 {
            return f(self);
        }
        let [a, b] = self.port.wire().to_ne_bytes();
        let words = Words { addr: self.addr, rest: [u32::from_ne_bytes([a, b, self.proto, 0]), 0] };
        // SAFETY: of the same size and layout, and any bytes are a valid key.
        f(unsafe { &*(&raw const words).cast() })
    }
}

/// A run of slots. Its id is never used again for other endpoints, so a packet sees all of a change or nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Set {
    /// First half of the slots' keys.
    pub id: u32,
    /// Number of slots; with zero, [`Frontend::flags`] say what becomes of a packet.
    pub count: u32,
}

/// Value of the frontend table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Frontend {
    /// For pods and processes of this node.
    pub internal: Set,
    /// For everybody else.
    pub external: Set,
    /// Key of the names map.
    pub service: u32,
    /// `sessionAffinity: ClientIP` timeout in seconds, zero for none.
    pub affinity: u32,
    /// The constants below.
    pub flags: u16,
    /// 1 ClusterIP, 2 NodePort, 3 LoadBalancer, 4 external IP. For people only.
    pub kind: u8,
    /// Always zero.
    pub pad: u8,
}

impl Frontend {
    /// The endpoints for those inside or everybody else.
    #[inline(always)]
    pub const fn set(&self, inside: bool) -> Set {
        if inside { self.internal } else { self.external }
    }

    /// An empty internal set means drop, not reject.
    pub const INTERNAL_DROP: u16 = 1;
    /// An empty external set means drop, not reject.
    pub const EXTERNAL_DROP: u16 = 2;
    /// Masquerade whoever the client is.
    pub const MASQUERADE_ALWAYS: u16 = 4;
    /// For the socket hooks alone: a loopback address, which no packet from outside may reach (CVE-2020-8558).
    pub const SOCKETS_ONLY: u16 = 8;
    /// Only clients in [`SourceKey`]'s ranges are admitted (`loadBalancerSourceRanges`).
    pub const SOURCE_RANGES: u16 = 16;
    /// None of the node's addresses is in those ranges: its processes are not admitted.
    pub const NODE_OUTSIDE_RANGES: u16 = 32;
    /// Not a frontend but an address that has some, under port and protocol zero.
    pub const ADDRESS: u16 = 64;
    /// A ClusterIP: what is sent to a port of it that is no frontend is rejected.
    pub const REJECT_OTHER_PORTS: u16 = 128;
}

/// Key of the table of `loadBalancerSourceRanges`, a trie: the Service port whole, and the address as far as the range
/// says. A hit admits.
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceKey<A> {
    /// [`Frontend::service`].
    pub service: u32,
    /// The client.
    pub addr: A,
}

/// The smallest range with all ClusterIPs: what lies outside need not be looked up as one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range<A> {
    /// Its first address.
    pub first: A,
    /// The bits that all its addresses share.
    pub mask: A,
}

/// Key of the affinity table (`sessionAffinity: ClientIP`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct AffinityKey {
    /// The client's address, mapped; the family's unspecified one for the node's own processes.
    pub client: Ip6,
    /// [`Frontend::service`].
    pub service: u32,
    /// Always zero.
    pub pad: u32,
}

/// Value of the affinity table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Affinity {
    /// The backend, mapped.
    pub addr: Ip6,
    /// Its port.
    pub port: NetPort,
    /// Always zero.
    pub pad: u16,
    /// Its place in the set that it was chosen from.
    pub index: u32,
    /// When the client's last flow began: seconds of the kernel's monotonic clock.
    pub last_used: u32,
    /// [`Frontend::affinity`], so that whoever tidies up need not look.
    pub timeout: u32,
}

impl Affinity {
    /// Whether it still holds. As `xt_recent`'s `--seconds` counts.
    #[inline(always)]
    pub const fn holds(&self, now: u32, timeout: u32) -> bool {
        now.wrapping_sub(self.last_used) <= timeout
    }
}

/// What the fragments of a datagram have in common. (RFC 791; RFC 8200, 4.5)
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FragmentKey<A> {
    /// Source address, as the hook sees it.
    pub src: A,
    /// Destination address, as the hook sees it.
    pub dst: A,
    /// The identification, as in the packet.
    pub id: u32,
    /// IP protocol; zero in IPv6.
    pub proto: u8,
    /// 0 at egress, 1 at ingress; and [`FragmentKey::WAITING`].
    pub hook: u8,
    /// Always zero.
    pub pad: u16,
}

impl<A> FragmentKey<A> {
    /// Of the entry that says who waits for the first fragment.
    pub const WAITING: u8 = 2;
}

/// What a datagram's first fragment says of all of them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Fragment {
    /// Source port, or an echo's identifier, as in [`FlowKey`].
    pub sport: NetPort,
    /// Destination port.
    pub dport: NetPort,
    /// IP protocol.
    pub proto: u32,
    /// When it came: seconds of the kernel's monotonic clock.
    pub seen: u32,
    /// With [`FragmentKey::WAITING`]: the last one that waits, see [`Held`]; and that is all that counts then.
    pub held: u32,
}

/// A fragment that came before its datagram's first one.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// Its own number, so that a place that was used again is not taken for it. Never zero.
    pub id: u32,
    /// The number of the one before it, zero for none.
    pub previous: u32,
    /// Length of the frame.
    pub len: u32,
    /// Always zero.
    pub pad: u32,
    /// The frame.
    pub frame: [u8; Self::MAX],
}

impl Held {
    /// Larger frames are not held.
    pub const MAX: usize = 2032;
    /// Places for each CPU.
    pub const PER_CPU: u32 = 64;
}

/// A place in a set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SlotKey {
    /// [`Set::id`].
    pub set: u32,
    /// Zero to [`Set::count`] exclusive.
    pub index: u32,
}

impl SlotKey {
    /// Where the slot is found: the group's key, and the place in the group.
    #[inline(always)]
    pub const fn group(&self) -> (SlotGroupKey, usize) {
        let len = SLOT_GROUP as u32;
        (SlotGroupKey { set: self.set, group: self.index / len }, (self.index % len) as usize)
    }
}

/// How many slots an entry of the slot table has. A hash table's entry takes 64 bytes and a microsecond to write besides
/// its value: one for each endpoint would be most of what a large cluster costs.
pub const SLOT_GROUP: usize = 4;

/// Key of the slot table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct SlotGroupKey {
    /// [`Set::id`].
    pub set: u32,
    /// Zero for the slots from 0 on, one for those from [`SLOT_GROUP`] on.
    pub group: u32,
}

/// Value of the slot table: neighbours in a set. What is beyond the set's end is zero.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotGroup<A> {
    /// The slots.
    pub slots: [Slot<A>; SLOT_GROUP],
}

/// One backend of a set.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot<A> {
    /// Where to send the packet.
    pub addr: A,
    /// Its port.
    pub port: NetPort,
    /// The constants below.
    pub flags: u16,
    /// Entry in the liveness table, zero for none.
    pub backend_id: u32,
    /// That entry's epoch when the slot was written.
    pub backend_epoch: u32,
    /// Always zero.
    pub pad: u32,
}

impl<A> Slot<A> {
    /// The backend runs on this node: replies come by here anyway, so an outside client's address is kept.
    pub const LOCAL: u16 = 1;
}

/// Value of the names map, so that tools can tell Services when the agent is down. NUL-padded.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceName {
    /// `metadata.namespace`.
    pub namespace: [u8; 64],
    /// `metadata.name`.
    pub name: [u8; 64],
    /// `spec.ports[].name`.
    pub port: [u8; 64],
}

/// Value of the device table; the key is the interface index. The one layout that never changes: the plugin, which may be of
/// another version than the agent, writes it, and one table serves all versions.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Device {
    /// The constants below.
    pub flags: u32,
    /// Masquerade to this, unspecified for none.
    pub masq4: Ip4,
    /// Masquerade to this, unspecified for none.
    pub masq6: Ip6,
    /// One more than the id of the network namespace at the other end of the pod's veth, zero where it is not known.
    pub netns: u32,
    /// Always zero.
    pub pad: u32,
}

impl Device {
    /// The host side of a pod's veth: clients behind it are inside.
    pub const POD: u32 = 1;
    /// Traffic from pods to the outside is masqueraded here.
    pub const MASQUERADE: u32 = 2;
    /// A port of a bridge that may carry IPv4 packets to other pods of it: what forwards them looks at the same rules as
    /// routing would.
    pub const BRIDGED4: u32 = 4;
    /// The same for IPv6.
    pub const BRIDGED6: u32 = 8;
    /// A pod's veth or an overlay that packets may be redirected to, past everything between the hooks.
    pub const REDIRECT: u32 = 16;
    /// The flags of a pod's device that depend on the agent's own.
    pub const OF_THE_AGENT: u32 = Self::BRIDGED4 | Self::BRIDGED6 | Self::REDIRECT;

    /// The flag of a family.
    #[inline(always)]
    pub const fn bridged<A: Addr>() -> u32 {
        if A::IS_V4 { Self::BRIDGED4 } else { Self::BRIDGED6 }
    }
}

/// What XDP has to know of a device. It is in the place that [`XdpDevice::place`] says.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct XdpDevice {
    /// Its index; zero where the place is free.
    pub index: u32,
    /// The constants below.
    pub flags: u32,
    /// Its Ethernet address.
    pub mac: Mac,
    /// An overlay's UDP port.
    pub port: NetPort,
    /// The overlay device whose packets come in here in IPv4, zero for none.
    pub overlay4: u32,
    /// The same in IPv6.
    pub overlay6: u32,
    /// An overlay's identifier, as in the header of its packets.
    pub vni: u32,
    /// Until when this may be relied on: seconds of the kernel's monotonic clock.
    pub until: u32,
    /// Index of the device that an overlay's packets have to leave by, zero for any.
    pub link: u32,
    /// The first of the UDP ports that an overlay's packets leave from, host order.
    pub first_port: u16,
    /// How many there are.
    pub ports: u16,
    /// An overlay's own address, mapped.
    pub local: Ip6,
    /// Time to live of an overlay's packets.
    pub ttl: u8,
    /// Always zero.
    pub pad: [u8; 7],
}

impl XdpDevice {
    /// Size of the table.
    pub const PLACES: u32 = 256;
    /// It sends packets back to where they came from.
    pub const TX: u32 = 1;
    /// It takes packets that are redirected to it.
    pub const REDIRECT: u32 = 2;
    /// An overlay: packets for it have to be wrapped.
    pub const OVERLAY: u32 = 4;
    /// An overlay whose UDP packets have checksums.
    pub const CHECKSUM: u32 = 8;
    /// The longest that [`XdpDevice::until`] may be ahead, in seconds.
    pub const FRESH: u32 = 120;

    /// Where a device is. Two that would share a place cannot both be in the table.
    #[inline(always)]
    pub const fn place(index: u32) -> u32 {
        index % Self::PLACES
    }

    /// Whether a packet that came in by that device can leave by this one at the driver.
    #[inline(always)]
    pub const fn sends(&self, arrival: u32) -> bool {
        let ways = if self.index == arrival { Self::TX | Self::REDIRECT } else { Self::REDIRECT };
        self.flags & ways != 0
    }
}

/// Key of the table of where an overlay device sends what is for an Ethernet address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct VtepKey {
    /// Index of the device.
    pub device: u32,
    /// The next hop's Ethernet address.
    pub mac: Mac,
    /// Always zero.
    pub pad: u16,
}

/// Key data of the CIDR trie is the address; these are its values' bits.
pub mod cidr {
    /// Pods of the cluster.
    pub const CLUSTER: u32 = 1;
    /// Not masqueraded to.
    pub const NO_MASQUERADE: u32 = 2;
}

/// What the programs do about flows that they do not know: the only value of `LB_STANCE`, which every version of the
/// programs has and understands.
pub mod stance {
    /// They are ours.
    pub const SERVE: u32 = 0;
    /// They are left to another version's programs behind ours.
    pub const LEAVE: u32 = 1;
    /// TCP connections that begin are ours, all others are left. (Whether a datagram begins a flow, only he can tell who
    /// has the others.)
    pub const BEGIN: u32 = 2;
    /// They are left to the host, to kube-proxy's rules say; which may not take the ports of those that we still have.
    pub const DRAIN: u32 = 3;
    /// As [`BEGIN`], and datagrams to frontends are ours, too: what others began before was taken over by then, and those
    /// that began since go to the same backend by their hash. Their answers are still left.
    pub const ADOPT: u32 = 4;
}

/// In `__sk_buff::cb[0]`, from a version's program to another version's behind it: the packet has been seen to.
pub mod seen_to {
    /// At ingress.
    pub const INGRESS: u32 = 0x6c62_b1d6;
    /// At egress.
    pub const EGRESS: u32 = 0x6c62_4e29;
}

/// Bits of the programs' `FLAGS`: set at load time and constant, so that the verifier drops what is switched off.
pub mod flags {
    /// `bpf_ktime_get_coarse_ns` exists (5.11).
    pub const COARSE_CLOCK: u32 = 1;
    /// `bpf_set_retval` exists (5.18): a refused connect says so.
    pub const SET_RETVAL: u32 = 2;
    /// Socket hooks serve every network namespace, not only the node's.
    pub const SOCKETS_ALL: u32 = 4;
    /// Log the slow path.
    pub const LOG: u32 = 8;
    /// `bpf_l4_csum_replace` knows `BPF_F_IPV6` (6.16): right for `CHECKSUM_COMPLETE` too.
    pub const CSUM_IPV6: u32 = 16;
    /// Another version's programs are behind: tell them what has been seen to.
    pub const FRONT: u32 = 32;
}

/// Key of the socket tables: a socket and one peer of it. IPv4 is mapped.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct SocketKey {
    /// The kernel's socket cookie.
    pub cookie: u64,
    /// The peer's address, IPv4 mapped.
    pub addr: Ip6,
    /// The peer's port.
    pub port: NetPort,
    /// IP protocol.
    pub proto: u8,
    /// 0: `addr` is a backend and the value its VIP; 1: the other way round.
    pub direction: u8,
    /// Always zero.
    pub pad: u32,
}

/// Value of the socket tables.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct SocketPeer {
    /// Address, IPv4 mapped.
    pub addr: Ip6,
    /// Port.
    pub port: NetPort,
    /// Always zero.
    pub pad: u16,
    /// Liveness as in [`Flow`].
    pub backend_id: u32,
    /// Liveness as in [`Flow`].
    pub backend_epoch: u32,
    /// Always zero.
    pub pad2: u32,
}

impl Addr for Ip4 {
    const ETHERTYPE: u16 = 0x0800u16.to_be();
    const IS_V4: bool = true;
    const ICMP: u8 = 1;

    #[inline(always)]
    fn diff(old: Self, new: Self) -> crate::checksum::Sum {
        crate::checksum::Sum::diff32(old.wire(), new.wire())
    }

    #[inline(always)]
    fn sum(self) -> u64 {
        u64::from(self.wire())
    }

    #[inline(always)]
    fn mix(self, hash: u32) -> u32 {
        mix_word(hash, self.wire())
    }

    #[inline(always)]
    fn pair(self, other: Self) -> u32 {
        mix_pair(self.wire().into(), other.wire().into())
    }

    #[inline(always)]
    fn spread(self) -> u64 {
        spread(self.wire().into())
    }

    #[inline(always)]
    fn masquerade_addr(device: &Device) -> Self {
        device.masq4
    }

    #[inline(always)]
    fn carrier_addr(overlay: &Overlay) -> Self {
        overlay.addr4
    }

    #[inline(always)]
    fn is_local_scope(self) -> bool {
        let ip = u32::from_be(self.wire());
        ip >> 28 >= 0xe || ip >> 24 == 127 || ip >> 24 == 0
    }

    #[inline(always)]
    fn is_in(self, range: &Range<Self>) -> bool {
        self.wire() & range.mask.wire() == range.first.wire()
    }

    #[inline(always)]
    fn precedes(self, other: Self) -> bool {
        u32::from_be(self.wire()) < u32::from_be(other.wire())
    }

    #[inline(always)]
    fn mapped(self) -> Ip6 {
        Ip6::mapped(self)
    }

    #[inline(always)]
    fn from_mapped(ip: Ip6) -> Option<Self> {
        ip.unmapped()
    }
}

impl Addr for Ip6 {
    const ETHERTYPE: u16 = 0x86ddu16.to_be();
    const IS_V4: bool = false;
    const ICMP: u8 = 58;

    #[inline(always)]
    fn diff(old: Self, new: Self) -> crate::checksum::Sum {
        let ((o1, o2), (n1, n2)) = (old.wire(), new.wire());
        let halves = |w: u64| (w & 0xffff_ffff) + (w >> 32);
        let sum = halves(!o1) + halves(!o2) + halves(n1) + halves(n2);
        crate::checksum::Sum(sum as u32).plus(crate::checksum::Sum((sum >> 32) as u32))
    }

    #[inline(always)]
    fn sum(self) -> u64 {
        let (a, b) = self.wire();
        (a & 0xffff_ffff) + (a >> 32) + (b & 0xffff_ffff) + (b >> 32)
    }

    #[inline(always)]
    fn mix(self, hash: u32) -> u32 {
        let (a, b) = self.wire();
        mix_word(mix_word(mix_word(mix_word(hash, a as u32), (a >> 32) as u32), b as u32), (b >> 32) as u32)
    }

    #[inline(always)]
    fn pair(self, other: Self) -> u32 {
        mix_pair(one_word(self), one_word(other))
    }

    #[inline(always)]
    fn spread(self) -> u64 {
        spread(one_word(self))
    }

    #[inline(always)]
    fn masquerade_addr(device: &Device) -> Self {
        device.masq6
    }

    #[inline(always)]
    fn carrier_addr(overlay: &Overlay) -> Self {
        overlay.addr6
    }

    #[inline(always)]
    fn is_local_scope(self) -> bool {
        let (high, low) = self.wire();
        let head = u64::from_be(high) >> 48;
        head >> 8 == 0xff || high == 0 && u64::from_be(low) < 2
    }

    #[inline(always)]
    fn is_in(self, range: &Range<Self>) -> bool {
        let ((a, b), (x, y), (m, n)) = (self.wire(), range.first.wire(), range.mask.wire());
        a & m == x && b & n == y
    }

    #[inline(always)]
    fn precedes(self, other: Self) -> bool {
        let ((a, b), (x, y)) = (self.wire(), other.wire());
        if a == x { u64::from_be(b) < u64::from_be(y) } else { u64::from_be(a) < u64::from_be(x) }
    }

    #[inline(always)]
    fn mapped(self) -> Ip6 {
        self
    }

    #[inline(always)]
    fn from_mapped(ip: Ip6) -> Option<Self> {
        Some(ip)
    }
}

// The layouts that are generic over the address. `Addr` is for `Ip4` and `Ip6` alone, and for both the assertions
// below say that no padding is in them.
macro_rules! plain_layouts {
    ($($ty:ident: $v4:literal, $v6:literal;)*) => {$(
        const _: () = {
            assert!(size_of::<$ty<Ip4>>() == $v4 && align_of::<$ty<Ip4>>() == 4);
            assert!(size_of::<$ty<Ip6>>() == $v6 && align_of::<$ty<Ip6>>() == 8);
        };
        // SAFETY: repr(C), made of Pod fields only, valid when zero.
        unsafe impl<A: Addr> Zeroable for $ty<A> {}
        // SAFETY: repr(C), made of Pod fields only, and the sizes asserted above are the sums of theirs: no padding.
        unsafe impl<A: Addr> Pod for $ty<A> {}
        #[cfg(all(feature = "user", not(target_arch = "bpf")))]
        // SAFETY: bytemuck's Pod has just said the same.
        unsafe impl<A: Addr> aya::Pod for $ty<A> {}
    )*};
}

#[cfg(not(feature = "layout-next"))]
plain_layouts! {
    Flow: 48, 96;
}

#[cfg(feature = "layout-next")]
plain_layouts! {
    Flow: 56, 104;
}

plain_layouts! {
    FlowKey: 16, 40;
    FrontendKey: 12, 24;
    Slot: 20, 32;
    SlotGroup: 80, 128;
    Range: 8, 32;
    FragmentKey: 16, 40;
}

// SAFETY: packed, made of Pod fields only.
unsafe impl<A: Addr> Zeroable for SourceKey<A> {}
// SAFETY: as above.
unsafe impl<A: Addr> Pod for SourceKey<A> {}
#[cfg(all(feature = "user", not(target_arch = "bpf")))]
// SAFETY: bytemuck's Pod says the same.
unsafe impl<A: Addr> aya::Pod for SourceKey<A> {}

// SAFETY: bytes only.
unsafe impl Zeroable for ServiceName {}
// SAFETY: bytes only.
unsafe impl Pod for ServiceName {}

macro_rules! aya_pod {
    ($($ty:ty),*) => {$(
        #[cfg(all(feature = "user", not(target_arch = "bpf")))]
        // SAFETY: bytemuck's Pod says the same.
        unsafe impl aya::Pod for $ty {}
    )*};
}
aya_pod!(
    Frontend,
    Set,
    SlotGroupKey,
    Device,
    SocketKey,
    SocketPeer,
    ServiceName,
    AffinityKey,
    Affinity,
    Fragment,
    XdpDevice,
    VtepKey,
    Presence,
    Overlay,
    NetPort,
    Ip4,
    Ip6
);

const _: () = {
    assert!(size_of::<ServiceName>() == 192);
    assert!(size_of::<Frontend>() == 28 && core::mem::offset_of!(Frontend, flags) == 24);
    assert!(size_of::<SlotGroupKey>() == 8 && size_of::<Presence>() == 8);
    assert!(size_of::<Overlay>() == 24);
    assert!(size_of::<Device>() == 32);
    assert!(size_of::<SourceKey<Ip4>>() == 8 && size_of::<SourceKey<Ip6>>() == 20);
    assert!(size_of::<Held>() == 2048);
    assert!(size_of::<AffinityKey>() == 24 && size_of::<Affinity>() == 32);
    assert!(size_of::<XdpDevice>() == 64 && size_of::<VtepKey>() == 12);
    assert!(size_of::<SocketKey>() == 32);
    assert!(size_of::<SocketPeer>() == 32);
    assert!(
        core::mem::offset_of!(Flow<Ip4>, last_seen) == 24
            && core::mem::offset_of!(Flow<Ip6>, last_seen) == 72
    );
};

#[cfg(test)]
mod tests {
    use super::{Addr, FlowKey, FrontendKey, Presence, Served};
    use crate::addr::{Ip4, Ip6, NetPort};
    use core::net::{Ipv4Addr, Ipv6Addr};

    fn stays_what_it_is<A: Addr>([src, dst]: [A; 2]) {
        let (sport, dport) = (NetPort::new(0x1234), NetPort::new(0x5678));
        let key = FlowKey { src, dst, sport, dport, proto: 17, variant: 1, pad: [0; 2] };
        key.in_words(|words| assert_eq!(*words, key));
        let front = FrontendKey::new(dst, dport, 6);
        front.in_words(|words| assert_eq!(*words, front));
    }

    #[test]
    fn a_key_in_words_is_the_same_key() {
        stays_what_it_is::<Ip4>([1, 2].map(|n| Ipv4Addr::new(192, 0, 2, n).into()));
        stays_what_it_is::<Ip6>([1, 2].map(|n| Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n).into()));
    }

    fn marks<A: Addr>(addr: impl Fn(u8, u8) -> A) {
        // What direct traffic between pods of two nodes has to be told from: 100 clients of 100 endpoints elsewhere.
        let key = |src, dst| FlowKey { src, dst, ..FlowKey::<A>::default() };
        let mut taken = std::collections::HashSet::new();
        for (a, b) in (0..100).flat_map(|a| (0..100).map(move |b| (a, b))) {
            let key = key(addr(1, a), addr(2, b));
            assert_eq!(key.mark(), key.reversed().mark());
            taken.insert(key.mark());
        }
        // By chance it would be 32,768 times (1 - e^-(10,000 / 32,768)): 8,620.
        assert!(taken.len() > 8000, "{} places", taken.len());
        let others = (0..100u8).flat_map(|a| (0..100).map(move |b| (a, b)));
        let wrong = others.filter(|&(a, b)| taken.contains(&key(addr(3, a), addr(4, b)).mark())).count();
        assert!(wrong < 3500, "{wrong} of 10,000 are looked up for nothing");
    }

    #[test]
    fn pairs_of_addresses_have_marks_of_their_own() {
        marks::<Ip4>(|node, pod| Ipv4Addr::new(10, 244, node, pod).into());
        marks::<Ip6>(|node, pod| Ipv6Addr::new(0xfd00, 0x10, 0x244, node.into(), 0, 0, 0, pod.into()).into());
        // Interface identifiers, one below the other.
        marks::<Ip6>(|node, pod| {
            Ipv6Addr::new(0xfd00, 0, 0, 0, 0xa8bb, node.into(), 0xfe00, pod.into()).into()
        });
    }

    fn few_others_look_served<A: Addr>(addr: impl Fn(u8, u8, u8) -> A) {
        // 30,000 ClusterIPs, one after the other.
        let mut words = vec![0u64; Served::WORDS as usize];
        for n in 0..30_000u16 {
            let [high, low] = n.to_be_bytes();
            let bit = Served::bit(addr(96, high, low));
            assert!(bit.mask.is_power_of_two());
            words[bit.word as usize] |= bit.mask;
        }
        let looks_served = |&(high, low): &(u8, u8)| {
            let bit = Served::bit(addr(244, high, low));
            bit.is_in(words[bit.word as usize])
        };
        let pods = (0..100u8).flat_map(|high| (0..100).map(move |low| (high, low)));
        let wrong = pods.filter(looks_served).count();
        // By chance it would be 10,000 times (1 - e^-(30,000 / 262,144)): 1081.
        assert!(wrong < 1500, "{wrong} of 10,000 are looked up for nothing");
    }

    #[test]
    fn addresses_without_frontends_are_told_from_those_with_some() {
        few_others_look_served::<Ip4>(|net, high, low| Ipv4Addr::new(10, net, high, low).into());
        few_others_look_served::<Ip6>(|net, high, low| {
            Ipv6Addr::new(0xfd00, 0x10, net.into(), 0, 0, 0, high.into(), low.into()).into()
        });
        few_others_look_served::<Ip6>(|net, high, low| {
            Ipv6Addr::new(0xfd00, 0x10, net.into(), high.into(), 0, 0, 0, low.into()).into()
        });
    }

    #[test]
    fn marks_of_the_present_round_and_of_two_before_count() {
        let presence = |complete, round| Presence { complete, round };
        let told = |presence: Presence| [0, 5, 6, 7, 8].map(|mark| presence.may_be(mark));
        assert_eq!(told(presence(1, 8)), [false, false, true, true, true]);
        assert_eq!(told(presence(0, 8)), [true; 5]);
        assert!(!presence(1, Presence::FIRST).may_be(0), "never marked");
        // A processor that has read the round before the last one ended, when rounds begin anew.
        assert!(presence(1, 0).may_be(u32::MAX) && presence(1, 1).may_be(u32::MAX));
    }
}
