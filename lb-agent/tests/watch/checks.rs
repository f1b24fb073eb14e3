//! The health checks of Services (`healthCheckNodePort`): sockets that come and go.

use crate::http::{free, get};
use lb_agent::desired::{Config, Diff};
use lb_agent::events::Events;
use lb_agent::health::{Health, ServiceChecks};
use lb_agent::model::FrontendAddr;
use lb_agent::source::Event;
use lb_agent::source::kube::{Access, Cluster};
use lb_agent::store::{Change, LocalAddresses, ObjectName, Slice};
use lb_agent::sync::{Reports, Writer, run};
use lb_stand_in::Api;
use serde_json::{Value, json};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(10);

/// Servers on 127.0.0.1.
struct Bench {
    checks: ServiceChecks,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Bench {
    fn start(events: Events) -> Self {
        let checks = ServiceChecks::default();
        let task = tokio::spawn(checks.clone().run("node-a".into(), Health::default(), events));
        Self { checks, task }
    }

    fn on(&self, addresses: &[&str], checks: &[(&str, u16, usize)]) {
        let addresses = addresses.iter().map(|ip| ip.parse().unwrap()).collect();
        let checks: Vec<_> = checks.iter().map(|&(name, port, count)| (service(name), port, count)).collect();
        self.checks.set(addresses, checks.iter().map(|(name, port, count)| (name, *port, *count)));
    }

    fn set(&self, checks: &[(&str, u16, usize)]) {
        self.on(&["127.0.0.1"], checks);
    }
}

fn service(name: &str) -> ObjectName {
    ObjectName::new("shop", name)
}

/// Who answers, and how many endpoints it says there are.
async fn asked(address: SocketAddr) -> (String, u64) {
    let text = timeout(PATIENCE, get(address, "/any/path")).await.expect("no server came");
    let (_, body) = text.split_once("\r\n\r\n").unwrap();
    let body: Value = serde_json::from_str(body).unwrap();
    (body["service"]["name"].as_str().unwrap().into(), body["localEndpoints"].as_u64().unwrap())
}

async fn refused(address: SocketAddr) {
    let closing = async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, closing).await.expect("the socket stays open");
}

/// Waits until `name` answers there.
async fn answers(address: SocketAddr, name: &str) {
    let waiting = async {
        while asked(address).await.0 != name {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, waiting).await.expect("somebody else goes on answering");
}

#[tokio::test]
async fn answers_are_kube_proxys_and_change_at_once() {
    let (bench, address) = (Bench::start(Events::default()), free().await);
    bench.set(&[("web", address.port(), 2)]);
    let text = timeout(PATIENCE, get(address, "/")).await.expect("no server came");
    let lines: Vec<_> = text.split("\r\n").filter(|line| !line.starts_with("Date: ")).collect();
    let body = "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}";
    let length = format!("Content-Length: {}", body.len());
    let headers = [
        "HTTP/1.1 200 OK",
        "Content-Type: application/json",
        "X-Content-Type-Options: nosniff",
        "X-Load-Balancing-Endpoint-Weight: 2",
    ];
    for header in headers.iter().chain([&length.as_str()]) {
        assert!(lines.contains(header), "{header} is not in\n{text}");
    }
    assert_eq!(lines.last(), Some(&body));

    // On one connection: what the main loop says is answered with the very next response.
    let mut stream = TcpStream::connect(address).await.unwrap();
    for (endpoints, status) in [(0, "503 Service Unavailable"), (7, "200 OK")] {
        bench.set(&[("web", address.port(), endpoints)]);
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut buffer = [0; 1024];
        let length = stream.read(&mut buffer).await.unwrap();
        let text = std::str::from_utf8(&buffer[..length]).unwrap();
        assert!(text.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{text}");
        assert!(text.contains(&format!("X-Load-Balancing-Endpoint-Weight: {endpoints}\r\n")), "{text}");
        assert!(text.contains(&format!("\"localEndpoints\": {endpoints},")), "{text}");
    }
    // Gone, and with it the connection.
    bench.set(&[]);
    refused(address).await;
    let end = timeout(PATIENCE, stream.read(&mut [0; 16])).await.expect("the connection stays open");
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
}

#[tokio::test]
async fn ports_move_and_change_hands() {
    let (bench, one, two) = (Bench::start(Events::default()), free().await, free().await);
    bench.set(&[("web", one.port(), 1), ("dns", two.port(), 2)]);
    assert_eq!(asked(one).await, ("web".into(), 1));
    assert_eq!(asked(two).await, ("dns".into(), 2));
    // Swapped in one step.
    bench.set(&[("web", two.port(), 1), ("dns", one.port(), 2)]);
    answers(one, "dns").await;
    answers(two, "web").await;
    bench.set(&[("web", two.port(), 3)]);
    refused(one).await;
    assert_eq!(asked(two).await, ("web".into(), 3));
}

#[tokio::test]
async fn sockets_follow_the_addresses() {
    let (bench, port) = (Bench::start(Events::default()), free().await.port());
    let at = |ip: &str| SocketAddr::new(ip.parse().unwrap(), port);
    let checks = [("web", port, 1)];
    bench.on(&["127.0.0.2"], &checks);
    asked(at("127.0.0.2")).await;
    refused(at("127.0.0.3")).await;
    // One that is not the host's (yet) is no reason not to be on the others.
    bench.on(&["127.0.0.2", "127.0.0.3", "192.0.2.1", "::1"], &checks);
    for ip in ["127.0.0.2", "127.0.0.3", "::1"] {
        asked(at(ip)).await;
    }
    bench.on(&["127.0.0.3"], &checks);
    refused(at("127.0.0.2")).await;
    refused(at("::1")).await;
    // Both wildcards, each for its family.
    bench.on(&["0.0.0.0", "::"], &checks);
    for ip in ["127.0.0.2", "127.0.0.3", "::1"] {
        asked(at(ip)).await;
    }
}

#[tokio::test]
async fn a_port_that_cannot_be_had_is_told_and_waited_for() {
    let api = Api::start().await;
    for name in ["a", "b", "c"] {
        let meta = json!({"name": name, "namespace": "shop"});
        api.apply(json!({"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {}}));
    }
    let cluster = Cluster::open(Access::Anonymous, Some(&api.url())).await.unwrap();
    let bench = Bench::start(Events::start(cluster.client(), "node-a"));
    let shared = free().await;
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap();

    // `b` has it and keeps it, though `a` comes first by name.
    bench.set(&[("b", shared.port(), 1)]);
    asked(shared).await;
    bench.set(&[("a", shared.port(), 1), ("b", shared.port(), 1), ("c", address.port(), 1)]);
    let all = api.until("events", |all| all.len() == 2).await;
    let (a, c) = (&all[0], &all[1]);
    for (event, name) in [(a, "a"), (c, "c")] {
        assert_eq!(event["regarding"]["name"], name);
        assert_eq!(event["reason"], "FailedToStartServiceHealthcheck");
        assert_eq!(event["type"], "Warning");
    }
    let note = format!("node node-a failed to start healthcheck \"shop/a\" on port {}: ", shared.port());
    assert_eq!(a["note"], format!("{note}Service shop/b has it"));
    let note = format!("node node-a failed to start healthcheck \"shop/c\" on port {}: ", address.port());
    assert!(c["note"].as_str().unwrap().starts_with(&format!("{note}listen tcp {address}: ")), "{c}");
    assert_eq!(asked(shared).await.0, "b");

    // Not told again at each attempt.
    tokio::time::sleep(Duration::from_millis(800)).await;
    assert!(api.objects("events").iter().all(|event| event["series"].is_null()));
    drop(taken);
    answers(address, "c").await;
    bench.set(&[("a", shared.port(), 1), ("c", address.port(), 1)]);
    answers(shared, "a").await;
}

#[tokio::test]
async fn a_new_agent_has_the_port_at_once() {
    let bench = Bench::start(Events::default());
    let address = free().await;
    bench.set(&[("web", address.port(), 1)]);
    // Closed by the server, so that it is the server's port which lingers; and one that is open.
    asked(address).await;
    let open = TcpStream::connect(address).await.unwrap();
    drop(bench);
    refused(address).await;
    let bench = Bench::start(Events::default());
    bench.set(&[("web", address.port(), 1)]);
    let soon = timeout(Duration::from_secs(1), get(address, "/")).await;
    assert!(soon.is_ok_and(|text| text.starts_with("HTTP/1.1 200 OK")));
    drop(open);
}

/// A kernel that takes everything.
struct Nowhere;

impl Writer for Nowhere {
    fn adopt(&mut self) -> anyhow::Result<Vec<FrontendAddr>> {
        Ok(Vec::new())
    }

    fn apply(&mut self, _: &Diff) -> anyhow::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn the_main_loop_says_what_is_wanted() {
    let reports = Reports::default();
    let (events, receiver) = tokio::sync::mpsc::channel(16);
    let node_port_addresses = "127.0.0.1/32,::1/128".parse().unwrap();
    let config = Config { node_port_addresses, ..Config::default() };
    tokio::spawn(run(config, receiver, Nowhere, reports.clone()));
    let Reports { health, metrics, checks, events: told } = reports;
    tokio::spawn(checks.run("node-a".into(), health.clone(), told));

    let address = free().await;
    let web = |policy: &str| {
        let service = json!({
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {
                "type": "LoadBalancer", "clusterIP": "10.96.0.1", "externalTrafficPolicy": policy,
                "healthCheckNodePort": address.port(),
                "ports": [{"port": 80}, {"name": "sig", "port": 81, "protocol": "SCTP"}],
            },
        });
        let service: lb_agent::objects::Service = serde_json::from_value(service).unwrap();
        Change::Service(service_name(), Some(Arc::new((&service).into())))
    };
    let pods = |nodes: &[&str]| {
        let endpoint = |(last, node): (usize, &&str)| json!({"addresses": [format!("10.0.0.{last}")], "nodeName": node, "conditions": {"ready": true}});
        let endpoints: Vec<_> = nodes.iter().enumerate().map(endpoint).collect();
        let slice = json!({
            "metadata": {
                "name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"},
            },
            "addressType": "IPv4", "ports": [{"port": 8080}], "endpoints": endpoints,
        });
        let slice = Slice::new(&serde_json::from_value(slice).unwrap(), "node-a").unwrap();
        Change::Slice(ObjectName::new("shop", "web-1"), Some(Arc::new(slice)))
    };
    let send = |changes| async { events.send(Event::Changes(changes)).await.unwrap() };

    let local = LocalAddresses::from_iter(["127.0.0.1".parse::<IpAddr>().unwrap()]);
    send(vec![web("Local"), pods(&["node-a", "node-b", "node-a"]), Change::Addresses(local)]).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    refused(address).await; // Not before everything is known.
    events.send(Event::Synced { partial: false }).await.unwrap();
    assert_eq!(asked(address).await, ("web".into(), 2));
    let text = metrics.render(&health);
    let counted = "\nlb_unserved{reason=\"UnsupportedProtocol\"} 1\n";
    assert!(text.contains(counted), "the SCTP port is not in\n{text}");

    send(vec![pods(&["node-b"])]).await;
    let falling = async { while asked(address).await.1 != 0 {} };
    timeout(PATIENCE, falling).await.expect("endpoints stay");
    send(vec![web("Cluster")]).await;
    refused(address).await;
    send(vec![web("Local")]).await;
    asked(address).await;
    send(vec![Change::Service(service_name(), None)]).await;
    refused(address).await;
}

fn service_name() -> ObjectName {
    service("web")
}
