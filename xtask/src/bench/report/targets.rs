//! What the project wants to keep to, held against a run.

use crate::bench::load::Load;
use crate::bench::mode::Mode;
use crate::bench::results::{Of, Results, Row};
use crate::bench::services::counted;
use crate::bench::topology::Path;

/// A bar and where the run stands.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) what: String,
    bar: f64,
    /// The worst that was measured.
    value: f64,
    more_is_better: bool,
    /// Where that was.
    pub(super) worst: String,
}

impl Target {
    pub(super) fn is_kept(&self) -> bool {
        if self.more_is_better { self.value >= self.bar } else { self.value <= self.bar }
    }

    pub(super) fn measured(&self) -> String {
        let relation = if self.more_is_better { "≥" } else { "≤" };
        format!("{:.3} ({relation} {})", self.value, self.bar)
    }
}

/// The worst of some values, each with its place, as a target; none of nothing.
fn worst(
    what: &str,
    bar: f64,
    more_is_better: bool,
    values: impl Iterator<Item = (f64, String)>,
) -> Option<Target> {
    let sign = if more_is_better { 1.0 } else { -1.0 };
    let (value, worst) = values.min_by(|a, b| (sign * a.0).total_cmp(&(sign * b.0)))?;
    Some(Target { what: what.into(), bar, value, more_is_better, worst })
}

/// All for which there are figures.
pub(super) fn all(results: &Results) -> Vec<Target> {
    let mut targets = Vec::new();
    connections(results, &mut targets);
    established(results, &mut targets);
    peers(results, &mut targets);
    control(results, &mut targets);
    programs(results, &mut targets);
    targets.into_iter().flatten().collect()
}

fn place(of: &Of) -> String {
    format!("{}, {}, {}, {}", of.load.name(), of.path.name(), counted(of.services), of.family.name())
}

fn of_pods(row: &&Row) -> bool {
    matches!(row.of.path, Path::SameNode | Path::OtherNode)
}

fn connections(results: &Results, targets: &mut Vec<Option<Target>>) {
    let rows = |mode| {
        let rows = results.rows.iter().filter(of_pods);
        rows.filter(move |row| row.mode == mode && row.of.load == Load::Connections)
    };
    for (mode, bar) in [(Mode::Ours, 1.05), (Mode::OursSockets, 1.01)] {
        let what = format!("new connections, pod → ClusterIP: p50 over direct, {}", mode.name());
        targets.push(worst(&what, bar, false, rows(mode).map(|row| (row.to_direct.median, place(&row.of)))));
    }
    // Over direct both times: so it is not the machine's mood between the two.
    let grown = rows(Mode::Ours).filter_map(|row| {
        let first = rows(Mode::Ours).filter(|r| (r.of.path, r.of.family) == (row.of.path, row.of.family));
        let first = first.min_by_key(|r| r.of.services).filter(|r| r.of.services < row.of.services)?;
        Some((row.to_direct.median / first.to_direct.median, place(&row.of)))
    });
    targets.push(worst("the same, over the smallest number of Services", 1.02, false, grown));
}

fn established(results: &Results, targets: &mut Vec<Option<Target>>) {
    let rows = results.rows.iter().filter(of_pods).filter(|row| row.mode == Mode::Ours);
    let speeds = rows.filter_map(|row| match row.of.load {
        Load::TcpTrips | Load::UdpTrips => Some((1.0 / row.to_direct.median, place(&row.of))),
        Load::Stream | Load::Streams => Some((row.to_direct.median, place(&row.of))),
        _ => None,
    });
    targets.push(worst("round trips and streams: speed over direct", 0.98, true, speeds));
}

/// How much faster one of ours is than kube-proxy.
fn peers(results: &Results, targets: &mut Vec<Option<Target>>) {
    let compared = |mode: Mode, keep: fn(&Of) -> bool| {
        let rows = results.compared.iter().filter(move |c| c.mode == mode && keep(&c.of));
        rows.map(|c| (1.0 / c.ratio.median, format!("{}, against {}", place(&c.of), c.against.name())))
    };
    let everywhere = compared(Mode::Ours, |of| of.load == Load::Connections && of.path != Path::Outside);
    targets.push(worst("new connections to Services: speed over kube-proxy's", 1.0, true, everywhere));
    let there = |of: &Of| of.load == Load::Packets && of.path == Path::NodePortThere;
    for (mode, bar) in [(Mode::Ours, 1.5), (Mode::OursXdp, 3.0)] {
        let what =
            format!("outside → NodePort on the other node: packet rate over kube-proxy's, {}", mode.name());
        targets.push(worst(&what, bar, true, compared(mode, there)));
    }
    let snat = |of: &Of| of.path == Path::Outside && matches!(of.load, Load::Connections | Load::Packets);
    let snat = compared(Mode::Ours, snat);
    targets.push(worst("pod → outside: speed over flannel's MASQUERADE", 1.0, true, snat));
}

fn control(results: &Results, targets: &mut Vec<Option<Target>>) {
    for (services, bar) in [(10_000, 200.0), (30_000, 600.0)] {
        let rows = results.programming.iter().filter(|p| p.services == services && p.mode == Mode::Ours);
        let times = rows.filter_map(|p| Some((p.seconds_after_list? * 1e3, p.family.name().to_owned())));
        let what = format!("{services} Services from nothing, after the last object: ms");
        targets.push(worst(&what, bar, false, times));
    }
    let changes = || results.changes.iter().filter(|c| c.mode.is_ours());
    let place = |c: &crate::bench::results::Changes| {
        format!("{}, {}, {} other changes a second", c.mode.name(), counted(c.services), c.churn)
    };
    let p50 = changes().map(|c| (c.milliseconds.p50, place(c)));
    targets.push(worst("a change until packets see it: p50 ms", 2.0, false, p50));
    let p99 = changes().map(|c| (c.milliseconds.p99, place(c)));
    targets.push(worst("a change until packets see it: p99 ms", 10.0, false, p99));
    let processes = || results.processes.iter().filter(|p| p.mode.is_ours());
    let resident = processes().filter(|p| p.services <= 10_000);
    let resident = resident.map(|p| (p.resident, format!("{}, {}", p.mode.name(), counted(p.services))));
    targets.push(worst("the agent, resident, to 10,000 Services: MB", 25.0, false, resident));
    let idle = processes().map(|p| (p.idle, format!("{}, {}", p.mode.name(), counted(p.services))));
    targets.push(worst("the agent, idle: percent of a core", 0.5, false, idle));
}

fn programs(results: &Results, targets: &mut Vec<Option<Target>>) {
    let mut bars: Vec<f64> = results
        .programs
        .iter()
        .flat_map(|c| &c.families)
        .filter_map(|f| Some(f.limit.as_ref()?.at_most))
        .collect();
    bars.sort_by(f64::total_cmp);
    bars.dedup();
    for bar in bars {
        let what = match bar {
            1.3 => "programs: none of ours, over a bare program's two misses",
            1.4 => "programs: established flow, over a bare program's look-up and rewrite",
            _ => "programs: new flow, over the same flow's later packets",
        };
        let figures = results.programs.iter().flat_map(|cost| {
            let limits = cost.families.iter().filter_map(|f| f.limit.as_ref());
            let limits = limits.filter(move |limit| limit.at_most == bar);
            limits.map(|limit| (limit.ratio.median, format!("{} ({})", cost.packet, cost.hook)))
        });
        targets.push(worst(what, bar, false, figures));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(values: &[f64]) -> impl Iterator<Item = (f64, String)> {
        values.iter().map(|v| (*v, format!("at {v}"))).collect::<Vec<_>>().into_iter()
    }

    #[test]
    fn the_worst_value_decides() {
        let target = worst("time", 1.05, false, values(&[1.0, 1.2, 0.9])).unwrap();
        assert_eq!((target.value, target.worst.as_str(), target.is_kept()), (1.2, "at 1.2", false));
        assert_eq!(target.measured(), "1.200 (≤ 1.05)");
        let target = worst("speed", 1.5, true, values(&[2.0, 1.5])).unwrap();
        assert!(target.is_kept() && target.value == 1.5);
        assert!(worst("nothing", 1.0, true, values(&[])).is_none());
    }
}
