//! What a guest tells the host, and how the host shows it.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The result of one guest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Report {
    /// `uname -r`.
    pub(super) release: String,
    /// The guest's uptime when the payload started.
    pub(super) boot_seconds: f64,
    /// Programs that the agent has loaded on one node.
    pub(super) programs: Option<usize>,
    /// `clsact` or `tcx`.
    pub(super) attach: Option<String>,
    pub(super) checks: Vec<Check>,
}

/// One thing tried in the guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Check {
    pub(super) name: String,
    /// Why it failed; `None` if it did not.
    pub(super) failure: Option<String>,
}

impl Report {
    /// Records a result and prints it to the guest's console, with the time since it was started.
    pub(super) fn check(&mut self, name: impl Into<String>, result: anyhow::Result<()>) {
        let check = Check { name: name.into(), failure: result.err().map(|e| format!("{e:#}")) };
        let at = super::guest::uptime().unwrap_or_default();
        match &check.failure {
            None => println!("{at:6.1} s  ok    {}", check.name),
            Some(why) => println!("{at:6.1} s  FAIL  {}: {why}", check.name),
        }
        self.checks.push(check);
    }

    /// How many checks passed.
    pub(super) fn passed(&self) -> usize {
        self.checks.iter().filter(|c| c.failure.is_none()).count()
    }
}

/// A kernel's row in the table at the end.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) kernel: String,
    /// Of the whole test on this kernel, second attempts included.
    pub(super) took: Duration,
    pub(super) report: Option<Report>,
    /// Why the kernel failed; `None` if it did not.
    pub(super) failure: Option<String>,
}

/// The rows as a table, each failure below it.
pub(super) fn table(rows: &[Row]) -> String {
    let head =
        ["kernel", "release", "boot s", "total s", "programs", "attach", "checks", ""].map(String::from);
    let lines: Vec<[String; 8]> = std::iter::once(head).chain(rows.iter().map(cells)).collect();
    let widths: [usize; 8] = std::array::from_fn(|i| lines.iter().map(|l| l[i].len()).max().unwrap_or(0));
    let mut out = String::new();
    for line in &lines {
        let cells: Vec<String> =
            line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        out += cells.join("  ").trim_end();
        out.push('\n');
    }
    for row in rows {
        if let Some(why) = &row.failure {
            out += &format!("\n{}: {why}\n", row.kernel);
        }
        for check in row.report.iter().flat_map(|r| &r.checks) {
            if let Some(why) = &check.failure {
                out += &format!("  {}: {why}\n", check.name);
            }
        }
    }
    out
}

fn cells(row: &Row) -> [String; 8] {
    let report = row.report.as_ref();
    let or_dash = |cell: Option<String>| cell.unwrap_or_else(|| "-".into());
    [
        row.kernel.clone(),
        or_dash(report.map(|r| r.release.clone())),
        or_dash(report.map(|r| format!("{:.1}", r.boot_seconds))),
        format!("{:.1}", row.took.as_secs_f64()),
        or_dash(report.and_then(|r| r.programs).map(|n| n.to_string())),
        or_dash(report.and_then(|r| r.attach.clone())),
        or_dash(report.map(|r| format!("{}/{}", r.passed(), r.checks.len()))),
        if row.failure.is_none() { "ok" } else { "FAIL" }.into(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_which_check_failed_where() {
        let mut report = Report { release: "6.1.0-56".into(), boot_seconds: 2.04, ..Default::default() };
        report.check("bpffs", Ok(()));
        report.check("hairpin v6", Err(anyhow::anyhow!("timed out")));
        let failure = Some("1 of 2 checks failed".to_owned());
        let rows = [
            Row { kernel: "6.1".into(), took: Duration::from_secs(4), report: Some(report), failure },
            Row {
                kernel: "7.2".into(),
                took: Duration::ZERO,
                report: None,
                failure: Some("not found".into()),
            },
        ];
        let table = table(&rows);
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines[1], "6.1     6.1.0-56  2.0     4.0      -         -       1/2     FAIL");
        assert_eq!(lines[2], "7.2     -         -       0.0      -         -       -       FAIL");
        assert_eq!(
            lines[4..],
            ["6.1: 1 of 2 checks failed", "  hairpin v6: timed out", "", "7.2: not found"]
        );
    }
}
