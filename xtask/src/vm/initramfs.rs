//! The guest's whole file system: our own static binaries, the kernel's modules, and nothing else.

use super::kernel::Kernel;
use super::{MODULE_DIR, PAYLOAD_DIR};
use anyhow::{Context as _, Result};
use cpio::newc::{Builder, ModeFileType, trailer};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Writes the initramfs that boots `kernel` with the payload's `binaries`.
pub(super) fn write(file: &Path, kernel: &Kernel, binaries: &[PathBuf]) -> Result<()> {
    let out = File::create(file).with_context(|| format!("create {}", file.display()))?;
    let mut archive = Archive { out: BufWriter::new(out), inode: 0 };
    for dir in ["bin", "dev", "modules", "proc", "run", "sys", "tmp"] {
        archive.add(dir, ModeFileType::Directory, 0o755, &[])?;
    }
    // Without it the kernel starts init with no standard output.
    archive.console()?;
    for binary in binaries {
        let name = binary.file_name().context("a binary has a name")?.to_string_lossy();
        let contents = fs::read(binary).with_context(|| format!("read {}", binary.display()))?;
        archive.add(&format!("{PAYLOAD_DIR}/{name}"), ModeFileType::Regular, 0o755, &contents)?;
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
}

impl<W: Write> Archive<W> {
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
    fn the_console_is_a_device_and_files_keep_their_contents() {
        let mut archive = Archive { out: Vec::new(), inode: 0 };
        archive.console().unwrap();
        archive.add("/bin/x", ModeFileType::Regular, 0o755, b"contents").unwrap();
        let bytes = trailer(archive.out).unwrap();
        let first = cpio::NewcReader::new(bytes.as_slice()).unwrap();
        assert_eq!((first.entry().name(), first.entry().mode()), ("dev/console", 0o020600));
        assert_eq!((first.entry().rdev_major(), first.entry().rdev_minor()), (5, 1));
        let mut second = cpio::NewcReader::new(first.finish().unwrap()).unwrap();
        assert_eq!((second.entry().name(), second.entry().mode()), ("bin/x", 0o100755));
        let mut contents = String::new();
        std::io::Read::read_to_string(&mut second, &mut contents).unwrap();
        assert_eq!(contents, "contents");
    }
}
