//! The task: files change while it runs.

use crate::parse::{WEB, brief};
use crate::support::NODE;
use lb_agent::source::{Event, manifests};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};

struct Bench {
    _dir: tempfile::TempDir,
    path: PathBuf,
    events: mpsc::Receiver<Event>,
    served: BTreeSet<String>,
    /// Everything that was ever removed.
    removed: Vec<String>,
    synced: Vec<bool>,
}

impl Bench {
    async fn start(prepare: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("manifests");
        std::fs::create_dir(&path).unwrap();
        prepare(&path);
        let (sender, events) = mpsc::channel(16);
        let watched = path.clone();
        tokio::spawn(async move { manifests::run(&watched, NODE, sender).await.unwrap() });
        let mut bench = Self {
            _dir: dir,
            path,
            events,
            served: BTreeSet::new(),
            removed: Vec::new(),
            synced: Vec::new(),
        };
        while bench.synced.is_empty() {
            let event = timeout(Duration::from_secs(5), bench.events.recv()).await.unwrap().unwrap();
            bench.take(event);
        }
        bench
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Synced { partial } => self.synced.push(partial),
            Event::NoMasquerade(_) => panic!("no source of objects says this"),
            Event::Changes(changes) => {
                for change in changes {
                    let text = brief(&change);
                    match text.strip_prefix('-') {
                        None => drop(self.served.insert(text[1..].to_owned())),
                        Some(gone) => {
                            assert!(self.served.remove(gone), "{gone} was not there");
                            self.removed.push(gone.to_owned());
                        }
                    }
                }
            }
        }
    }

    /// Takes events until exactly these Services are served.
    async fn expect(&mut self, services: &[&str]) -> Duration {
        let wanted: BTreeSet<_> = services.iter().map(|name| format!("Service default/{name}")).collect();
        let start = Instant::now();
        while self.served != wanted {
            let event = timeout_at(start + Duration::from_secs(5), self.events.recv()).await;
            let event = event.unwrap_or_else(|_| panic!("{:?} instead of {wanted:?}", self.served));
            self.take(event.unwrap());
        }
        start.elapsed()
    }

    /// Takes what comes for a while.
    async fn settle(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while let Ok(event) = timeout_at(end, self.events.recv()).await {
            self.take(event.unwrap());
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

fn named(name: &str) -> String {
    WEB.replace("name: web", &format!("name: {name}"))
}

#[tokio::test]
async fn changes_arrive_soon() {
    let mut bench = Bench::start(|dir| std::fs::write(dir.join("a.yaml"), WEB).unwrap()).await;
    bench.expect(&["web"]).await;
    assert_eq!(bench.synced, [false]);
    std::fs::write(bench.file("b.yaml"), named("db")).unwrap();
    let took = bench.expect(&["web", "db"]).await;
    assert!(took < Duration::from_millis(500), "{took:?}");
    std::fs::remove_file(bench.file("a.yaml")).unwrap();
    bench.expect(&["db"]).await;
    // As editors and deployment tools do it: a new file beside it, renamed over the old one.
    std::fs::write(bench.file(".b.yaml.swp"), named("cache")).unwrap();
    std::fs::rename(bench.file(".b.yaml.swp"), bench.file("b.yaml")).unwrap();
    bench.expect(&["cache"]).await;
    assert_eq!(bench.synced, [false]);
}

#[tokio::test]
async fn a_slow_writer_takes_nothing_away() {
    use std::io::Write as _;
    let two = format!("{WEB}---\n{}", named("db"));
    let mut bench = Bench::start(|dir| std::fs::write(dir.join("a.yaml"), &two).unwrap()).await;
    bench.expect(&["web", "db"]).await;
    let mut file = std::fs::File::create(bench.file("a.yaml")).unwrap();
    for part in [&two[..WEB.len()], &two[WEB.len()..], "---\n", &named("cache")] {
        bench.settle(Duration::from_millis(150)).await;
        file.write_all(part.as_bytes()).unwrap();
    }
    drop(file);
    bench.expect(&["web", "db", "cache"]).await;
    assert_eq!(bench.removed, [""; 0]);
}

/// A moment later, because it may be half of a change; but not much later, though nothing more happens.
#[tokio::test]
async fn an_emptied_file_takes_everything_away_after_a_moment() {
    for replaced in [true, false] {
        let mut bench = Bench::start(|dir| std::fs::write(dir.join("a.yaml"), WEB).unwrap()).await;
        bench.expect(&["web"]).await;
        if replaced {
            std::fs::write(bench.file(".new"), "").unwrap();
            std::fs::rename(bench.file(".new"), bench.file("a.yaml")).unwrap();
        } else {
            std::fs::write(bench.file("a.yaml"), "\n").unwrap();
        }
        bench.settle(Duration::from_millis(500)).await;
        assert_eq!(bench.removed, [""; 0], "replaced: {replaced}");
        let took = bench.expect(&[]).await;
        assert!(took < Duration::from_millis(1500), "{took:?}, replaced: {replaced}");
    }
}

#[tokio::test]
async fn config_map_volumes_are_followed() {
    let install = |dir: &Path, version: &str, text: &str| {
        std::fs::create_dir(dir.join(version)).unwrap();
        std::fs::write(dir.join(version).join("a.yaml"), text).unwrap();
        std::os::unix::fs::symlink(version, dir.join("..data_tmp")).unwrap();
        std::fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
    };
    let mut bench = Bench::start(|dir| {
        install(dir, "..2026_1", WEB);
        std::os::unix::fs::symlink("..data/a.yaml", dir.join("a.yaml")).unwrap();
    })
    .await;
    bench.expect(&["web"]).await;
    install(&bench.path, "..2026_2", &named("db"));
    std::fs::remove_dir_all(bench.path.join("..2026_1")).unwrap();
    bench.expect(&["db"]).await;
}

#[tokio::test]
async fn broken_files_are_announced_as_partial() {
    let mut bench = Bench::start(|dir| std::fs::write(dir.join("a.yaml"), "kind: [").unwrap()).await;
    assert_eq!(bench.synced, [true]);
    std::fs::write(bench.file("b.yaml"), named("db")).unwrap();
    bench.expect(&["db"]).await;
    std::fs::write(bench.file("a.yaml"), WEB).unwrap();
    bench.expect(&["web", "db"]).await;
    bench.settle(Duration::from_millis(100)).await;
    assert_eq!(bench.synced, [true, false]);
}

#[tokio::test]
async fn a_directory_that_vanishes_takes_nothing_away_and_is_found_again() {
    let mut bench = Bench::start(|dir| std::fs::write(dir.join("a.yaml"), WEB).unwrap()).await;
    bench.expect(&["web"]).await;
    std::fs::rename(&bench.path, bench.path.with_extension("old")).unwrap();
    bench.settle(Duration::from_millis(300)).await;
    assert_eq!(bench.removed, [""; 0]);
    std::fs::create_dir(&bench.path).unwrap();
    std::fs::write(bench.file("b.yaml"), named("db")).unwrap();
    // No event tells of it.
    let end = Instant::now() + Duration::from_secs(15);
    while !bench.served.contains("Service default/db") {
        let event = timeout_at(end, bench.events.recv()).await.expect("the new directory is not found");
        bench.take(event.unwrap());
    }
    std::fs::write(bench.file("c.yaml"), named("cache")).unwrap();
    bench.expect(&["db", "cache"]).await;
}

#[tokio::test]
async fn a_directory_that_is_not_there_is_an_error() {
    let (sender, _events) = mpsc::channel(1);
    let error = manifests::run(Path::new("/nonexistent/dir"), NODE, sender).await.unwrap_err();
    assert!(error.to_string().contains("/nonexistent/dir"), "{error}");
}
