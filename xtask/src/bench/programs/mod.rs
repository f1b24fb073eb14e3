//! What each program costs a packet, by `BPF_PROG_TEST_RUN`, beside the least that a program can do.
//!
//! The kernel does not restore the packet between repetitions, so a second one would meet what the first left. Two ways
//! round that, both of which leave the programs as they are: an established flow's rewrite is undone by a second flow,
//! whose rewrite is as much work ([`Work::Rewrite`]); a new flow's packet is restored, with another source port, by a
//! little program that runs first, whose own cost is measured and taken off ([`Work::Fresh`]).

mod cases;
mod forwarded;
mod objects;

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use lb_common::addr::{Ip4, Ip6};
use nix::sched::{CloneFlags, unshare};
use serde::{Deserialize, Serialize};

use super::cores::pin;
use super::packet::Family;
use super::plan::Depth;
use super::stats::Spread;
use cases::{Case, Floor};
pub(super) use forwarded::measure as forwarded;
pub(super) use objects::object;
use objects::{Loaded, Own, time};

/// What a packet costs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Cost {
    pub(super) packet: String,
    pub(super) hook: String,
    /// IPv4 first.
    pub(super) families: Vec<Figure>,
}

/// In one family.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Figure {
    pub(super) nanoseconds: Spread,
    /// What there is to keep to.
    pub(super) limit: Option<Limit>,
}

/// A bound that the same run gives.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Limit {
    pub(super) floor: String,
    /// The packet's time over the floor's, turn by turn.
    pub(super) ratio: Spread,
    pub(super) at_most: f64,
}

impl Limit {
    pub(super) fn is_kept(&self) -> bool {
        self.ratio.median <= self.at_most
    }
}

/// What a program does with a packet, and how it is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// Leaves it alone.
    Pass,
    /// Rewrites it; the next repetition rewrites it back.
    Rewrite,
    /// Enters a new flow and rewrites it: that many in a turn, three entries each. So many of them follow one another; then all
    /// are removed.
    Fresh { count: u32, at_once: u32 },
}

/// The bare programs, in the order in which they are measured.
const BARE: [(&str, Floor); 2] = [
    ("bare program: parse, one look-up, one rewrite", Floor::Rewrite),
    ("bare program: parse, two look-ups that miss", Floor::Miss),
];

/// Measures every case in both families, in turn.
pub(super) fn measure(core: usize, depth: Depth) -> Result<Vec<Cost>> {
    let on_thread = || {
        pin(core)?;
        // A namespace without sockets: looking for one costs the same on every machine.
        unshare(CloneFlags::CLONE_NEWNET).context("creating a network namespace")?;
        take_turns(depth.programs())
    };
    std::thread::scope(|s| s.spawn(on_thread).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

/// The turns of one family: of each bare program, and of each case.
struct Turns<A> {
    cases: Vec<Case<A>>,
    bare: Vec<Vec<f64>>,
    times: Vec<Vec<f64>>,
}

impl<A: Family> Turns<A> {
    fn new(lb: &mut Loaded, own: &mut Own) -> Result<Self> {
        let cases = cases::all::<A>()?;
        lb.family::<A>(&cases)?;
        cases.iter().try_for_each(|case| lb.check(case))?;
        own.family::<A>()?;
        let (bare, times) = (vec![Vec::new(); BARE.len()], vec![Vec::new(); cases.len()]);
        Ok(Self { cases, bare, times })
    }

    fn take(&mut self, lb: &mut Loaded, own: &mut Own, empty: f64, packets: u32) -> Result<()> {
        // Whatever the table's state, the new flows find no entries but those of the cases.
        lb.reset(&self.cases)?;
        for ((_, floor), times) in BARE.iter().zip(&mut self.bare) {
            times.push(own.bare::<A>(*floor, packets)?);
        }
        for (case, times) in self.cases.iter().zip(&mut self.times) {
            times.push(lb.measure(own, (case, &self.cases), empty, packets)?);
        }
        Ok(())
    }

    fn of_floor(&self, floor: Floor) -> (&str, &[f64]) {
        match (floor, BARE.iter().position(|(_, bare)| *bare == floor)) {
            (Floor::Established(name), _) => {
                let at = self.cases.iter().position(|case| case.name == name);
                let at = at.unwrap_or_else(|| unreachable!("{name} is a case"));
                ("the same, established", &self.times[at])
            }
            (_, at) => (BARE[at.unwrap_or_default()].0, &self.bare[at.unwrap_or_default()]),
        }
    }

    fn figure(&self, case: usize) -> Figure {
        let times = &self.times[case];
        let (floor, at_most) = self.cases[case].limit;
        let (name, floor) = self.of_floor(floor);
        let ratios: Vec<_> = times.iter().zip(floor).map(|(ours, floor)| ours / floor).collect();
        let limit = Limit { floor: name.into(), ratio: Spread::of(&ratios), at_most };
        Figure { nanoseconds: Spread::of(times), limit: Some(limit) }
    }
}

fn take_turns((rounds, packets): (usize, u32)) -> Result<Vec<Cost>> {
    let (mut lb, mut own) = (Loaded::new()?, Own::new()?);
    let mut v4 = Turns::<Ip4>::new(&mut lb, &mut own)?;
    let mut v6 = Turns::<Ip6>::new(&mut lb, &mut own)?;
    let mut empty = Vec::new();
    let bar = ProgressBar::new(rounds as u64);
    for _ in 0..rounds {
        let nothing = time(own.program("empty")?, &v4.cases[0].packet, packets)?;
        empty.push(nothing);
        v4.take(&mut lb, &mut own, nothing, packets)?;
        v6.take(&mut lb, &mut own, nothing, packets)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    let plain = |times: &[f64]| Figure { nanoseconds: Spread::of(times), limit: None };
    let row =
        |packet: &str, hook: &str, families| Cost { packet: packet.into(), hook: hook.into(), families };
    let mut costs = vec![row("empty program", "–", vec![plain(&empty)])];
    for (i, (name, _)) in BARE.iter().enumerate() {
        costs.push(row(name, "–", vec![plain(&v4.bare[i]), plain(&v6.bare[i])]));
    }
    for (i, case) in v4.cases.iter().enumerate() {
        costs.push(row(case.name, case.hook, vec![v4.figure(i), v6.figure(i)]));
    }
    Ok(costs)
}
