//! Every load on every way, beside the direct one.

use anyhow::Result;
use plotters::prelude::DrawingBackend;

use super::Picture;
use super::axis::Axis;
use super::style::{At, FAINT, GRID, INK, Sheet, about, color, tick};
use crate::bench::family::IpFamily;
use crate::bench::load::Load;
use crate::bench::mode::Mode;
use crate::bench::results::{Results, Row};
use crate::bench::services::counted;
use crate::bench::stats::Spread;
use crate::bench::topology::Path;

const ROW: f64 = 26.0;
const LEFT: f64 = 290.0;
const RIGHT: f64 = 960.0;
const TOP: f64 = 106.0;

/// Speed over that of the direct way, in the largest cluster that each was measured in.
pub(super) struct Relative {
    title: String,
    about: String,
    groups: Vec<Group>,
    modes: Vec<Mode>,
}

/// A load.
struct Group {
    name: String,
    lines: Vec<Line>,
}

/// A way.
struct Line {
    name: String,
    dots: Vec<(Mode, Spread)>,
}

impl Relative {
    pub(super) fn of(results: &Results, family: IpFamily) -> Option<Self> {
        let rows: Vec<&Row> =
            results.rows.iter().filter(|r| r.of.family == family && r.mode != Mode::Direct).collect();
        let groups = Load::ALL.into_iter().filter_map(|load| {
            let lines: Vec<_> = Path::ALL.into_iter().filter_map(|path| line(&rows, load, path)).collect();
            let services = rows.iter().filter(|r| r.of.load == load).map(|r| r.of.services).max()?;
            Some(Group { name: format!("{}, {}", load.name(), counted(services)), lines })
        });
        let groups: Vec<_> = groups.collect();
        let modes = Mode::ALL.into_iter().filter(|mode| rows.iter().any(|row| row.mode == *mode)).collect();
        let title = format!("Speed beside the direct way, {}", family.name());
        (!groups.is_empty()).then(|| Self { title, about: about(results), groups, modes })
    }

    fn rows(&self) -> usize {
        self.groups.iter().map(|group| group.lines.len() + 1).sum()
    }
}

fn line(rows: &[&Row], load: Load, path: Path) -> Option<Line> {
    let of_line = || rows.iter().filter(|r| (r.of.load, r.of.path) == (load, path));
    let services = of_line().map(|r| r.of.services).max()?;
    let dots = of_line().filter(|r| r.of.services == services).map(|r| (r.mode, speed(r))).collect();
    Some(Line { name: path.name().into(), dots })
}

/// More is faster, whatever the figure.
fn speed(row: &Row) -> Spread {
    if row.of.load.is_timed() { row.to_direct.inverse() } else { row.to_direct }
}

impl Picture for Relative {
    fn size(&self) -> (u32, u32) {
        (RIGHT as u32 + 40, (TOP + ROW * self.rows() as f64 + 50.0) as u32)
    }

    fn draw<DB: DrawingBackend>(&self, sheet: &Sheet<DB>) -> Result<()> {
        sheet.title(&self.title, &self.about)?;
        sheet.legend(&self.modes, LEFT, 80.0)?;
        let dots = || self.groups.iter().flat_map(|g| &g.lines).flat_map(|l| &l.dots);
        let most = dots().map(|(_, speed)| speed.high.min(1.5)).fold(1.0, f64::max);
        let x = Axis::from_zero(most, (LEFT, RIGHT));
        let (small, faint) = (sheet.font(12, false, INK), sheet.font(11, false, FAINT));
        let bottom = TOP + ROW * self.rows() as f64;
        for value in x.ticks() {
            sheet.line((x.at(value), TOP), (x.at(value), bottom), 1, GRID)?;
            sheet.text(&tick(value), x.at(value), bottom + 12.0, At::Middle, &faint)?;
        }
        // The limit.
        sheet.line((x.at(1.0), TOP - 6.0), (x.at(1.0), bottom), 2, color(Mode::Direct))?;
        sheet.text(
            "direct = 1, more is faster; bars: the middle half of the turns",
            LEFT,
            bottom + 32.0,
            At::Left,
            &faint,
        )?;
        let mut y = TOP + ROW / 2.0;
        for group in &self.groups {
            sheet.text(&group.name, 20.0, y, At::Left, &sheet.font(13, true, INK))?;
            y += ROW;
            for line in &group.lines {
                sheet.text(&line.name, LEFT - 14.0, y, At::Right, &small)?;
                for (i, (mode, speed)) in line.dots.iter().enumerate() {
                    // One above the other, so that none is hidden.
                    let at = y + (i as f64 - (line.dots.len() as f64 - 1.0) / 2.0) * 5.0;
                    sheet.line((x.at(speed.low), at), (x.at(speed.high), at), 2, color(*mode))?;
                    sheet.dot(x.at(speed.median), at, 3.5, color(*mode))?;
                }
                y += ROW;
            }
        }
        Ok(())
    }
}
