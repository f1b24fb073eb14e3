//! Flows from one version's table to another's, in an order that leaves no packet between the two.
//!
//! A packet must not find half of a flow that leads our programs to a decision which the others have made differently: the
//! entry that says how the source is translated comes first, and what leads there only when it is there. A flow whose source
//! has not been decided on is left to the others until they decide no more, and one that is closed until they use its port
//! no more for another.

use super::layout::{Layout, Record};
use lb_common::maps::{Flow, Side};

type Bits = Flow<lb_common::addr::Ip4>;

/// How far the others have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Others {
    /// They serve what we do not know.
    Serve,
    /// No packet comes to them any more.
    Rest,
}

/// What to do about an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Copy it.
    Copy,
    /// Copy it if the flow's [`Side::Forward`] is there, which this is the key of.
    With(Vec<u8>),
    /// Leave it where it is, for now.
    Leave,
}

/// Sides in the order in which they are copied. (`Held` is for microseconds, while an agent leaves.)
pub(super) const ORDER: [Side; 5] = [Side::Forward, Side::Back, Side::Reply, Side::Front, Side::Foreign];

/// The fields of a key and, in the same order, those of an entry that make the key of its flow's [`Side::Forward`].
const FORWARD: [(&str, &str); 5] = [
    ("src", "client"),
    ("dst", "backend"),
    ("sport", "alias_port"),
    ("dport", "backend_port"),
    ("proto", "proto"),
];
/// What [`Flow::same_origin`] compares.
const ORIGIN: [&str; 5] = ["client", "vip", "client_port", "vip_port", "proto"];

/// Reads entries of a flow table by their fields' names. What sides and flags mean is the same in all versions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entries<'a> {
    layout: &'a Layout,
}

impl<'a> Entries<'a> {
    pub(super) fn new(layout: &'a Layout) -> Self {
        Self { layout }
    }

    /// Which side an entry is.
    pub(super) fn side(&self, entry: &[u8]) -> Option<Side> {
        Side::from_raw(*field(&self.layout.value, "side", entry).first()?)
    }

    /// What to do about an entry now.
    pub(super) fn step(&self, entry: &[u8], others: Others) -> Step {
        match (self.side(entry), others) {
            (None | Some(Side::Held), _) => Step::Leave,
            (_, Others::Rest) => Step::Copy,
            _ if self.closing(entry) => Step::Leave,
            (Some(Side::Forward), _) if self.undecided(entry) => Step::Leave,
            (Some(Side::Forward | Side::Back | Side::Foreign), _) => Step::Copy,
            (Some(Side::Reply | Side::Front), _) => Step::With(self.forward_key(entry)),
        }
    }

    /// Whether two entries are of the same connection.
    pub(super) fn same_origin(&self, one: &[u8], other: &[u8]) -> bool {
        ORIGIN
            .iter()
            .all(|name| field(&self.layout.value, name, one) == field(&self.layout.value, name, other))
    }

    /// Whether they are of the same connection, which leaves from the same port.
    pub(super) fn same_flow(&self, one: &[u8], other: &[u8]) -> bool {
        self.same_origin(one, other)
            && ["masq", "masq_port"]
                .iter()
                .all(|name| field(&self.layout.value, name, one) == field(&self.layout.value, name, other))
    }

    /// Whether the device that the flow leaves by has still to say how its source is translated.
    fn undecided(&self, entry: &[u8]) -> bool {
        let flags = field(&self.layout.value, "flags", entry).first().copied().unwrap_or(0);
        flags & (Bits::MASQ_NEEDED | Bits::MASQ_UNDECIDED) != 0 && flags & Bits::MASQ_DONE == 0
    }

    /// Whether it is closed on this side: the others may give its port to another flow, whose replies must not find it here.
    pub(super) fn closing(&self, entry: &[u8]) -> bool {
        field(&self.layout.value, "state", entry).first().is_some_and(|state| state & Bits::CLOSING != 0)
    }

    fn forward_key(&self, entry: &[u8]) -> Vec<u8> {
        let mut key = vec![0; self.layout.key.size];
        for (to, from) in FORWARD {
            if let Some((at, len)) = self.layout.key.field(to) {
                key[at..at + len].copy_from_slice(field(&self.layout.value, from, entry));
            }
        }
        key
    }
}

fn field<'e>(record: &Record, name: &str, bytes: &'e [u8]) -> &'e [u8] {
    record.field(name).map_or(&[], |(at, len)| &bytes[at..at + len])
}

#[cfg(test)]
mod tests {
    use super::super::layout::ours;
    use super::*;
    use bytemuck::bytes_of;
    use lb_common::addr::{Ip4, NetPort};
    use lb_common::maps::FlowKey;
    use std::net::Ipv4Addr;

    fn flow(side: Side, flags: u8) -> Flow<Ip4> {
        Flow {
            client: Ip4::from(Ipv4Addr::new(10, 0, 0, 1)),
            vip: Ip4::from(Ipv4Addr::new(10, 96, 0, 1)),
            backend: Ip4::from(Ipv4Addr::new(10, 0, 0, 2)),
            client_port: NetPort::new(4000),
            alias_port: NetPort::new(4001),
            vip_port: NetPort::new(80),
            backend_port: NetPort::new(8080),
            proto: 6,
            side: side as u8,
            flags,
            ..Flow::straight(&FlowKey::default(), 0)
        }
    }

    #[test]
    fn what_leads_to_a_decision_waits_for_it() {
        let layouts = ours();
        let entries = Entries::new(&layouts["LB_FLOW4"]);
        let step = |side, flags, others| entries.step(bytes_of(&flow(side, flags)), others);
        let key = Step::With(bytes_of(&flow(Side::Forward, 0).key(Side::Forward)).to_vec());
        let (undecided, done) = (Bits::DNAT | Bits::MASQ_UNDECIDED, Bits::DNAT | Bits::MASQ_DONE);
        for (side, flags, now, last) in [
            (Side::Forward, undecided, Step::Leave, Step::Copy),
            (Side::Forward, Bits::DNAT | Bits::MASQ_NEEDED, Step::Leave, Step::Copy),
            (Side::Forward, done, Step::Copy, Step::Copy),
            (Side::Forward, done | Bits::MASQ_NEEDED, Step::Copy, Step::Copy),
            (Side::Forward, Bits::DNAT, Step::Copy, Step::Copy),
            (Side::Back, done, Step::Copy, Step::Copy),
            // They have the flags of the moment when they were made.
            (Side::Reply, undecided, key.clone(), Step::Copy),
            (Side::Front, undecided, key, Step::Copy),
            (Side::Foreign, 0, Step::Copy, Step::Copy),
            (Side::Held, 0, Step::Leave, Step::Leave),
        ] {
            assert_eq!(step(side, flags, Others::Serve), now, "{side:?} {flags:#x}");
            assert_eq!(step(side, flags, Others::Rest), last, "{side:?} {flags:#x}");
        }
    }

    #[test]
    fn what_is_closed_comes_last() {
        let layouts = ours();
        let entries = Entries::new(&layouts["LB_FLOW4"]);
        for side in ORDER {
            for state in [Bits::FIN, Bits::RST | Bits::SEEN] {
                let closed = Flow { state, ..flow(side, Bits::DNAT | Bits::MASQ_DONE) };
                assert_eq!(entries.step(bytes_of(&closed), Others::Serve), Step::Leave, "{side:?}");
                assert_eq!(entries.step(bytes_of(&closed), Others::Rest), Step::Copy, "{side:?}");
            }
        }
    }

    #[test]
    fn entries_of_a_connection_know_each_other() {
        let layouts = ours();
        let entries = Entries::new(&layouts["LB_FLOW4"]);
        let (front, forward) = (flow(Side::Front, 4), flow(Side::Forward, 8));
        assert!(entries.same_origin(bytes_of(&front), bytes_of(&forward)));
        let other = Flow { client_port: NetPort::new(1), ..forward };
        assert!(!entries.same_origin(bytes_of(&front), bytes_of(&other)));
        assert!(entries.same_flow(bytes_of(&front), bytes_of(&forward)));
        let moved = Flow { masq_port: NetPort::new(1), ..forward };
        assert!(entries.same_origin(bytes_of(&front), bytes_of(&moved)));
        assert!(!entries.same_flow(bytes_of(&front), bytes_of(&moved)));
    }
}
