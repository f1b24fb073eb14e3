//! What was seen of a flow, and how long it lives without a packet.

use lb_common::addr::Ip4;
use lb_common::maps::{Flow, Side};

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const SEEN: u8 = Flow::<Ip4>::SEEN;
const FIN: u8 = Flow::<Ip4>::FIN;
const RST: u8 = Flow::<Ip4>::RST;

/// Seconds without a packet after which a flow ends: `nf_conntrack`'s, by its names, as far as the flow table can tell
/// its states apart. The defaults are its own, too, but for the two that kube-proxy sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// The server has not answered.
    pub tcp_syn_sent: u32,
    /// The server has, and the client nothing more to say.
    pub tcp_syn_recv: u32,
    /// Both go on.
    pub tcp_established: u32,
    /// One of them has sent a FIN.
    pub tcp_close_wait: u32,
    /// Both have.
    pub tcp_time_wait: u32,
    /// A RST went by.
    pub tcp_close: u32,
    /// The client has sent one datagram, or the server has not answered.
    pub udp: u32,
    /// The client went on after the server's answer, or before.
    pub udp_stream: u32,
    /// Echo.
    pub icmp: u32,
    /// Echo.
    pub icmpv6: u32,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            tcp_syn_sent: 120,
            tcp_syn_recv: 60,
            tcp_established: 86_400,
            tcp_close_wait: 3600,
            tcp_time_wait: 120,
            tcp_close: 10,
            udp: 30,
            udp_stream: 120,
            icmp: 30,
            icmpv6: 30,
        }
    }
}

/// The state bits of a flow's entries, by who sent the packets that set them.
///
/// The packet that makes the entries does not count as [`Flow::SEEN`]: on the client's side the bit means a second
/// packet, on the server's an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    client: u8,
    server: u8,
}

/// Who can be spared when the table is full, the first first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rank {
    /// Only one end has spoken.
    Unanswered,
    /// Half open, closing or closed; a question and its answer.
    Over,
    /// Nobody may end it but time.
    Living,
}

impl Seen {
    /// Adds an entry's bits.
    pub(crate) const fn add(&mut self, side: u8, state: u8) {
        if of_client(side) {
            self.client |= state;
        } else {
            self.server |= state;
        }
    }

    /// The most alive that a flow with this entry can be.
    const fn at_best(side: u8, state: u8) -> Self {
        if of_client(side) {
            Self { client: state, server: SEEN }
        } else {
            Self { client: SEEN, server: state }
        }
    }

    const fn either(self, bit: u8) -> bool {
        (self.client | self.server) & bit != 0
    }

    const fn both(self, bit: u8) -> bool {
        self.client & self.server & bit != 0
    }

    /// `nf_conntrack`'s word for it. What it has no word for, a flow whose server has answered once, is `REPLIED`.
    pub(crate) const fn state(self, proto: u8) -> &'static str {
        match proto {
            TCP if self.either(RST) => "CLOSE",
            TCP if self.both(FIN) => "TIME_WAIT",
            TCP if self.either(FIN) => "CLOSE_WAIT",
            TCP if self.both(SEEN) => "ESTABLISHED",
            TCP if self.server & SEEN != 0 => "SYN_RECV",
            TCP => "SYN_SENT",
            _ if self.server & SEEN == 0 => "UNREPLIED",
            UDP if self.both(SEEN) => "ASSURED",
            _ => "REPLIED",
        }
    }

    /// Whether it is a connection that both ends have closed, or one has reset.
    pub(crate) const fn is_over(self, proto: u8) -> bool {
        proto == TCP && (self.either(RST) || self.both(FIN))
    }

    pub(super) const fn rank(self, proto: u8) -> Rank {
        if self.server & SEEN == 0 && !self.either(RST) {
            Rank::Unanswered
        } else if !self.both(SEEN) || self.either(FIN | RST) || !matches!(proto, TCP | UDP) {
            Rank::Over
        } else {
            Rank::Living
        }
    }
}

const fn of_client(side: u8) -> bool {
    matches!(Side::from_raw(side), Some(Side::Front | Side::Forward))
}

impl Timeouts {
    /// How long the whole flow may be silent.
    pub(super) const fn of(&self, proto: u8, seen: Seen) -> u32 {
        match proto {
            TCP if seen.either(RST) => self.tcp_close,
            TCP if seen.both(FIN) => self.tcp_time_wait,
            TCP if seen.either(FIN) => self.tcp_close_wait,
            TCP if seen.both(SEEN) => self.tcp_established,
            TCP if seen.server & SEEN != 0 => self.tcp_syn_recv,
            TCP => self.tcp_syn_sent,
            UDP if seen.both(SEEN) => self.udp_stream,
            UDP => self.udp,
            ICMPV6 => self.icmpv6,
            _ => self.icmp,
        }
    }

    /// How long one entry has to be silent to make its flow worth a look at all of its entries. Whatever is over is
    /// told by an entry of the client's or by one of the server's.
    pub(super) fn at_least(&self, proto: u8, side: u8, state: u8) -> u32 {
        let alone = self.of(proto, Seen::at_best(side, state));
        match proto {
            TCP if state & FIN != 0 => alone.min(self.tcp_time_wait),
            TCP if state & SEEN == 0 => alone.min(self.tcp_syn_sent),
            _ => alone,
        }
    }
}

/// Whether one entry alone says that the flow may be spared.
pub(super) const fn may_be_spared(proto: u8, side: u8, state: u8, most: Rank) -> bool {
    Seen::at_best(side, state).rank(proto) as u8 <= most as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(client: u8, server: u8) -> Seen {
        Seen { client, server }
    }

    #[test]
    fn a_flow_ends_by_what_was_seen_of_it() {
        let t = Timeouts::default();
        for (proto, client, server, timeout, rank, state) in [
            (TCP, 0, 0, t.tcp_syn_sent, Rank::Unanswered, "SYN_SENT"),
            (TCP, SEEN, 0, t.tcp_syn_sent, Rank::Unanswered, "SYN_SENT"),
            (TCP, 0, SEEN, t.tcp_syn_recv, Rank::Over, "SYN_RECV"),
            (TCP, SEEN, SEEN, t.tcp_established, Rank::Living, "ESTABLISHED"),
            (TCP, SEEN | FIN, SEEN, t.tcp_close_wait, Rank::Over, "CLOSE_WAIT"),
            (TCP, SEEN, SEEN | FIN, t.tcp_close_wait, Rank::Over, "CLOSE_WAIT"),
            (TCP, SEEN | FIN, SEEN | FIN, t.tcp_time_wait, Rank::Over, "TIME_WAIT"),
            (TCP, SEEN | FIN | RST, SEEN | FIN, t.tcp_close, Rank::Over, "CLOSE"),
            (TCP, 0, SEEN | RST, t.tcp_close, Rank::Over, "CLOSE"),
            (TCP, SEEN | RST, 0, t.tcp_close, Rank::Over, "CLOSE"),
            (UDP, SEEN, 0, t.udp, Rank::Unanswered, "UNREPLIED"),
            (UDP, 0, SEEN, t.udp, Rank::Over, "REPLIED"),
            (UDP, SEEN, SEEN, t.udp_stream, Rank::Living, "ASSURED"),
            (1, SEEN, SEEN, t.icmp, Rank::Over, "REPLIED"),
            (58, 0, 0, t.icmpv6, Rank::Unanswered, "UNREPLIED"),
        ] {
            let bits = seen(client, server);
            let found = (t.of(proto, bits), bits.rank(proto), bits.state(proto));
            assert_eq!(found, (timeout, rank, state), "{proto} {bits:?}");
        }
    }

    /// The look at one entry of either end must find whatever the look at all of them would end.
    #[test]
    fn no_flow_is_overlooked() {
        // Odd ones on purpose: nothing says that the user's are in nf_conntrack's order.
        let odd = Timeouts { tcp_syn_recv: 500, tcp_close_wait: 70, udp_stream: 5, ..Timeouts::default() };
        for t in [Timeouts::default(), odd] {
            for (proto, client, server) in [TCP, UDP, 1, 58]
                .into_iter()
                .flat_map(|proto| (0..8).flat_map(move |c| (0..8).map(move |s| (proto, c, s))))
            {
                // A FIN or RST comes by a packet, which is either the first or sets the other bit.
                let bits = seen(client, server);
                let looked = t.at_least(proto, Side::Forward as u8, client).min(t.at_least(
                    proto,
                    Side::Reply as u8,
                    server,
                ));
                assert!(looked <= t.of(proto, bits), "{proto} {bits:?}");
                let spared = |most| {
                    may_be_spared(proto, Side::Front as u8, client, most)
                        || may_be_spared(proto, Side::Back as u8, server, most)
                };
                let rank = bits.rank(proto);
                assert!(rank == Rank::Living || spared(rank), "{proto} {bits:?}");
            }
        }
    }
}
