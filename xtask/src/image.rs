//! `cargo xtask image`: the container image, from what this machine builds, with whichever engine is here.

mod engine;
mod static_elf;

use crate::build;
use crate::system::{output, workspace};
use anyhow::{Context as _, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

pub use engine::Engine;
pub(crate) use engine::find as find_engine;

/// What is in the image.
const PROGRAMS: [&str; 3] = ["lb-agent", "lb-cni", "lbctl"];
/// More than that is not to be shipped.
const LARGEST: u64 = 20_000_000;

/// Their names, if nobody gives others.
pub(crate) const AGENT: &str = "lb-agent:dev";
pub(crate) const PROBE: &str = "lb-probe:dev";

/// Options of `image`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the image [default: lb-agent:dev, lb-probe:dev]
    #[arg(long)]
    tag: Option<String>,
    /// The image of the sample application (manifests/sample.yaml) instead
    #[arg(long)]
    probe: bool,
    /// What builds it [default: the first that works of docker, podman, buildah]
    #[arg(long, value_enum)]
    engine: Option<Engine>,
    /// Also write it to this file, as `docker load` and `ctr image import` take it
    #[arg(long, value_name = "FILE")]
    archive: Option<PathBuf>,
}

/// Runs `image`.
///
/// # Errors
/// If the programs cannot be built or are too large, or there is no engine.
pub fn run(args: Args) -> Result<()> {
    // First: a build of minutes is not to be in vain.
    let engine = find_engine(args.engine)?;
    let tag = args.tag.as_deref().unwrap_or(if args.probe { PROBE } else { AGENT });
    if args.probe {
        build_probe(engine, tag)?
    } else {
        build(engine, tag)?
    }
    if let Some(file) = &args.archive {
        engine.save(tag, file)?;
        println!("{}", file.display());
    }
    Ok(())
}

/// Builds the programs, and the image of them.
///
/// # Errors
/// As [`run`].
pub fn build(engine: Engine, tag: &str) -> Result<()> {
    let built = build::release()?;
    let programs = PROGRAMS.map(|name| built.binary(name));
    let programs = programs.into_iter().collect::<Result<Vec<_>>>()?;
    let dir = workspace().join("target/image");
    let size = context(&dir, &programs)?;
    ensure!(size <= LARGEST, "{:.1} MB are too many: {} is the limit", mega(size), mega(LARGEST));
    let dockerfile = workspace().join("Dockerfile");
    let text = fs::read_to_string(&dockerfile).with_context(|| dockerfile.display().to_string())?;
    let text =
        last_stage(&text).with_context(|| format!("{} has another last stage", dockerfile.display()))?;
    fs::write(dir.join("Dockerfile"), text)?;
    engine.build(&dir, tag)?;
    println!("{tag}, by {engine}: {:.1} MB", mega(size));
    Ok(())
}

/// Builds the image of the sample application: this tool itself.
///
/// # Errors
/// As [`run`].
pub(crate) fn build_probe(engine: Engine, tag: &str) -> Result<()> {
    let built = build::static_bins(&["--package", "xtask"])?;
    let dir = workspace().join("target/probe-image");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let (from, to) = (built.binary("xtask")?, dir.join("probe"));
    output(Command::new("strip").arg("-o").arg(&to).arg(from))?;
    fs::write(
        dir.join("Dockerfile"),
        "FROM scratch\nCOPY probe /bin/probe\nENTRYPOINT [\"/bin/probe\", \"probe\"]\n",
    )?;
    engine.build(&dir, tag)?;
    println!("{tag}, by {engine}");
    Ok(())
}

/// Puts the programs where an engine takes them from. Returns their size.
fn context(dir: &Path, programs: &[&Path]) -> Result<u64> {
    let bin = dir.join("bin");
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("empty {}", dir.display()))?;
    }
    fs::create_dir_all(&bin).with_context(|| format!("create {}", bin.display()))?;
    let mut size = 0;
    for program in programs {
        static_elf::check(program)?;
        let name = program.file_name().context("a program's name")?;
        let bytes =
            fs::copy(program, bin.join(name)).with_context(|| format!("copy {}", program.display()))?;
        println!("{:>10} {:>5.1} MB", name.display(), mega(bytes));
        size += bytes;
    }
    Ok(size)
}

/// The last stage of the Dockerfile, with the programs of this machine in the place of those that the first would build.
fn last_stage(dockerfile: &str) -> Option<String> {
    const BUILT: &str = "COPY --from=build /out/bin/ /bin/";
    let (_, stage) = dockerfile.rsplit_once("\nFROM scratch\n")?;
    stage.contains(BUILT).then(|| format!("FROM scratch\n{}", stage.replace(BUILT, "COPY bin/ /bin/")))
}

fn mega(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dockerfiles_last_stage_takes_this_machines_programs() {
        let text = fs::read_to_string(workspace().join("Dockerfile")).unwrap();
        let stage = last_stage(&text).expect("a last stage of the known form");
        assert!(stage.starts_with("FROM scratch\n") && stage.contains("\nCOPY bin/ /bin/\n"), "{stage}");
        assert!(!stage.contains("--from") && stage.contains("ENTRYPOINT [\"/bin/lb-agent\"]"), "{stage}");
        let listed = format!("for program in {}; do", PROGRAMS.join(" "));
        assert!(text.contains(&listed), "both ways ship the same programs");
    }
}
