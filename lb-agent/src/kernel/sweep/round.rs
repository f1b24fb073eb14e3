//! One way through a flow table.

use super::timeouts::{Rank, Seen, Timeouts, may_be_spared};
use crate::kernel::presence::Met;
use crate::kernel::tables::{Family, NodeAddr};
use crate::model::Protocol;
use anyhow::Result;
use lb_common::maps::{Flow, FlowKey, Side};

/// What to do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Round<'a> {
    pub(super) timeouts: &'a Timeouts,
    /// The clock of [`Flow::last_seen`].
    pub(super) now: u32,
    /// Also look at entries whose flow's main entry is gone.
    pub(super) orphans: bool,
    /// Make lost halves of living flows again.
    pub(super) mend: bool,
    /// There is no room: end more than what has timed out.
    pub(super) early: Option<Early>,
}

/// What may end before its time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Early {
    /// Up to this rank …
    pub(super) most: Rank,
    /// … what has been silent for longer than so many seconds.
    pub(super) age: u32,
}

/// What was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Swept {
    pub(super) entries: usize,
    pub(super) removed: usize,
    /// Flows that go on.
    pub(super) flows: Flows,
    pub(super) ended: usize,
    pub(super) unanswered: usize,
    pub(super) over: usize,
    pub(super) mended: usize,
    /// Entries of flows that could be spared, if they were older.
    pub(super) young: usize,
}

/// How many flows there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Flows {
    pub(super) tcp: usize,
    pub(super) udp: usize,
    pub(super) icmp: usize,
    /// Those of them that have a port (or an ICMP id) of the node's.
    pub(super) masqueraded: usize,
}

impl Flows {
    fn add<A: NodeAddr>(&mut self, flow: &Flow<A>) {
        const TCP: u8 = Protocol::Tcp.number();
        const UDP: u8 = Protocol::Udp.number();
        let of_protocol = match flow.proto {
            TCP => &mut self.tcp,
            UDP => &mut self.udp,
            _ => &mut self.icmp,
        };
        *of_protocol += 1;
        self.masqueraded += usize::from(flow.flags & Flow::<A>::MASQ_DONE != 0);
    }
}

impl Swept {
    /// Entries that are left, but for those that came meanwhile.
    pub(super) const fn left(&self) -> usize {
        self.entries.saturating_sub(self.removed)
    }
}

impl Round<'_> {
    /// Goes through the table in the kernel's batches. `read` and `family` are the same tables: what a batch holds is a
    /// copy, and the kernel's position in the table is a bucket, so what is removed meanwhile does not disturb.
    pub(super) fn run<A: NodeAddr>(
        &self,
        read: &Family<A>,
        family: &mut Family<A>,
        met: &mut Met,
    ) -> Result<Swept> {
        let mut swept = Swept::default();
        read.for_each_flow(|key, flow| {
            swept.entries += 1;
            met.add(key);
            if flow.is_ours() {
                // One of its others that is lost is made again when a packet comes for it.
                flow.entries().iter().flatten().for_each(|other| met.add(other));
            }
            if flow.side == Side::Held as u8 {
                // Whoever held it is gone.
                swept.removed += usize::from(family.flows.remove(key).is_ok());
                return Ok(());
            }
            let forward = flow.side == Side::Forward as u8;
            swept.young += usize::from(self.is_too_young(flow));
            let mut over = false;
            if self.is_worth_a_look(flow) {
                over = self.look(family, key, flow, &mut swept);
            } else if self.mend && forward && flow.flags & Flow::<A>::MASQ_DONE != 0 {
                swept.mended += usize::from(mend(family, flow));
            }
            if forward && !over {
                swept.flows.add(flow);
            }
            Ok(())
        })?;
        Ok(swept)
    }

    /// Whether an entry by itself looks as if its flow was over.
    fn is_worth_a_look<A: NodeAddr>(&self, flow: &Flow<A>) -> bool {
        if flow.side == Side::Foreign as u8 {
            // Netfilter knows how long, not we.
            return false;
        }
        let dnat = flow.flags & Flow::<A>::DNAT != 0;
        // One entry of the client's and one of the server's will do.
        let stands_for_all = match Side::from_raw(flow.side) {
            Some(Side::Forward) => true,
            Some(Side::Reply) => dnat,
            Some(Side::Back) => !dnat,
            _ => false,
        };
        let age = self.age(flow);
        (stands_for_all || self.orphans)
            && (age > self.timeouts.at_least(flow.proto, flow.side, flow.state)
                || self.early.is_some_and(|early| {
                    age > early.age && may_be_spared(flow.proto, flow.side, flow.state, early.most)
                }))
    }

    /// Whether a flow that could be spared is too young to go.
    fn is_too_young<A: NodeAddr>(&self, flow: &Flow<A>) -> bool {
        self.early.is_some_and(|early| {
            self.age(flow) <= early.age && may_be_spared(flow.proto, flow.side, flow.state, early.most)
        })
    }

    fn age<A: NodeAddr>(&self, flow: &Flow<A>) -> u32 {
        // Seen after we asked for the time: no age at all.
        self.now.saturating_sub(flow.last_seen)
    }

    /// Looks at all entries of the flow: the last packet of either direction counts. Whether it was over.
    fn look<A: NodeAddr>(
        &self,
        family: &mut Family<A>,
        key: &FlowKey<A>,
        flow: &Flow<A>,
        swept: &mut Swept,
    ) -> bool {
        // The main entry knows the masquerade port; where it is gone, this one has to do.
        let main_key = flow.key(Side::Forward);
        let there = family.flows.get(&main_key, 0).ok().filter(|main| main.same_origin(flow));
        let main = there.unwrap_or(*flow);
        let [forward, front, reply, back] = main.entries();
        let mut keys = [forward, front, reply, back, None];
        if !keys.contains(&Some(*key)) {
            keys[4] = Some(*key);
        }
        let (mut found, mut youngest, mut seen) = (0, u32::MAX, Seen::default());
        for slot in &mut keys {
            let entry = match slot {
                Some(key) if *key == main_key => there,
                Some(key) => family.flows.get(key, 0).ok(),
                None => None,
            };
            match entry.filter(|entry| entry.same_origin(&main)) {
                Some(entry) => {
                    found += 1;
                    youngest = youngest.min(self.age(&entry));
                    seen.add(entry.side, entry.state);
                }
                // Taken by another flow since, or gone: not ours to remove.
                None => *slot = None,
            }
        }
        let timed_out = youngest > self.timeouts.of(main.proto, seen);
        let rank = seen.rank(main.proto);
        let spared = self.early.is_some_and(|early| rank <= early.most && youngest > early.age);
        if found == 0 || !timed_out && !spared {
            return found == 0;
        }
        if let Some(forward) = keys[0] {
            // A straight flow with the same tuple is found by way of this entry.
            let straight = FlowKey { variant: 1, ..forward };
            if family.flows.get(&straight, 0).is_ok_and(|other| !other.same_origin(&main)) {
                keys[0] = None;
            }
        }
        for key in keys.iter().flatten() {
            swept.removed += usize::from(family.flows.remove(key).is_ok());
        }
        match rank {
            _ if timed_out => swept.ended += 1,
            Rank::Unanswered => swept.unanswered += 1,
            _ => swept.over += 1,
        }
        true
    }
}

/// A reply to a masqueraded flow finds its way by this entry alone.
fn mend<A: NodeAddr>(family: &mut Family<A>, forward: &Flow<A>) -> bool {
    let key = forward.key(Side::Back);
    if family.flows.get(&key, 0).is_ok() {
        return false;
    }
    // `forward` is a copy: the flow may have ended since, by our own hand.
    let alive = family.flows.get(&forward.key(Side::Forward), 0).is_ok_and(|now| now.same_origin(forward));
    // Nobody knows whether the server had answered: the flow must not look as if it had not.
    let back = Flow { state: Flow::<A>::SEEN, ..forward.as_side(Side::Back) };
    alive && family.enter(key, back, NOEXIST).is_ok()
}

/// A packet may have made it in between.
const NOEXIST: u64 = 1;
