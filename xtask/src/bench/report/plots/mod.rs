//! The plots: each as SVG, and as PNG in twice the size.

mod axis;
mod bars;
mod dots;
mod lines;
mod style;

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::markdown::file_part;
use crate::bench::family::IpFamily;
use crate::bench::results::Results;
use style::Sheet;

/// Pixels of a PNG for one of the SVG.
const SCALE: u32 = 2;
/// Pixels that are drawn for one of a PNG: lines are smooth that way.
const SMOOTH: u32 = 2;

/// A picture, before it is known how it is written.
trait Picture {
    fn size(&self) -> (u32, u32);
    fn draw<DB: DrawingBackend>(&self, sheet: &Sheet<DB>) -> Result<()>;
}

/// Turns an error of plotters into ours.
fn drawn<T, E: std::error::Error + Send + Sync>(result: Result<T, DrawingAreaErrorKind<E>>) -> Result<T> {
    result.map_err(|e| anyhow!("drawing: {e}"))
}

/// Writes all for which there are figures; their titles and names.
pub(super) fn write(results: &Results, dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    style::register_fonts()?;
    let mut written = Vec::new();
    for family in IpFamily::ALL {
        if let Some(picture) = lines::Connections::of(results, family) {
            let title = format!("New connections, {}", family.name());
            written.push((title, save(&picture, dir, &format!("connections-{}", file_part(family)))?));
        }
        if let Some(picture) = dots::Relative::of(results, family) {
            let title = format!("Beside the direct way, {}", family.name());
            written.push((title, save(&picture, dir, &format!("relative-{}", file_part(family)))?));
        }
    }
    if let Some(picture) = lines::Control::of(results) {
        written.push(("Programming and changes".into(), save(&picture, dir, "control")?));
    }
    if let Some(picture) = bars::Programs::of(results) {
        written.push(("Program cost".into(), save(&picture, dir, "programs")?));
    }
    Ok(written)
}

fn save(picture: &impl Picture, dir: &Path, name: &str) -> Result<PathBuf> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, picture.size()).into_drawing_area();
        draw(picture, &area, 1)?;
    }
    fs::write(dir.join(format!("{name}.svg")), svg)?;
    let file = PathBuf::from(format!("{name}.png"));
    save_png(picture, &dir.join(&file))?;
    Ok(file)
}

fn draw<DB: DrawingBackend>(picture: &impl Picture, area: &DrawingArea<DB, Shift>, scale: u32) -> Result<()> {
    drawn(area.fill(&WHITE))?;
    picture.draw(&Sheet::new(area.clone(), scale))?;
    drawn(area.present())
}

fn save_png(picture: &impl Picture, file: &Path) -> Result<()> {
    let (width, height) = picture.size();
    let large = (width * SCALE * SMOOTH, height * SCALE * SMOOTH);
    let mut pixels = vec![0; (large.0 * large.1 * 3) as usize];
    {
        let area = BitMapBackend::with_buffer(&mut pixels, large).into_drawing_area();
        draw(picture, &area, SCALE * SMOOTH)?;
    }
    let small = shrink(&pixels, large.0 as usize, SMOOTH as usize);
    let out = File::create(file).with_context(|| format!("creating {}", file.display()))?;
    let mut encoder = png::Encoder::new(BufWriter::new(out), width * SCALE, height * SCALE);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.write_header()?.write_image_data(&small)?;
    Ok(())
}

/// Each pixel the mean of a square of `by` × `by`.
fn shrink(pixels: &[u8], width: usize, by: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(pixels.len() / (by * by));
    for rows in pixels.chunks_exact(width * 3 * by) {
        for x in (0..width).step_by(by) {
            for channel in 0..3 {
                let square =
                    (0..by).flat_map(|dy| (0..by).map(move |dx| (dy * width + x + dx) * 3 + channel));
                let sum: usize = square.map(|at| usize::from(rows[at])).sum();
                out.push((sum / (by * by)) as u8);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shrinking_takes_the_mean_of_each_square() {
        // Four pixels wide, two high, the two squares in red 0/100/50/250 and blue 7.
        let square = |values: [u8; 4]| values.map(|v| [v, 0, 7]);
        let ([a, b, c, d], [e, f, g, h]) = (square([0, 100, 50, 250]), square([9; 4]));
        let pixels = [a, b, e, f, c, d, g, h].concat();
        assert_eq!(shrink(&pixels, 4, 2), [100, 0, 7, 9, 0, 7]);
    }
}
