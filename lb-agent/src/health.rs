//! `/healthz` and `/livez`, answered as kube-proxy does: load balancers and autoscalers act upon them.

pub mod server;
pub mod services;

pub use server::{Handler, Reply, serve};
pub use services::ServiceChecks;

use hyper::StatusCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// Twice kube-proxy's default `--sync-period`: a change that waits longer means that we are stuck.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The agent's health; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Health(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    started: Started,
    state: Mutex<State>,
    healthz: Codes,
    livez: Codes,
}

#[derive(Debug, Default)]
struct State {
    /// Since when a change waits to be written.
    queued: Option<Instant>,
    updated: Option<(SystemTime, Instant)>,
    node_leaving: bool,
}

/// When we began to count time.
#[derive(Debug)]
struct Started(Instant);

impl Default for Started {
    fn default() -> Self {
        Self(Instant::now())
    }
}

/// How often each status was answered.
#[derive(Debug, Default)]
pub struct Codes {
    ok: AtomicU64,
    unavailable: AtomicU64,
}

impl Codes {
    /// Status and count.
    pub fn counts(&self) -> [(&'static str, u64); 2] {
        [("200", self.ok.load(Ordering::Relaxed)), ("503", self.unavailable.load(Ordering::Relaxed))]
    }
}

impl Health {
    /// A change arrived that has to be written.
    pub fn queued(&self) {
        self.queued_at(Instant::now());
    }

    /// Everything that was queued is written.
    pub fn synced(&self) {
        let mut state = self.state();
        state.queued = None;
        state.updated = Some((SystemTime::now(), Instant::now()));
    }

    /// Whether new traffic should come to this node (KEP-3836).
    pub fn set_node_eligible(&self, eligible: bool) {
        self.state().node_leaving = !eligible;
    }

    /// Whether changes are written in time, whatever the node's state.
    pub fn is_live(&self) -> bool {
        self.live_at(Instant::now())
    }

    /// Answers of `/healthz` so far.
    pub fn healthz_codes(&self) -> &Codes {
        &self.0.healthz
    }

    /// Answers of `/livez` so far.
    pub fn livez_codes(&self) -> &Codes {
        &self.0.livez
    }

    /// Answers requests for the two paths.
    pub fn handler(&self) -> Handler {
        let health = self.clone();
        Arc::new(move |path| match path {
            "/healthz" => Some(health.reply(true, Instant::now(), SystemTime::now())),
            "/livez" => Some(health.reply(false, Instant::now(), SystemTime::now())),
            _ => None,
        })
    }

    /// Answers the kubelet: `/livez`, and `/readyz` once everything known has been written. Not where kube-proxy answers, which
    /// may still be there when we come.
    pub fn probes(&self) -> Handler {
        let health = self.clone();
        Arc::new(move |path| {
            let good = match path {
                "/livez" => health.is_live(),
                "/readyz" => health.is_live() && health.state().updated.is_some(),
                _ => return None,
            };
            let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            Some(Reply { status, ..Reply::text(if good { "ok\n" } else { "not yet\n" }) })
        })
    }

    fn queued_at(&self, now: Instant) {
        self.state().queued.get_or_insert(now);
    }

    /// Healthy while starting: load balancers would otherwise take every new node for a broken one.
    fn live_at(&self, now: Instant) -> bool {
        let state = self.state();
        state.updated.is_none() || state.queued.is_none_or(|queued| now.duration_since(queued) < TIMEOUT)
    }

    fn reply(&self, with_node: bool, now: Instant, time: SystemTime) -> Reply {
        let live = self.live_at(now);
        let (leaving, updated) = {
            let state = self.state();
            (state.node_leaving, state.updated)
        };
        let healthy = live && !(with_node && leaving);
        // kube-proxy's oldest promise is that a healthy answer's `lastUpdated` is recent.
        let updated = self.go_time(if healthy { Some((time, now)) } else { updated });
        let time = self.go_time(Some((time, now)));
        let node = if with_node { format!(", \"nodeEligible\": {}", !leaving) } else { String::new() };
        let codes = if with_node { &self.0.healthz } else { &self.0.livez };
        let (status, counter) = match healthy {
            true => (StatusCode::OK, &codes.ok),
            false => (StatusCode::SERVICE_UNAVAILABLE, &codes.unavailable),
        };
        counter.fetch_add(1, Ordering::Relaxed);
        let body = format!("{{\"lastUpdated\": \"{updated}\",\"currentTime\": \"{time}\"{node}}}");
        Reply::json(status, body)
    }

    /// As Go prints a time in UTC that its clock has told: with the seconds since the process began. Go's zero time where
    /// there is none.
    fn go_time(&self, time: Option<(SystemTime, Instant)>) -> String {
        use k8s_openapi::jiff::{Timestamp, tz::TimeZone};
        let known = time.and_then(|(time, at)| Some((Timestamp::try_from(time).ok()?, at)));
        let Some((time, at)) = known else { return "0001-01-01 00:00:00 +0000 UTC".into() };
        let fraction = format!("{:09}", time.subsec_nanosecond());
        let fraction = fraction.trim_end_matches('0');
        let dot = if fraction.is_empty() { "" } else { "." };
        let seconds = time.to_zoned(TimeZone::UTC).strftime("%Y-%m-%d %H:%M:%S").to_string();
        let since = at.saturating_duration_since(self.0.started.0);
        let (whole, nanos) = (since.as_secs(), since.subsec_nanos());
        format!("{seconds}{dot}{fraction} +0000 UTC m=+{whole}.{nanos:09}")
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // The state is plain data, whole at any moment.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: Duration = Duration::from_millis(1_700_000_000_250);

    fn body(health: &Health, with_node: bool, now: Instant) -> (u16, String) {
        let reply = health.reply(with_node, now, SystemTime::UNIX_EPOCH + TIME);
        (reply.status.as_u16(), reply.body)
    }

    #[test]
    fn bodies_are_kube_proxys() {
        let health = Health::default();
        let now = health.0.started.0 + Duration::from_nanos(202_631_797_660);
        let time = "2023-11-14 22:13:20.25 +0000 UTC m=+202.631797660";
        let expected =
            format!(r#"{{"lastUpdated": "{time}","currentTime": "{time}", "nodeEligible": true}}"#);
        assert_eq!(body(&health, true, now), (200, expected));
        let expected = format!(r#"{{"lastUpdated": "{time}","currentTime": "{time}"}}"#);
        assert_eq!(body(&health, false, now), (200, expected));
    }

    #[test]
    fn a_change_that_waits_too_long_is_unhealthy_until_written() {
        let health = Health::default();
        let start = Instant::now();
        health.queued_at(start);
        assert_eq!(body(&health, false, start + TIMEOUT).0, 200, "while starting up");
        health.synced();
        health.queued_at(start);
        health.queued_at(start + TIMEOUT / 2);
        assert_eq!(body(&health, true, start + TIMEOUT - Duration::from_millis(1)).0, 200);
        assert_eq!(body(&health, true, start + TIMEOUT).0, 503);
        let (code, text) = body(&health, false, start + TIMEOUT);
        assert_eq!(code, 503);
        assert!(!text.contains(r#""lastUpdated": "2023"#), "the time of the last write, not now: {text}");
        health.synced();
        assert_eq!(body(&health, true, start + TIMEOUT).0, 200);
        assert_eq!(health.healthz_codes().counts(), [("200", 2), ("503", 1)]);
    }

    #[test]
    fn it_is_ready_when_everything_is_written() {
        let health = Health::default();
        let probes = health.probes();
        let codes = || ["/livez", "/readyz"].map(|path| probes(path).expect("a path").status.as_u16());
        assert_eq!(codes(), [200, 503]);
        health.synced();
        assert_eq!(codes(), [200, 200]);
        health.set_node_eligible(false);
        assert_eq!(codes(), [200, 200], "a node that is to go has an agent all the same");
        health.queued_at(Instant::now().checked_sub(TIMEOUT).expect("an earlier time"));
        assert_eq!(codes(), [503, 503]);
        assert!(probes("/healthz").is_none());
    }

    #[test]
    fn a_leaving_node_is_not_healthy_but_live() {
        let health = Health::default();
        health.set_node_eligible(false);
        let now = Instant::now();
        let (code, text) = body(&health, true, now);
        assert_eq!(code, 503);
        assert!(text.starts_with(r#"{"lastUpdated": "0001-01-01 00:00:00 +0000 UTC","#), "{text}");
        assert!(text.ends_with(r#", "nodeEligible": false}"#), "{text}");
        assert_eq!(body(&health, false, now).0, 200);
        health.set_node_eligible(true);
        assert_eq!(body(&health, true, now).0, 200);
    }
}
