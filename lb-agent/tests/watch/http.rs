//! Our own servers, asked over real HTTP.

use lb_agent::health::{Health, serve};
use lb_agent::metrics::Metrics;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// The whole response, once somebody listens.
pub(crate) async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = loop {
        match TcpStream::connect(address).await {
            Ok(stream) => break stream,
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

/// A port that nobody listens on.
pub(crate) async fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

#[tokio::test]
async fn health_and_metrics_answer() {
    let (health, metrics) = (Health::default(), Metrics::default());
    let (healthz, scraped) = (free().await, free().await);
    tokio::spawn(serve("health", healthz, health.handler()));
    tokio::spawn(serve("metrics", scraped, metrics.handler(&health)));

    let text = get(healthz, "/healthz?verbose=1").await;
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
    let lower = text.to_lowercase();
    assert!(lower.contains("content-type: application/json\r\n"), "{text}");
    assert!(lower.contains("x-content-type-options: nosniff\r\n"), "{text}");
    assert!(text.ends_with(r#", "nodeEligible": true}"#), "{text}");
    health.set_node_eligible(false);
    assert!(get(healthz, "/healthz").await.starts_with("HTTP/1.1 503 Service Unavailable\r\n"));
    assert!(get(healthz, "/livez").await.starts_with("HTTP/1.1 200 OK\r\n"));
    assert!(get(healthz, "/metrics").await.starts_with("HTTP/1.1 404 Not Found\r\n"));

    let text = get(scraped, "/metrics").await;
    assert!(text.contains("kubeproxy_proxy_healthz_total{code=\"503\"} 1\n"), "{text}");
    assert!(get(scraped, "/proxyMode").await.ends_with("\r\n\r\nebpf"));
    assert!(get(scraped, "/healthz").await.ends_with("\r\n\r\nok"));
}

#[tokio::test]
async fn a_port_that_is_taken_is_waited_for() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap();
    let server = tokio::spawn(serve("health", address, Health::default().handler()));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!server.is_finished());
    drop(taken);
    let answer = tokio::time::timeout(Duration::from_secs(10), get(address, "/livez")).await;
    assert!(answer.expect("the server never came").starts_with("HTTP/1.1 200 OK"));
}
