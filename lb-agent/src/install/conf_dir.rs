//! The directory of network configurations: which one runtimes use, and our plugin in it.

use super::conflist;
use super::files::{self, Seen};
use anyhow::{Context as _, Result, bail};
use std::path::{Path, PathBuf};

/// What runtimes read, in the order of names (libcni's `ConfFiles`).
const EXTENSIONS: [&str; 3] = ["conf", "conflist", "json"];
/// End of the names of lists that we made of single configurations: `-` sorts before `.`, so ours comes first.
const MADE: &str = "-lb-agent.conflist";
/// Somebody who writes a file more often than that while we read it does nothing else.
const ATTEMPTS: u32 = 10;

/// A directory of network configurations.
#[derive(Clone, Debug)]
pub struct ConfDir {
    dir: PathBuf,
    /// As the plugin is to find it.
    bpffs: PathBuf,
}

/// What [`ConfDir::add`] found or did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Added {
    /// There is no configuration yet.
    None,
    /// The plugin was there already.
    Already(PathBuf),
    /// It is now.
    To(PathBuf),
}

impl ConfDir {
    /// A directory, and the BPF file system that the plugin will need.
    pub fn new(dir: &Path, bpffs: &Path) -> Self {
        Self { dir: dir.into(), bpffs: bpffs.into() }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The file whose changes matter most: what runtimes use, or what we make that of.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn first(&self) -> Result<Option<PathBuf>> {
        Ok(first(&files::names(&self.dir)?).map(|name| self.dir.join(name)))
    }

    /// Sees to it that the configuration that runtimes use has our plugin.
    ///
    /// # Errors
    /// If it is not one, or cannot be written: then it stays as it is.
    pub fn add(&self) -> Result<Added> {
        let names = files::names(&self.dir)?;
        let Some(name) = first(&names) else {
            self.remove_made(&names, None)?;
            return Ok(Added::None);
        };
        let made = (extension(name) != Some("conflist")).then(|| made_of(name));
        let added = match &made {
            None => self.add_to_list(&self.dir.join(name)),
            Some(made) => self.make_list(&self.dir.join(name), &self.dir.join(made)),
        };
        // A list that we made of a file that is gone must not outlive it. Last, so that there always is one.
        self.remove_made(&names, made.as_deref())?;
        added
    }

    fn add_to_list(&self, path: &Path) -> Result<Added> {
        let changed = rewrite(path, |text| conflist::add(text, &self.bpffs))?;
        Ok(if changed { Added::To(path.into()) } else { Added::Already(path.into()) })
    }

    fn make_list(&self, single: &Path, list: &Path) -> Result<Added> {
        let seen = Seen::read(single)?;
        let text = conflist::wrap(&seen.text, &self.bpffs);
        let text = text.with_context(|| single.display().to_string())?;
        let written = files::write(list, text.as_bytes(), seen.mode())?;
        Ok(if written { Added::To(list.into()) } else { Added::Already(list.into()) })
    }

    fn remove_made(&self, names: &[String], but: Option<&str>) -> Result<()> {
        for name in names.iter().filter(|name| name.ends_with(MADE) && Some(name.as_str()) != but) {
            files::remove(&self.dir.join(name))?;
        }
        Ok(())
    }

    /// Takes our plugin out of every configuration. Returns the files that had it.
    ///
    /// # Errors
    /// If one of them cannot be changed; all others have been.
    pub fn remove(&self) -> Result<Vec<PathBuf>> {
        let (mut changed, mut failed) = (Vec::new(), Vec::new());
        for name in files::names(&self.dir)? {
            let path = self.dir.join(&name);
            let removed = match extension(&name) {
                _ if name.ends_with(MADE) => files::remove(&path),
                Some("conflist") => rewrite(&path, conflist::remove),
                _ => continue,
            };
            match removed {
                Ok(true) => changed.push(path),
                Ok(false) => {}
                Err(error) => failed.push(format!("{error:#}")),
            }
        }
        files::remove_unfinished(&self.dir)?;
        if failed.is_empty() { Ok(changed) } else { bail!("{}", failed.join("; ")) }
    }
}

/// Changes a file. Whether that was needed.
fn rewrite<E>(path: &Path, change: impl Fn(&str) -> Result<Option<String>, E>) -> Result<bool>
where
    E: std::error::Error + Send + Sync + 'static,
{
    for _ in 0..ATTEMPTS {
        let seen = Seen::read(path)?;
        let changed = change(&seen.text).with_context(|| path.display().to_string())?;
        match changed {
            None => return Ok(false),
            Some(text) if seen.replace(&text)? => return Ok(true),
            // Somebody wrote it meanwhile: theirs is what has to be changed.
            Some(_) => {}
        }
    }
    bail!("{} is being written by somebody else all the time", path.display())
}

/// The file that runtimes would use without us.
fn first(sorted: &[String]) -> Option<&str> {
    let mut names = sorted.iter().map(String::as_str);
    names.find(|name| extension(name).is_some() && !name.ends_with(MADE))
}

fn extension(name: &str) -> Option<&str> {
    let (_, extension) = name.rsplit_once('.')?;
    EXTENSIONS.contains(&extension).then_some(extension)
}

/// The name of the list made of a single configuration.
fn made_of(name: &str) -> String {
    let (stem, _) = name.rsplit_once('.').unwrap_or((name, ""));
    format!("{stem}{MADE}")
}

#[cfg(test)]
mod tests;
