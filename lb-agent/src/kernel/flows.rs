//! Whole flows, put together from their entries.

use super::sweep::Seen;
use super::tables::{Family, NodeAddr};
use anyhow::Result;
use lb_common::addr::NetPort;
use lb_common::maps::{Flow, Side};
use std::collections::HashMap;

/// What all entries of a flow have in common.
type Origin<A> = (A, NetPort, A, NetPort, u8);

/// A flow.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Whole<A> {
    /// The entry that knows most.
    pub(crate) entry: Flow<A>,
    /// What was seen of both ends.
    pub(crate) seen: Seen,
    /// When the last packet of either end went by.
    pub(crate) last_seen: u32,
}

/// All flows of a family: one way through the table, in which a flow's entries are met in any order.
pub(crate) fn all<A: NodeAddr>(family: &Family<A>) -> Result<Vec<Whole<A>>> {
    let mut all: HashMap<Origin<A>, Whole<A>> = HashMap::new();
    family.for_each_flow(|_, entry| {
        let origin = (entry.client, entry.client_port, entry.vip, entry.vip_port, entry.proto);
        let whole = all.entry(origin).or_insert_with(|| Whole {
            entry: *entry,
            seen: Seen::default(),
            last_seen: entry.last_seen,
        });
        whole.seen.add(entry.side, entry.state);
        whole.last_seen = whole.last_seen.max(entry.last_seen);
        if knows(entry.side) > knows(whole.entry.side) {
            whole.entry = *entry;
        }
        Ok(())
    })?;
    Ok(all.into_values().collect())
}

/// How much an entry can know: the first two are there before a port to masquerade to is taken.
fn knows(side: u8) -> u8 {
    match Side::from_raw(side) {
        Some(Side::Forward) => 2,
        Some(Side::Back) => 1,
        _ => 0,
    }
}
