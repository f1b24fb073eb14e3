//! The CNI plugin's file where runtimes look for it.

use super::conflist::PLUGIN;
use super::files;
use anyhow::{Context as _, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// The plugin, and where it belongs.
#[derive(Clone, Debug)]
pub struct Plugin {
    source: PathBuf,
    target: PathBuf,
}

impl Plugin {
    /// `source`, or the plugin beside this program, to be put into `dir`.
    ///
    /// # Errors
    /// If the kernel does not say where this program is.
    pub fn new(source: Option<&Path>, dir: &Path) -> Result<Self> {
        let source = match source {
            Some(path) => path.into(),
            None => std::env::current_exe().context("find this program's own path")?.with_file_name(PLUGIN),
        };
        Ok(Self { source, target: dir.join(PLUGIN) })
    }

    /// Where it belongs.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Puts it there, as a whole or not at all. Whether that was needed.
    ///
    /// # Errors
    /// If there is none, or it cannot be written.
    pub fn install(&self) -> Result<bool> {
        let contents = fs::read(&self.source).with_context(|| {
            format!("read the plugin {} (name another by --cni-plugin)", self.source.display())
        })?;
        // Every pod would fail by it.
        if !contents.starts_with(b"\x7fELF") {
            bail!("{} is no program", self.source.display());
        }
        if let Some(dir) = self.target.parent() {
            fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        }
        files::write(&self.target, &contents, 0o755)
    }

    /// Whether it is there; not whether it is this one.
    pub fn is_there(&self) -> bool {
        self.target.exists()
    }
}

/// Takes the plugin out of a directory. Whether it was there.
///
/// # Errors
/// If it cannot be removed.
pub fn remove(dir: &Path) -> Result<bool> {
    files::remove_unfinished(dir)?;
    files::remove(&dir.join(PLUGIN))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    #[test]
    fn it_is_copied_when_it_differs_and_only_then() {
        let dir = tempfile::tempdir().unwrap();
        let (source, bin) = (dir.path().join("new"), dir.path().join("opt/cni/bin"));
        let plugin = Plugin::new(Some(&source), &bin).unwrap();
        let error = format!("{:#}", plugin.install().unwrap_err());
        assert!(error.contains("--cni-plugin"), "{error}");
        fs::write(&source, "#!/bin/sh").unwrap();
        assert!(plugin.install().unwrap_err().to_string().ends_with("is no program"));

        fs::write(&source, "\x7fELF one").unwrap();
        assert!(!plugin.is_there() && plugin.install().unwrap() && plugin.is_there());
        let meta = || fs::metadata(plugin.target()).unwrap();
        assert_eq!(meta().mode() & 0o7777, 0o755);
        let inode = meta().ino();
        assert!(!plugin.install().unwrap());
        assert_eq!(meta().ino(), inode);

        // One that runs is not written over but replaced.
        fs::write(&source, "\x7fELF two").unwrap();
        assert!(plugin.install().unwrap());
        assert_ne!(meta().ino(), inode);
        fs::set_permissions(plugin.target(), fs::Permissions::from_mode(0o644)).unwrap();
        assert!(plugin.install().unwrap(), "not executable");
        assert_eq!(files::names(&bin).unwrap(), [PLUGIN], "nothing else is left there");

        assert!(remove(&bin).unwrap());
        assert!(!remove(&bin).unwrap());
        assert!(!remove(&dir.path().join("none")).unwrap());
    }
}
