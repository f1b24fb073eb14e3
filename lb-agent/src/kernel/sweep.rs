//! Ends flows that have timed out, and makes lost halves of living ones again.
//!
//! From user space, by batches: a `bpf_for_each_map_elem` in one run of a program would keep the CPU's softirqs off
//! for as long as the whole table takes, and is not there before 5.13.

use super::tables::{Family, NodeAddr, Tables};
use anyhow::Result;
use lb_common::addr::Ip4;
use lb_common::maps::{Flow, FlowKey, Side};
use nix::time::{ClockId, clock_gettime};
use std::time::Duration;
use tracing::{debug, warn};

/// Time between two sweeps.
const EVERY: Duration = Duration::from_secs(10);
/// Every so many sweeps entries are looked at whose flow's main entry is gone.
const ORPHANS_EVERY: u32 = 6;

/// Seconds without a packet after which a flow ends. The defaults are nf_conntrack's, but for TCP's, which is what
/// kube-proxy sets.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// Both ends have spoken.
    pub tcp_established: u32,
    /// Only one end has.
    pub tcp_syn: u32,
    /// A FIN or RST went by.
    pub tcp_closing: u32,
    /// Only one end has spoken.
    pub udp: u32,
    /// Both have.
    pub udp_stream: u32,
    /// Echo.
    pub icmp: u32,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { tcp_established: 86_400, tcp_syn: 60, tcp_closing: 60, udp: 30, udp_stream: 120, icmp: 30 }
    }
}

impl Timeouts {
    /// `state` is what was seen of the flow, in either direction.
    const fn of(&self, proto: u8, state: u8) -> u32 {
        let both = state & Flow::<Ip4>::SEEN != 0;
        match proto {
            6 if state & Flow::<Ip4>::CLOSING != 0 => self.tcp_closing,
            6 if both => self.tcp_established,
            6 => self.tcp_syn,
            17 if both => self.udp_stream,
            17 => self.udp,
            _ => self.icmp,
        }
    }
}

/// Sweeps the flow tables.
pub struct Sweeper {
    tables: Tables,
    timeouts: Timeouts,
}

/// What a sweep found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Swept {
    flows: usize,
    ended: usize,
    mended: usize,
}

impl Sweeper {
    /// A sweeper of `tables`.
    pub fn new(tables: Tables) -> Self {
        Self { tables, timeouts: Timeouts::default() }
    }

    /// Sweeps for ever.
    pub async fn run(mut self) {
        let mut round = 0u32;
        loop {
            tokio::time::sleep(EVERY).await;
            let orphans = round.is_multiple_of(ORPHANS_EVERY);
            round = round.wrapping_add(1);
            let now = monotonic_seconds();
            let swept = sweep(&mut self.tables.v4, &self.timeouts, now, orphans)
                .and_then(|v4| Ok((v4, sweep(&mut self.tables.v6, &self.timeouts, now, orphans)?)));
            match swept {
                Ok((v4, v6)) => debug!(?v4, ?v6, "swept the flow tables"),
                Err(error) => warn!("sweep the flow tables: {error:#}"),
            }
        }
    }
}

/// The clock of [`Flow::last_seen`].
pub fn monotonic_seconds() -> u32 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |t| t.tv_sec() as u32)
}

/// One round: collects what looks dead first, because the table must not change under the reader more than it
/// does anyway.
fn sweep<A: NodeAddr>(family: &mut Family<A>, timeouts: &Timeouts, now: u32, orphans: bool) -> Result<Swept> {
    let mut swept = Swept::default();
    let mut candidates = Vec::new();
    let mut masqueraded = Vec::new();
    family.for_each_flow(|key, flow| {
        let side = Side::from_raw(flow.side);
        let forward = side == Some(Side::Forward);
        swept.flows += usize::from(forward);
        if is_candidate(flow, timeouts, now) && (forward || orphans || flow.state & Flow::<A>::CLOSING != 0) {
            candidates.push((*key, *flow));
        } else if forward && flow.flags & Flow::<A>::MASQ_DONE != 0 {
            masqueraded.push(*flow);
        }
        Ok(())
    })?;
    for (key, flow) in candidates {
        end_or_mend(family, timeouts, now, &key, &flow, &mut swept)?;
    }
    // A reply to a masqueraded flow finds its way by this entry alone.
    for flow in masqueraded {
        let back = flow.key(Side::Back);
        if family.flows.get(&back, 0).is_err()
            && family.flows.insert(back, flow.as_side(Side::Back), 0).is_ok()
        {
            swept.mended += 1;
        }
    }
    Ok(swept)
}

/// Whether an entry by itself looks dead.
fn is_candidate<A: NodeAddr>(flow: &Flow<A>, timeouts: &Timeouts, now: u32) -> bool {
    age(flow, now) > timeouts.of(flow.proto, flow.state)
}

fn age<A: NodeAddr>(flow: &Flow<A>, now: u32) -> u32 {
    // Seen after we asked for the time: no age at all.
    now.saturating_sub(flow.last_seen)
}

/// Looks at all entries of the flow: the last packet of either direction counts.
fn end_or_mend<A: NodeAddr>(
    family: &mut Family<A>,
    timeouts: &Timeouts,
    now: u32,
    key: &FlowKey<A>,
    flow: &Flow<A>,
    swept: &mut Swept,
) -> Result<()> {
    // The main entry knows the masquerade port; where it is gone, this one has to do.
    let main = family.flows.get(&flow.key(Side::Forward), 0).unwrap_or(*flow);
    let keys = entries(&main);
    let mut found = 0usize;
    let (mut youngest, mut state) = (age(flow, now), flow.state);
    for key in keys.iter().flatten() {
        if let Ok(entry) = family.flows.get(key, 0) {
            if !entry.same_origin(&main) {
                continue;
            }
            found += 1;
            youngest = youngest.min(age(&entry, now));
            state |= entry.state;
        }
    }
    if youngest <= timeouts.of(main.proto, state) {
        return Ok(());
    }
    for key in keys.iter().flatten() {
        // Taken by another flow since: not ours to remove.
        if family.flows.get(key, 0).is_ok_and(|entry| entry.same_origin(&main)) {
            let _ = family.flows.remove(key);
        }
    }
    let _ = family.flows.remove(key);
    swept.ended += usize::from(found > 0);
    Ok(())
}

/// The keys of all entries that the flow can have.
fn entries<A: NodeAddr>(flow: &Flow<A>) -> [Option<FlowKey<A>>; 4] {
    let dnat = flow.flags & Flow::<A>::DNAT != 0;
    let masqueraded = flow.flags & Flow::<A>::MASQ_DONE != 0;
    [
        Some(flow.key(Side::Forward)),
        dnat.then(|| flow.key(Side::Front)),
        dnat.then(|| flow.key(Side::Reply)),
        masqueraded.then(|| flow.key(Side::Back)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use lb_common::addr::Ip6;

    fn flow(proto: u8, state: u8, last_seen: u32) -> Flow<Ip6> {
        Flow { proto, state, last_seen, side: Side::Forward as u8, ..Flow::default() }
    }

    #[test]
    fn a_flow_ends_by_what_was_seen_of_it() {
        let t = Timeouts::default();
        let seen = Flow::<Ip6>::SEEN;
        for (proto, state, timeout) in [
            (6, seen, t.tcp_established),
            (6, 0, t.tcp_syn),
            (6, seen | Flow::<Ip6>::FIN, t.tcp_closing),
            (6, Flow::<Ip6>::RST, t.tcp_closing),
            (17, 0, t.udp),
            (17, seen, t.udp_stream),
            (58, seen, t.icmp),
        ] {
            let then = 1_000_000;
            assert!(!is_candidate(&flow(proto, state, then), &t, then + timeout), "{proto} {state}");
            assert!(is_candidate(&flow(proto, state, then), &t, then + timeout + 1), "{proto} {state}");
        }
    }

    #[test]
    fn a_packet_from_the_future_is_no_old_one() {
        assert!(!is_candidate(&flow(17, 0, 101), &Timeouts::default(), 100));
    }

    #[test]
    fn only_entries_that_a_flow_has_are_looked_for() {
        let plain = flow(6, 0, 0);
        assert_eq!(entries(&plain).iter().flatten().count(), 1);
        let all = Flow { flags: Flow::<Ip6>::DNAT | Flow::<Ip6>::MASQ_DONE, ..plain };
        assert_eq!(entries(&all).iter().flatten().count(), 4);
    }
}
