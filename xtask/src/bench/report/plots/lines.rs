//! Figures over the number of Services, a line for each mode.

use anyhow::Result;
use plotters::prelude::DrawingBackend;

use super::Picture;
use super::axis::Axis;
use super::style::{At, FAINT, GRID, INK, LEADER, Sheet, about, apart, color, tick};
use crate::bench::family::IpFamily;
use crate::bench::load::Load;
use crate::bench::mode::Mode;
use crate::bench::results::Results;
use crate::bench::stats::Spread;
use crate::bench::topology::Path;

/// One mode's figures: Services, and the middle and the middle half.
struct Series {
    mode: Mode,
    points: Vec<(f64, Spread)>,
}

/// A diagram of several.
struct Panel {
    title: String,
    unit: &'static str,
    series: Vec<Series>,
}

/// Left, top, width and height.
type Frame = (f64, f64, f64, f64);

impl Panel {
    fn new(
        title: &str,
        unit: &'static str,
        figures: impl Iterator<Item = (Mode, usize, Spread)>,
    ) -> Option<Self> {
        let mut series: Vec<Series> = Mode::ALL.map(|mode| Series { mode, points: Vec::new() }).into();
        for (mode, services, figure) in figures {
            let of_mode = series.iter_mut().find(|s| s.mode == mode);
            of_mode.into_iter().for_each(|s| s.points.push((services as f64, figure)));
        }
        series.retain(|s| !s.points.is_empty());
        series.iter_mut().for_each(|s| s.points.sort_by(|a, b| a.0.total_cmp(&b.0)));
        (!series.is_empty()).then(|| Self { title: title.into(), unit, series })
    }

    fn draw<DB: DrawingBackend>(&self, sheet: &Sheet<DB>, (left, top, width, height): Frame) -> Result<()> {
        let (small, faint) = (sheet.font(11, false, INK), sheet.font(11, false, FAINT));
        sheet.text(&self.title, left, top + 10.0, At::Left, &sheet.font(13, true, INK))?;
        sheet.text(self.unit, left, top + 29.0, At::Left, &faint)?;
        let (x0, x1, y0, y1) = (left + 44.0, left + width - 96.0, top + height - 36.0, top + 44.0);
        let points = || self.series.iter().flat_map(|s| &s.points);
        let x = Axis::around(points().map(|p| p.0), true, (x0, x1));
        let y = Axis::around(points().flat_map(|p| [p.1.median, p.1.high]), false, (y0, y1));
        for value in y.ticks() {
            let at = y.at(value);
            sheet.line((x0, at), (x1, at), 1, GRID)?;
            sheet.text(&tick(value), x0 - 6.0, at, At::Right, &small)?;
        }
        let mut services: Vec<f64> = points().map(|p| p.0).collect();
        services.sort_by(f64::total_cmp);
        services.dedup();
        for value in services {
            sheet.line((x.at(value), y0), (x.at(value), y0 + 4.0), 1, FAINT)?;
            sheet.text(&tick(value), x.at(value), y0 + 13.0, At::Middle, &small)?;
        }
        sheet.text("Services", (x0 + x1) / 2.0, y0 + 29.0, At::Middle, &faint)?;
        let mut labels = Vec::new();
        for Series { mode, points } in &self.series {
            let place = |(services, figure): &(f64, Spread)| (x.at(*services), y.at(figure.median));
            for pair in points.windows(2) {
                sheet.line(place(&pair[0]), place(&pair[1]), 2, color(*mode))?;
            }
            for point in points {
                let (px, py) = place(point);
                let (low, high) = (y.at(point.1.low), y.at(point.1.high));
                sheet.line((px, low), (px, high), 1, color(*mode))?;
                sheet.dot(px, py, 3.0, color(*mode))?;
            }
            labels.extend(points.last().map(|last| (place(last).1, *mode)));
        }
        let ends = self.series.iter().filter_map(|s| s.points.last().map(|p| (s.mode, p)));
        let ends: Vec<_> = ends.map(|(mode, p)| (mode, (x.at(p.0), y.at(p.1.median)))).collect();
        apart(&mut labels, 14.0);
        for (at, mode) in labels {
            let from = ends.iter().find(|(m, _)| *m == mode).map_or((x1, at), |(_, place)| *place);
            // Where the line ends before the others, or its label had to move.
            sheet.line((from.0 + 6.0, from.1), (x1 + 6.0, at), 1, LEADER)?;
            sheet.text(mode.name(), x1 + 10.0, at, At::Left, &sheet.font(11, true, color(mode)))?;
        }
        Ok(())
    }
}

/// Connections over the number of Services, a diagram for each way.
pub(super) struct Connections {
    title: String,
    about: String,
    panels: Vec<Panel>,
}

impl Connections {
    pub(super) fn of(results: &Results, family: IpFamily) -> Option<Self> {
        let panel = |path: Path| {
            let rows = results.rows.iter().filter(move |row| {
                (row.of.load, row.of.path, row.of.family) == (Load::Connections, path, family)
            });
            Panel::new(path.name(), "µs, median", rows.map(|row| (row.mode, row.of.services, row.figure)))
        };
        let panels: Vec<_> = Path::ALL.into_iter().filter_map(panel).collect();
        let title = format!("New connections, {}: connect, a byte each way, close", family.name());
        (!panels.is_empty()).then(|| Self { title, about: about(results), panels })
    }
}

impl Picture for Connections {
    fn size(&self) -> (u32, u32) {
        (1260, 70 + 300 * self.panels.len().div_ceil(3) as u32)
    }

    fn draw<DB: DrawingBackend>(&self, sheet: &Sheet<DB>) -> Result<()> {
        sheet.title(&self.title, &self.about)?;
        for (i, panel) in self.panels.iter().enumerate() {
            let (column, row) = ((i % 3) as f64, (i / 3) as f64);
            panel.draw(sheet, (20.0 + 412.0 * column, 74.0 + 300.0 * row, 400.0, 286.0))?;
        }
        Ok(())
    }
}

/// Programming from nothing, and changes.
pub(super) struct Control {
    about: String,
    panels: Vec<Panel>,
}

impl Control {
    pub(super) fn of(results: &Results) -> Option<Self> {
        let one = |value: f64| Spread::of(&[value]);
        let programming = results.programming.iter().filter(|p| p.family == IpFamily::V4);
        let programming = programming.map(|p| (p.mode, p.services, one(p.seconds)));
        let changes = |churn: bool| {
            let rows = results.changes.iter().filter(move |c| (c.churn > 0) == churn);
            rows.map(|c| {
                let ms = c.milliseconds;
                let spread = Spread { min: ms.p50, low: ms.p50, median: ms.p50, high: ms.p99, max: ms.p99 };
                (c.mode, c.services, spread)
            })
        };
        let panels = [
            Panel::new(
                "From nothing until all Services are served",
                "s, IPv4, 10 endpoints each",
                programming,
            ),
            Panel::new("A change until connections see it", "ms, median up to p99", changes(false)),
            Panel::new("The same, with 100 other changes a second", "ms, median up to p99", changes(true)),
        ];
        let panels: Vec<_> = panels.into_iter().flatten().collect();
        (!panels.is_empty()).then(|| Self { about: about(results), panels })
    }
}

impl Picture for Control {
    fn size(&self) -> (u32, u32) {
        (1260, 390)
    }

    fn draw<DB: DrawingBackend>(&self, sheet: &Sheet<DB>) -> Result<()> {
        sheet.title("Programming and changes", &self.about)?;
        for (i, panel) in self.panels.iter().enumerate() {
            panel.draw(sheet, (20.0 + 412.0 * i as f64, 74.0, 400.0, 300.0))?;
        }
        Ok(())
    }
}
