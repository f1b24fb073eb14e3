//! The turns: every mode under every load, on every way.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};

use super::control;
use super::load::Load;
use super::mode::{Mode, Site, Tools};
use super::plan::{Block, Budget, Cell, Depth};
use super::results::{Compared, Of, Programming, Results, Row};
use super::services::{Cluster, counted as counted_services};
use super::stats::{Spread, Times, Verdict};

mod turns;

use turns::Turns;

/// What a run is made of.
#[derive(Debug)]
pub(super) struct Run<'a> {
    pub(super) tools: &'a Tools,
    pub(super) depth: Depth,
    pub(super) core: usize,
    /// Those that there are.
    pub(super) modes: Vec<Mode>,
    pub(super) budget: Budget,
}

/// How far a run is. Drawn between turns only: nothing else may run while something is measured.
struct Progress(ProgressBar);

impl Progress {
    fn new(budget: &Budget) -> Self {
        let bar = ProgressBar::new(budget.whole().as_secs());
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {prefix} left at most: {msg}") {
            bar.set_style(style);
        }
        Self(bar)
    }

    fn show(&self, budget: &Budget, what: String) {
        let left = budget.left() as u64;
        self.0.set_position(budget.elapsed().as_secs());
        self.0.set_prefix(format!("{}:{:02}", left / 60, left % 60));
        self.0.set_message(what);
    }
}

/// Measures all blocks.
pub(super) fn measure(run: &mut Run<'_>, blocks: &[Block], results: &mut Results) -> Result<()> {
    let progress = Progress::new(&run.budget);
    for (i, block) in blocks.iter().enumerate() {
        if let Err(why) = run.budget.affords_block(block.services, &run.modes) {
            results.omitted.push(format!("{}: {why}", counted(block)));
            continue;
        }
        let cluster = Cluster::new(block.family, block.services, &block.kinds);
        let mut sites = start(run, &cluster, &progress, results)?;
        let idle = if block.control {
            progress.show(&run.budget, format!("{}, idle", counted(block)));
            control::idle(&sites, run.depth)?
        } else {
            Vec::new()
        };
        verify(&mut sites, block, &cluster, true)?;
        for (c, cell) in block.cells.iter().enumerate() {
            let what = format!("{}, {}, {}", counted(block), cell.load.name(), cell.path.name());
            progress.show(&run.budget, what);
            let later = &blocks[i + 1..];
            let cells_left = block.cells.len() - c + later.iter().map(|b| b.cells.len()).sum::<usize>();
            let turns = take(run, &mut sites, *cell, &cluster, (cells_left, block, later))?;
            let of = Of { load: cell.load, path: cell.path, family: block.family, services: block.services };
            turns.evaluate(of, results);
        }
        verify(&mut sites, block, &cluster, false)?;
        if block.control {
            for (site, idle) in sites.iter_mut().zip(idle) {
                progress.show(&run.budget, format!("{}, changes, {}", counted(block), site.mode.name()));
                control::measure(site, &cluster, run.depth, run.core, idle, results).with_context(|| {
                    format!("changes with {} in mode {}", counted(block), site.mode.name())
                })?;
            }
        }
        progress.show(&run.budget, "taking down the labs".into());
        sites.into_iter().try_for_each(Site::end)?;
    }
    progress.0.finish_and_clear();
    Ok(())
}

/// Whether each mode does what it says, on each of the block's ways.
fn verify(sites: &mut [Site], block: &Block, cluster: &Cluster, fresh: bool) -> Result<()> {
    for cell in block.cells.iter().filter(|cell| cell.load == Load::Connections) {
        for site in sites.iter_mut().filter(|site| site.mode.is_for(cell.path)) {
            site.verify(cell.path, cluster, fresh)?;
        }
    }
    Ok(())
}

fn counted(block: &Block) -> String {
    format!("{} ({})", counted_services(block.services), block.family.name())
}

fn start(
    run: &mut Run<'_>,
    cluster: &Cluster,
    progress: &Progress,
    results: &mut Results,
) -> Result<Vec<Site>> {
    let (family, services) = (cluster.family, cluster.all.len());
    let mut sites = Vec::new();
    for mode in run.modes.clone() {
        progress.show(
            &run.budget,
            format!("{services} Services ({}): programming {}", family.name(), mode.name()),
        );
        if let Err(why) = run.budget.affords_mode(mode, services) {
            results.omitted.push(format!("{}, {services} Services, {}: {why}", mode.name(), family.name()));
            continue;
        }
        let begin = Instant::now();
        let site = match Site::start(mode, run.tools, run.core, cluster) {
            Ok(site) => site,
            // That others do not get that far is a result, too.
            Err(error) if matches!(mode, Mode::Iptables | Mode::Nftables) => {
                let what = format!("{}, {services} Services, {}", mode.name(), family.name());
                // The rest is what was asked of it.
                let why = format!("{error:#}");
                let why = why.lines().next().unwrap_or_default();
                results.omitted.push(format!("{what}: it does not start: {why}"));
                continue;
            }
            Err(error) => return Err(error),
        };
        run.budget.learn(mode, services, begin.elapsed());
        let bridge_netfilter = site.bridge_netfilter()?;
        if let Some(available) = results.modes.iter_mut().find(|a| a.mode == mode) {
            available.bridge_netfilter = Some(bridge_netfilter);
        }
        // A small cluster is there for each kind of Service: once is enough.
        let known =
            results.programming.iter().any(|p| (p.services, p.family, p.mode) == (services, family, mode));
        if let Some(took) = site.programmed.filter(|_| !known) {
            let (seconds, after) = (took.whole.as_secs_f64(), took.listed.map(|d| d.as_secs_f64()));
            let programming = Programming { services, family, mode, seconds, seconds_after_list: after };
            results.programming.push(programming);
        }
        sites.push(site);
    }
    Ok(sites)
}

/// The turns of each mode. The first round warms up (neighbours, caches, routes) and tells how many operations make a turn,
/// the same for all modes; the second how long a round takes.
fn take(
    run: &Run<'_>,
    sites: &mut [Site],
    cell: Cell,
    cluster: &Cluster,
    (cells_left, this, later): (usize, &Block, &[Block]),
) -> Result<Turns> {
    let mut sites: Vec<_> = sites.iter_mut().filter(|site| site.mode.is_for(cell.path)).collect();
    sites.iter_mut().try_for_each(|site| site.prepare(cell.path, cell.load))?;
    let mut turns = Turns::new(sites.iter().map(|site| site.mode));
    let mut count = cell.load.first_count();
    let mut one_round = |round: usize, count: u64, turns: Option<&mut Turns>| -> Result<f64> {
        let (forth, mut rate, mut turns) = (round.is_multiple_of(2), 0.0, turns);
        for i in 0..sites.len() {
            // Back and forth, so that no mode is always the one after another.
            let i = if forth { i } else { sites.len() - 1 - i };
            let paid = sites[i].measure(cell.path, cell.load, count, cluster, round)?;
            if sites[i].mode == Mode::Direct {
                rate = paid.turn.rate;
            }
            if let Some(turns) = &mut turns {
                turns.push(i, paid, count);
            }
        }
        Ok(rate)
    };
    let rate = one_round(0, count, None)?;
    count = ((rate * run.depth.turn(cell.load).as_secs_f64()) as u64)
        .clamp(cell.load.first_count() / 8, 50_000_000);
    let begin = Instant::now();
    one_round(1, count, None)?;
    let rounds = run.budget.rounds(
        begin.elapsed().max(Duration::from_millis(1)),
        cells_left,
        (this, later),
        &run.modes,
        run.depth,
    );
    for round in 0..rounds {
        one_round(round, count, Some(&mut turns))?;
    }
    Ok(turns)
}
