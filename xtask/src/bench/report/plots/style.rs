//! What all plots look like.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};

use super::drawn;
use crate::bench::mode::Mode;
use crate::bench::results::Results;

/// For what is to be read first.
pub(super) const INK: RGBColor = RGBColor(30, 30, 30);
/// For what is to be read last.
pub(super) const FAINT: RGBColor = RGBColor(110, 110, 110);
/// Lines behind everything.
pub(super) const GRID: RGBColor = RGBColor(228, 228, 228);
/// From a line's end to its name.
pub(super) const LEADER: RGBColor = RGBColor(190, 190, 190);
/// What is not as it should be.
pub(super) const OVER: RGBColor = RGBColor(213, 94, 0);

/// Any name: it is embedded for the PNG, and the viewer's own in the SVG.
pub(super) const FONT: &str = "DejaVu Sans, sans-serif";

/// Where a text's given point is.
#[derive(Clone, Copy)]
pub(super) enum At {
    /// Left, at half its height.
    Left,
    /// Right, at half its height.
    Right,
    /// In the middle of both.
    Middle,
}

/// The palette of Okabe and Ito, which people who do not see all colours can tell apart.
pub(super) fn color(mode: Mode) -> RGBColor {
    match mode {
        Mode::Direct => RGBColor(90, 90, 90),
        Mode::Hooks => RGBColor(160, 160, 160),
        Mode::Iptables => RGBColor(213, 94, 0),
        Mode::Nftables => RGBColor(230, 159, 0),
        Mode::Ours => RGBColor(0, 114, 178),
        Mode::OursSockets => RGBColor(0, 158, 115),
        Mode::OursRedirect => RGBColor(86, 180, 233),
        Mode::OursXdp => RGBColor(204, 121, 167),
    }
}

/// Has to come before any text.
pub(super) fn register_fonts() -> Result<()> {
    for (style, bytes) in
        [(FontStyle::Normal, dejavu::sans::regular()), (FontStyle::Bold, dejavu::sans::bold())]
    {
        register_font(FONT, style, bytes).map_err(|_| anyhow!("the embedded font cannot be read"))?;
    }
    Ok(())
}

/// Something to draw on, in pixels of the SVG whatever the real size.
pub(super) struct Sheet<DB: DrawingBackend> {
    area: DrawingArea<DB, Shift>,
    scale: u32,
}

impl<DB: DrawingBackend> Sheet<DB> {
    pub(super) fn new(area: DrawingArea<DB, Shift>, scale: u32) -> Self {
        Self { area, scale }
    }

    /// A length in real pixels.
    fn px(&self, length: f64) -> i32 {
        (length * f64::from(self.scale)).round() as i32
    }

    pub(super) fn font(&self, size: u32, bold: bool, color: RGBColor) -> TextStyle<'static> {
        let style = if bold { FontStyle::Bold } else { FontStyle::Normal };
        let style = (FONT, size * self.scale, style).into_text_style(&self.area);
        TextStyle { color: color.to_backend_color(), ..style }
    }

    pub(super) fn text(&self, text: &str, x: f64, y: f64, at: At, style: &TextStyle<'_>) -> Result<()> {
        let h = match at {
            At::Left => HPos::Left,
            At::Right => HPos::Right,
            At::Middle => HPos::Center,
        };
        let style = style.pos(Pos::new(h, VPos::Center));
        drawn(self.area.draw_text(text, &style, (self.px(x), self.px(y))))
    }

    /// Title and what is to be known about the run.
    pub(super) fn title(&self, title: &str, subtitle: &str) -> Result<()> {
        self.text(title, 20.0, 26.0, At::Left, &self.font(19, true, INK))?;
        self.text(subtitle, 20.0, 50.0, At::Left, &self.font(12, false, FAINT))
    }

    /// A point of a series for the legend.
    pub(super) fn dot(&self, x: f64, y: f64, radius: f64, color: RGBColor) -> Result<()> {
        drawn(self.area.draw(&Circle::new((self.px(x), self.px(y)), self.px(radius), color.filled())))
    }

    pub(super) fn line(&self, from: (f64, f64), to: (f64, f64), width: u32, color: RGBColor) -> Result<()> {
        let points = [from, to].map(|(x, y)| (self.px(x), self.px(y)));
        drawn(self.area.draw(&PathElement::new(points, color.stroke_width(width * self.scale))))
    }

    pub(super) fn rect(&self, from: (f64, f64), to: (f64, f64), color: RGBColor) -> Result<()> {
        let corners = [from, to].map(|(x, y)| (self.px(x), self.px(y)));
        drawn(self.area.draw(&Rectangle::new(corners, color.filled())))
    }

    /// The modes' names in their colours, in one line.
    pub(super) fn legend(&self, modes: &[Mode], mut x: f64, y: f64) -> Result<()> {
        let style = |mode| self.font(12, true, color(mode));
        for &mode in modes {
            self.dot(x, y, 4.0, color(mode))?;
            self.text(mode.name(), x + 9.0, y, At::Left, &style(mode))?;
            x += 34.0 + 8.0 * mode.name().chars().count() as f64;
        }
        Ok(())
    }
}

/// What a run was, in a line.
pub(super) fn about(results: &Results) -> String {
    let machine = &results.machine;
    format!(
        "{}, core {} of {}, Linux {}, commit {}, load {} at the start",
        machine.cpu, machine.core, machine.cores, machine.kernel, machine.commit, machine.load_average
    )
}

/// A number as an axis shows it.
pub(super) fn tick(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{}M", v / 1e6),
        v if v >= 1e3 => format!("{}k", v / 1e3),
        v if v >= 1.0 => format!("{}", (v * 100.0).round() / 100.0),
        v => format!("{}", (v * 10_000.0).round() / 10_000.0),
    }
}

/// Moves the places of labels apart so that each has `room`; in their order.
pub(super) fn apart(places: &mut [(f64, Mode)], room: f64) {
    places.sort_by(|a, b| a.0.total_cmp(&b.0));
    for i in 1..places.len() {
        places[i].0 = places[i].0.max(places[i - 1].0 + room);
    }
    // Back by half of what they were moved, so that the group stays in its middle.
    let first: Vec<f64> = places.iter().map(|p| p.0).collect();
    let mut end = f64::INFINITY;
    for (place, was) in places.iter_mut().zip(first).rev() {
        place.0 = was.min(end);
        end = place.0 - room;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_do_not_cover_each_other() {
        let mut places =
            [(100.0, Mode::Ours), (10.0, Mode::Direct), (102.0, Mode::Nftables), (11.0, Mode::Iptables)];
        apart(&mut places, 14.0);
        assert!(places.windows(2).all(|pair| pair[1].0 - pair[0].0 >= 14.0), "{places:?}");
        assert_eq!(places[0], (10.0, Mode::Direct));
    }

    #[test]
    fn ticks_are_short() {
        assert_eq!(
            [1e6, 30_000.0, 1500.0, 10.0, 0.1, 0.001].map(tick),
            ["1M", "30k", "1.5k", "10", "0.1", "0.001"]
        );
    }
}
