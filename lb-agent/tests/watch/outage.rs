//! A server that is away, or will not have us: what changes (nothing), and what is said (once).

use crate::faults::{NODE, pods, prepared, synced, watching, web};
use crate::log::Log;
use crate::view::View;
use lb_agent::source::kube::{Access, Cluster};
use lb_stand_in::Api;
use std::collections::BTreeSet;
use std::time::Duration;

fn api_up(cluster: &Cluster) -> f64 {
    let samples = cluster.samples();
    samples.iter().find(|sample| sample.name == "lb_api_up").expect("a metric").value
}

async fn open(api: &Api) -> (Cluster, View) {
    let cluster = Cluster::open(Access::Anonymous, Some(&api.url())).await.unwrap();
    (cluster.clone(), View::new(cluster, NODE, None))
}

/// An hour in which all timers run, seconds in which nothing can be answered.
#[tokio::test]
async fn an_hour_without_the_server_changes_nothing_and_takes_two_lines() {
    let api = prepared().await;
    let (cluster, mut view) = open(&api).await;
    view.until("the first lists", |view| view.synced).await;
    let log = Log::start();
    api.down();
    api.delete("services", "default", "old");
    tokio::time::pause();
    view.settle(Duration::from_secs(3600)).await;
    assert_eq!((view.names(), view.deleted.len()), (vec!["old", "web", "slice"], 0));
    assert_eq!(api_up(&cluster), 0.0);
    let lines = log.take();
    let expected = format!("WARN the API server {} cannot be reached (", api.url());
    assert!(lines.len() == 1 && lines[0].starts_with(&expected), "{lines:#?}");
    assert!(lines[0].ends_with("; what is known stays served, trying again"), "{lines:#?}");

    api.up();
    // By now each watch waits for half a minute between attempts.
    tokio::time::advance(Duration::from_secs(60)).await;
    tokio::time::resume();
    view.until("what happened meanwhile", |view| view.names() == ["web", "slice"]).await;
    api.apply(pods(&["10.0.0.9"]));
    view.until("what happens now", |view| view.addresses("slice") == ["10.0.0.9"]).await;
    assert_eq!(api_up(&cluster), 1.0);
    let lines = log.take();
    let expected = format!("INFO the API server {} is back after ", api.url());
    assert!(lines.len() == 1 && lines[0].starts_with(&expected), "{lines:#?}");
}

/// Each kind is tried again at times of its own; what one finds out, all are to know.
#[tokio::test]
async fn when_the_server_is_back_all_kinds_are_watched_at_once() {
    let api = prepared().await;
    let (cluster, mut view) = open(&api).await;
    view.until("the first lists", |view| view.synced).await;
    api.down();
    // By now they wait for some seconds between attempts.
    view.settle(Duration::from_secs(9)).await;
    assert_eq!(api_up(&cluster), 0.0);
    api.requests();
    api.up();
    let mut asked = BTreeSet::new();
    while asked.is_empty() {
        view.settle(Duration::from_millis(10)).await;
        asked.extend(api.requests());
    }
    view.settle(Duration::from_millis(300)).await;
    asked.extend(api.requests());
    let all = ["watch endpointslices", "watch nodes", "watch services"].map(str::to_owned);
    assert_eq!(asked, BTreeSet::from(all));
    assert_eq!(api_up(&cluster), 1.0);
}

#[tokio::test]
async fn a_kind_that_is_refused_is_named_once_with_what_is_missing() {
    for (kind, code, message, expected) in [
        (
            "endpointslices",
            403,
            "endpointslices.discovery.k8s.io is forbidden",
            "WARN EndpointSlices: refused by the API server (403): endpointslices.discovery.k8s.io is forbidden (the agent \
             needs get, list and watch on services, endpointslices and nodes); trying again",
        ),
        (
            "endpointslices",
            404,
            "the server could not find the requested resource",
            "WARN EndpointSlices: refused by the API server (404): the server could not find the requested resource \
             (Kubernetes 1.21 or later is needed; this API server is v1.20.2); trying again",
        ),
    ] {
        let api = prepared().await;
        api.behave(|behaviour| behaviour.unread = Some((kind, code, message)));
        let log = Log::start();
        let (cluster, mut view) = open(&api).await;
        view.settle(Duration::from_millis(2500)).await;
        assert!(!view.synced);
        assert_eq!(view.names(), ["old", "web"]);
        assert_eq!(api_up(&cluster), 0.0);
        let lines: Vec<_> = log.take().into_iter().filter(|line| !line.contains(" listed")).collect();
        assert_eq!(lines, [expected]);
        api.behave(|behaviour| behaviour.unread = None);
        view.until("the rest", |view| view.synced && view.names() == ["old", "web", "slice"]).await;
        assert_eq!(api_up(&cluster), 1.0);
        assert!(log.take().contains(&"INFO EndpointSlices: can be watched now".to_owned()));
    }
}

#[tokio::test]
async fn a_server_that_is_overloaded_or_starts_is_said_to_be() {
    let api = prepared().await;
    let mut view = synced(&api).await;
    api.behave(|behaviour| {
        behaviour.unread = Some(("services", 503, "apiserver is shutting down"));
    });
    let log = Log::start();
    api.disconnect();
    let words = "cannot serve us at the moment (503); what is known stays served, trying again";
    let mut lines = Vec::new();
    // Once, however often it is tried: it is said after the second time, and there is a third and a fourth.
    for _ in 0..40 {
        view.settle(Duration::from_millis(250)).await;
        lines.extend(log.take());
        if lines.iter().any(|line| line.contains(words)) {
            break;
        }
    }
    view.settle(Duration::from_secs(4)).await;
    lines.extend(log.take());
    assert_eq!(lines.iter().filter(|line| line.contains(words)).count(), 1, "{lines:#?}");
    api.behave(|behaviour| behaviour.unread = None);
    api.apply(web("new"));
    view.until("the rest", |view| view.names().contains(&"new")).await;
}

#[tokio::test]
async fn without_trouble_there_is_a_line_for_each_kind() {
    let api = prepared().await;
    // Falling back from a streaming list is no trouble.
    api.behave(|behaviour| behaviour.streaming = lb_stand_in::Streaming::Refused);
    let log = Log::start();
    let mut view = watching(&api).await;
    view.until("the lists", |view| view.synced).await;
    for _ in 0..3 {
        api.disconnect();
        view.settle(Duration::from_millis(300)).await;
    }
    let mut lines = log.take();
    lines.sort();
    assert_eq!(
        lines,
        ["INFO EndpointSlices: 1 listed", "INFO Services: 2 listed", "INFO this Node: 1 listed"]
    );
}
