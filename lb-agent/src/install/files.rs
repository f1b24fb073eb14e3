//! Files that are there whole or not at all.

use anyhow::{Context as _, Result};
use std::fs::{self, Metadata, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

/// Beginning of the names of files that are not finished. Neither runtimes nor people take them for configurations.
const UNFINISHED: &str = ".lb-agent-";

/// A file as it was when it was read.
#[derive(Debug)]
pub(super) struct Seen {
    /// Behind any symbolic link.
    path: PathBuf,
    pub(super) text: String,
    meta: Metadata,
}

impl Seen {
    /// Reads a text file.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let read = || -> io::Result<Self> {
            let path = path.canonicalize()?;
            let meta = fs::metadata(&path)?;
            let text = fs::read_to_string(&path)?;
            Ok(Self { path, text, meta })
        };
        read().with_context(|| format!("read {}", path.display()))
    }

    /// Its rights.
    pub(super) fn mode(&self) -> u32 {
        self.meta.mode() & 0o7777
    }

    /// Puts another text in its place, with the same owner and rights. Whether it did: not if somebody else has
    /// written the file since it was read.
    pub(super) fn replace(&self, text: &str) -> Result<bool> {
        let mut unfinished = Unfinished::create(&self.path)?;
        unfinished.write(text.as_bytes(), self.mode())?;
        // The owner's right is the same to whom we are: those who may not change it are it.
        let _ = fchown(unfinished.0.as_file(), Some(self.meta.uid()), Some(self.meta.gid()));
        let now = fs::metadata(&self.path).with_context(|| format!("look at {}", self.path.display()))?;
        let stamp = |meta: &Metadata| (meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec());
        if stamp(&now) != stamp(&self.meta) {
            return Ok(false);
        }
        unfinished.finish(&self.path)?;
        Ok(true)
    }
}

/// Writes a file as a whole. Whether that was needed: not if it has these contents and rights.
pub(super) fn write(path: &Path, contents: &[u8], mode: u32) -> Result<bool> {
    let same = fs::symlink_metadata(path).is_ok_and(|meta| {
        meta.is_file() && meta.mode() & 0o7777 == mode && meta.len() == contents.len() as u64
    });
    if same && fs::read(path).is_ok_and(|old| old == contents) {
        return Ok(false);
    }
    let mut unfinished = Unfinished::create(path)?;
    unfinished.write(contents, mode)?;
    unfinished.finish(path)?;
    Ok(true)
}

/// Removes a file. Whether it was there.
pub(super) fn remove(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        result => result.map(|()| true).with_context(|| format!("remove {}", path.display())),
    }
}

/// Removes what writers that were killed have left in a directory.
pub(super) fn remove_unfinished(dir: &Path) -> Result<()> {
    for name in names(dir)?.iter().filter(|name| name.starts_with(UNFINISHED)) {
        remove(&dir.join(name))?;
    }
    Ok(())
}

/// Names of the files in a directory, sorted; none if there is no such directory.
pub(super) fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("read the directory {}", dir.display()))?,
    };
    let files = entries.flatten().filter(|entry| !entry.path().is_dir());
    let mut names: Vec<_> = files.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

/// A file under a name that nobody looks for, in the directory where it will be looked for under its own.
struct Unfinished(tempfile::NamedTempFile);

impl Unfinished {
    fn create(path: &Path) -> Result<Self> {
        let dir = path.parent().unwrap_or(Path::new("."));
        let file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(dir);
        file.map(Self).with_context(|| format!("create a file in {}", dir.display()))
    }

    fn write(&mut self, contents: &[u8], mode: u32) -> Result<()> {
        let mut write = || -> io::Result<()> {
            self.0.write_all(contents)?;
            self.0.as_file().set_permissions(Permissions::from_mode(mode))?;
            // Its name must not survive a power failure that its contents do not.
            self.0.as_file().sync_all()
        };
        write().with_context(|| format!("write {}", self.0.path().display()))
    }

    fn finish(self, path: &Path) -> Result<()> {
        self.0.persist(path).with_context(|| format!("put {} in place", path.display())).map(drop)
    }
}
