//! The guest's whole file system: our own programs, the libraries that they need, the kernel's modules.

use super::MODULE_DIR;
use super::kernel::Kernel;
use super::payload;
use anyhow::{Context as _, Result};
use cpio::newc::{Builder, ModeFileType, trailer};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Writes the initramfs that boots `kernel` with the payload's files.
pub(super) fn write(file: &Path, kernel: &Kernel, payload: &[payload::File]) -> Result<()> {
    let out = File::create(file).with_context(|| format!("create {}", file.display()))?;
    let mut archive = Archive::new(BufWriter::new(out));
    for dir in ["dev", "modules", "proc", "run", "sys", "tmp"] {
        archive.directory(Path::new(dir))?;
    }
    // Without it the kernel starts init with no standard output.
    archive.console()?;
    for file in payload {
        let contents = fs::read(&file.here).with_context(|| format!("read {}", file.here.display()))?;
        archive.directory(file.there.parent().context("a file's path has a directory")?)?;
        archive.add(&file.there.to_string_lossy(), ModeFileType::Regular, 0o755, &contents)?;
    }
    for (i, (name, contents)) in kernel.modules()?.iter().enumerate() {
        // Numbered: init loads them in this order.
        archive.add(&format!("{MODULE_DIR}/{i:02}-{name}.ko"), ModeFileType::Regular, 0o644, contents)?;
    }
    trailer(archive.out)?.flush().with_context(|| format!("write {}", file.display()))
}

struct Archive<W: Write> {
    out: W,
    inode: u32,
    directories: BTreeSet<PathBuf>,
}

impl<W: Write> Archive<W> {
    fn new(out: W) -> Self {
        Self { out, inode: 0, directories: BTreeSet::new() }
    }

    /// Adds a directory and those above it, each once.
    fn directory(&mut self, path: &Path) -> Result<()> {
        let path = path.strip_prefix("/").unwrap_or(path);
        let above: Vec<&Path> = path.ancestors().filter(|p| !p.as_os_str().is_empty()).collect();
        for dir in above.into_iter().rev() {
            if self.directories.insert(dir.to_owned()) {
                self.add(&dir.to_string_lossy(), ModeFileType::Directory, 0o755, &[])?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: &str, kind: ModeFileType, mode: u32) -> Builder {
        self.inode += 1;
        Builder::new(path.trim_start_matches('/')).ino(self.inode).mode(mode).set_mode_file_type(kind)
    }

    fn add(&mut self, path: &str, kind: ModeFileType, mode: u32, contents: &[u8]) -> Result<()> {
        let size = u32::try_from(contents.len()).with_context(|| format!("{path}: too large for cpio"))?;
        let mut writer = self.entry(path, kind, mode).write(&mut self.out, size);
        writer.write_all(contents)?;
        writer.finish()?;
        Ok(())
    }

    fn console(&mut self) -> Result<()> {
        let entry = self.entry("dev/console", ModeFileType::Char, 0o600).rdev_major(5).rdev_minor(1);
        entry.write(&mut self.out, 0).finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_console_is_a_device_directories_come_once_and_files_keep_their_contents() {
        let mut archive = Archive::new(Vec::new());
        archive.console().unwrap();
        archive.directory(Path::new("/bin")).unwrap();
        archive.directory(Path::new("bin")).unwrap();
        archive.add("/bin/x", ModeFileType::Regular, 0o755, b"contents").unwrap();
        let bytes = trailer(archive.out).unwrap();
        let first = cpio::NewcReader::new(bytes.as_slice()).unwrap();
        assert_eq!((first.entry().name(), first.entry().mode()), ("dev/console", 0o020600));
        assert_eq!((first.entry().rdev_major(), first.entry().rdev_minor()), (5, 1));
        let dir = cpio::NewcReader::new(first.finish().unwrap()).unwrap();
        assert_eq!((dir.entry().name(), dir.entry().mode()), ("bin", 0o040755));
        let mut second = cpio::NewcReader::new(dir.finish().unwrap()).unwrap();
        assert_eq!((second.entry().name(), second.entry().mode()), ("bin/x", 0o100755));
        let mut contents = String::new();
        std::io::Read::read_to_string(&mut second, &mut contents).unwrap();
        assert_eq!(contents, "contents");
    }
}
