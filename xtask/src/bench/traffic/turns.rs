//! The turns of one cell, and what they say.

use super::{Compared, Of, Results, Row, Spread, Times, Verdict};
use crate::bench::load::Load;
use crate::bench::mode::{Mode, Paid};

/// Of each mode.
pub(super) struct Turns(Vec<(Mode, Vec<One>)>);

struct One {
    paid: Paid,
    wanted: u64,
}

impl Turns {
    pub(super) fn new(modes: impl Iterator<Item = Mode>) -> Self {
        Self(modes.map(|mode| (mode, Vec::new())).collect())
    }

    pub(super) fn push(&mut self, mode: usize, paid: Paid, wanted: u64) {
        self.0[mode].1.push(One { paid, wanted });
    }

    pub(super) fn evaluate(&self, of: Of, results: &mut Results) {
        let figures: Vec<Vec<f64>> =
            self.0.iter().map(|(_, turns)| turns.iter().map(|one| figure(of.load, one)).collect()).collect();
        for ((mode, turns), own) in self.0.iter().zip(&figures) {
            results.rows.push(row(of, *mode, turns, own, &figures[0]));
        }
        for (a, (mode, _)) in self.0.iter().enumerate().filter(|(_, (mode, _))| mode.is_ours()) {
            let peers = |against: &Mode| matches!(against, Mode::Iptables | Mode::Nftables);
            for (b, (against, _)) in self.0.iter().enumerate().filter(|(_, (against, _))| peers(against)) {
                let ratios = ratios(&figures[a], &figures[b]);
                // Of times for all loads, so that less is always better.
                let ratios: Vec<_> =
                    ratios.into_iter().map(|r| if of.load.is_timed() { r } else { 1.0 / r }).collect();
                let (ratio, verdict) = (Spread::of(&ratios), Verdict::of(&ratios));
                results.compared.push(Compared { of, mode: *mode, against: *against, ratio, verdict });
            }
        }
    }
}

fn figure(load: Load, one: &One) -> f64 {
    match one.paid.turn.whole.quantiles() {
        Some(quantiles) if load.is_timed() => quantiles.p50,
        _ => one.paid.turn.rate * load.unit().1,
    }
}

fn ratios(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a / b).collect()
}

fn row(of: Of, mode: Mode, turns: &[One], figures: &[f64], direct: &[f64]) -> Row {
    let (mut whole, mut connect) = (Times::new(), Times::new());
    let (mut done, mut wanted) = (0, 0);
    for One { paid, wanted: of_turn } in turns {
        whole.add(&paid.turn.whole);
        connect.add(&paid.turn.connect);
        done += paid.turn.done;
        wanted += of_turn;
    }
    let rates: Vec<_> = turns.iter().map(|one| one.paid.turn.rate).collect();
    let cpu: Vec<_> = turns.iter().map(|one| one.paid.cpu * 1e6 / one.paid.turn.done.max(1) as f64).collect();
    Row {
        of,
        mode,
        turns: turns.len(),
        figure: Spread::of(figures),
        to_direct: Spread::of(&ratios(figures, direct)),
        whole: whole.quantiles(),
        connect: connect.quantiles(),
        rate: Spread::of(&rates),
        cpu: Spread::of(&cpu),
        lost: match of.load {
            Load::Packets | Load::Forwarded => 1.0 - (done as f64 / wanted as f64).min(1.0),
            _ => 0.0,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::family::IpFamily;
    use crate::bench::load::Turn;
    use crate::bench::machine::Machine;
    use crate::bench::results::Results;
    use crate::bench::topology::Path;

    fn paid(microseconds: u32, rate: f64) -> Paid {
        let whole = Times::of((microseconds > 0).then_some(microseconds * 1000));
        Paid { turn: Turn { whole, connect: Times::new(), rate, done: 100 }, cpu: 0.001 }
    }

    fn evaluated(load: Load, direct: Paid, peer: Paid, ours: Paid) -> Results {
        let modes = [Mode::Direct, Mode::Iptables, Mode::Ours];
        let mut turns = Turns::new(modes.into_iter());
        for _ in 0..4 {
            turns.push(0, direct.clone(), 128);
            turns.push(1, peer.clone(), 128);
            turns.push(2, ours.clone(), 128);
        }
        let of = Of { load, path: Path::SameNode, family: IpFamily::V4, services: 1 };
        let mut results = Results::new(Machine::default(), Vec::new());
        turns.evaluate(of, &mut results);
        results
    }

    #[test]
    fn less_time_is_better() {
        let results = evaluated(Load::Connections, paid(40, 1.0), paid(60, 1.0), paid(50, 1.0));
        assert!((results.rows[2].to_direct.median - 1.25).abs() < 0.01);
        assert!((results.rows[2].cpu.median - 10.0).abs() < 0.01, "1 ms for 100 operations");
        assert_eq!(results.rows[2].lost, 0.0);
        assert_eq!(results.compared.len(), 1);
        assert_eq!(results.compared[0].verdict, Verdict::Ahead);
    }

    #[test]
    fn a_higher_rate_is_better() {
        let results = evaluated(Load::Packets, paid(0, 4e6), paid(0, 2e6), paid(0, 1e6));
        assert!((results.rows[2].figure.median - 1000.0).abs() < 0.01, "in thousands");
        assert!((results.rows[1].to_direct.median - 0.5).abs() < 0.01);
        assert!((results.rows[1].lost - 28.0 / 128.0).abs() < 0.01);
        assert!((results.compared[0].ratio.median - 2.0).abs() < 0.01);
        assert_eq!(results.compared[0].verdict, Verdict::Behind);
    }
}
