//! Objects in a directory of ordinary Kubernetes manifests, watched for changes.
//!
//! What cannot be read changes nothing: the objects that a file served keep being served until the file says
//! something readable. ConfigMap volumes (`..data` links), renames and editors' temporary files are understood.

mod parse;
pub(crate) mod watch;

pub use parse::Problem;

use super::{Event, Sender};
use crate::store::{Change, ObjectName};
use parse::Key;
use std::collections::{BTreeMap, HashSet};
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tokio::time::{Instant, sleep_until};
use tracing::{debug, warn};

/// A file that was just emptied is probably being written.
const SETTLING: Duration = Duration::from_secs(1);

/// Why the directory cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory cannot be read.
    #[error("cannot read the directory of manifests {}: {error}", dir.display())]
    Directory {
        /// The directory.
        dir: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// inotify does not work.
    #[error("cannot watch {}: {error} (is fs.inotify.max_user_instances used up?)", dir.display())]
    Watch {
        /// The directory.
        dir: PathBuf,
        /// Why.
        #[source]
        error: notify::Error,
    },
}

/// Serves a directory until the receiver is dropped.
///
/// # Errors
/// If the directory cannot be read or watched at the start. Later it may come and go.
pub async fn run(dir: &Path, node_name: &str, events: Sender) -> Result<(), Error> {
    let mut manifests = Manifests::new(dir, node_name);
    let mut watch = watch::Watch::new(dir).map_err(|error| Error::Watch { dir: dir.into(), error })?;
    let mut scan = manifests
        .scan(&HashSet::new(), &HashSet::new())
        .map_err(|error| Error::Directory { dir: dir.into(), error })?;
    let mut synced = None;
    loop {
        for problem in &scan.problems {
            warn!("{problem}");
        }
        if !scan.changes.is_empty()
            && events.send(Event::Changes(std::mem::take(&mut scan.changes))).await.is_err()
        {
            return Ok(());
        }
        let partial = manifests.has_broken_files();
        if synced.replace(partial) != Some(partial) && events.send(Event::Synced { partial }).await.is_err() {
            return Ok(());
        }
        scan = loop {
            let settled = manifests.settled();
            tokio::select! {
                () = events.closed() => return Ok(()),
                () = watch.changed() => {}
                () = sleep_until(settled.unwrap_or_else(Instant::now)), if settled.is_some() => {}
            }
            match manifests.scan(&watch.take_finished(), &watch.unfinished()) {
                Ok(scan) => break scan,
                Err(error) => warn!("{}: {error}; what it held stays served", dir.display()),
            }
        };
    }
}

/// What a scan of the directory found out.
#[derive(Debug, Default)]
pub struct Scan {
    /// Differences from the scan before.
    pub changes: Vec<Change>,
    /// What is wrong in files that are new or changed.
    pub problems: Vec<Problem>,
}

/// A directory of manifests and what it served last.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
    node_name: String,
    files: BTreeMap<PathBuf, File>,
    served: BTreeMap<Key, Change>,
}

#[derive(Debug, Default)]
struct File {
    /// `None`: to be read again at the next opportunity.
    stamp: Option<Stamp>,
    objects: BTreeMap<Key, Change>,
    broken: bool,
    /// It is empty, and would take something away. No event says that it stays so.
    settled: Option<Instant>,
}

/// Changes whenever the contents may have.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    inode: (u64, u64),
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl From<&Metadata> for Stamp {
    fn from(meta: &Metadata) -> Self {
        Self {
            inode: (meta.dev(), meta.ino()),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

impl Manifests {
    /// Nothing is read yet.
    pub fn new(dir: &Path, node_name: &str) -> Self {
        Self { dir: dir.into(), node_name: node_name.into(), files: BTreeMap::new(), served: BTreeMap::new() }
    }

    /// Whether some of the directory cannot be read.
    pub fn has_broken_files(&self) -> bool {
        self.files.values().any(|file| file.broken)
    }

    /// When to look again at files that were just emptied, if there are any.
    fn settled(&self) -> Option<Instant> {
        self.files.values().filter_map(|file| file.settled).min()
    }

    /// Reads what changed: files with a new stamp and the `finished` ones. `unfinished` ones are being written.
    ///
    /// # Errors
    /// If the directory cannot be listed; nothing changes then.
    pub fn scan(&mut self, finished: &HashSet<PathBuf>, unfinished: &HashSet<PathBuf>) -> io::Result<Scan> {
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if is_manifest(&path) {
                paths.push(path);
            }
        }
        paths.sort_unstable();
        let before = self.files.len();
        self.files.retain(|path, _| paths.binary_search(path).is_ok());
        let mut changed = self.files.len() != before;
        let mut scan = Scan::default();
        for path in paths {
            let file = self.files.entry(path.clone()).or_default();
            if finished.contains(&path) {
                file.stamp = None;
            }
            if !unfinished.contains(&path) {
                changed |= file.read(&path, &self.node_name, &mut scan.problems);
            }
        }
        // There may be thousands of objects, and mostly nothing has changed.
        if changed {
            self.merge(&mut scan);
        }
        Ok(scan)
    }

    /// Compares what the files hold together with what they held before.
    fn merge(&mut self, scan: &mut Scan) {
        let mut served: BTreeMap<Key, Change> = BTreeMap::new();
        let mut first: BTreeMap<&Key, &Path> = BTreeMap::new();
        for (path, file) in &self.files {
            for (key, object) in &file.objects {
                served.insert(key.clone(), object.clone());
                if let Some(other) = first.insert(key, path) {
                    debug!("{key} is in {} and in {}: the latter counts", other.display(), path.display());
                }
            }
        }
        for (key, object) in &served {
            if self.served.get(key) != Some(object) {
                scan.changes.push(object.clone());
            }
        }
        let gone = self.served.keys().filter(|key| !served.contains_key(key));
        scan.changes.extend(gone.map(Key::gone));
        self.served = served;
    }
}

impl File {
    /// Returns whether it may hold something else than before.
    fn read(&mut self, path: &Path, node_name: &str, problems: &mut Vec<Problem>) -> bool {
        self.settled = None;
        let read = std::fs::metadata(path).and_then(|meta| {
            if !meta.is_file() || self.stamp == Some(Stamp::from(&meta)) {
                return Ok(None);
            }
            Ok(Some((std::fs::read(path)?, meta)))
        });
        let (text, meta) = match read {
            Ok(None) => return false,
            Ok(Some(read)) => read,
            Err(error) => {
                // Said once: a broken file is tried again at every opportunity.
                if !std::mem::replace(&mut self.broken, true) {
                    problems.push(Problem::of_file(path, format!("cannot be read: {error}")));
                }
                self.stamp = None;
                return false;
            }
        };
        let modified = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        let settling = modified.elapsed().ok().and_then(|age| SETTLING.checked_sub(age));
        if let Some(settling) = settling
            && !self.objects.is_empty()
            && text.trim_ascii().is_empty()
        {
            self.settled = Some(Instant::now() + settling);
            return false;
        }
        self.stamp = Some(Stamp::from(&meta));
        let mut parsed = match std::str::from_utf8(&text) {
            Ok(text) => parse::file(path, text, node_name),
            Err(_) => parse::Parsed::unreadable(Problem::of_file(path, "is not text (UTF-8)".into())),
        };
        // What a broken document served before stays; if it cannot be known which object it was, all do that the
        // file does not define anew.
        for (key, object) in std::mem::take(&mut self.objects) {
            if parsed.broken.contains(&Some(key.clone())) || parsed.broken.contains(&None) {
                parsed.objects.entry(key).or_insert(object);
            }
        }
        self.broken = !parsed.broken.is_empty();
        self.objects = parsed.objects;
        problems.extend(parsed.problems);
        true
    }
}

/// `*.yaml`, `*.yml` and `*.json`, but nothing hidden: editors and ConfigMap volumes keep their own files there.
fn is_manifest(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    !hidden && ["yaml", "yml", "json"].iter().any(|known| extension.eq_ignore_ascii_case(known))
}

impl Key {
    fn gone(&self) -> Change {
        match self {
            Self::Service(name) => Change::Service(name.clone(), None),
            Self::Slice(name) => Change::Slice(name.clone(), None),
            Self::Node => Change::Node(None),
        }
    }

    fn new(kind: &str, name: &ObjectName) -> Option<Self> {
        match kind {
            "Service" => Some(Self::Service(name.clone())),
            "EndpointSlice" => Some(Self::Slice(name.clone())),
            "Node" => Some(Self::Node),
            _ => None,
        }
    }
}
