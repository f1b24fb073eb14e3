//! Tables in words and figures.

use std::fmt::Write as _;

use super::table::Table;
use super::targets;
use crate::bench::family::IpFamily;
use crate::bench::load::Load;
use crate::bench::machine::Machine;
use crate::bench::mode::Mode;
use crate::bench::programs::Cost;
use crate::bench::results::{Of, Results, Row};
use crate::bench::stats::{Quantiles, Spread};

/// What was measured on what, with what.
pub(in crate::bench) fn head(results: &Results) -> String {
    let Machine { cpu, cores, core, kernel, load_average, commit, agent, xtask } = &results.machine;
    let mut out = format!(
        "- {cpu}, {cores} cores, load {load_average} at the start; Linux {kernel}\n\
         - everything measured runs on core {core}\n\
         - commit {commit}; agent {agent}; client and server {xtask}\n"
    );
    for available in &results.modes {
        let name = available.mode.name();
        let bridge = available.bridge_netfilter.as_deref();
        let bridge = bridge.map_or(String::new(), |values| format!("; {values}"));
        let _ = match &available.by {
            Ok(by) => writeln!(out, "- {name}: {by}{bridge}"),
            Err(why) => writeln!(out, "- {name}: not available: {why}"),
        };
    }
    out
}

/// All tables.
pub(in crate::bench) fn body(results: &Results) -> String {
    let mut out = String::new();
    targets_kept(results, &mut out);
    for load in Load::ALL {
        traffic(results, load, &mut out);
    }
    compared(results, &mut out);
    control(results, &mut out);
    programs(&results.programs, &mut out);
    if !results.omitted.is_empty() {
        let _ = writeln!(out, "\n## Left out\n");
        for what in &results.omitted {
            let _ = writeln!(out, "- {what}");
        }
    }
    out
}

fn targets_kept(results: &Results, out: &mut String) {
    let mut table = Table::new(&["target", "bar", "measured", "", "where it is worst"]);
    for target in targets::all(results) {
        table.row(vec![
            target.what.clone(),
            target.bar(),
            target.measured(),
            target.verdict().into(),
            target.place().into(),
        ]);
    }
    let _ = writeln!(out, "\n## Targets\n");
    table.render(out);
}

fn traffic(results: &Results, load: Load, out: &mut String) {
    let (unit, _) = load.unit();
    let mut head = vec!["way", "family", "Services", "mode", unit, "(turns)", "of direct"];
    if load.is_timed() {
        head.extend(["p90", "p99", "a second"]);
    }
    if load == Load::Connections {
        head.push("connect p50/p90/p99");
    }
    if matches!(load, Load::Packets | Load::Forwarded) {
        head.push("lost");
    }
    let cpu = format!("CPU µs/{}", load.operation());
    head.push(&cpu);
    let mut table = Table::new(&head);
    let mut rows: Vec<&Row> = results.rows.iter().filter(|row| row.of.load == load).collect();
    rows.sort_by_key(|row| (row.of, row.mode));
    for row in rows {
        let Of { path, family, services, .. } = row.of;
        let mut cells = vec![
            path.name().to_owned(),
            family.name().into(),
            services.to_string(),
            row.mode.name().into(),
            digits(row.figure.median),
            format!("{}..{}", digits(row.figure.low), digits(row.figure.high)),
            if row.mode == Mode::Direct { String::new() } else { format!("{:.2}", row.to_direct.median) },
        ];
        if load.is_timed() {
            let whole =
                |of: fn(&Quantiles) -> f64| row.whole.as_ref().map_or(String::new(), |q| digits(of(q)));
            cells.extend([whole(|q| q.p90), whole(|q| q.p99), format!("{:.0}", row.rate.median)]);
        }
        if load == Load::Connections {
            cells.push(
                row.connect.map_or(String::new(), |q| {
                    format!("{}/{}/{}", digits(q.p50), digits(q.p90), digits(q.p99))
                }),
            );
        }
        if matches!(load, Load::Packets | Load::Forwarded) {
            cells.push(format!("{:.2} %", row.lost * 100.0));
        }
        cells.push(digits(row.cpu.median));
        table.row(cells);
    }
    if !table.is_empty() {
        let _ = writeln!(out, "\n## {}\n", capital(load.name()));
        table.render(out);
    }
}

fn compared(results: &Results, out: &mut String) {
    let mut table =
        Table::new(&["load", "way", "family", "Services", "mode", "against", "time ratio", "verdict"]);
    let mut rows: Vec<_> = results.compared.iter().collect();
    rows.sort_by_key(|c| (c.of, c.mode, c.against));
    for c in rows {
        let Of { load, path, family, services } = c.of;
        table.row(vec![
            load.name().into(),
            path.name().into(),
            family.name().into(),
            services.to_string(),
            c.mode.name().into(),
            c.against.name().into(),
            spread(c.ratio),
            c.verdict.name().into(),
        ]);
    }
    if !table.is_empty() {
        let _ = writeln!(
            out,
            "\n## Ours beside kube-proxy's modes\n\nTime that an operation takes over what it takes there; the median of the \
             turns and the middle half of them.\n"
        );
        table.render(out);
    }
}

fn control(results: &Results, out: &mut String) {
    let mut table =
        Table::new(&["Services", "family", "mode", "from nothing, s", "after the last object, s"]);
    for p in &results.programming {
        let after = p.seconds_after_list.map_or(String::new(), |s| format!("{s:.3}"));
        let cells = [
            p.services.to_string(),
            p.family.name().into(),
            p.mode.name().into(),
            format!("{:.3}", p.seconds),
        ];
        table.row(cells.into_iter().chain([after]).collect());
    }
    if !table.is_empty() {
        let _ = writeln!(out, "\n## Until a node serves all Services, 10 endpoints each\n");
        table.render(out);
    }
    let mut table =
        Table::new(&["Services", "mode", "changes elsewhere", "p50 ms", "p90", "p99", "changes", "by"]);
    for c in &results.changes {
        let Quantiles { p50, p90, p99 } = c.milliseconds;
        table.row(vec![
            c.services.to_string(),
            c.mode.name().into(),
            if c.churn == 0 { "none".into() } else { format!("{} a second", c.churn) },
            format!("{p50:.2}"),
            format!("{p90:.2}"),
            format!("{p99:.2}"),
            c.samples.to_string(),
            if c.by_api { "the API".into() } else { "rules rewritten by hand".into() },
        ]);
    }
    if !table.is_empty() {
        let _ = writeln!(out, "\n## From a change of an endpoint until connections go the new way\n");
        table.render(out);
    }
    let mut table = Table::new(&[
        "Services",
        "mode",
        "resident MB",
        "maps MB",
        "CPU % idle",
        "CPU % with 100 changes a second",
    ]);
    for p in &results.processes {
        let optional = |value: Option<f64>| value.map_or(String::new(), digits);
        table.row(vec![
            p.services.to_string(),
            p.mode.name().into(),
            digits(p.resident),
            optional(p.maps),
            format!("{:.2}", p.idle),
            optional(p.churn),
        ]);
    }
    if !table.is_empty() {
        let _ = writeln!(out, "\n## What a node's process takes\n");
        table.render(out);
    }
}

fn programs(costs: &[Cost], out: &mut String) {
    let _ = writeln!(
        out,
        "\n## Our programs (ns a packet, `BPF_PROG_TEST_RUN`, hot cache)\n\nMedian of the turns and the middle half of \
         them, with what running an empty program costs.\n"
    );
    let mut table = Table::new(&["packet", "hook", "IPv4", "× floor", "IPv6", "× floor", "at most", "of"]);
    for cost in costs {
        let ns = |i: usize| cost.families.get(i).map_or_else(String::new, |f| spread_of(f.nanoseconds, 1));
        let limit = |i: usize| cost.families.get(i).and_then(|f| f.limit.as_ref());
        let ratio = |i: usize| {
            limit(i).map_or_else(String::new, |l| {
                let mark = if l.is_kept() { "" } else { " **over**" };
                format!("{:.2}{mark}", l.ratio.median)
            })
        };
        let (at_most, floor) =
            limit(0).map_or_else(Default::default, |l| (format!("{}", l.at_most), l.floor.clone()));
        let packet = cost.packet.clone();
        table.row(vec![packet, cost.hook.clone(), ns(0), ratio(0), ns(1), ratio(1), at_most, floor]);
    }
    table.render(out);
}

fn spread(s: Spread) -> String {
    spread_of(s, 2)
}

fn spread_of(s: Spread, digits: usize) -> String {
    format!("{:.digits$} ({:.digits$}..{:.digits$})", s.median, s.low, s.high)
}

/// Three digits, whatever the size.
pub(super) fn digits(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map(|first| first.to_uppercase().chain(chars).collect()).unwrap_or_default()
}

/// A word for a family in a file's name.
pub(super) fn file_part(family: IpFamily) -> String {
    family.name().to_lowercase()
}
