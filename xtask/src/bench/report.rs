//! The figures, for people and for machines.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use super::machine::Machine;
use super::programs::Cost;
use super::site::Mode;
use super::stats::{Spread, Verdict};
use super::traffic::{Compared, Programming, Row};

/// Everything that a run found out.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) machine: Machine,
    pub(super) rows: Vec<Row>,
    pub(super) compared: Vec<Compared>,
    pub(super) programming: Vec<Programming>,
    pub(super) programs: Vec<Cost>,
}

impl Report {
    pub(super) fn new(machine: Machine) -> Self {
        let (rows, compared, programming, programs) = Default::default();
        Self { machine, rows, compared, programming, programs }
    }

    pub(super) fn all_ahead(&self) -> bool {
        self.compared.iter().all(|c| c.verdict == Verdict::Ahead)
    }

    pub(super) fn print_head(&self) {
        println!("{}\n", self.head());
    }

    /// A Markdown table with its columns lined up reads well on a terminal, too.
    pub(super) fn print(&self) {
        print!("{}", self.body());
    }

    /// Writes `bench.json` and `bench.md`.
    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        fs::write(dir.join("bench.json"), serde_json::to_string_pretty(self)?)?;
        let text = format!("# Benchmark\n\n{}\n\n{}", self.head(), self.body());
        Ok(fs::write(dir.join("bench.md"), text)?)
    }

    fn head(&self) -> String {
        let m = &self.machine;
        let Machine { cpu, cores, core, kernel, load_average, commit, agent, xtask, .. } = m;
        format!(
            "- {cpu}, {cores} cores, load {load_average} at the start; Linux {kernel}\n- everything measured runs on \
             core {core}\n- commit {commit}; agent {agent}; client and server {xtask}"
        )
    }

    fn body(&self) -> String {
        let mut out = String::new();
        if !self.rows.is_empty() {
            self.traffic(&mut out);
        }
        self.program_costs(&mut out);
        out
    }

    fn traffic(&self, out: &mut String) {
        let iptables = self.machine.iptables.as_deref().unwrap_or_default();
        let _ = writeln!(
            out,
            "## pod → ClusterIP on one node (IPv4, TCP)\n\nIn µs. p50, p90, p99 of all turns together; (least..most) of the \
             turns' p50. {iptables}.\n"
        );
        let mut table = Table::new(&[
            "load",
            "Services",
            "mode",
            "p50",
            "(turns)",
            "p90",
            "p99",
            "per second",
            "p50 / direct",
        ]);
        for r in &self.rows {
            table.row(vec![
                r.load.name().into(),
                r.services.to_string(),
                r.mode.name().into(),
                format!("{:.1}", r.p50),
                format!("{:.1}..{:.1}", r.turns.min, r.turns.max),
                format!("{:.1}", r.p90),
                format!("{:.1}", r.p99),
                format!("{:.0}", r.rate.median),
                if r.mode == Mode::Direct { "1".into() } else { ratio(r.to_direct) },
            ]);
        }
        table.render(out);
        let _ = writeln!(out, "\n## Ours against iptables\n");
        for c in &self.compared {
            let _ = writeln!(
                out,
                "- {}, {}: ours takes {} of iptables' p50: **{}**",
                c.load.name(),
                counted(c.services),
                ratio(c.ratio),
                c.verdict.name(),
            );
        }
        let _ = writeln!(out, "\n## Until a node serves all Services, from nothing\n");
        for p in &self.programming {
            let _ = writeln!(out, "- {}, {}: {:.2} s", counted(p.services), p.mode.name(), p.seconds);
        }
        let _ = writeln!(out);
    }

    fn program_costs(&self, out: &mut String) {
        let _ = writeln!(
            out,
            "## Our programs (ns a packet, `BPF_PROG_TEST_RUN`, hot cache)\n\nMedian of the turns, with what running an \
             empty program costs; (least..most) of the turns.\n"
        );
        let mut table =
            Table::new(&["packet", "hook", "IPv4", "× floor", "IPv6", "× floor", "at most", "of"]);
        for cost in &self.programs {
            let ns = |i: usize| {
                cost.families.get(i).map_or_else(String::new, |f| {
                    let s = f.nanoseconds;
                    format!("{:.1} ({:.1}..{:.1})", s.median, s.min, s.max)
                })
            };
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
}

fn counted(services: usize) -> String {
    format!("{services} {}", if services == 1 { "Service" } else { "Services" })
}

fn ratio(spread: Spread) -> String {
    format!("{:.2} ({:.2}..{:.2})", spread.median, spread.min, spread.max)
}

/// A Markdown table, its columns lined up.
struct Table(Vec<Vec<String>>);

impl Table {
    fn new(head: &[&str]) -> Self {
        Self(vec![head.iter().map(|&h| h.into()).collect()])
    }

    fn row(&mut self, cells: Vec<String>) {
        self.0.push(cells);
    }

    fn render(&self, out: &mut String) {
        let columns = self.0[0].len();
        let width = |i: usize| self.0.iter().map(|row| row[i].chars().count()).max().unwrap_or_default();
        let widths: Vec<_> = (0..columns).map(width).collect();
        for (i, row) in self.0.iter().enumerate() {
            let cells = row.iter().zip(&widths).map(|(cell, &width)| format!(" {cell:<width$} |"));
            let _ = writeln!(out, "|{}", cells.collect::<String>());
            if i == 0 {
                let rule = widths.iter().map(|width| format!("{}|", "-".repeat(width + 2)));
                let _ = writeln!(out, "|{}", rule.collect::<String>());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up_in_any_script() {
        let mut table = Table::new(&["a", "µs"]);
        table.row(vec!["–".into(), "10.5".into()]);
        let mut out = String::new();
        table.render(&mut out);
        assert_eq!(out, "| a | µs   |\n|---|------|\n| – | 10.5 |\n");
    }
}
