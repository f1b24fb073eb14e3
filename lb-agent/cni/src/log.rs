//! A line for each thing done: on standard error, which runtimes show when a plugin fails, and in a file if one is named.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A log file that has grown to this is put aside; the one put aside before goes.
const FULL: u64 = 1 << 20;

/// Where to say what.
pub(crate) struct Log {
    file: Option<PathBuf>,
}

impl Log {
    pub(crate) fn new(file: Option<PathBuf>) -> Self {
        Self { file }
    }

    /// Adds a line. That there is no room for it stops no pod.
    pub(crate) fn say(&self, text: &str) {
        let line = format!("{} lb-cni: {text}\n", humantime::format_rfc3339_seconds(SystemTime::now()));
        let _ = io::stderr().write_all(line.as_bytes());
        if let Some(path) = &self.file
            && let Err(error) = append(path, &line)
        {
            let _ = writeln!(io::stderr(), "lb-cni: cannot write to {}: {error}", path.display());
        }
    }
}

fn append(path: &Path, line: &str) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    if path.metadata().is_ok_and(|file| file.len() >= FULL) {
        let mut old = path.as_os_str().to_owned();
        old.push(".1");
        fs::rename(path, old)?;
    }
    // In one go, so that the lines of plugins that run at the same time do not mix.
    File::options().create(true).append(true).open(path)?.write_all(line.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_log_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log/cni.log");
        let log = Log::new(Some(path.clone()));
        log.say("one");
        log.say("two");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.lines().count() == 2 && text.ends_with("Z lb-cni: two\n"), "{text}");
        File::options().write(true).open(&path).unwrap().set_len(FULL).unwrap();
        log.say("three");
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 1);
        assert_eq!(dir.path().join("log/cni.log.1").metadata().unwrap().len(), FULL);
    }
}
