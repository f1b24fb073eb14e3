//! When to look at the directory again.

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use std::collections::{HashMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::warn;

/// A burst of events ends when nothing happens for this long …
const QUIET: Duration = Duration::from_millis(20);
/// … and is looked at after this long in any case.
const LATEST: Duration = Duration::from_millis(200);
/// A file that somebody writes to is left alone for this long, unless it is closed earlier.
const WRITING: Duration = Duration::from_secs(1);
/// Some changes give no event: behind symbolic links, through memory maps, after an overflow.
const ANYWAY: Duration = Duration::from_secs(10);

type Result<T> = std::result::Result<T, notify::Error>;

/// Watches one directory.
pub(crate) struct Watch {
    dir: PathBuf,
    inode: Option<(u64, u64)>,
    watcher: RecommendedWatcher,
    events: mpsc::UnboundedReceiver<Result<notify::Event>>,
    /// Files that are open for writing, as far as events tell.
    writing: HashMap<PathBuf, Instant>,
    finished: HashSet<PathBuf>,
}

impl Watch {
    pub(crate) fn new(dir: &Path) -> Result<Self> {
        let (send, events) = mpsc::unbounded_channel();
        let watcher = notify::recommended_watcher(move |event| {
            // Nobody listens any more: the watcher is about to be dropped.
            let _ = send.send(event);
        })?;
        let mut watch = Self {
            dir: dir.into(),
            inode: None,
            watcher,
            events,
            writing: HashMap::new(),
            finished: HashSet::new(),
        };
        watch.follow()?;
        Ok(watch)
    }

    /// The directory itself may be replaced.
    fn follow(&mut self) -> Result<()> {
        let inode = std::fs::metadata(&self.dir).map(|meta| (meta.dev(), meta.ino())).ok();
        if inode.is_none() || inode != self.inode {
            // The old watch is gone with the old directory, most likely.
            let _ = self.watcher.unwatch(&self.dir);
            self.inode = None;
            self.watcher.watch(&self.dir, RecursiveMode::NonRecursive)?;
            self.inode = inode;
        }
        Ok(())
    }

    /// Waits until it is worth a look. Safe to drop halfway.
    pub(crate) async fn changed(&mut self) {
        let mut give_up = Instant::now() + ANYWAY;
        if let Some(since) = self.writing.values().min() {
            give_up = give_up.min(*since + WRITING);
        }
        if let Ok(Some(event)) = timeout_at(give_up, self.events.recv()).await {
            let mut interesting = self.note(event);
            let latest = Instant::now() + LATEST;
            loop {
                let quiet = Instant::now() + QUIET;
                let until = if interesting { quiet.min(latest) } else { give_up };
                match timeout_at(until, self.events.recv()).await {
                    Ok(Some(event)) => interesting |= self.note(event),
                    Ok(None) => sleep_until(until).await,
                    Err(_) => break,
                }
                if interesting && Instant::now() >= latest {
                    break;
                }
            }
        }
        self.writing.retain(|path, since| {
            let patient = since.elapsed() < WRITING;
            if !patient {
                self.finished.insert(path.clone());
            }
            patient
        });
        if let Err(error) = self.follow() {
            warn!("cannot watch {}: {error}; looking every {ANYWAY:?}", self.dir.display());
        }
    }

    /// Returns whether anything may have changed: our own reading makes events, too.
    fn note(&mut self, event: Result<notify::Event>) -> bool {
        let Ok(event) = event else { return true };
        match event.kind {
            EventKind::Create(_) | EventKind::Modify(ModifyKind::Data(_)) => {
                // Links are made in one step and never closed.
                let files = event.paths.into_iter().filter(|path| !path.is_symlink());
                self.writing.extend(files.map(|path| (path, Instant::now())));
                true
            }
            EventKind::Access(AccessKind::Close(AccessMode::Write))
            | EventKind::Modify(_)
            | EventKind::Remove(_) => {
                for path in event.paths {
                    self.writing.remove(&path);
                    self.finished.insert(path);
                }
                true
            }
            EventKind::Access(_) => false,
            EventKind::Any | EventKind::Other => true,
        }
    }

    /// Files that changed for certain.
    pub(crate) fn take_finished(&mut self) -> HashSet<PathBuf> {
        std::mem::take(&mut self.finished)
    }

    /// Files that are being written.
    pub(crate) fn unfinished(&self) -> HashSet<PathBuf> {
        self.writing.keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::timeout;

    #[tokio::test]
    async fn reading_is_no_change() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.yaml");
        std::fs::write(&file, "a").unwrap();
        let mut watch = Watch::new(dir.path()).unwrap();
        std::fs::read(&file).unwrap();
        assert!(
            timeout(Duration::from_millis(300), watch.changed()).await.is_err(),
            "our own scan would wake us"
        );
        std::fs::write(&file, "b").unwrap();
        timeout(Duration::from_secs(5), watch.changed()).await.unwrap();
        assert!(watch.take_finished().contains(&file));
        assert!(watch.unfinished().is_empty());
    }
}
