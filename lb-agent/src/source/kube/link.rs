//! What is said of the connection to the API server: once that it is gone, once that it is back, whoever notices and
//! however often it is tried.

use crate::metrics::{Histogram, Kind, Sample};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

/// Why a request has not been served, as far as that is the server's matter and not the request's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// No answer: the root of it.
    Unreachable(String),
    /// 401: it does not know us.
    Unauthorized,
    /// It cannot at the moment: 429, 5xx.
    Unavailable(u16),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(why) => write!(f, "cannot be reached ({why})"),
            Self::Unauthorized => f.write_str(
                "does not accept our credentials (401): the token or certificate has expired, or is another cluster's",
            ),
            Self::Unavailable(code) => write!(f, "cannot serve us at the moment ({code})"),
        }
    }
}

/// The state of the connection; clones share it.
#[derive(Clone, Debug)]
pub(super) struct Link(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// The server's address, for people.
    url: String,
    /// The same as client-go's label `host`.
    host: String,
    state: Mutex<State>,
    /// Raised when it serves us after it has not.
    serves: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    outage: Option<Outage>,
    /// By method and code.
    requests: BTreeMap<(&'static str, u16), u64>,
    /// By method.
    durations: BTreeMap<&'static str, Histogram>,
    /// Kinds that it will not have us watch.
    refused: BTreeSet<&'static str>,
    /// Complete lists by kind.
    lists: BTreeMap<&'static str, u64>,
}

#[derive(Debug)]
struct Outage {
    since: Instant,
    /// By path.
    failing: BTreeMap<String, Failing>,
    /// The troubles that have been told.
    told: BTreeSet<u8>,
}

#[derive(Debug, Default)]
struct Failing {
    /// How often in a row.
    count: u32,
    /// Nobody answered.
    silent: bool,
    /// So it is for all paths: nobody answered, or whoever did does not know us.
    for_all: bool,
}

impl Link {
    pub(super) fn new(url: &str, host: &str) -> Self {
        let (url, host, serves) = (url.into(), host.into(), watch::Sender::new(()));
        Self(Arc::new(Shared { url, host, state: Mutex::default(), serves }))
    }

    /// The server's address.
    pub(super) fn url(&self) -> &str {
        &self.0.url
    }

    /// A request has been answered, or not (code 0).
    pub(super) fn count(&self, method: &'static str, code: u16, took: Duration) {
        let mut state = self.state();
        *state.requests.entry((method, code)).or_default() += 1;
        state.durations.entry(method).or_default().observe(took);
    }

    /// A list of a kind is complete.
    pub(super) fn listed(&self, kind: &'static str) {
        *self.state().lists.entry(kind).or_default() += 1;
    }

    /// It will not have us watch a kind, or will again.
    pub(super) fn refused(&self, kind: &'static str, refused: bool) {
        let mut state = self.state();
        let _ = if refused { state.refused.insert(kind) } else { state.refused.remove(kind) };
    }

    /// A path does not work; said if it is news.
    pub(super) fn fails(&self, path: &str, trouble: &Trouble) {
        let news = self.state().fails(path, trouble, Instant::now());
        if news {
            warn!("the API server {} {trouble}; what is known stays served, trying again", self.0.url);
        }
    }

    /// A path works; said if that ends an outage that was told.
    pub(super) fn works(&self, path: &str) {
        let (news, over) = {
            let mut state = self.state();
            (state.is_news_for_all(), state.works(path))
        };
        if news {
            self.0.serves.send_replace(());
        }
        if let Some(since) = over {
            let time = Duration::from_secs(since.elapsed().as_secs());
            info!("the API server {} is back after {time:?}", self.0.url);
        }
    }

    /// Waits until it serves somebody of us again.
    pub(super) fn serves(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut serves = self.0.serves.subscribe();
        async move {
            // Without a sender, there is nobody to wait either.
            let _ = serves.changed().await;
        }
    }

    /// For the metrics: client-go's names where they mean the same.
    pub(super) fn samples(&self) -> Vec<Sample> {
        let state = self.state();
        let up = if state.outage.is_none() && state.refused.is_empty() { 1.0 } else { 0.0 };
        let help = "Whether the API server answers, and lets us watch what we have to";
        let mut samples = vec![Sample::new("lb_api_up", help, Kind::Gauge, up)];
        let help =
            "Complete lists of a kind of objects: more than one each means that a watch could not go on";
        samples.extend(state.lists.iter().map(|(kind, count)| {
            Sample::new("lb_api_lists_total", help, Kind::Counter, *count as f64).with("kind", *kind)
        }));
        let help = "Requests to the API server by status code";
        samples.extend(state.requests.iter().map(|((method, code), count)| {
            let code = if *code == 0 { "<error>".into() } else { code.to_string() };
            Sample::new("rest_client_requests_total", help, Kind::Counter, *count as f64)
                .with("code", code)
                .with("host", &*self.0.host)
                .with("method", *method)
        }));
        for (method, histogram) in &state.durations {
            let help = "Time until the API server's answer began";
            let labels = [("host", self.0.host.clone()), ("verb", (*method).to_owned())];
            samples.extend(histogram.samples("rest_client_request_duration_seconds", help, &labels));
        }
        samples
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Plain data, whole at any moment.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// News is what fails twice in a row: one connection that breaks at the wrong moment is nobody's concern. Each kind of
    /// trouble is news once until all is well: while a server starts, they come in turns.
    fn fails(&mut self, path: &str, trouble: &Trouble, now: Instant) -> bool {
        let outage = self.outage.get_or_insert_with(|| Outage {
            since: now,
            failing: BTreeMap::new(),
            told: BTreeSet::new(),
        });
        let failing = outage.failing.entry(path.into()).or_default();
        failing.count += 1;
        failing.silent = matches!(trouble, Trouble::Unreachable(_));
        failing.for_all = !matches!(trouble, Trouble::Unavailable(_));
        failing.count > 1
            && outage.told.insert(match trouble {
                // A server that has come back under another authority's certificate would not be told from one that is away.
                Trouble::Unreachable(why) if why.contains("certificate") => 3,
                Trouble::Unreachable(_) => 0,
                Trouble::Unauthorized => 1,
                Trouble::Unavailable(_) => 2,
            })
    }

    /// Whether what works now may work for those, too, that wait to try it again.
    fn is_news_for_all(&self) -> bool {
        self.outage.as_ref().is_some_and(|outage| outage.failing.values().any(|failing| failing.for_all))
    }

    /// Since when there was an outage that is over now, if it was told of. Who answers one can be reached for all.
    fn works(&mut self, path: &str) -> Option<Instant> {
        let outage = self.outage.as_mut()?;
        outage.failing.retain(|other, failing| other != path && !failing.silent);
        let outage = self.outage.take_if(|outage| outage.failing.is_empty())?;
        (!outage.told.is_empty()).then_some(outage.since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trouble_is_news_when_it_lasts_and_once_until_all_is_well() {
        let (mut state, now) = (State::default(), Instant::now());
        let refused = Trouble::Unreachable("Connection refused".into());
        assert!(!state.fails("/services", &refused, now) && !state.fails("/nodes", &refused, now));
        assert_eq!(state.works("/services"), None, "a moment that nobody was told of");
        assert!(state.outage.is_none());

        assert!(!state.fails("/services", &refused, now) && !state.fails("/nodes", &refused, now));
        assert!(state.fails("/services", &refused, now) && !state.fails("/nodes", &refused, now));
        // It starts.
        assert!(state.fails("/services", &Trouble::Unavailable(503), now));
        assert!(!state.fails("/services", &refused, now));
        assert!(!state.fails("/services", &Trouble::Unavailable(500), now));
        assert!(state.fails("/nodes", &Trouble::Unauthorized, now));
        let stranger = Trouble::Unreachable("invalid peer certificate: UnknownIssuer".into());
        assert!(state.fails("/nodes", &stranger, now) && !state.fails("/nodes", &stranger, now));
        // One that works is not all.
        assert_eq!(state.works("/nodes"), None);
        assert!(!state.fails("/services", &Trouble::Unavailable(429), now));
        assert_eq!(state.works("/services"), Some(now));
        assert!(!state.fails("/services", &refused, now) && state.fails("/services", &refused, now));
        // Who answers a question can be reached for the other.
        assert_eq!(state.works("/nodes"), Some(now));
    }
}
