//! Ends flows that have timed out, makes lost halves of living ones again, and makes room when there is none.
//!
//! From user space, by batches: a `bpf_for_each_map_elem` in one run of a program would keep the CPU's softirqs off
//! for as long as the whole table takes, and is not there before 5.13.
//!
//! A full table refuses new flows, whoever they belong to. So when it fills up, flows that nobody has answered end
//! after seconds, and if that is not enough, those that are closing (`nf_conntrack` calls it early drop, and does it in
//! the packet's path). Established connections and streams of datagrams never do.

mod round;
#[cfg(test)]
mod tests;
mod timeouts;

use super::fill::Fill;
use super::pins::Pins;
use super::presence::{Marks, Met};
use super::tables::{Family, NodeAddr, Tables};
use crate::metrics::{Collector, Kind, Sample};
use anyhow::{Context as _, Result};
use aya::maps::MapInfo;
use lb_common::datapath::Reason;
use nix::time::{ClockId, clock_gettime};
use round::{Early, Flows, Round, Swept};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use timeouts::Rank;
use tracing::{debug, warn};

pub(crate) use timeouts::Seen;
pub use timeouts::Timeouts;

/// Time between two sweeps when there is room.
const EVERY: Duration = Duration::from_secs(10);
/// The same where there was nothing, and nothing has come since as far as the programs have counted: going through empty
/// tables is most of what a sweep costs.
const EVERY_QUIET: Duration = Duration::from_secs(60);
/// Time between two looks at the counters.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Every so many sweeps entries are looked at whose flow's main entry is gone.
const ORPHANS_EVERY: u32 = 6;
/// Sweeps after which all that is attached are this agent's programs, which mark what they enter: [`Marks::renew`].
const ALL_MARK: u32 = 3;
/// Time between these.
const SOON: Duration = Duration::from_millis(500);
/// After a sweep, rest for so many times as long as it took: a fifth of a core at most.
const REST: u32 = 4;
/// The same while new flows are refused: half a core.
const SHORT_REST: u32 = 1;
/// Entries that a flow can have: an estimate of what new flows have taken, on the safe side.
const ENTRIES_PER_FLOW: u64 = 4;
/// Seconds of silence after which a flow that can be spared can go, when the table fills up.
const PATIENT: u32 = 3;
/// The same when it is full.
const URGENT: u32 = 1;
/// How often the log says that room had to be made.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// Sweeps the flow tables.
pub struct Sweeper {
    /// The same tables twice: one is read while the other is changed.
    read: Tables,
    tables: Tables,
    /// What the programs need not look up.
    marks: Marks,
    timeouts: Timeouts,
    stats: Arc<Stats>,
    /// Told how much is left.
    fill: Option<Fill>,
    rounds: u32,
    /// What the programs had counted when the last sweep began.
    counted: Counted,
    /// The last sweep has left nothing.
    empty: bool,
    last: Instant,
    not_before: Instant,
    /// The fill that is too much: more than after the last sweep, if that could do no better.
    alarm: u64,
    said: Option<Instant>,
}

/// What the programs count, of all families.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counted {
    new: u64,
    /// Entries made again, after those of their flow were removed by a sweep, perhaps.
    repaired: u64,
    refused: u64,
}

/// What the sweeper knows of the flow tables, for metrics.
#[derive(Debug, Default)]
struct Stats {
    /// Most entries of each family's table.
    limit: u64,
    /// Entries after the last sweep: IPv4, IPv6.
    entries: [AtomicU64; 2],
    /// Flows after the last sweep.
    flows: Mutex<[Flows; 2]>,
    /// Flows that ended early because only one end had spoken.
    unanswered: AtomicU64,
    /// Flows that ended early though both ends had: closing ones.
    over: AtomicU64,
}

impl Stats {
    fn samples(&self) -> Vec<Sample> {
        let get = |value: &AtomicU64| value.load(Relaxed) as f64;
        let entries = |family: &str, value| {
            let help = "Flow table entries after the last sweep";
            Sample::new("lb_flow_entries", help, Kind::Gauge, get(value)).with("family", family)
        };
        let early = |state: &str, value| {
            let help = "Flows that ended before their time because the table was nearly full";
            Sample::new("lb_flows_dropped_early_total", help, Kind::Counter, get(value)).with("state", state)
        };
        let help = "Room for flow table entries, in each family";
        let flows = *self.flows.lock().unwrap_or_else(PoisonError::into_inner);
        let mut samples = vec![
            entries("IPv4", &self.entries[0]),
            entries("IPv6", &self.entries[1]),
            Sample::new("lb_flow_entries_max", help, Kind::Gauge, self.limit as f64),
            early("unanswered", &self.unanswered),
            early("closing", &self.over),
        ];
        for (family, flows) in ["IPv4", "IPv6"].into_iter().zip(flows) {
            let of =
                |name, help, count| Sample::new(name, help, Kind::Gauge, count as f64).with("family", family);
            for (protocol, count) in [("TCP", flows.tcp), ("UDP", flows.udp), ("ICMP", flows.icmp)] {
                let help = "Flows after the last sweep, of two to four entries each";
                samples.push(of("lb_flows", help, count).with("protocol", protocol));
            }
            let help = "Flows after the last sweep that have a masquerade port";
            samples.push(of("lb_masqueraded_flows", help, flows.masqueraded));
        }
        samples
    }
}

impl Sweeper {
    /// A sweeper of the pinned tables.
    ///
    /// # Errors
    /// If they cannot be opened.
    pub fn open(pins: &Pins, timeouts: Timeouts) -> Result<Self> {
        // A table keeps the size that it was made with, whatever the flag says now.
        let info = |name| MapInfo::from_pin(pins.map(name)).context("ask for the size of the flow tables");
        let limit = info("LB_FLOW4")?.max_entries().min(info("LB_FLOW6")?.max_entries());
        let stats = Stats { limit: limit.into(), ..Stats::default() };
        let tables = Tables::open(pins)?;
        let (now, counted) = (Instant::now(), Counted::read(&tables)?);
        Ok(Self {
            read: Tables::open(pins)?,
            tables,
            marks: Marks::open(pins)?,
            timeouts,
            stats: Arc::new(stats),
            fill: None,
            rounds: 0,
            counted,
            empty: false,
            last: now,
            not_before: now,
            // Nothing is known of what is in it.
            alarm: 0,
            said: None,
        })
    }

    /// How full the tables are, and what had to go.
    pub fn samples(&self) -> Collector {
        let stats = Arc::clone(&self.stats);
        Box::new(move || stats.samples())
    }

    /// Tells how full the maps are that others than the agent write.
    pub fn tell_of_fill(&mut self, fill: Fill) {
        self.fill = Some(fill);
    }

    /// Sweeps for ever.
    ///
    /// # Errors
    /// If a sweep panics.
    pub async fn run(mut self) -> Result<()> {
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            look.tick().await;
            // A large table takes a while, and the main loop must not wait for it.
            self = tokio::task::spawn_blocking(move || {
                if let Err(error) = self.look() {
                    warn!("sweep the flow tables: {error:#}");
                }
                self
            })
            .await?;
        }
    }

    /// Looks at the counters, and sweeps if it is time, or there is no room.
    pub(super) fn look(&mut self) -> Result<()> {
        let start = Instant::now();
        let counted = Counted::read(&self.tables)?;
        let refused = counted.refused > self.counted.refused;
        let full = refused || self.fill(&counted) >= self.alarm;
        if start < self.not_before || !full && start.duration_since(self.last) < self.every(&counted) {
            return Ok(());
        }
        (self.counted, self.last) = (counted, start);
        self.sweep(monotonic_seconds(), full.then_some(if refused { URGENT } else { PATIENT }))?;
        self.not_before = Instant::now() + start.elapsed() * if refused { SHORT_REST } else { REST };
        Ok(())
    }

    /// Time between two sweeps.
    fn every(&self, counted: &Counted) -> Duration {
        match self.rounds {
            ..ALL_MARK => SOON,
            _ if self.empty && *counted == self.counted => EVERY_QUIET,
            _ => EVERY,
        }
    }

    /// Most entries that the fuller table can have now.
    fn fill(&self, counted: &Counted) -> u64 {
        let new = counted.new.saturating_sub(self.counted.new) * ENTRIES_PER_FLOW;
        self.stats.entries.iter().map(|entries| entries.load(Relaxed)).max().unwrap_or(0) + new
    }

    /// One sweep; with `early`, one that makes room in a table that has none: what has been silent for so many
    /// seconds may go.
    fn sweep(&mut self, now: u32, early: Option<u32>) -> Result<()> {
        let limit = self.stats.limit;
        let plenty = limit / 4 * 3;
        let round = Round {
            timeouts: &self.timeouts,
            now,
            orphans: self.rounds.is_multiple_of(ORPHANS_EVERY),
            mend: true,
            early: None,
        };
        self.rounds = self.rounds.wrapping_add(1);
        let mut met = Met::default();
        let v4 = make_room(&round, early, plenty, &self.read.v4, &mut self.tables.v4, &mut met)?;
        let v6 = make_room(&round, early, plenty, &self.read.v6, &mut self.tables.v6, &mut met)?;
        self.marks.renew(&met, self.rounds >= ALL_MARK)?;
        let affinities = self.end_affinities(now)?;
        self.empty = v4.left() + v6.left() + affinities == 0;
        debug!(?v4, ?v6, affinities, "swept the flow tables");
        let most = v4.left().max(v6.left()) as u64;
        // Where nothing more can go soon, it is no use to try again before the rest fills up, too.
        let hope = v4.young + v6.young > 0;
        self.alarm = if hope { plenty } else { plenty.max(most + limit.saturating_sub(most) / 4) };
        for (entries, swept) in self.stats.entries.iter().zip([&v4, &v6]) {
            entries.store(swept.left() as u64, Relaxed);
        }
        *self.stats.flows.lock().unwrap_or_else(PoisonError::into_inner) = [v4.flows, v6.flows];
        if let Some(fill) = &self.fill {
            fill.set("LB_FLOW4", v4.left());
            fill.set("LB_FLOW6", v6.left());
            fill.set("LB_AFFINITY", affinities);
        }
        let (unanswered, over) = (v4.unanswered + v6.unanswered, v4.over + v6.over);
        self.stats.unanswered.fetch_add(unanswered as u64, Relaxed);
        self.stats.over.fetch_add(over as u64, Relaxed);
        if unanswered + over > 0 && self.said.is_none_or(|said| said.elapsed() > SAY_EVERY) {
            self.said = Some(Instant::now());
            warn!(
                "the flow table (room for {limit} entries) was nearly full: {unanswered} flows that nobody had \
                 answered and {over} that were closing had to go, {most} entries are left; see \
                 lb_flows_dropped_early_total, and --flow-table-max for more room"
            );
        }
        Ok(())
    }
}

impl Sweeper {
    /// Forgets what clients were sent to so long ago that it does not count any more. Returns how much is left.
    fn end_affinities(&mut self, now: u32) -> Result<usize> {
        let (mut over, mut left) = (Vec::new(), 0);
        self.read.for_each_affinity(|key, affinity| {
            // A client may have come back since we asked for the time.
            if affinity.last_used > now || affinity.holds(now, affinity.timeout) {
                left += 1;
            } else {
                over.push(*key);
            }
        })?;
        for key in &over {
            // Gone already, or used again just now: then the client's next flow chooses anew, as it may.
            let _ = self.tables.affinity.remove(key);
        }
        Ok(left)
    }
}

/// A regular round, and if that leaves no room and may end flows early, as many more as it takes.
fn make_room<A: NodeAddr>(
    regular: &Round<'_>,
    early: Option<u32>,
    plenty: u64,
    read: &Family<A>,
    family: &mut Family<A>,
    met: &mut Met,
) -> Result<Swept> {
    let mut swept = regular.run(read, family, met)?;
    let Some(age) = early else { return Ok(swept) };
    for most in [Rank::Unanswered, Rank::Over] {
        // What is in the table counts, not what was refused: that may have been the other family's.
        if (swept.left() as u64) < plenty {
            break;
        }
        let round = Round { orphans: false, mend: false, early: Some(Early { most, age }), ..*regular };
        let more = round.run(read, family, met)?;
        swept = Swept {
            ended: swept.ended + more.ended,
            unanswered: swept.unanswered + more.unanswered,
            over: swept.over + more.over,
            mended: swept.mended,
            ..more
        };
    }
    Ok(swept)
}

impl Counted {
    fn read(tables: &Tables) -> Result<Self> {
        Ok(Self {
            new: tables.counter(Reason::NewFlow)?,
            repaired: tables.counter(Reason::Repaired)?,
            refused: tables.counter(Reason::FlowTableFull)?,
        })
    }
}

/// The clock of [`lb_common::maps::Flow::last_seen`].
pub fn monotonic_seconds() -> u32 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |t| t.tv_sec() as u32)
}
