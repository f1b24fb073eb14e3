//! What a running agent does: the plugin stays in the configuration that runtimes use, whoever rewrites it.

use super::conf_dir::{Added, ConfDir};
use super::plugin::Plugin;
use crate::source::manifests::watch::Watch;
use anyhow::Result;
use std::time::Duration;
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

/// How long to wait for a directory that is not there yet.
const ANYWAY: Duration = Duration::from_secs(10);
/// Who writes again within that time after us may do so because of us …
const SERIES: Duration = Duration::from_secs(60);
/// … and is left alone for longer and longer, up to this.
const LONGEST: Duration = Duration::from_secs(30);

/// The plugin and its place.
#[derive(Debug)]
pub struct Keeper {
    conf: ConfDir,
    /// Where its file is to be seen to, too.
    plugin: Option<Plugin>,
    pace: Pace,
    /// What went wrong at the last attempt: said once.
    failing: Option<String>,
    /// Whether anything has been said of the directory.
    told: bool,
}

impl Keeper {
    /// Looks at nothing yet.
    pub fn new(conf: ConfDir, plugin: Option<Plugin>) -> Self {
        Self { conf, plugin, pace: Pace::default(), failing: None, told: false }
    }

    /// Keeps the plugin there, for ever.
    pub async fn run(mut self) {
        let mut watch = None;
        loop {
            if watch.is_none() {
                watch = Watch::new(self.conf.path()).ok();
            }
            // Half a file is no file: its writer is given the time to finish.
            let unfinished = watch.as_ref().is_some_and(|watch| !watch.unfinished().is_empty());
            if !unfinished {
                sleep(self.pace.pause(Instant::now())).await;
                self.look();
            }
            match &mut watch {
                Some(watch) => {
                    watch.changed().await;
                    watch.take_finished();
                }
                None => sleep(ANYWAY).await,
            }
        }
    }

    fn look(&mut self) {
        match self.restore() {
            Ok(()) => {
                if self.failing.take().is_some() {
                    info!("{}: in order again", self.conf.path().display());
                }
            }
            Err(error) => {
                let error = format!("{error:#}");
                if self.failing.as_ref() != Some(&error) {
                    warn!("network configuration left as it is: {error}; pods are served all the same");
                    self.failing = Some(error);
                }
            }
        }
    }

    fn restore(&mut self) -> Result<()> {
        // The file first: a configuration that names a plugin that is not there is no configuration.
        if let Some(plugin) = &self.plugin
            && !plugin.is_there()
            && plugin.install()?
        {
            info!("put the plugin back: {}", plugin.target().display());
        }
        match self.conf.add()? {
            Added::To(path) => {
                info!("added the plugin to {}", path.display());
                self.pace.wrote(Instant::now());
                self.told = true;
            }
            Added::Already(path) if !self.told => {
                info!("the plugin is in {}", path.display());
                self.told = true;
            }
            Added::None if !self.told => {
                let dir = self.conf.path().display();
                info!("no network configuration in {dir} yet: the plugin will be added");
                self.told = true;
            }
            Added::Already(_) | Added::None => {}
        }
        Ok(())
    }
}

/// Two who both correct what the other writes must not keep a node busy.
#[derive(Debug, Default)]
struct Pace {
    last: Option<Instant>,
    /// How often in a row.
    row: u32,
}

impl Pace {
    fn wrote(&mut self, now: Instant) {
        let again = self.last.is_some_and(|last| now.duration_since(last) < SERIES);
        self.row = if again { self.row + 1 } else { 0 };
        self.last = Some(now);
    }

    /// How long to wait before the next look. The first few corrections are made at once.
    fn pause(&self, now: Instant) -> Duration {
        const FREE: u32 = 3;
        let Some(last) = self.last.filter(|_| self.row >= FREE) else { return Duration::ZERO };
        let pause = Duration::from_secs(1 << (self.row - FREE).min(5)).min(LONGEST);
        pause.saturating_sub(now.duration_since(last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::{Path, PathBuf};
    use tokio::time::timeout;

    const LIST: &str = r#"{"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "bridge"}]}"#;

    /// Waits until a file names the plugin.
    async fn named_in(path: PathBuf) {
        let waiting = async {
            while !fs::read_to_string(&path).is_ok_and(|text| text.contains("lb-cni")) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(20), waiting).await.unwrap_or_else(|_| panic!("{}", path.display()));
    }

    #[tokio::test]
    async fn it_comes_back_and_follows_the_first_file() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let plugin = at("plugin");
        fs::write(&plugin, "\x7fELF").unwrap();
        let conf = at("net.d");
        fs::create_dir(&conf).unwrap();
        let list = |name: &str| conf.join(name);
        let keeper = Keeper::new(
            ConfDir::new(&conf, Path::new("/bpf")),
            Some(Plugin::new(Some(&plugin), &at("bin")).unwrap()),
        );
        let keeper = tokio::spawn(keeper.run());
        sleep(Duration::from_millis(50)).await;

        fs::write(list("10-a.conflist"), LIST).unwrap();
        named_in(list("10-a.conflist")).await;
        assert!(at("bin/lb-cni").exists(), "the plugin comes before its name");

        fs::write(list("10-a.conflist"), LIST).unwrap();
        named_in(list("10-a.conflist")).await;
        fs::write(at("new"), LIST).unwrap();
        fs::rename(at("new"), list("10-a.conflist")).unwrap();
        named_in(list("10-a.conflist")).await;
        fs::write(list("05-b.conflist"), LIST).unwrap();
        named_in(list("05-b.conflist")).await;
        keeper.abort();
    }

    #[tokio::test]
    async fn who_writes_slowly_is_not_interrupted() {
        use std::io::Write as _;
        let dir = tempfile::tempdir().unwrap();
        let keeper = Keeper::new(ConfDir::new(dir.path(), Path::new("/bpf")), None);
        let keeper = tokio::spawn(keeper.run());
        sleep(Duration::from_millis(50)).await;
        let path = dir.path().join("10-a.conflist");
        let mut file = fs::File::create(&path).unwrap();
        for part in [&LIST[..20], &LIST[20..]] {
            file.write_all(part.as_bytes()).unwrap();
            file.flush().unwrap();
            sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), LIST, "not before it is closed");
        drop(file);
        named_in(path).await;
        keeper.abort();
    }

    #[test]
    fn those_who_contradict_are_left_alone_for_longer_and_longer() {
        let (start, mut pace) = (Instant::now(), Pace::default());
        let mut pauses = Vec::new();
        for second in 0..10 {
            let now = start + Duration::from_secs(second);
            pace.wrote(now);
            pauses.push(pace.pause(now).as_secs());
        }
        assert_eq!(pauses, [0, 0, 0, 1, 2, 4, 8, 16, 30, 30]);
        let later = start + Duration::from_secs(9) + LONGEST;
        assert_eq!(pace.pause(later), Duration::ZERO);
        pace.wrote(later + SERIES);
        assert_eq!(pace.pause(later + SERIES), Duration::ZERO, "that was somebody else's reason");
    }
}
