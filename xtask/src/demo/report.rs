//! What the demo prints.

use std::io::IsTerminal;
use std::time::Duration;

use super::check::{Check, Outcome};
use super::cluster::Cluster;

/// Collects and prints what was observed.
pub(super) struct Report {
    colour: bool,
    count: usize,
    wrong: usize,
}

const BOLD: &str = "1";
const DIM: &str = "2";
const RED: &str = "1;31";
const GREEN: &str = "32";

impl Report {
    pub(super) fn new() -> Self {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { colour, count: 0, wrong: 0 }
    }

    fn paint(&self, style: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{style}m{text}\x1b[0m") } else { text.into() }
    }

    pub(super) fn intro(&self) {
        println!(
            "{}",
            self.paint(
                BOLD,
                "A Kubernetes Service from its manifest to a packet that arrives, by eBPF alone"
            )
        );
        let picture = "
     client 192.0.2.10 ──┐                          ┌── outside 198.51.100.10
                         router, knows no pod and no Service
              ┌──────────┴──────────────┐
     n1 172.18.0.11 ═══ vxlan ═══ n2 172.18.0.12           an lb-agent on each node,
     web-1 web-2 dns-1            web-3 dns-2 store        no iptables rule anywhere";
        println!("{}\n", self.paint(DIM, picture));
    }

    pub(super) fn cluster(&self, cluster: &Cluster) {
        println!("lab {} is up, both agents are ready", cluster.lab().name());
    }

    pub(super) fn heading(&self, title: &str, how: &str) {
        println!("\n{}\n  {}", self.paint(BOLD, title), self.paint(DIM, how));
    }

    pub(super) fn checked(&mut self, check: &Check, outcome: Outcome) {
        self.count += 1;
        let mark = match outcome.wrong {
            None => self.paint(GREEN, "✓"),
            Some(_) => self.paint(RED, "✗"),
        };
        let from = check.from.name();
        let to = format!("{from} → {}", check.action.to());
        let mut line = format!(
            "  {mark} {:<10} {to:<33} {:<13} {:<31} ",
            check.action.kind(),
            check.label,
            outcome.answers
        );
        if !outcome.sources.is_empty() {
            line += &self.paint(DIM, &outcome.sources);
        }
        println!("{}", line.trim_end());
        if let Some(wrong) = outcome.wrong {
            self.wrong += 1;
            println!("    {}", self.paint(RED, &wrong));
        }
    }

    /// The last line; how many observations there were, and how many were wrong.
    pub(super) fn end(&self, took: Duration) -> (usize, usize) {
        let (count, wrong) = (self.count, self.wrong);
        let verdict = match wrong {
            0 => self.paint(GREEN, &format!("all {count} observations are as they should be")),
            _ => self.paint(RED, &format!("{wrong} of {count} observations are not as they should be")),
        };
        println!("\n{verdict}, {:.1} s", took.as_secs_f64());
        (count, wrong)
    }

    pub(super) fn kept(&self, cluster: &Cluster) {
        let (lab, dir) = (cluster.lab().name(), cluster.lab().node(0).state_dir());
        println!("\nEverything is still running:");
        println!("  cargo xtask lab exec {lab} n1p3 -- curl -s http://10.96.0.10");
        println!("  cargo xtask lab exec {lab} client -- curl -s http://172.18.0.11:30080");
        println!("  edit {}", dir.join("manifests/web.yaml").display());
        println!("  cargo xtask lab down {lab}");
    }
}
