//! The figures, for people and for machines.

mod check;
pub(super) mod compare;
mod markdown;
mod plots;
mod table;
mod targets;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::results::Results;

pub(super) use check::check;
pub(super) use markdown::{body, head};

/// Writes `bench.json`, `bench.md` and the plots.
pub(super) fn write(results: &Results, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    fs::write(dir.join("bench.json"), serde_json::to_string_pretty(results)?)?;
    let plots = plots::write(results, dir)?;
    let pictures: String =
        plots.iter().map(|(title, file)| format!("![{title}]({})\n\n", file.display())).collect();
    let text = format!("# Benchmark\n\n{}\n{pictures}{}", head(results), body(results));
    Ok(fs::write(dir.join("bench.md"), text)?)
}

fn read(file: &Path) -> Result<Results> {
    let text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not a result of this version", file.display()))
}

/// `bench plot`: from a `bench.json`, into the directory that it lies in.
#[derive(Debug, clap::Args)]
pub(super) struct Plot {
    /// A bench.json
    file: PathBuf,
    /// Where to write to [default: beside the file]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl Plot {
    pub(super) fn run(self) -> Result<()> {
        let beside = self.file.parent().map(Path::to_owned).unwrap_or_default();
        write(&read(&self.file)?, &self.out.unwrap_or(beside))
    }
}
