//! A stand-in for the Kubernetes API server: list, watch and writes over real HTTP, and the ways in which the real
//! one fails. Not there: validation, defaulting (but ClusterIPs are given out). Whom it lets in, it tells by a
//! token, if it is given one. What it is asked wrongly it
//! answers with a panic: it is for tests and measurements.

mod dialect;
mod http;
mod objects;
mod tls;
mod watch;

use objects::Objects;
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::sync::watch as signal;

/// What the server does with streaming lists (`sendInitialEvents`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Streaming {
    /// As of Kubernetes 1.34.
    #[default]
    Supported,
    /// The feature is off: 422.
    Refused,
    /// The server is older than the feature: an ordinary watch.
    Unknown,
}

/// How the server says that a version is too old.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gone {
    /// An ERROR event in a stream that begins with status 200.
    #[default]
    Event,
    /// HTTP status 410.
    Status,
}

/// How the server behaves.
#[derive(Clone, Debug)]
pub struct Behaviour {
    /// Streaming lists.
    pub streaming: Streaming,
    /// Versions that are too old.
    pub gone: Gone,
    /// Before a list, of either way, is answered.
    pub slow_list: Duration,
    /// The kind (`services` …) that `slow_list` is for; all where there is none.
    pub slow_kind: Option<&'static str>,
    /// Time between bookmarks.
    pub bookmarks: Duration,
    /// Connections are closed as soon as they are made.
    pub down: bool,
    /// Watches say nothing.
    pub paused: bool,
    /// Writes to a kind that are answered with a status code and its message.
    pub refused: Option<(&'static str, u16, &'static str)>,
    /// Lists and watches of a kind that are answered so.
    pub unread: Option<(&'static str, u16, &'static str)>,
    /// No list can be continued after its first page.
    pub old_pages: bool,
    /// The only token that is let in; without, everybody is.
    pub token: Option<String>,
    /// Events of what has no namespace are refused (422) outside of `kube-system`, as by servers before 1.21.6.
    pub old_events: bool,
}

/// What an access rule grants.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Right {
    /// API group; empty for the core's.
    pub group: String,
    /// `services` …
    pub resource: String,
    /// `get`, `list`, `watch`, `create` …
    pub verb: String,
}

struct Shared {
    objects: Mutex<Objects>,
    behaviour: Mutex<Behaviour>,
    requests: Mutex<Vec<String>>,
    rights: Mutex<BTreeSet<Right>>,
    askers: Mutex<BTreeSet<String>>,
    listed: Mutex<Option<Instant>>,
    tls: tls::Tls,
    /// Raised whenever watches may have something to say.
    news: signal::Sender<u64>,
    /// Raised to cut all connections.
    cut: signal::Sender<u64>,
}

/// A running server; it stops with this value.
pub struct Api {
    shared: Arc<Shared>,
    address: SocketAddr,
    server: tokio::task::JoinHandle<()>,
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.server.abort();
        self.disconnect();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

impl Api {
    /// On a free port of 127.0.0.1.
    pub async fn start() -> Self {
        Self::start_on("127.0.0.1:0".parse().unwrap()).await
    }

    /// On this address, whose port may be 0 for a free one.
    ///
    /// # Panics
    /// If there is no listening there.
    pub async fn start_on(address: SocketAddr) -> Self {
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let behaviour = Behaviour {
            streaming: Streaming::default(),
            gone: Gone::default(),
            slow_list: Duration::ZERO,
            slow_kind: None,
            bookmarks: Duration::from_millis(50),
            down: false,
            paused: false,
            refused: None,
            unread: None,
            old_pages: false,
            token: None,
            old_events: false,
        };
        let shared = Arc::new(Shared {
            objects: Mutex::default(),
            behaviour: Mutex::new(behaviour),
            requests: Mutex::default(),
            rights: Mutex::default(),
            askers: Mutex::default(),
            listed: Mutex::default(),
            tls: tls::Tls::default(),
            news: signal::Sender::new(0),
            cut: signal::Sender::new(0),
        });
        let server = tokio::spawn(http::serve(listener, shared.clone()));
        Self { shared, address, server }
    }

    /// Where it is, for `--master` and its like.
    pub fn url(&self) -> String {
        format!("{}://{}", if self.shared.tls.is_on() { "https" } else { "http" }, self.address)
    }

    /// From now on new connections are encrypted, under a new certificate. Returns that, as PEM.
    pub fn renew_certificate(&self) -> String {
        self.shared.tls.renew()
    }

    /// Creates or replaces an object.
    pub fn apply(&self, object: Value) {
        lock(&self.shared.objects).apply(object);
        self.raise();
    }

    /// Deletes an object.
    ///
    /// # Panics
    /// If there is none.
    pub fn delete(&self, kind: &str, namespace: &str, name: &str) {
        assert!(
            lock(&self.shared.objects).delete(kind, namespace, name).is_some(),
            "{kind} {name} is not there"
        );
        self.raise();
    }

    /// All objects of a kind (`services` …), by namespace and name.
    pub fn objects(&self, kind: &str) -> Vec<Value> {
        let objects = lock(&self.shared.objects).matching(kind, &objects::Filter::default());
        objects.iter().map(|object| (**object).clone()).collect()
    }

    /// When the last list, of either way, had been handed out to its end.
    pub fn listed(&self) -> Option<Instant> {
        *lock(&self.shared.listed)
    }

    /// Waits until the objects of a kind are as expected, and returns them.
    ///
    /// # Panics
    /// If they are not after 20 seconds.
    pub async fn until(&self, kind: &str, expected: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        let mut news = self.shared.news.subscribe();
        let waiting = async {
            while !expected(&self.objects(kind)) {
                news.changed().await.unwrap();
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(20), waiting).await;
        let objects = self.objects(kind);
        assert!(waited.is_ok(), "in vain; there are {objects:#?}");
        objects
    }

    /// Forgets history: watches and continued lists of older versions are refused.
    pub fn compact(&self) {
        lock(&self.shared.objects).compact();
    }

    /// Cuts all connections in the middle of whatever they say.
    pub fn disconnect(&self) {
        self.shared.cut.send_modify(|count| *count += 1);
    }

    /// Until [`Self::up`], nothing answers.
    pub fn down(&self) {
        self.behave(|behaviour| behaviour.down = true);
        self.disconnect();
    }

    /// The end of [`Self::down`].
    pub fn up(&self) {
        self.behave(|behaviour| behaviour.down = false);
    }

    /// Watches say nothing until [`Self::resume`].
    pub fn pause(&self) {
        self.behave(|behaviour| behaviour.paused = true);
    }

    /// The end of [`Self::pause`].
    pub fn resume(&self) {
        self.behave(|behaviour| behaviour.paused = false);
        self.raise();
    }

    /// Lists take that long.
    pub fn slow_list(&self, kind: Option<&'static str>, time: Duration) {
        self.behave(|behaviour| (behaviour.slow_kind, behaviour.slow_list) = (kind, time));
    }

    /// Changes how it behaves from now on.
    pub fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut lock(&self.shared.behaviour));
    }

    /// The requests since the last call: `list services`, `stream services`, `watch services`, `create services` …
    pub fn requests(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.shared.requests))
    }

    /// The rights that all requests so far have taken.
    pub fn rights(&self) -> BTreeSet<Right> {
        lock(&self.shared.rights).clone()
    }

    /// Who has asked anything, by the header `User-Agent`; empty for those who did not say.
    pub fn askers(&self) -> BTreeSet<String> {
        lock(&self.shared.askers).clone()
    }

    fn raise(&self) {
        self.shared.raise();
    }
}

impl Shared {
    fn has_listed(&self) {
        *lock(&self.listed) = Some(Instant::now());
    }

    fn raise(&self) {
        self.news.send_modify(|count| *count += 1);
    }
}
