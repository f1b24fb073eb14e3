//! The maps' layouts as they are pinned beside them, and records brought from one version's into another's.

use lb_common::addr::{Ip4, Ip6};
use lb_common::layout::{Described, Field};
use lb_common::maps::{
    Affinity, AffinityKey, Flow, FlowKey, Frontend, FrontendKey, Range, ServiceName, SlotGroup, SlotGroupKey,
    SocketKey, SocketPeer, SourceKey,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Fields by name: where, and how long.
type Fields = BTreeMap<String, (usize, usize)>;

/// A record's layout.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) size: usize,
    fields: Fields,
}

/// A map's layout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Layout {
    pub(super) key: Record,
    pub(super) value: Record,
}

/// All maps whose contents outlive a version.
pub(super) type Layouts = BTreeMap<String, Layout>;

/// The prefix length that keys of tries begin with.
const PREFIX: usize = size_of::<u32>();

impl Record {
    /// Where a field is, and how long.
    pub(super) fn field(&self, name: &str) -> Option<(usize, usize)> {
        self.fields.get(name).copied()
    }

    fn of<T: Described>(prefix: usize) -> Self {
        let mut fields = Fields::new();
        if prefix > 0 {
            fields.insert("prefix".into(), (0, prefix));
        }
        if T::FIELDS.is_empty() {
            fields.insert("value".into(), (prefix, size_of::<T>()));
        }
        add(&mut fields, "", prefix, T::FIELDS);
        Self { size: prefix + size_of::<T>(), fields }
    }
}

fn add(all: &mut Fields, path: &str, at: usize, fields: &[Field]) {
    for field in fields {
        let (name, at) = (format!("{path}{}", field.name), at + field.offset);
        if field.of.is_empty() {
            all.insert(name, (at, field.size));
            continue;
        }
        let each = field.size / field.count.max(1);
        for i in 0..field.count {
            let path = if field.count == 1 { format!("{name}.") } else { format!("{name}.{i}.") };
            add(all, &path, at + i * each, field.of);
        }
    }
}

/// Ours.
pub(super) fn ours() -> Layouts {
    fn map<K: Described, V: Described>(name: &str, prefix: usize) -> (String, Layout) {
        (name.into(), Layout { key: Record::of::<K>(prefix), value: Record::of::<V>(0) })
    }
    macro_rules! families {
        ($a:ident, $n:literal) => {
            [
                map::<FlowKey<$a>, Flow<$a>>(concat!("LB_FLOW", $n), 0),
                map::<FrontendKey<$a>, Frontend>(concat!("LB_FRONT", $n), 0),
                map::<SlotGroupKey, SlotGroup<$a>>(concat!("LB_SLOT", $n), 0),
                map::<$a, u32>(concat!("LB_CIDR", $n), PREFIX),
                map::<SourceKey<$a>, u32>(concat!("LB_SOURCE", $n), PREFIX),
                map::<u32, Range<$a>>(concat!("LB_RANGE", $n), 0),
            ]
        };
    }
    let shared = [
        map::<AffinityKey, Affinity>("LB_AFFINITY", 0),
        map::<u32, ServiceName>("LB_NAME", 0),
        map::<SocketKey, SocketPeer>("LB_SOCKET", 0),
        map::<u32, u32>("LB_EPOCH", 0),
        map::<u32, u32>("LB_TAKEN", 0),
        map::<u32, u64>("LB_PORTS", 0),
        map::<u32, u64>("LB_NETNS", 0),
    ];
    families!(Ip4, "4").into_iter().chain(families!(Ip6, "6")).chain(shared).collect()
}

/// How records of one layout become those of another.
#[derive(Debug)]
pub(super) struct Plan {
    /// From, to, and how many bytes.
    moves: Vec<(usize, usize, usize)>,
    /// What has no place there: it can only be brought over where it is zero.
    lost: Vec<(usize, usize)>,
    size: usize,
}

impl Plan {
    /// Numbers are little-endian: a wider field has more zeros at its end. `strict` for keys: what is lost of them would make
    /// two records one.
    pub(super) fn new(from: &Record, to: &Record, strict: bool) -> Self {
        let (mut moves, mut lost) = (Vec::new(), Vec::new());
        for (name, &(at, len)) in &from.fields {
            match to.fields.get(name) {
                Some(&(there, room)) => {
                    moves.push((at, there, len.min(room)));
                    if room < len {
                        lost.push((at + room, len - room));
                    }
                }
                None if strict => lost.push((at, len)),
                None => {}
            }
        }
        Self { moves, lost, size: to.size }
    }

    /// The record in the other layout, in `there`; false if it cannot be said in that.
    pub(super) fn apply(&self, record: &[u8], there: &mut Vec<u8>) -> bool {
        if self.lost.iter().any(|&(at, len)| record[at..at + len].iter().any(|byte| *byte != 0)) {
            return false;
        }
        there.clear();
        there.resize(self.size, 0);
        for &(from, to, len) in &self.moves {
            there[to..to + len].copy_from_slice(&record[from..from + len]);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(size: usize, fields: &[(&str, usize, usize)]) -> Record {
        Record { size, fields: fields.iter().map(|&(name, at, len)| (name.into(), (at, len))).collect() }
    }

    fn applied(plan: &Plan, record: &[u8]) -> Option<Vec<u8>> {
        let mut there = vec![9; 3];
        plan.apply(record, &mut there).then_some(there)
    }

    #[test]
    fn records_go_over_by_field_names() {
        let old = record(6, &[("a", 0, 4), ("b", 4, 2)]);
        let new = record(12, &[("b", 0, 4), ("new", 4, 4), ("a", 8, 4)]);
        let there = applied(&Plan::new(&old, &new, true), &[1, 2, 3, 4, 5, 6]);
        assert_eq!(there.as_deref(), Some(&[5, 6, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4][..]));
        let back = |record: &[u8], strict| applied(&Plan::new(&new, &old, strict), record);
        assert_eq!(back(&there.unwrap(), true).as_deref(), Some(&[1, 2, 3, 4, 5, 6][..]));
        let more = [5, 6, 0, 0, 7, 0, 0, 0, 1, 2, 3, 4];
        assert_eq!(back(&more, true), None, "a key would be another's");
        assert_eq!(back(&more, false).as_deref(), Some(&[1, 2, 3, 4, 5, 6][..]));
        assert_eq!(back(&[5, 6, 1, 0, 0, 0, 0, 0, 1, 2, 3, 4], false), None, "a number that is too large");
    }

    #[test]
    fn ours_says_where_every_field_is() {
        let ours = ours();
        let flow = &ours["LB_FLOW4"].value;
        assert_eq!((flow.size, flow.fields["last_seen"]), (size_of::<Flow<Ip4>>(), (24, 4)));
        let slots = &ours["LB_SLOT6"].value.fields;
        assert_eq!(slots["slots.1.port"], (32 + 16, 2));
        assert_eq!(ours["LB_SOURCE4"].key.fields["addr"], (8, 4));
        assert_eq!(ours["LB_FRONT4"].value.fields["external.count"], (12, 4));
        for (name, layout) in &ours {
            for record in [&layout.key, &layout.value] {
                assert_eq!(record.fields.values().map(|(_, len)| len).sum::<usize>(), record.size, "{name}");
            }
        }
        let text = serde_json::to_vec(&ours).unwrap();
        assert!(text.len() < lb_common::layout::ROOM, "{} bytes", text.len());
        assert_eq!(serde_json::from_slice::<Layouts>(&text).unwrap(), ours);
    }
}
