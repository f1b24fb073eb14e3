//! What the project wants to keep to, held against a run.

use crate::bench::family::IpFamily;
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
    more_is_better: bool,
    /// The worst that was measured, and where that was.
    worst: Option<(f64, String)>,
}

impl Target {
    /// The worst of some values, each with its place, against a bar.
    fn of(
        what: impl Into<String>,
        bar: f64,
        more_is_better: bool,
        values: impl Iterator<Item = (f64, String)>,
    ) -> Self {
        let sign = if more_is_better { 1.0 } else { -1.0 };
        let worst = values.min_by(|a, b| (sign * a.0).total_cmp(&(sign * b.0)));
        Self { what: what.into(), bar, more_is_better, worst }
    }

    /// Nothing is known of what was not measured.
    fn is_kept(&self) -> Option<bool> {
        let (value, _) = self.worst.as_ref()?;
        Some(if self.more_is_better { *value >= self.bar } else { *value <= self.bar })
    }

    pub(super) fn bar(&self) -> String {
        format!("{} {}", if self.more_is_better { "≥" } else { "≤" }, self.bar)
    }

    pub(super) fn measured(&self) -> String {
        self.worst.as_ref().map_or("–".into(), |(value, _)| format!("{value:.3}"))
    }

    pub(super) fn verdict(&self) -> &'static str {
        match self.is_kept() {
            Some(true) => "met",
            Some(false) => "**not met**",
            None => "not measured",
        }
    }

    pub(super) fn place(&self) -> &str {
        self.worst.as_ref().map_or("", |(_, place)| place)
    }
}

/// All, those for which there are no figures, too.
pub(super) fn all(results: &Results) -> Vec<Target> {
    let mut targets = Vec::new();
    connections(results, &mut targets);
    established(results, &mut targets);
    peers(results, &mut targets);
    control(results, &mut targets);
    programs(results, &mut targets);
    targets
}

fn place(of: &Of) -> String {
    format!("{}, {}, {}, {}", of.load.name(), of.path.name(), counted(of.services), of.family.name())
}

fn of_pods(row: &&Row) -> bool {
    matches!(row.of.path, Path::SameNode | Path::OtherNode)
}

fn connections(results: &Results, targets: &mut Vec<Target>) {
    let rows = |mode| {
        let rows = results.rows.iter().filter(of_pods);
        rows.filter(move |row| row.mode == mode && row.of.load == Load::Connections)
    };
    for (mode, bar) in [(Mode::Ours, 1.05), (Mode::OursRedirect, 1.05), (Mode::OursSockets, 1.01)] {
        let what = format!("new connections, pod → ClusterIP: p50 over direct, {}", mode.name());
        targets.push(Target::of(
            &what,
            bar,
            false,
            rows(mode).map(|row| (row.to_direct.median, place(&row.of))),
        ));
    }
    for mode in [Mode::Ours, Mode::OursRedirect, Mode::OursSockets] {
        // Over direct both times: so it is not the machine's mood between the two.
        let grown = rows(mode).filter_map(|row| {
            let first = rows(mode).filter(|r| (r.of.path, r.of.family) == (row.of.path, row.of.family));
            let first = first.min_by_key(|r| r.of.services).filter(|r| r.of.services < row.of.services)?;
            Some((row.to_direct.median / first.to_direct.median, place(&row.of)))
        });
        let what = format!("the same, over that with the fewest Services, {}", mode.name());
        targets.push(Target::of(what, 1.02, false, grown));
    }
}

fn established(results: &Results, targets: &mut Vec<Target>) {
    for mode in [Mode::Ours, Mode::OursRedirect, Mode::OursSockets] {
        let rows = results.rows.iter().filter(|row| row.mode == mode);
        let speeds = rows.filter_map(|row| match row.of.load {
            Load::TcpTrips | Load::UdpTrips => Some((1.0 / row.to_direct.median, place(&row.of))),
            Load::Stream | Load::Streams => Some((row.to_direct.median, place(&row.of))),
            _ => None,
        });
        let what = format!("round trips and streams: speed over direct, {}", mode.name());
        targets.push(Target::of(what, 0.98, true, speeds));
    }
}

/// How much faster one of ours is than kube-proxy.
fn peers(results: &Results, targets: &mut Vec<Target>) {
    let compared = |mode: Mode, keep: fn(&Of) -> bool| {
        let rows = results.compared.iter().filter(move |c| c.mode == mode && keep(&c.of));
        rows.map(|c| (1.0 / c.ratio.median, format!("{}, against {}", place(&c.of), c.against.name())))
    };
    let to_services = |of: &Of| of.load == Load::Connections && of.path != Path::Outside;
    for mode in [Mode::Ours, Mode::OursRedirect, Mode::OursSockets] {
        let what = format!("new connections to Services: speed over kube-proxy's, {}", mode.name());
        targets.push(Target::of(what, 1.0, true, compared(mode, to_services)));
    }
    let there = |of: &Of| of.load == Load::Forwarded;
    for (mode, bar) in [(Mode::Ours, 1.5), (Mode::OursXdp, 3.0)] {
        let what = format!(
            "outside → NodePort on the other node: packets forwarded over kube-proxy's, {}",
            mode.name()
        );
        targets.push(Target::of(&what, bar, true, compared(mode, there)));
    }
    let snat = |of: &Of| of.path == Path::Outside && matches!(of.load, Load::Connections | Load::Packets);
    let snat = compared(Mode::Ours, snat);
    targets.push(Target::of("pod → outside: speed over flannel's MASQUERADE", 1.0, true, snat));
}

fn control(results: &Results, targets: &mut Vec<Target>) {
    for (services, bar) in [(10_000, 200.0), (30_000, 600.0)] {
        let rows = results.programming.iter().filter(|p| p.services == services && p.mode == Mode::Ours);
        let times = rows.filter_map(|p| Some((p.seconds_after_list? * 1e3, p.family.name().to_owned())));
        let what = format!("{services} Services from nothing, after the last object: ms");
        targets.push(Target::of(&what, bar, false, times));
    }
    let changes = || results.changes.iter().filter(|c| c.mode.is_ours());
    let place = |c: &crate::bench::results::Changes| {
        format!("{}, {}, {} other changes a second", c.mode.name(), counted(c.services), c.churn)
    };
    let p50 = changes().map(|c| (c.milliseconds.p50, place(c)));
    targets.push(Target::of("a change until packets see it: p50 ms", 2.0, false, p50));
    let p99 = changes().map(|c| (c.milliseconds.p99, place(c)));
    targets.push(Target::of("a change until packets see it: p99 ms", 10.0, false, p99));
    let processes = || results.processes.iter().filter(|p| p.mode.is_ours());
    let resident = processes().filter(|p| p.services <= 10_000);
    let resident = resident.map(|p| (p.resident, format!("{}, {}", p.mode.name(), counted(p.services))));
    targets.push(Target::of("the agent, resident, to 10,000 Services: MB", 25.0, false, resident));
    let idle = processes().map(|p| (p.idle, format!("{}, {}", p.mode.name(), counted(p.services))));
    targets.push(Target::of("the agent, idle: percent of a core", 0.5, false, idle));
}

fn programs(results: &Results, targets: &mut Vec<Target>) {
    for (bar, what) in [
        (1.4, "programs: established flow, over a bare program's look-up and rewrite"),
        (1.3, "programs: none of ours, over a bare program's two misses"),
        (6.0, "programs: new flow, over the same flow's later packets"),
        (1.25, "programs: forwarded by XDP, over a bare XDP redirect"),
    ] {
        let figures = results.programs.iter().flat_map(|cost| {
            IpFamily::ALL.iter().zip(&cost.families).filter_map(move |(family, figure)| {
                let limit = figure.limit.as_ref().filter(|limit| limit.at_most == bar)?;
                let place = format!("{} ({}), {}", cost.packet, cost.hook, family.name());
                Some((limit.ratio.median, place))
            })
        });
        targets.push(Target::of(what, bar, false, figures));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::machine::Machine;

    fn values(values: &[f64]) -> impl Iterator<Item = (f64, String)> {
        values.iter().map(|v| (*v, format!("at {v}"))).collect::<Vec<_>>().into_iter()
    }

    #[test]
    fn the_worst_value_decides() {
        let target = Target::of("time", 1.05, false, values(&[1.0, 1.2, 0.9]));
        assert_eq!((target.measured().as_str(), target.bar().as_str()), ("1.200", "≤ 1.05"));
        assert_eq!((target.verdict(), target.place()), ("**not met**", "at 1.2"));
        let target = Target::of("speed", 1.5, true, values(&[2.0, 1.5]));
        assert_eq!((target.measured().as_str(), target.verdict()), ("1.500", "met"));
    }

    #[test]
    fn what_was_not_measured_is_said() {
        let targets = all(&Results::new(Machine::default(), Vec::new()));
        assert!(targets.len() > 15, "{targets:#?}");
        for target in targets {
            assert_eq!((target.verdict(), target.measured().as_str()), ("not measured", "–"), "{target:?}");
        }
    }
}
