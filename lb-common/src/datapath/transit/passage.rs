//! A packet's way through the node.

use super::{NextHop, Query, TCP_HEADER};
use crate::addr::NetPort;
use crate::checksum::Sum;
use crate::datapath::enter::stale;
use crate::datapath::ingress::used_again;
use crate::datapath::masquerade::renew;
use crate::datapath::parse::{ETH, Headers, Kind, TCP, UDP, Wire, checksum_offset, pseudo_header, tcp_flags};
use crate::datapath::{Covered, FlowRef, Flows, Packet, Reason};
use crate::maps::{Flow, FlowKey, Side};

/// What the two hooks would do to a packet with a transport header of that length: the entries that they would find.
pub(super) struct Passage<'k, A, const TRANSPORT: usize> {
    kind: Kind,
    ingress: FlowRef<'k, A>,
    egress: FlowRef<'k, A>,
}

impl<'k, A: Wire, const TRANSPORT: usize> Passage<'k, A, TRANSPORT> {
    const IS_TCP: bool = TRANSPORT == TCP_HEADER;
    const L4: usize = ETH + A::HEADER;

    /// Looks a packet's flow up: established, translated at both hooks, nothing unusual.
    #[inline(always)]
    pub(super) fn find<W: Packet, K: Flows<A>>(window: &W, kernel: &'k K, frame: usize) -> Option<Self> {
        let len = A::plain(window)?;
        let kind = if Self::IS_TCP { Kind::Tcp(window.read(Self::L4 + 13)?) } else { Kind::Udp };
        let headers = Headers { key: Self::tuple(window)?, kind, l4: Self::L4, more_fragments: 0 };
        if (len as usize) < A::HEADER + TRANSPORT
            || ETH + len as usize > frame
            || window.read::<u8>(ETH + A::TTL)? < 2
            || opens(kind)
            || is_partial(window, &headers, len)
        {
            return None;
        }
        let ingress = kernel.flow(&headers.key)?;
        let flow = ingress.get();
        let between = match Side::from_raw(flow.side)? {
            Side::Front if !stale(kernel, flow) && !used_again(&headers, flow) => flow.key(Side::Forward),
            Side::Back => flow.key(Side::Reply),
            _ => return None,
        };
        let egress = kernel.flow(&between)?;
        let flow = egress.get();
        let known = match Side::from_raw(flow.side)? {
            Side::Forward => flow.flags & Flow::<A>::MASQ_DONE != 0,
            Side::Reply => true,
            Side::Front | Side::Back | Side::Foreign | Side::Held => false,
        };
        known.then_some(Self { kind, ingress, egress })
    }

    #[inline(always)]
    fn tuple<W: Packet>(window: &W) -> Option<FlowKey<A>> {
        let [sport, dport] = window.read(Self::L4)?;
        let proto = if Self::IS_TCP { TCP } else { UDP };
        Some(FlowKey {
            src: window.read(ETH + A::SRC)?,
            dst: window.read(ETH + A::DST)?,
            sport,
            dport,
            proto,
            variant: 0,
            pad: [0; 2],
        })
    }

    #[inline(always)]
    fn is_forward(&self) -> bool {
        self.egress.get().side == Side::Forward as u8
    }

    /// As the kernel asks for its route, between the two hooks.
    #[inline(always)]
    pub(super) fn query<W: Packet>(&self, window: &W, arrival: u32) -> Query<A> {
        let flow = self.egress.get();
        let key = if self.is_forward() { flow.key(Side::Forward) } else { flow.key(Side::Reply) };
        let (head, len) = (window.read(ETH).unwrap_or(0), A::plain(window).unwrap_or(0));
        Query { key, head, len, device: arrival, own: false }
    }

    /// What it becomes: source, destination, their ports.
    #[inline(always)]
    fn after(&self) -> (A, A, [NetPort; 2]) {
        let flow = self.egress.get();
        if self.is_forward() {
            (flow.masq, flow.backend, [flow.masq_port, flow.backend_port])
        } else {
            (flow.vip, flow.client, [flow.vip_port, flow.client_port])
        }
    }

    /// The ports that it leaves with.
    #[inline(always)]
    pub(super) fn ports(&self) -> [NetPort; 2] {
        let (.., ports) = self.after();
        ports
    }

    /// Notes that it went by, as the two hooks do.
    #[inline(always)]
    pub(super) fn seen<K: Flows<A>>(&self, kernel: &K) {
        let (now, state) = (kernel.now(), self.kind.state() | Flow::<A>::SEEN);
        self.ingress.seen(now, state);
        if self.egress.seen(now, state) && self.is_forward() {
            renew(kernel, self.egress.get());
        }
    }

    /// Does to it all that the two hooks do, and the router between them.
    #[inline(always)]
    pub(super) fn write<W: Packet>(&self, window: &mut W, hop: &NextHop) -> Result<(), Reason> {
        let old = Self::tuple(window).ok_or(Reason::Malformed)?;
        let (src, dst, ports) = self.after();
        let addresses = A::diff(old.src, src).plus(A::diff(old.dst, dst));
        let [sport, dport] = ports;
        let changed = addresses
            .plus(Sum::diff16(old.sport.wire(), sport.wire()))
            .plus(Sum::diff16(old.dport.wire(), dport.wire()));
        let of = Covered { pseudo_header: true, zero_is_none: !Self::IS_TCP };
        window.l4_checksum(Self::L4 + checksum_offset(self.kind), changed, of)?;
        window.store(Self::L4, &ports)?;
        window.store(ETH + A::SRC, &src)?;
        window.store(ETH + A::DST, &dst)?;
        A::one_hop_less(window, addresses)?;
        window.store(0, &[hop.dst, hop.src])
    }
}

/// Whether a packet opens a connection: that is for the hooks to judge.
#[inline(always)]
fn opens(kind: Kind) -> bool {
    matches!(kind, Kind::Tcp(flags) if flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN)
}

/// Whether the transport checksum is still the device's to complete: a veth hands such packets over as they are, and
/// nothing says so. But what is in the checksum's place is known then: the pseudo header's sum. (A whole checksum that
/// looks like it, one of 65,535, takes the other way; no more comes of it.)
#[inline(always)]
fn is_partial<A: Wire, W: Packet>(window: &W, headers: &Headers<A>, len: u16) -> bool {
    let Some(found) = window.read::<u16>(headers.l4 + checksum_offset(headers.kind)) else { return true };
    let sum = pseudo_header(&headers.key, len.wrapping_sub(A::HEADER as u16));
    sum.fold() == found && !(headers.kind == Kind::Udp && found == 0)
}
