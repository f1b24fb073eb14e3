//! Real connections, the modes in turn.

use std::path::Path;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::Effort;
use super::report::Report;
use super::services::Services;
use super::site::{Load, Mode, Site, Turn};
use super::stats::{Spread, Times, Verdict};

/// One mode under one load.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub(super) load: Load,
    pub(super) services: usize,
    pub(super) mode: Mode,
    /// Of all turns together, µs.
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    /// The turns' medians, µs.
    pub(super) turns: Spread,
    /// Per second.
    pub(super) rate: Spread,
    /// The turns' medians over those of `direct`.
    pub(super) to_direct: Spread,
}

/// Ours against iptables.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Compared {
    pub(super) load: Load,
    pub(super) services: usize,
    /// Ours over iptables, turn by turn.
    pub(super) ratio: Spread,
    pub(super) verdict: Verdict,
}

/// How long a node took to serve all Services, from nothing.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Programming {
    pub(super) services: usize,
    pub(super) mode: Mode,
    pub(super) seconds: f64,
}

/// Measures all modes under all loads with each number of Services.
pub(super) fn measure(
    exe: &Path,
    core: usize,
    effort: Effort,
    sizes: &[usize],
    report: &mut Report,
) -> Result<()> {
    report.machine.iptables = Some(super::iptables::prepare()?);
    let turns = sizes.len() * (effort.rounds + 1) * Load::ALL.len() * Mode::ALL.len();
    // Drawn between turns only: the bar must not run while something is measured.
    let bar = ProgressBar::new(turns as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} turns, {eta} left: {msg}") {
        bar.set_style(style);
    }
    bar.set_message("starting the labs");
    let mut sites =
        Mode::ALL.into_iter().map(|mode| Site::start(mode, exe, core)).collect::<Result<Vec<_>>>()?;
    for &size in sizes {
        let services = Services::new(size, sites[0].server());
        for site in &mut sites {
            bar.set_message(format!("{size} Services: programming {}", site.mode.name()));
            if let Some(took) = site.program(&services)? {
                let seconds = took.as_secs_f64();
                report.programming.push(Programming { services: size, mode: site.mode, seconds });
            }
        }
        for load in Load::ALL {
            bar.set_message(format!("{size} Services, {}", load.name()));
            let turns = take_turns(&mut sites, load, effort, &services, &bar)?;
            evaluate(load, size, &turns, report);
        }
    }
    bar.finish_and_clear();
    sites.iter().try_for_each(Site::verify)
}

/// The turns of each mode, in the order of [`Mode::ALL`].
fn take_turns(
    sites: &mut [Site],
    load: Load,
    effort: Effort,
    services: &Services,
    bar: &ProgressBar,
) -> Result<Vec<Vec<Turn>>> {
    let count = match load {
        Load::NewConnection => effort.connections,
        Load::RoundTrip => effort.round_trips,
    };
    let mut turns = vec![Vec::new(); sites.len()];
    // The first round warms up: neighbours, caches, routes.
    for round in 0..=effort.rounds {
        // Back and forth, so that no mode is always the one after another.
        let forth = round % 2 == 0;
        for i in 0..sites.len() {
            let i = if forth { i } else { sites.len() - 1 - i };
            let turn = sites[i].measure(load, count, services, round)?;
            bar.inc(1);
            if round > 0 {
                turns[i].push(turn);
            }
        }
    }
    Ok(turns)
}

fn evaluate(load: Load, services: usize, turns: &[Vec<Turn>], report: &mut Report) {
    let medians = |turns: &[Turn]| turns.iter().map(|t| t.times.quantile(0.5)).collect::<Vec<_>>();
    let ratios = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a / b).collect::<Vec<_>>();
    let medians: Vec<_> = turns.iter().map(|turns| medians(turns)).collect();
    for (i, mode) in Mode::ALL.into_iter().enumerate() {
        let mut all = Times::new();
        turns[i].iter().for_each(|turn| all.add(&turn.times));
        let rates: Vec<_> = turns[i].iter().map(|turn| turn.rate).collect();
        report.rows.push(Row {
            load,
            services,
            mode,
            p50: all.quantile(0.5),
            p90: all.quantile(0.9),
            p99: all.quantile(0.99),
            turns: Spread::of(&medians[i]),
            rate: Spread::of(&rates),
            to_direct: Spread::of(&ratios(&medians[i], &medians[0])),
        });
    }
    let at = |mode| Mode::ALL.iter().position(|&m| m == mode).unwrap_or_default();
    let ratios = ratios(&medians[at(Mode::Ours)], &medians[at(Mode::Iptables)]);
    let (ratio, verdict) = (Spread::of(&ratios), Verdict::of(&ratios));
    report.compared.push(Compared { load, services, ratio, verdict });
}
