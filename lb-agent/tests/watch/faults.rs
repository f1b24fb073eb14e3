//! A server that fails: nothing is lost, and nothing is deleted that still exists.

use crate::cluster::{service, slice};
use crate::view::View;
use lb_agent::source::kube::{Access, Cluster};
use lb_stand_in::{Api, Gone, Streaming};
use serde_json::{Value, json};
use std::time::Duration;

pub(crate) const NODE: &str = "node-a";

fn at(namespace: &str, mut object: Value) -> Value {
    object["metadata"]["namespace"] = namespace.into();
    object
}

pub(crate) fn web(name: &str) -> Value {
    at("default", service(name, json!({"ports": [{"port": 80}]})))
}

pub(crate) fn pods(addresses: &[&str]) -> Value {
    at("default", slice("slice", "web", addresses))
}

/// A server with a Node, two Services and a slice.
pub(crate) async fn prepared() -> Api {
    let api = Api::start().await;
    api.apply(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}));
    api.apply(web("web"));
    api.apply(web("old"));
    api.apply(pods(&["10.0.0.1"]));
    api
}

pub(crate) async fn watching(api: &Api) -> View {
    View::new(Cluster::open(Access::Anonymous, Some(&api.url())).await.unwrap(), NODE, None)
}

pub(crate) async fn synced(api: &Api) -> View {
    let mut view = watching(api).await;
    view.until("the first lists", |view| view.synced).await;
    assert_eq!(view.names(), ["old", "web", "slice"]);
    view
}

#[tokio::test]
async fn a_stream_is_used_where_there_is_one() {
    let api = prepared().await;
    let _view = synced(&api).await;
    let mut requests = api.requests();
    requests.sort();
    assert_eq!(requests, ["stream endpointslices", "stream nodes", "stream services"]);
}

#[tokio::test]
async fn older_servers_are_listed() {
    for streaming in [Streaming::Refused, Streaming::Unknown] {
        let api = prepared().await;
        api.behave(|behaviour| behaviour.streaming = streaming);
        let mut view = synced(&api).await;
        assert!(api.requests().contains(&"list services".to_owned()));
        api.apply(pods(&["10.0.0.2"]));
        view.until("a change after the list", |view| view.addresses("slice") == ["10.0.0.2"]).await;
        assert_eq!(view.deleted, [""; 0]);
    }
}

#[tokio::test]
async fn long_lists_come_in_pages_and_complete() {
    let api = prepared().await;
    api.behave(|behaviour| behaviour.streaming = Streaming::Refused);
    for i in 0..1000 {
        api.apply(web(&format!("web-{i}")));
    }
    let mut view = watching(&api).await;
    view.until("the lists", |view| view.synced).await;
    assert_eq!(view.services.len(), 1002);
    let pages = api.requests().iter().filter(|request| *request == "list services").count();
    assert!(pages >= 3, "{pages} pages");
}

#[tokio::test]
async fn nothing_is_complete_before_everything_is() {
    for (streaming, slow) in [
        (Streaming::Supported, "services"),
        (Streaming::Refused, "endpointslices"),
        (Streaming::Supported, "nodes"),
    ] {
        let api = prepared().await;
        api.behave(|behaviour| behaviour.streaming = streaming);
        api.slow_list(Some(slow), Duration::from_millis(700));
        let mut view = watching(&api).await;
        view.settle(Duration::from_millis(400)).await;
        assert!(!view.synced, "{slow} are not listed");
        assert!(!view.names().is_empty());
        view.until("the slow list", |view| view.synced).await;
        assert_eq!((view.names().len(), view.node.is_some()), (3, true));
    }
}

#[tokio::test]
async fn a_cut_connection_is_taken_up_where_it_ended() {
    let api = prepared().await;
    let mut view = synced(&api).await;
    // Others' changes move the version on; bookmarks tell.
    view.settle(Duration::from_millis(200)).await;
    api.requests();
    for round in 0..3 {
        api.disconnect();
        api.apply(web(&format!("new-{round}")));
        api.apply(pods(&["10.0.1.1"]));
    }
    api.delete("services", "default", "old");
    let expected = ["new-0", "new-1", "new-2", "web", "slice"];
    view.until("what happened meanwhile", |view| {
        view.names() == expected && view.addresses("slice") == ["10.0.1.1"]
    })
    .await;
    assert_eq!(view.deleted, ["old"]);
    let lists = api.requests().iter().filter(|request| !request.starts_with("watch")).count();
    assert_eq!(lists, 0, "no need to list anything");
}

#[tokio::test]
async fn bookmarks_save_a_list() {
    let api = prepared().await;
    let mut view = synced(&api).await;
    // Nothing of our Services changes for a long time, and the history is forgotten.
    for _ in 0..10 {
        api.apply(pods(&["10.0.2.1"]));
    }
    view.settle(Duration::from_millis(300)).await;
    api.compact();
    api.requests();
    api.disconnect();
    view.settle(Duration::from_millis(1500)).await;
    let requests = api.requests();
    assert!(requests.contains(&"watch services".to_owned()), "{requests:?}");
    assert!(
        !requests.iter().any(|request| request.contains("list") || request.contains("stream")),
        "{requests:?}"
    );
}

#[tokio::test]
async fn a_version_that_is_gone_means_a_new_list() {
    for gone in [Gone::Event, Gone::Status] {
        let api = prepared().await;
        api.behave(|behaviour| behaviour.gone = gone);
        let mut view = synced(&api).await;
        api.pause();
        api.delete("services", "default", "old");
        api.apply(web("new"));
        api.apply(pods(&["10.0.3.1"]));
        api.compact();
        api.slow_list(None, Duration::from_millis(500));
        api.disconnect();
        // While the new list is on its way, everything stays.
        view.settle(Duration::from_millis(300)).await;
        assert_eq!(view.names(), ["old", "web", "slice"], "{gone:?}");
        api.resume();
        view.until("the new lists", |view| {
            view.names() == ["new", "web", "slice"] && view.addresses("slice") == ["10.0.3.1"]
        })
        .await;
        assert_eq!(view.deleted, ["old"], "only what is gone, and once");
        // A consistent read, not what some cache holds.
        assert!(api.requests().contains(&"list services".to_owned()));
        api.apply(pods(&["10.0.3.2"]));
        view.until("the watch after it", |view| view.addresses("slice") == ["10.0.3.2"]).await;
    }
}

#[tokio::test]
async fn a_list_that_is_cut_deletes_nothing() {
    let api = prepared().await;
    api.behave(|behaviour| behaviour.streaming = Streaming::Refused);
    for i in 0..600 {
        api.apply(web(&format!("web-{i}")));
    }
    let mut view = watching(&api).await;
    view.until("the lists", |view| view.synced).await;
    api.slow_list(Some("services"), Duration::from_millis(300));
    api.pause();
    api.compact();
    api.apply(web("web-0"));
    api.compact();
    api.disconnect();
    // In the middle of the pages of the new list, twice: the connection goes, the continuation expires.
    for _ in 0..2 {
        view.settle(Duration::from_millis(1700)).await;
        api.compact();
        api.disconnect();
    }
    api.resume();
    api.apply(web("last"));
    view.until("the list at last", |view| view.services.contains_key("last")).await;
    assert_eq!(view.deleted, [""; 0]);
    assert_eq!(view.services.len(), 603);
}

#[tokio::test]
async fn a_server_that_goes_away_changes_nothing() {
    let api = prepared().await;
    let mut view = synced(&api).await;
    api.down();
    api.delete("services", "default", "old");
    api.compact();
    view.settle(Duration::from_secs(2)).await;
    assert_eq!(view.names(), ["old", "web", "slice"]);
    api.up();
    view.until("what happened meanwhile", |view| view.names() == ["web", "slice"]).await;
    assert_eq!(view.deleted, ["old"]);
}

#[tokio::test]
async fn a_server_that_is_not_there_yet_is_waited_for() {
    let api = prepared().await;
    api.down();
    let mut view = watching(&api).await;
    view.settle(Duration::from_secs(1)).await;
    assert!(!view.synced && view.names().is_empty());
    api.up();
    view.until("the first lists", |view| view.synced && view.names() == ["old", "web", "slice"]).await;
}

#[tokio::test]
async fn a_leaving_node_is_seen() {
    let api = prepared().await;
    let mut view = synced(&api).await;
    assert!(view.node.as_ref().unwrap().eligible);
    let taint = json!([{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]);
    api.apply(
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "other"}, "spec": {"taints": taint}}),
    );
    api.apply(
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}, "spec": {"taints": taint}}),
    );
    view.until("the taint", |view| view.node.as_ref().is_some_and(|node| !node.eligible)).await;
    api.delete("nodes", "", NODE);
    view.until("no Node", |view| view.node.is_none()).await;
}

#[tokio::test]
async fn a_list_whose_pages_grow_old_comes_in_one() {
    let api = prepared().await;
    api.behave(|behaviour| (behaviour.streaming, behaviour.old_pages) = (Streaming::Refused, true));
    for i in 0..300 {
        api.apply(web(&format!("web-{i}")));
    }
    let mut view = watching(&api).await;
    view.until("the list", |view| view.synced).await;
    assert_eq!((view.services.len(), view.deleted.len()), (302, 0));
}
