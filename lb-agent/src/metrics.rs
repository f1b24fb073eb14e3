//! `/metrics` in Prometheus' text format. What kube-proxy measures, too, has kube-proxy's name, so that dashboards
//! and alerts written for it go on working.

pub mod process;

use crate::desired::Totals;
use crate::health::{Handler, Health, Reply};
use crate::store::Warning;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// One measured value.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The metric's name. Samples of one name have one help and kind.
    pub name: &'static str,
    /// One line on what it means.
    pub help: &'static str,
    /// How it behaves.
    pub kind: Kind,
    /// Names and values of labels.
    pub labels: Vec<(&'static str, String)>,
    /// The value.
    pub value: f64,
    /// Which part of a histogram.
    part: &'static str,
}

/// How a value behaves over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// [`Histogram::samples`].
    Histogram,
}

impl Sample {
    /// A value without labels.
    pub fn new(name: &'static str, help: &'static str, kind: Kind, value: f64) -> Self {
        Self { name, help, kind, labels: Vec::new(), value, part: "" }
    }

    /// So much of Services that is not served, for that reason: the one that Kubernetes Events have.
    pub fn unserved(reason: &'static str, count: usize) -> Self {
        let help = "Parts of Services that cannot be served, by reason";
        Self::new("lb_unserved", help, Kind::Gauge, count as f64).with("reason", reason)
    }

    /// With one more label.
    #[must_use]
    pub fn with(mut self, label: &'static str, value: impl Into<String>) -> Self {
        self.labels.push((label, value.into()));
        self
    }
}

/// Values that are read when somebody asks.
pub type Collector = Box<dyn Fn() -> Vec<Sample> + Send + Sync>;

/// What the agent counts; clones share it.
#[derive(Clone, Default)]
pub struct Metrics(Arc<Shared>);

#[derive(Default)]
struct Shared {
    syncs: Mutex<Syncs>,
    service_changes: AtomicU64,
    slice_changes: AtomicU64,
    failures: AtomicU64,
    collectors: Mutex<Vec<Collector>>,
}

#[derive(Clone, Default)]
struct Syncs {
    duration: Histogram,
    programming: Histogram,
    last: Option<SystemTime>,
    last_queued: Option<SystemTime>,
    services_pending: usize,
    slices_pending: usize,
    totals: Totals,
}

impl Metrics {
    /// Adds values that are read at each request.
    pub fn collect(&self, collector: Collector) {
        self.0.collectors.lock().unwrap_or_else(PoisonError::into_inner).push(collector);
    }

    /// Changes arrived that have to be written; both numbers are what is pending now.
    pub fn queued(&self, services: usize, slices: usize) {
        let mut sync = self.sync();
        let old = (sync.services_pending, sync.slices_pending);
        (sync.services_pending, sync.slices_pending) = (services, slices);
        sync.last_queued = Some(SystemTime::now());
        self.0.service_changes.fetch_add(services.saturating_sub(old.0) as u64, Relaxed);
        self.0.slice_changes.fetch_add(slices.saturating_sub(old.1) as u64, Relaxed);
    }

    /// Everything is written; `triggers` is when the control plane saw the causes.
    pub fn synced(&self, took: Duration, totals: Totals, triggers: &[SystemTime]) {
        let now = SystemTime::now();
        let mut sync = self.sync();
        sync.duration.observe(took);
        for trigger in triggers {
            sync.programming.observe(now.duration_since(*trigger).unwrap_or_default());
        }
        sync.last = Some(now);
        (sync.services_pending, sync.slices_pending) = (0, 0);
        sync.totals = totals;
    }

    /// Writing failed and will be tried again.
    pub fn failed(&self) {
        self.0.failures.fetch_add(1, Relaxed);
    }

    /// Answers `/metrics`, `/proxyMode` and (a plain one) `/healthz`.
    pub fn handler(&self, health: &Health) -> Handler {
        let (metrics, health) = (self.clone(), health.clone());
        Arc::new(move |path| match path {
            "/metrics" => Some(Reply {
                content_type: "text/plain; version=0.0.4; charset=utf-8",
                ..Reply::text(metrics.render(&health))
            }),
            "/proxyMode" => Some(Reply::text("ebpf")),
            "/healthz" => Some(Reply::text("ok")),
            _ => None,
        })
    }

    /// The text of `/metrics`.
    pub fn render(&self, health: &Health) -> String {
        let mut samples = self.own(&self.sync().clone(), health);
        for collector in self.0.collectors.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            samples.extend(collector());
        }
        // Samples of one name have to follow each other, wherever they are from.
        let mut places = HashMap::new();
        for sample in &samples {
            let next = places.len();
            places.entry(sample.name).or_insert(next);
        }
        samples.sort_by_key(|sample| places[sample.name]);
        let (mut text, mut last) = (String::new(), "");
        for sample in &samples {
            if sample.name != last {
                let kind = match sample.kind {
                    Kind::Counter => "counter",
                    Kind::Gauge => "gauge",
                    Kind::Histogram => "histogram",
                };
                let _ = writeln!(text, "# HELP {0} {1}\n# TYPE {0} {kind}", sample.name, sample.help);
                last = sample.name;
            }
            text.push_str(sample.name);
            text.push_str(sample.part);
            for (index, (label, value)) in sample.labels.iter().enumerate() {
                let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
                let _ = write!(text, "{}{label}=\"{value}\"", if index == 0 { '{' } else { ',' });
            }
            let close = if sample.labels.is_empty() { "" } else { "}" };
            let _ = writeln!(text, "{close} {}", sample.value);
        }
        text
    }

    fn own(&self, sync: &Syncs, health: &Health) -> Vec<Sample> {
        use Kind::{Counter, Gauge};
        const LOCAL: (&str, &str) = (
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
            "Service ports whose Local policy finds no endpoint here",
        );
        let seconds = |time: Option<SystemTime>| {
            time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok())
                .unwrap_or_default()
                .as_secs_f64()
        };
        let count = |counter: &AtomicU64| counter.load(Relaxed) as f64;
        let totals = sync.totals;
        let local = |policy: &str, count: usize| {
            Sample::new(LOCAL.0, LOCAL.1, Gauge, count as f64).with("traffic_policy", policy)
        };
        let codes = |name, help, codes: &crate::health::Codes| {
            codes
                .counts()
                .map(|(code, count)| Sample::new(name, help, Counter, count as f64).with("code", code))
        };
        let mut samples = Vec::new();
        let help = "Time that writing a set of changes took";
        samples.extend(sync.duration.samples("kubeproxy_sync_proxy_rules_duration_seconds", help, &[]));
        let help = "Time from a change of endpoints to the kernel's knowing it";
        samples.extend(sync.programming.samples("kubeproxy_network_programming_duration_seconds", help, &[]));
        samples.extend([
            Sample::new(
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
                "When changes were last written",
                Gauge,
                seconds(sync.last),
            ),
            Sample::new(
                "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
                "When a change last arrived",
                Gauge,
                seconds(sync.last_queued),
            ),
            Sample::new(
                "kubeproxy_sync_proxy_rules_service_changes_pending",
                "Changes of Services that wait to be written",
                Gauge,
                sync.services_pending as f64,
            ),
            Sample::new(
                "kubeproxy_sync_proxy_rules_service_changes_total",
                "Changes of Services",
                Counter,
                count(&self.0.service_changes),
            ),
            Sample::new(
                "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
                "Changes of endpoints that wait to be written",
                Gauge,
                sync.slices_pending as f64,
            ),
            Sample::new(
                "kubeproxy_sync_proxy_rules_endpoint_changes_total",
                "Changes of endpoints",
                Counter,
                count(&self.0.slice_changes),
            ),
            local("internal", totals.without_local_internal),
            local("external", totals.without_local_external),
        ]);
        samples.extend(codes("kubeproxy_proxy_healthz_total", "Answers of /healthz", health.healthz_codes()));
        samples.extend(codes("kubeproxy_proxy_livez_total", "Answers of /livez", health.livez_codes()));
        samples.extend([
            Sample::new("lb_services", "Services that are served", Gauge, totals.services as f64),
            Sample::new("lb_frontends", "Addresses that are served", Gauge, totals.frontends as f64),
            Sample::new(
                "lb_sync_failures_total",
                "Failed attempts to write",
                Counter,
                count(&self.0.failures),
            ),
        ]);
        samples
            .extend(Warning::REASONS.into_iter().zip(totals.unserved).map(|(r, n)| Sample::unserved(r, n)));
        samples
    }

    fn sync(&self) -> std::sync::MutexGuard<'_, Syncs> {
        self.0.syncs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics")
    }
}

/// Buckets from 1 ms, each twice as wide as the one before.
const BUCKETS: usize = 19;

/// How often a duration was how long.
#[derive(Clone, Debug, Default)]
pub struct Histogram {
    buckets: [u64; BUCKETS],
    count: u64,
    sum: f64,
}

impl Histogram {
    /// Adds a duration.
    pub fn observe(&mut self, value: Duration) {
        let value = value.as_secs_f64();
        for (bound, bucket) in Self::bounds().zip(&mut self.buckets) {
            *bucket += u64::from(value <= bound);
        }
        self.count += 1;
        self.sum += value;
    }

    fn bounds() -> impl Iterator<Item = f64> {
        (0..BUCKETS as i32).map(|index| 0.001 * 2f64.powi(index))
    }

    /// All that there is to say of it.
    pub fn samples<'a>(
        &'a self,
        name: &'static str,
        help: &'static str,
        labels: &'a [(&'static str, String)],
    ) -> impl Iterator<Item = Sample> + 'a {
        let sample = move |part, value| {
            let labels = labels.to_vec();
            Sample { name, help, kind: Kind::Histogram, labels, value, part }
        };
        let bounds = Self::bounds().map(|bound| bound.to_string()).chain(["+Inf".to_owned()]);
        let counts = self.buckets.iter().chain([&self.count]);
        let buckets =
            bounds.zip(counts).map(move |(le, count)| sample("_bucket", *count as f64).with("le", le));
        buckets.chain([sample("_sum", self.sum), sample("_count", self.count as f64)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let metrics = Metrics::default();
        metrics.collect(Box::new(|| {
            vec![
                Sample::new("lb_drops_total", "Packets", Kind::Counter, 3.0).with("reason", "no \"flow\""),
                Sample::new("lb_drops_total", "Packets", Kind::Counter, 0.0)
                    .with("reason", "b")
                    .with("family", "4"),
                Sample::unserved("Late", 2),
            ]
        }));
        metrics.queued(2, 1);
        let unserved = [1, 0, 0, 3, 0];
        let totals = Totals { services: 7, without_local_external: 1, unserved, ..Totals::default() };
        metrics.synced(Duration::from_millis(3), totals, &[SystemTime::now() - Duration::from_secs(2)]);
        let text = metrics.render(&Health::default());
        for line in [
            "# TYPE kubeproxy_sync_proxy_rules_duration_seconds histogram",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.002\"} 0",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.004\"} 1",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"+Inf\"} 1",
            "kubeproxy_sync_proxy_rules_duration_seconds_sum 0.003",
            "kubeproxy_network_programming_duration_seconds_count 1",
            "kubeproxy_sync_proxy_rules_service_changes_total 2",
            "kubeproxy_sync_proxy_rules_service_changes_pending 0",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"external\"} 1",
            "kubeproxy_proxy_healthz_total{code=\"503\"} 0",
            "lb_services 7",
            "lb_unserved{reason=\"UnsupportedProtocol\"} 1",
            "lb_unserved{reason=\"AddressTaken\"} 3",
            "lb_drops_total{reason=\"no \\\"flow\\\"\"} 3",
            "lb_drops_total{reason=\"b\",family=\"4\"} 0",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} is not in\n{text}");
        }
        assert_eq!(text.matches("# TYPE lb_drops_total counter").count(), 1);
        let together = "lb_unserved{reason=\"NotServed\"} 0\nlb_unserved{reason=\"Late\"} 2\n";
        assert!(text.contains(together), "samples of one name stay together:\n{text}");
    }
}
