//! What is measured, chosen by the time that there is.

use std::time::{Duration, Instant};

use super::family::IpFamily;
use super::load::Load;
use super::mode::Mode;
use super::services::{self, Kind};
use super::topology::Path;

/// A load on a way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cell {
    pub(super) path: Path,
    pub(super) load: Load,
}

/// Cells that one cluster serves.
#[derive(Clone, Debug)]
pub(super) struct Block {
    pub(super) family: IpFamily,
    pub(super) services: usize,
    pub(super) kinds: Vec<Kind>,
    pub(super) cells: Vec<Cell>,
    /// Whether changes are measured here, too.
    pub(super) control: bool,
}

/// How thorough a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    /// Everything.
    Full,
    /// Every way and every load once, not each combination of them.
    Quick,
    /// One load on each way: whether the harness works at all.
    Smoke,
}

/// Most rounds of a cell: more say no more.
const MOST_ROUNDS: usize = 60;
/// Fewest, whatever the time.
const FEWEST_ROUNDS: usize = 4;

impl Depth {
    /// Turns of each program, and packets in a turn.
    pub(super) fn programs(self) -> (usize, u32) {
        match self {
            Self::Full => (21, 1_000_000),
            Self::Quick => (5, 200_000),
            Self::Smoke => (1, 10_000),
        }
    }

    /// Turns of each way of forwarding, and packets in a turn.
    pub(super) fn forwarded(self) -> (usize, u32) {
        match self {
            Self::Full => (21, 100_000),
            Self::Quick => (7, 40_000),
            Self::Smoke => (1, 5000),
        }
    }

    /// Most changes that are waited for, and the longest that they may take together, in each state of the cluster.
    pub(super) fn changes(self) -> (usize, Duration) {
        match self {
            Self::Full => (200, Duration::from_secs(20)),
            Self::Quick => (40, Duration::from_secs(3)),
            Self::Smoke => (2, Duration::from_secs(2)),
        }
    }

    /// How long an idle process is watched.
    pub(super) fn idle(self) -> Duration {
        match self {
            Self::Full => Duration::from_secs(10),
            Self::Quick => Duration::from_secs(2),
            Self::Smoke => Duration::from_millis(100),
        }
    }

    /// How long a turn should be. A stream takes a while until it is at its speed.
    pub(super) fn turn(self, load: Load) -> Duration {
        match (self, load) {
            (Self::Smoke, _) => Duration::from_millis(2),
            (_, Load::Stream | Load::Streams) => Duration::from_millis(60),
            _ => Duration::from_millis(20),
        }
    }

    fn cells(self, family: IpFamily, is_edge: bool, is_last: bool) -> Vec<Cell> {
        if (self, family) == (Self::Smoke, IpFamily::V6) {
            return vec![Cell { path: Path::NodePortThere, load: Load::Connections }];
        }
        let connections = Path::ALL.map(|path| Cell { path, load: Load::Connections });
        let mut cells = connections.to_vec();
        let rest = || Load::ALL.into_iter().filter(|&load| load != Load::Connections);
        match (self, family) {
            (Self::Full, _) if is_edge => {
                cells.extend(Path::ALL.into_iter().flat_map(|path| {
                    rest().filter(move |l| l.is_for(path)).map(move |load| Cell { path, load })
                }));
            }
            (Self::Quick, IpFamily::V4) if is_last => {
                let same = rest().filter(|load| load.is_for(Path::SameNode));
                cells.extend(same.map(|load| Cell { path: Path::SameNode, load }));
                cells.push(Cell { path: Path::NodePortThere, load: Load::Forwarded });
                for path in [Path::NodePortThere, Path::Outside] {
                    cells.extend([Load::TcpTrips, Load::Packets].map(|load| Cell { path, load }));
                }
            }
            (Self::Quick, IpFamily::V6) if is_last => {
                cells.push(Cell { path: Path::NodePortThere, load: Load::Forwarded });
                for path in [Path::SameNode, Path::NodePortThere] {
                    cells.extend([Load::TcpTrips, Load::Packets].map(|load| Cell { path, load }));
                }
            }
            (Self::Smoke, _) => {
                cells.push(Cell { path: Path::SameNode, load: Load::Packets });
                cells.push(Cell { path: Path::NodePortThere, load: Load::Forwarded });
            }
            _ => {}
        }
        cells
    }
}

/// The blocks in the order in which they are measured: small clusters first, so that a time that was too short costs the
/// large ones.
pub(super) fn blocks(depth: Depth, counts: &[usize], families: &[IpFamily]) -> Vec<Block> {
    let mut counts = counts.to_vec();
    counts.sort_unstable();
    counts.dedup();
    let mut blocks = Vec::new();
    for (i, &services) in counts.iter().enumerate() {
        for &family in families {
            let is_last = i + 1 == counts.len();
            let cells = depth.cells(family, i == 0 || is_last, is_last);
            let mut kinds: Vec<Kind> = Vec::new();
            for kind in cells.iter().filter_map(|cell| cell.path.kind(cell.load.transport())) {
                if !kinds.contains(&kind) {
                    kinds.push(kind);
                }
            }
            let groups = services::blocks(services, &kinds);
            let home = |cell: &Cell| {
                let kind = cell.path.kind(cell.load.transport());
                // What needs no Service goes to the first of them.
                kind.and_then(|kind| groups.iter().position(|group| group.contains(&kind))).unwrap_or(0)
            };
            for (g, kinds) in groups.iter().enumerate() {
                let cells = cells.iter().copied().filter(|cell| home(cell) == g).collect();
                let control = family == families[0] && g == 0 && (depth != Depth::Quick || is_last);
                blocks.push(Block { family, services, kinds: kinds.clone(), cells, control });
            }
        }
    }
    blocks
}

/// The time that a run has, and what is left of it.
#[derive(Debug)]
pub(super) struct Budget {
    start: Instant,
    whole: Duration,
    /// How long programming took, over what was expected.
    slowness: f64,
}

impl Budget {
    pub(super) fn new(whole: Duration) -> Self {
        Self { start: Instant::now(), whole, slowness: 1.0 }
    }

    pub(super) fn whole(&self) -> Duration {
        self.whole
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Seconds.
    pub(super) fn left(&self) -> f64 {
        self.whole.saturating_sub(self.elapsed()).as_secs_f64()
    }

    /// Learns from how long it took to start a mode's site.
    pub(super) fn learn(&mut self, mode: Mode, services: usize, took: Duration) {
        let ratio = took.as_secs_f64() / starting(mode, services);
        self.slowness = (0.7 * self.slowness + 0.3 * ratio).clamp(0.3, 10.0);
    }

    /// Whether the sites of a block can be started at all.
    pub(super) fn affords_block(&self, services: usize, modes: &[Mode]) -> Result<(), String> {
        let needed = modes.iter().filter(|mode| mode.is_ours()).map(|&mode| starting(mode, services)).sum();
        self.affords(needed, 1.0)
    }

    /// Whether one of kube-proxy's modes can be started without using up most of what is left.
    pub(super) fn affords_mode(&self, mode: Mode, services: usize) -> Result<(), String> {
        match mode {
            Mode::Iptables | Mode::Nftables => self.affords(starting(mode, services), 0.4),
            _ => Ok(()),
        }
    }

    fn affords(&self, needed: f64, share: f64) -> Result<(), String> {
        let (needed, left) = (self.slowness * needed, self.left());
        if needed < share * left {
            return Ok(());
        }
        Err(format!("programming would take about {needed:.0} s of the {left:.0} s that were left"))
    }

    /// Rounds of the next cell, given what one takes, the cells to come, this block, whose changes come last, and the later
    /// ones.
    pub(super) fn rounds(
        &self,
        round: Duration,
        cells_left: usize,
        (this, later): (&Block, &[Block]),
        modes: &[Mode],
        depth: Depth,
    ) -> usize {
        let control = |block: &Block| if block.control { control(depth, modes) } else { 0.0 };
        let starting = |block: &Block| modes.iter().map(|&mode| starting(mode, block.services)).sum::<f64>();
        let later: f64 = later.iter().map(|block| self.slowness * starting(block) + control(block)).sum();
        let share = (self.left() - control(this) - later - programs(depth)) / cells_left.max(1) as f64;
        let rounds = (share / round.as_secs_f64()).max(0.0) as usize;
        // Even, so that forth and back are as many.
        let most = if depth == Depth::Smoke { FEWEST_ROUNDS } else { MOST_ROUNDS };
        rounds.clamp(FEWEST_ROUNDS, most) / 2 * 2
    }
}

/// Seconds that a site is expected to take until it serves, on a machine like the one that this was written on.
fn starting(mode: Mode, services: usize) -> f64 {
    let n = services as f64 / 1000.0;
    let lab = 0.8;
    lab + match mode {
        Mode::Direct | Mode::Hooks => 0.0,
        Mode::Iptables => 0.4 * n.powf(1.2),
        // Measured in pieces: 2 s for 3,000, 24 s for 10,000, 154 s for 30,000.
        Mode::Nftables => 0.3 * n.powf(1.85),
        Mode::Ours | Mode::OursSockets | Mode::OursRedirect | Mode::OursXdp => 1.5 + 0.3 * n,
    }
}

/// Seconds that changes are measured for in a block.
fn control(depth: Depth, modes: &[Mode]) -> f64 {
    let served = modes.iter().filter(|mode| !mode.is_direct()).count() as f64;
    // All modes are idle at once.
    2.0 * depth.changes().1.as_secs_f64() * 0.4 * served + depth.idle().as_secs_f64() * 1.25
}

/// Seconds that the programs take.
fn programs(depth: Depth) -> f64 {
    match depth {
        Depth::Full => 100.0,
        Depth::Quick => 15.0,
        Depth::Smoke => 4.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODES: [Mode; 4] = [Mode::Direct, Mode::Iptables, Mode::Nftables, Mode::Ours];

    #[test]
    fn every_cell_is_in_one_block_that_can_serve_it() {
        for depth in [Depth::Full, Depth::Quick] {
            let blocks = blocks(depth, &[1000, 1, 1], &IpFamily::ALL);
            for block in &blocks {
                for cell in &block.cells {
                    let kind = cell.path.kind(cell.load.transport());
                    assert!(kind.is_none_or(|kind| block.kinds.contains(&kind)), "{cell:?} in {block:?}");
                }
            }
            let cells =
                |services| blocks.iter().filter(move |b| b.services == services).flat_map(|b| &b.cells);
            let connections = |services| cells(services).filter(|c| c.load == Load::Connections).count();
            assert_eq!((connections(1), connections(1000)), (10, 10), "each way, each family");
            assert_eq!(blocks.first().unwrap().services, 1);
            let changes = if depth == Depth::Full { 2 } else { 1 };
            assert_eq!(blocks.iter().filter(|b| b.control).count(), changes);
        }
    }

    #[test]
    fn a_full_grid_has_every_load_on_every_way_at_both_ends() {
        let blocks = blocks(Depth::Full, &[1, 100, 1000], &[IpFamily::V4]);
        let count = |n| blocks.iter().filter(|b| b.services == n).map(|b| b.cells.len()).sum::<usize>();
        assert_eq!((count(1), count(100), count(1000)), (31, 5, 31));
    }

    #[test]
    fn rounds_follow_from_the_time_left() {
        let budget = Budget::new(Duration::from_secs(100));
        let mut this = blocks(Depth::Quick, &[1], &[IpFamily::V4]).remove(0);
        this.control = false;
        let of = |this: &Block, ms, cells, later: &[Block]| {
            budget.rounds(Duration::from_millis(ms), cells, (this, later), &MODES, Depth::Quick)
        };
        let rounds = |ms, cells, later: &[Block]| of(&this, ms, cells, later);
        assert_eq!(rounds(100, 10, &[]), MOST_ROUNDS);
        let some = rounds(500, 10, &[]);
        assert!((14..=18).contains(&some), "{some}");
        assert_eq!(rounds(1000, 1000, &[]), FEWEST_ROUNDS);
        let later = blocks(Depth::Quick, &[10_000], &[IpFamily::V4]);
        assert!(rounds(500, 10, &later) < some);
        let with_changes = Block { control: true, ..this.clone() };
        assert!(of(&with_changes, 500, 10, &[]) < some);
    }

    #[test]
    fn what_would_take_too_long_is_left_out_and_why() {
        let budget = Budget::new(Duration::from_secs(100));
        assert!(budget.affords_mode(Mode::Nftables, 1000).is_ok());
        assert!(
            budget.affords_mode(Mode::Ours, 1_000_000).is_ok(),
            "ours never without the rest of its block"
        );
        assert!(budget.affords_mode(Mode::Nftables, 30_000).unwrap_err().contains("of the 100 s"));
        assert!(budget.affords_block(30_000, &MODES).is_ok());
        assert!(budget.affords_block(1_000_000, &MODES).is_err());
    }
}
