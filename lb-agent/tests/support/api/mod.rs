//! A stand-in for the Kubernetes API server: list, watch and writes over real HTTP, and the ways in which the real
//! one fails. Not there: authentication, validation, defaulting (but ClusterIPs are given out).

mod http;
mod objects;
mod watch;

use objects::Objects;
use serde_json::Value;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::watch as signal;

/// What the server does with streaming lists (`sendInitialEvents`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Streaming {
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
pub(crate) enum Gone {
    /// An ERROR event in a stream that begins with status 200.
    #[default]
    Event,
    /// HTTP status 410.
    Status,
}

/// How the server behaves.
#[derive(Clone, Debug)]
pub(crate) struct Behaviour {
    pub(crate) streaming: Streaming,
    pub(crate) gone: Gone,
    /// Before a list, of either way, is answered.
    pub(crate) slow_list: Duration,
    /// The kind (`services` …) that `slow_list` is for; all where there is none.
    pub(crate) slow_kind: Option<&'static str>,
    pub(crate) bookmarks: Duration,
    /// Connections are closed as soon as they are made.
    pub(crate) down: bool,
    /// Watches say nothing.
    pub(crate) paused: bool,
    /// Writes to a kind that are answered with a status code and its message.
    pub(crate) refused: Option<(&'static str, u16, &'static str)>,
}

struct Shared {
    objects: Mutex<Objects>,
    behaviour: Mutex<Behaviour>,
    requests: Mutex<Vec<String>>,
    /// Raised whenever watches may have something to say.
    news: signal::Sender<u64>,
    /// Raised to cut all connections.
    cut: signal::Sender<u64>,
}

/// The tests' handle; the server stops with it.
pub(crate) struct Api {
    shared: Arc<Shared>,
    address: SocketAddr,
    server: tokio::task::JoinHandle<()>,
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
    pub(crate) async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
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
        };
        let shared = Arc::new(Shared {
            objects: Mutex::default(),
            behaviour: Mutex::new(behaviour),
            requests: Mutex::default(),
            news: signal::Sender::new(0),
            cut: signal::Sender::new(0),
        });
        let server = tokio::spawn(http::serve(listener, shared.clone()));
        Self { shared, address, server }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Creates or replaces an object.
    pub(crate) fn apply(&self, object: Value) {
        lock(&self.shared.objects).apply(object);
        self.raise();
    }

    pub(crate) fn delete(&self, kind: &str, namespace: &str, name: &str) {
        assert!(
            lock(&self.shared.objects).delete(kind, namespace, name).is_some(),
            "{kind} {name} is not there"
        );
        self.raise();
    }

    /// All objects of a kind (`services` …), by namespace and name.
    pub(crate) fn objects(&self, kind: &str) -> Vec<Value> {
        lock(&self.shared.objects).matching(kind, &objects::Filter::default())
    }

    /// Waits until the objects of a kind are as expected, and returns them.
    pub(crate) async fn until(&self, kind: &str, expected: impl Fn(&[Value]) -> bool) -> Vec<Value> {
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
    pub(crate) fn compact(&self) {
        lock(&self.shared.objects).compact();
    }

    /// Cuts all connections in the middle of whatever they say.
    pub(crate) fn disconnect(&self) {
        self.shared.cut.send_modify(|count| *count += 1);
    }

    /// Until [`Self::up`], nothing answers.
    pub(crate) fn down(&self) {
        self.behave(|behaviour| behaviour.down = true);
        self.disconnect();
    }

    pub(crate) fn up(&self) {
        self.behave(|behaviour| behaviour.down = false);
    }

    /// Watches say nothing until [`Self::resume`].
    pub(crate) fn pause(&self) {
        self.behave(|behaviour| behaviour.paused = true);
    }

    pub(crate) fn resume(&self) {
        self.behave(|behaviour| behaviour.paused = false);
        self.raise();
    }

    /// Lists take that long.
    pub(crate) fn slow_list(&self, kind: Option<&'static str>, time: Duration) {
        self.behave(|behaviour| (behaviour.slow_kind, behaviour.slow_list) = (kind, time));
    }

    pub(crate) fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut lock(&self.shared.behaviour));
    }

    /// The requests since the last call: `list services`, `stream services`, `watch services`, `create services` …
    pub(crate) fn requests(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.shared.requests))
    }

    fn raise(&self) {
        self.shared.raise();
    }
}

impl Shared {
    fn raise(&self) {
        self.news.send_modify(|count| *count += 1);
    }
}
