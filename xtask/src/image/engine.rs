//! What builds images: docker, podman or buildah.

use crate::system::{find_program, output};
use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use std::path::Path;
use std::process::Command;

/// A program that builds images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// Needs its daemon.
    Docker,
    /// Needs none.
    Podman,
    /// Needs none.
    Buildah,
}

impl std::fmt::Display for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.program())
    }
}

impl Engine {
    const ALL: [Self; 3] = [Self::Docker, Self::Podman, Self::Buildah];

    const fn program(self) -> &'static str {
        match self {
            Self::Docker => "docker",
            Self::Podman => "podman",
            Self::Buildah => "buildah",
        }
    }

    fn command(self, args: &[&str]) -> Command {
        let mut command = Command::new(self.program());
        command.args(args);
        command
    }

    /// Whether it is here and does its work; otherwise why not.
    fn works(self) -> Result<(), String> {
        if find_program(self.program()).is_none() {
            return Err("not installed".into());
        }
        // The client alone is no engine.
        let question: &[&str] = match self {
            Self::Docker => &["version", "--format", "{{.Server.Version}}"],
            Self::Podman => &["info", "--format", "{{.Store.GraphDriverName}}"],
            Self::Buildah => &["info"],
        };
        output(&mut self.command(question)).map(drop).map_err(|error| {
            let said = error.to_string();
            said.lines().last().unwrap_or_default().trim().to_owned()
        })
    }

    /// Builds the image of a directory with a Dockerfile.
    ///
    /// # Errors
    /// If it fails; the end of what it said is in the message.
    pub fn build(self, dir: &Path, tag: &str) -> Result<()> {
        let build = if self == Self::Buildah { "bud" } else { "build" };
        let mut command = self.command(&[build, "--tag", tag]);
        output(command.arg(dir)).with_context(|| format!("build {tag}")).map(drop)
    }

    /// Writes an image to a file.
    ///
    /// # Errors
    /// If it fails.
    pub fn save(self, tag: &str, file: &Path) -> Result<()> {
        if file.exists() {
            std::fs::remove_file(file).with_context(|| format!("replace {}", file.display()))?;
        }
        let path = file.display();
        let args = match self {
            Self::Docker | Self::Podman => ["save".into(), format!("--output={path}"), tag.into()],
            Self::Buildah => ["push".into(), tag.into(), format!("docker-archive:{path}:{tag}")],
        };
        output(&mut self.command(&args.each_ref().map(String::as_str))).map(drop)
    }
}

/// The engine that was asked for, or the first that works.
///
/// # Errors
/// If there is none: what is wrong with each, and what to do.
pub(crate) fn find(wanted: Option<Engine>) -> Result<Engine> {
    let mut wrong = Vec::new();
    for engine in Engine::ALL.into_iter().filter(|engine| wanted.is_none_or(|wanted| wanted == *engine)) {
        match engine.works() {
            Ok(()) => return Ok(engine),
            Err(why) => wrong.push(format!("{engine}: {why}")),
        }
    }
    bail!(
        "there is nothing here that builds images ({}): start docker, or install podman or buildah (`apt-get install buildah`)",
        wrong.join("; ")
    )
}
