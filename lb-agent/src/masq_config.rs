//! ip-masq-agent's configuration file (`--ip-masq-agent-config`): which destinations pods reach with their own
//! address. Read again whenever it changes; a file that cannot be read or understood changes nothing.

mod parse;
#[cfg(test)]
mod tests;

use crate::source::manifests::watch::Watch;
use crate::source::{Event, Sender};
use ipnet::IpNet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::sleep;
use tracing::{info, warn};

pub use parse::MasqConfig;

/// The file, and what it said last.
#[derive(Debug)]
pub struct ConfigFile {
    dir: PathBuf,
    path: PathBuf,
    /// `--non-masquerade-cidrs`.
    flags: Vec<IpNet>,
    config: MasqConfig,
    last: Option<Contents>,
    good: bool,
}

/// What was found when it was read.
#[derive(Debug, PartialEq, Eq)]
enum Contents {
    Text(Vec<u8>),
    Absent,
    Unreadable(io::ErrorKind),
}

impl ConfigFile {
    /// Reads nothing yet.
    pub fn new(path: &Path, flags: Vec<IpNet>) -> Self {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // As events name it.
        let path = path.file_name().map_or_else(|| path.to_owned(), |name| dir.join(name));
        Self { dir: dir.to_owned(), path, flags, config: MasqConfig::default(), last: None, good: false }
    }

    /// All that is not masqueraded to, by the last file that could be read; ip-masq-agent's default before the first
    /// and when there is none.
    pub fn ranges(&self) -> Vec<IpNet> {
        self.config.ranges(&self.flags)
    }

    /// Whether it could be read and understood, or is not there at all, when it was last looked at.
    pub fn is_good(&self) -> bool {
        self.good
    }

    /// Reads the file. Whether it is there and says something new, or is not there any more.
    pub fn read(&mut self) -> bool {
        let contents = match std::fs::read(&self.path) {
            Ok(text) => Contents::Text(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Contents::Absent,
            Err(error) => Contents::Unreadable(error.kind()),
        };
        if self.last.as_ref() == Some(&contents) {
            return false;
        }
        let parsed = match &contents {
            Contents::Text(text) => MasqConfig::parse(text),
            Contents::Absent => Ok(MasqConfig::default()),
            Contents::Unreadable(kind) => Err(format!("cannot be read: {kind}")),
        };
        self.good = parsed.is_ok();
        let absent = contents == Contents::Absent;
        self.last = Some(contents);
        let path = self.path.display();
        match parsed {
            Ok(config) if absent => {
                info!("there is no {path}: ip-masq-agent's defaults hold ({config})");
                self.config = config;
            }
            Ok(config) => {
                info!("{path}: {config}");
                self.config = config;
            }
            Err(error) => {
                warn!("{path} {error}; what was in force stays");
                return false;
            }
        }
        for key in &self.config.unknown {
            warn!("{path}: {key:?} is no setting of ip-masq-agent's: ignored");
        }
        true
    }

    /// Follows the file until nobody listens any more.
    pub async fn run(mut self, events: Sender) {
        let mut watch = None;
        loop {
            if watch.is_none() {
                // Where there is no directory yet, resyncInterval has to do.
                watch = Watch::new(&self.dir).ok();
                if watch.is_some() && self.read() && !self.tell(&events).await {
                    return;
                }
            }
            tokio::select! {
                () = events.closed() => return,
                () = changed(&mut watch) => {}
                () = sleep(self.config.resync_interval) => {}
            }
            if let Some(watch) = &mut watch {
                watch.take_finished();
                if watch.unfinished().contains(&self.path) {
                    continue;
                }
            }
            if self.read() && !self.tell(&events).await {
                return;
            }
        }
    }

    async fn tell(&self, events: &Sender) -> bool {
        events.send(Event::NoMasquerade(self.ranges())).await.is_ok()
    }
}

async fn changed(watch: &mut Option<Watch>) {
    match watch {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
    }
}

/// The least time between two looks at a file that did not change, as far as events tell.
const LEAST_INTERVAL: Duration = Duration::from_secs(1);
