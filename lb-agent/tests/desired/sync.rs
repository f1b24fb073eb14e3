//! The main loop: when it writes, what it does when writing fails.

use crate::support::{a_service, a_slice, endpoints, show};
use lb_agent::desired::{Config, Diff};
use lb_agent::health::Health;
use lb_agent::metrics::Metrics;
use lb_agent::model::{FrontendAddr, Protocol};
use lb_agent::source::Event;
use lb_agent::store::{Change, LocalAddresses, Node};
use lb_agent::sync::{Reports, Writer, run};
use serde_json::json;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

/// Remembers what it was given; fails as often as it is told to.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Recorded>>);

#[derive(Default)]
struct Recorded {
    writes: Vec<(Instant, Vec<String>)>,
    nodes: usize,
    fail: usize,
    adopted: Vec<FrontendAddr>,
}

impl Writer for Recorder {
    fn adopt(&mut self) -> anyhow::Result<Vec<FrontendAddr>> {
        Ok(self.0.lock().unwrap().adopted.clone())
    }

    fn apply(&mut self, diff: &Diff) -> anyhow::Result<()> {
        let mut recorded = self.0.lock().unwrap();
        let mut lines: Vec<_> =
            diff.upserts.iter().map(|(address, frontend)| show(address, frontend)).collect();
        lines.extend(diff.deletes.iter().map(|address| format!("-{}", address.addr())));
        recorded.writes.push((Instant::now(), lines));
        if recorded.fail > 0 {
            recorded.fail -= 1;
            anyhow::bail!("no memory");
        }
        Ok(())
    }

    fn node_changed(&mut self, _: &Node, _: &LocalAddresses) -> anyhow::Result<()> {
        self.0.lock().unwrap().nodes += 1;
        Ok(())
    }
}

impl Recorder {
    fn writes(&self) -> Vec<Vec<String>> {
        self.0.lock().unwrap().writes.iter().map(|(_, lines)| lines.clone()).collect()
    }
}

struct Bench {
    recorder: Recorder,
    events: mpsc::Sender<Event>,
    metrics: Metrics,
    health: Health,
}

impl Bench {
    fn start(recorder: Recorder) -> Self {
        let (events, receiver) = mpsc::channel(16);
        let (health, metrics) = (Health::default(), Metrics::default());
        let config = Config { localhost_node_ports: false, ..Config::default() };
        let reports = Reports { health: health.clone(), metrics: metrics.clone(), ..Reports::default() };
        tokio::spawn(run(config, receiver, recorder.clone(), reports));
        Self { recorder, events, metrics, health }
    }

    async fn send(&self, changes: Vec<Change>) {
        self.events.send(Event::Changes(changes)).await.unwrap();
    }

    async fn begin(&self) {
        self.send(vec![Change::Addresses(LocalAddresses::default())]).await;
        self.events.send(Event::Synced { partial: false }).await.unwrap();
    }
}

fn web() -> Change {
    a_service("web", json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}))
}

fn pods(list: &str) -> Change {
    a_slice("web-1", "web", json!([{"port": 8080}]), endpoints(list))
}

#[tokio::test(start_paused = true)]
async fn nothing_is_written_before_everything_is_listed() {
    let recorder = Recorder::default();
    let stale = FrontendAddr::new("10.96.0.9:80".parse().unwrap(), Protocol::Tcp);
    recorder.0.lock().unwrap().adopted = vec![stale];
    let bench = Bench::start(recorder);
    bench.send(vec![web(), pods("10.0.0.1")]).await;
    sleep(Duration::from_secs(100)).await;
    bench.events.send(Event::Synced { partial: false }).await.unwrap();
    sleep(Duration::from_secs(100)).await;
    assert_eq!(bench.recorder.writes(), [[""; 0]; 0], "the host's addresses are missing");
    bench.send(vec![Change::Addresses(LocalAddresses::default())]).await;
    sleep(Duration::from_millis(50)).await;
    assert_eq!(bench.recorder.writes(), [["10.96.0.1:80/TCP ClusterIp: 10.0.0.1:8080", "-10.96.0.9:80"]]);
}

#[tokio::test(start_paused = true)]
async fn the_first_change_is_written_at_once_and_a_burst_together() {
    let bench = Bench::start(Recorder::default());
    bench.begin().await;
    sleep(Duration::from_secs(1)).await;
    let start = Instant::now();
    bench.send(vec![web()]).await;
    sleep(Duration::from_millis(1)).await;
    assert_eq!(bench.recorder.writes().len(), 1);
    for last in 1..=200 {
        bench.send(vec![pods(&format!("10.0.0.{last}"))]).await;
        sleep(Duration::from_millis(1)).await;
    }
    sleep(Duration::from_secs(1)).await;
    let writes = bench.recorder.writes();
    assert!(writes.len() <= 1 + 200 / 5, "{} writes for a burst of 200 ms", writes.len());
    assert_eq!(writes.last().unwrap(), &["10.96.0.1:80/TCP ClusterIp: 10.0.0.200:8080"]);
    let last = bench.recorder.0.lock().unwrap().writes.last().unwrap().0;
    assert!(last - start < Duration::from_millis(220), "the end of the burst waited: {:?}", last - start);
}

#[tokio::test(start_paused = true)]
async fn what_does_not_matter_is_not_written() {
    let bench = Bench::start(Recorder::default());
    bench.begin().await;
    bench.send(vec![web(), pods("10.0.0.1")]).await;
    sleep(Duration::from_secs(1)).await;
    bench.send(vec![web(), pods("10.0.0.1"), Change::Service(crate::support::name("gone"), None)]).await;
    sleep(Duration::from_secs(1)).await;
    assert_eq!(bench.recorder.writes().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_failed_write_is_tried_again_until_it_works() {
    let recorder = Recorder::default();
    recorder.0.lock().unwrap().fail = 3;
    let bench = Bench::start(recorder);
    bench.begin().await;
    bench.send(vec![web()]).await;
    sleep(Duration::from_secs(3)).await;
    let writes = bench.recorder.writes();
    assert_eq!(writes.len(), 4);
    assert!(writes.iter().all(|lines| lines == &["10.96.0.1:80/TCP ClusterIp: reject"]), "{writes:?}");
    let text = bench.metrics.render(&bench.health);
    assert!(text.contains("lb_sync_failures_total 3\n"), "{text}");
    assert!(text.contains("lb_frontends 1\n"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn the_writer_learns_of_the_node() {
    let bench = Bench::start(Recorder::default());
    bench.begin().await;
    sleep(Duration::from_secs(1)).await;
    let node = Node { eligible: false, pod_cidrs: vec!["10.42.0.0/24".parse().unwrap()], ..Node::default() };
    bench.send(vec![Change::Node(Some(node.clone()))]).await;
    sleep(Duration::from_secs(1)).await;
    bench.send(vec![Change::Node(Some(node))]).await;
    sleep(Duration::from_secs(1)).await;
    assert_eq!(bench.recorder.0.lock().unwrap().nodes, 1);
    let reply = (bench.health.handler())("/healthz").unwrap();
    assert_eq!(reply.status, 503, "the node is leaving");
    assert_eq!((bench.health.handler())("/livez").unwrap().status, 200);
}
