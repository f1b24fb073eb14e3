//! `bench compare`: whether ours has become slower between two results.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Result, bail};

use super::markdown::digits;
use super::table::Table;
use crate::bench::results::Results;
use crate::bench::services::counted;
use crate::bench::stats::Spread;

/// Options of `bench compare`.
#[derive(Debug, clap::Args)]
pub(in crate::bench) struct Args {
    /// A bench.json from before
    before: PathBuf,
    /// A bench.json from after
    after: PathBuf,
    /// Percent that a figure may be worse
    #[arg(long, value_name = "PERCENT", default_value_t = 5.0)]
    tolerance: f64,
}

/// A figure that there may be in both. Less is better.
struct Figure {
    name: String,
    /// Where two figures may differ by chance, as much as one run's own turns do.
    spread: Spread,
    /// Of the tolerance: a figure that was counted once is worth less than the middle of many.
    leeway: f64,
}

#[derive(Debug, PartialEq, Eq)]
enum Change {
    Better,
    Same,
    Worse,
}

impl Args {
    pub(in crate::bench) fn run(self) -> Result<()> {
        let (before, after) = (super::read(&self.before)?, super::read(&self.after)?);
        let (text, worse) = compare(&before, &after, self.tolerance);
        print!("{text}");
        if worse > 0 {
            bail!(
                "{worse} figures are worse by more than {} % and than chance would have it",
                self.tolerance
            );
        }
        Ok(())
    }
}

/// The report, and how many figures are worse.
fn compare(before: &Results, after: &Results, tolerance: f64) -> (String, usize) {
    let (old, new) = (figures(before), figures(after));
    let mut table = Table::new(&["figure", "before", "after", "change", ""]);
    let (mut same, mut worse, mut only_old) = (0, 0, Vec::new());
    for figure in &old {
        let Some(now) = new.iter().find(|f| f.name == figure.name) else {
            only_old.push(&figure.name);
            continue;
        };
        let percent = 100.0 * (now.spread.median / figure.spread.median - 1.0);
        let change = judge(figure, now, tolerance);
        let word = match change {
            Change::Same => {
                same += 1;
                continue;
            }
            Change::Better => "better",
            Change::Worse => {
                worse += 1;
                "**worse**"
            }
        };
        let (name, was, is) = (figure.name.clone(), digits(figure.spread.median), digits(now.spread.median));
        table.row(vec![name, was, is, format!("{percent:+.1} %"), word.into()]);
    }
    let only_new = new.iter().filter(|f| old.iter().all(|o| o.name != f.name)).count();
    let mut out = format!("{} → {}\n\n", before.machine.commit, after.machine.commit);
    if !table.is_empty() {
        table.render(&mut out);
        out.push('\n');
    }
    let _ = writeln!(out, "{same} figures are the same, within {tolerance} % or within their own spread");
    if before.machine.cpu != after.machine.cpu || before.machine.kernel != after.machine.kernel {
        let _ = writeln!(
            out,
            "the machines differ: only ratios within each run are compared, but they may differ, too"
        );
    }
    if !only_old.is_empty() {
        let _ = writeln!(out, "{} figures are only in the first: {} …", only_old.len(), only_old[0]);
    }
    if only_new > 0 {
        let _ = writeln!(out, "{only_new} figures are only in the second");
    }
    (out, worse)
}

fn judge(before: &Figure, after: &Figure, tolerance: f64) -> Change {
    let allowed = 1.0 + before.leeway * tolerance / 100.0;
    let (a, b) = (before.spread, after.spread);
    if b.median > a.median * allowed && b.low > a.high {
        Change::Worse
    } else if b.median * allowed < a.median && b.high < a.low {
        Change::Better
    } else {
        Change::Same
    }
}

/// Everything of ours that a run measures, as far as possible in relation to something of the same run: so a slower machine
/// is no regression.
fn figures(results: &Results) -> Vec<Figure> {
    let mut figures = Vec::new();
    for row in results.rows.iter().filter(|row| row.mode.is_ours()) {
        let of = row.of;
        let name = format!(
            "{} of direct, {}, {}, {}, {}",
            of.load.name(),
            of.path.name(),
            counted(of.services),
            of.family.name(),
            row.mode.name()
        );
        let spread = if of.load.is_timed() { row.to_direct } else { row.to_direct.inverse() };
        figures.push(Figure { name, spread, leeway: 1.0 });
    }
    for cost in &results.programs {
        for (family, figure) in ["IPv4", "IPv6"].iter().zip(&cost.families) {
            if let Some(limit) = &figure.limit {
                let name = format!("{} ({}), {family}, over {}", cost.packet, cost.hook, limit.floor);
                figures.push(Figure { name, spread: limit.ratio, leeway: 1.0 });
            }
        }
    }
    // These have no spread of their own, and the machine's mood in them.
    let mut once = |name: String, value: f64, leeway: f64| {
        figures.push(Figure { name, spread: Spread::of(&[value]), leeway })
    };
    for p in results.programming.iter().filter(|p| p.mode.is_ours()) {
        let of = format!("{}, {}, {}", counted(p.services), p.family.name(), p.mode.name());
        once(format!("from nothing, s: {of}"), p.seconds, 6.0);
    }
    for c in results.changes.iter().filter(|c| c.mode.is_ours()) {
        let of = format!("{}, {} others a second, {}", counted(c.services), c.churn, c.mode.name());
        once(format!("change until seen, p50 ms: {of}"), c.milliseconds.p50, 6.0);
    }
    for p in results.processes.iter().filter(|p| p.mode.is_ours()) {
        let of = format!("{}, {}", counted(p.services), p.mode.name());
        once(format!("resident, MB: {of}"), p.resident, 2.0);
        if let Some(maps) = p.maps {
            once(format!("maps, MB: {of}"), maps, 2.0);
        }
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::family::IpFamily;
    use crate::bench::load::Load;
    use crate::bench::machine::Machine;
    use crate::bench::mode::Mode;
    use crate::bench::results::{Of, Row};
    use crate::bench::topology::Path;

    fn with(load: Load, mode: Mode, to_direct: &[f64]) -> Results {
        let of = Of { load, path: Path::SameNode, family: IpFamily::V4, services: 1 };
        let mut results = Results::new(Machine::default(), Vec::new());
        let spread = Spread::of(to_direct);
        let (whole, connect) = (None, None);
        let (figure, rate, cpu) = (spread, spread, spread);
        results.rows.push(Row {
            of,
            mode,
            turns: 3,
            figure,
            to_direct: spread,
            whole,
            connect,
            rate,
            cpu,
            lost: 0.0,
        });
        results
    }

    fn worse(load: Load, mode: Mode, before: &[f64], after: &[f64]) -> usize {
        compare(&with(load, mode, before), &with(load, mode, after), 5.0).1
    }

    #[test]
    fn worse_is_more_than_the_tolerance_and_more_than_chance() {
        let ours = |before: &[f64], after: &[f64]| worse(Load::Connections, Mode::Ours, before, after);
        assert_eq!(ours(&[1.0, 1.01, 1.02], &[1.2, 1.21, 1.22]), 1);
        assert_eq!(ours(&[1.0, 1.01, 1.02], &[1.03, 1.04, 1.05]), 0, "within the tolerance");
        assert_eq!(ours(&[0.8, 1.0, 1.3], &[0.9, 1.2, 1.4]), 0, "within their spread");
        assert_eq!(ours(&[1.2, 1.21, 1.22], &[1.0, 1.01, 1.02]), 0, "better");
        assert_eq!(worse(Load::Connections, Mode::Nftables, &[1.0], &[2.0]), 0, "not ours");
    }

    #[test]
    fn a_lower_rate_is_worse() {
        assert_eq!(worse(Load::Packets, Mode::Ours, &[1.0], &[0.8]), 1);
        assert_eq!(worse(Load::Packets, Mode::Ours, &[0.8], &[1.0]), 0);
    }

    #[test]
    fn what_is_worse_is_named_and_what_is_missing_too() {
        let before = with(Load::Stream, Mode::Ours, &[1.0]);
        let (text, _) = compare(&before, &with(Load::Stream, Mode::Ours, &[0.5]), 5.0);
        assert!(
            text.contains("TCP stream of direct") && text.contains("+100.0 %") && text.contains("**worse**"),
            "{text}"
        );
        let (text, worse) = compare(&before, &Results::new(Machine::default(), Vec::new()), 5.0);
        assert!(worse == 0 && text.contains("1 figures are only in the first"), "{text}");
    }
}
