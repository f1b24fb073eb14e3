//! What our programs cost a packet.

use anyhow::Result;
use plotters::prelude::{DrawingBackend, RGBColor};

use super::Picture;
use super::axis::Axis;
use super::style::{At, FAINT, GRID, INK, OVER, Sheet, about, tick};
use crate::bench::programs::{Cost, Figure};
use crate::bench::results::Results;

const ROW: f64 = 34.0;
const LEFT: f64 = 400.0;
const RIGHT: f64 = 980.0;
const TOP: f64 = 106.0;

const V4: RGBColor = RGBColor(0, 114, 178);
const V6: RGBColor = RGBColor(86, 180, 233);

/// A bar for each packet and family, with the bound that it is to keep to.
pub(super) struct Programs {
    about: String,
    /// Two scales: new flows cost many times what all others do.
    groups: [Vec<Cost>; 2],
}

impl Programs {
    pub(super) fn of(results: &Results) -> Option<Self> {
        let (new, others): (Vec<_>, Vec<_>) = results.programs.iter().cloned().partition(is_new);
        (!others.is_empty()).then(|| Self { about: about(results), groups: [others, new] })
    }

    fn height(group: &[Cost]) -> f64 {
        ROW * group.len() as f64 + 60.0
    }
}

fn is_new(cost: &Cost) -> bool {
    cost.families.iter().any(|f| f.limit.as_ref().is_some_and(|l| l.at_most > 5.0))
}

/// The most that it may cost.
fn bound(figure: &Figure) -> Option<f64> {
    let limit = figure.limit.as_ref()?;
    Some(figure.nanoseconds.median / limit.ratio.median * limit.at_most)
}

impl Picture for Programs {
    fn size(&self) -> (u32, u32) {
        let groups: f64 = self.groups.iter().map(|group| Self::height(group)).sum();
        (RIGHT as u32 + 90, (TOP + groups) as u32)
    }

    fn draw<DB: DrawingBackend>(&self, sheet: &Sheet<DB>) -> Result<()> {
        sheet.title("What a packet costs in our programs, ns", &self.about)?;
        let faint = sheet.font(12, false, FAINT);
        for (x, color, name) in
            [(LEFT, V4, "IPv4"), (LEFT + 70.0, V6, "IPv6"), (LEFT + 140.0, OVER, "over its bound")]
        {
            sheet.rect((x, 75.0), (x + 12.0, 85.0), color)?;
            sheet.text(name, x + 18.0, 80.0, At::Left, &faint)?;
        }
        sheet.line((LEFT + 290.0, 73.0), (LEFT + 290.0, 87.0), 2, INK)?;
        sheet.text(
            "bound: bare programs of the same run, times 1.3, 1.4 or 6",
            LEFT + 298.0,
            80.0,
            At::Left,
            &faint,
        )?;
        let mut top = TOP;
        for group in self.groups.iter().filter(|group| !group.is_empty()) {
            draw_group(sheet, group, top)?;
            top += Self::height(group);
        }
        Ok(())
    }
}

fn draw_group<DB: DrawingBackend>(sheet: &Sheet<DB>, group: &[Cost], top: f64) -> Result<()> {
    let figures = || group.iter().flat_map(|c| &c.families);
    let most = figures().flat_map(|f| [Some(f.nanoseconds.median), bound(f)]).flatten().fold(0.0, f64::max);
    let x = Axis::from_zero(most, (LEFT, RIGHT));
    let bottom = top + ROW * group.len() as f64;
    for value in x.ticks() {
        sheet.line((x.at(value), top), (x.at(value), bottom), 1, GRID)?;
        sheet.text(&tick(value), x.at(value), bottom + 12.0, At::Middle, &sheet.font(11, false, FAINT))?;
    }
    for (i, cost) in group.iter().enumerate() {
        let y = top + ROW * i as f64 + ROW / 2.0;
        let name =
            if cost.hook == "–" { cost.packet.clone() } else { format!("{} ({})", cost.packet, cost.hook) };
        sheet.text(&name, LEFT - 12.0, y, At::Right, &sheet.font(12, false, INK))?;
        let both = cost.families.len() as f64;
        for (f, figure) in cost.families.iter().enumerate() {
            let at = y + (f as f64 - (both - 1.0) / 2.0) * 12.0;
            let over = figure.limit.as_ref().is_some_and(|limit| !limit.is_kept());
            let color = if over { OVER } else { [V4, V6][f.min(1)] };
            let ns = figure.nanoseconds.median;
            sheet.rect((LEFT, at - 5.0), (x.at(ns), at + 5.0), color)?;
            let mut end = x.at(ns);
            if let Some(bound) = bound(figure) {
                sheet.line((x.at(bound), at - 6.0), (x.at(bound), at + 6.0), 2, INK)?;
                // The bound's line must not cross the number.
                if (x.at(bound) - end).abs() < 36.0 {
                    end = end.max(x.at(bound));
                }
            }
            sheet.text(&format!("{ns:.0}"), end + 5.0, at, At::Left, &sheet.font(10, over, INK))?;
        }
    }
    Ok(())
}
