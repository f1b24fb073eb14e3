//! Kubernetes Events, against the stand-in.

use lb_agent::events::Events;
use lb_agent::source::kube::{Access, Cluster};
use lb_agent::store::{ObjectName, Warning};
use lb_stand_in::Api;
use serde_json::{Value, json};
use std::time::Duration;

const SENDING: &str = "post events";

async fn start() -> (Api, Events) {
    let api = Api::start().await;
    for name in ["web", "dns"] {
        let meta = json!({"name": name, "namespace": "shop"});
        api.apply(json!({"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {}}));
    }
    let cluster = Cluster::open(Access::Anonymous, Some(&api.url())).await.unwrap();
    (api, Events::start(cluster.client(), "node-a"))
}

fn sctp(port: &str) -> Warning {
    Warning::Protocol { port: port.into(), protocol: "SCTP".into() }
}

fn service(name: &str) -> ObjectName {
    ObjectName::new("shop", name)
}

fn count(events: &Events, result: &str) -> f64 {
    let found = events.samples().into_iter().find(|sample| sample.labels[0].1 == result);
    found.expect("no such result").value
}

/// Counted a moment after the server has it.
async fn counted(events: &Events, result: &str, expected: f64) {
    let counting = async {
        while count(events, result) < expected {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(20), counting).await;
    assert_eq!(count(events, result), expected, "{result}");
}

fn notes(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["note"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn they_arrive_whole() {
    let (api, events) = start().await;
    events.starting();
    events.unserved(&service("web"), &sctp("sig"));
    events.unserved(&service("web"), &sctp("sig2"));
    let all = api.until("events", |all| all.len() == 3).await;
    let [node, first, second] = &all[..] else { unreachable!() };
    assert_eq!((&node["type"], &node["reason"]), (&json!("Normal"), &json!("Starting")));
    // `kubectl describe node` looks for such a uid.
    let regarding = json!({"apiVersion": "v1", "kind": "Node", "name": "node-a", "uid": "node-a"});
    assert_eq!((&node["regarding"], &node["metadata"]["namespace"]), (&regarding, &json!("default")));

    let services = api.objects("services");
    let web = services.iter().find(|object| object["metadata"]["name"] == "web").unwrap();
    let uid = &web["metadata"]["uid"];
    for (event, port) in [(first, "sig"), (second, "sig2")] {
        let regarding =
            json!({"apiVersion": "v1", "kind": "Service", "namespace": "shop", "name": "web", "uid": uid});
        assert_eq!(event["regarding"], regarding);
        assert_eq!(event["metadata"]["namespace"], "shop");
        assert_eq!((&event["type"], &event["reason"]), (&json!("Warning"), &json!("UnsupportedProtocol")));
        let note = format!("port {port:?} is not served: protocol SCTP is not supported");
        assert_eq!(event["note"], note);
        assert_eq!(event["reportingController"], "lb-agent");
        assert_eq!(event["reportingInstance"], "lb-agent-node-a");
        // Without these the API server refuses it.
        assert!(event["eventTime"].is_string() && event["action"].is_string(), "{event}");
    }
}

#[tokio::test]
async fn old_servers_want_a_nodes_events_in_another_namespace() {
    let (api, events) = start().await;
    api.behave(|behaviour| behaviour.old_events = true);
    events.starting();
    events.unserved(&service("web"), &sctp("sig"));
    events.node("TableFull", "no room");
    let all = api.until("events", |all| all.len() == 3).await;
    let homes: Vec<_> = all.iter().map(|event| event["metadata"]["namespace"].as_str().unwrap()).collect();
    assert_eq!(homes, ["kube-system", "kube-system", "shop"]);
    counted(&events, "sent", 3.0).await;
    assert_eq!(count(&events, "failed"), 0.0);
    let asked = api.requests().iter().filter(|request| *request == SENDING).count();
    assert_eq!(asked, 4, "refused once, and remembered");
    assert_eq!(api.askers(), [concat!("lb-agent/", env!("CARGO_PKG_VERSION")).to_owned()].into());
}

#[tokio::test]
async fn what_happens_again_is_counted() {
    let (api, events) = start().await;
    events.unserved(&service("web"), &sctp("sig"));
    let first = api.until("events", |all| all.len() == 1).await;
    assert!(first[0]["series"].is_null(), "{first:?}");
    for count in 2..4 {
        events.unserved(&service("web"), &sctp("sig"));
        api.until("events", |all| all.len() == 1 && all[0]["series"]["count"] == count).await;
    }
    let name = first[0]["metadata"]["name"].as_str().unwrap();
    // The API server forgets events after an hour.
    api.delete("events", "shop", name);
    events.unserved(&service("web"), &sctp("sig"));
    let again = api.until("events", |all| all.len() == 1).await;
    assert_ne!(again[0]["metadata"]["name"], name);
    counted(&events, "sent", 4.0).await;
}

#[tokio::test]
async fn many_are_cut_short() {
    let (api, events) = start().await;
    for number in 0..10_000 {
        events.unserved(&service("web"), &sctp(&format!("p{number}")));
    }
    api.until("events", |all| all.len() == 25).await;
    assert_eq!(count(&events, "dropped"), 10_000.0 - 64.0);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let sent = api.requests().iter().filter(|request| *request == SENDING).count();
    assert_eq!(sent, 25, "the rest comes slowly");
}

#[tokio::test]
async fn an_agent_that_may_not_goes_on() {
    let (api, events) = start().await;
    api.behave(|behaviour| behaviour.refused = Some(("events", 403, "events is forbidden")));
    events.starting();
    events.unserved(&service("web"), &sctp("lost"));
    counted(&events, "failed", 2.0).await;
    let sent = api.requests().iter().filter(|request| *request == SENDING).count();
    assert_eq!(sent, 2, "refused is refused");
    api.behave(|behaviour| behaviour.refused = None);
    events.unserved(&service("web"), &sctp("allowed"));
    let all = api.until("events", |all| !all.is_empty()).await;
    assert!(notes(&all)[0].contains("allowed"), "{all:?}");
}

#[tokio::test]
async fn a_server_that_comes_back_gets_what_it_missed() {
    let (api, events) = start().await;
    api.behave(|behaviour| behaviour.refused = Some(("events", 500, "etcd has no leader")));
    events.starting();
    while !api.requests().iter().any(|request| request == SENDING) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    api.behave(|behaviour| behaviour.refused = None);
    api.until("events", |all| all.len() == 1).await;
    api.down();
    events.unserved(&service("dns"), &sctp("dark"));
    tokio::time::sleep(Duration::from_millis(300)).await;
    api.up();
    let all = api.until("events", |all| all.len() == 2).await;
    assert!(notes(&all)[1].contains("dark"), "{all:?}");
    counted(&events, "sent", 2.0).await;
    assert_eq!(count(&events, "failed"), 0.0);
}

#[tokio::test]
async fn nobody_is_told_of_a_service_that_is_gone() {
    let (api, events) = start().await;
    events.unserved(&service("gone"), &sctp("sig"));
    events.unserved(&service("web"), &sctp("sig"));
    let all = api.until("events", |all| !all.is_empty()).await;
    assert_eq!((all.len(), &all[0]["regarding"]["name"]), (1, &json!("web")));
    assert_eq!(count(&events, "failed"), 0.0);
}

#[tokio::test]
async fn without_an_api_server_nothing_happens() {
    let events = Events::default();
    events.starting();
    events.unserved(&service("web"), &sctp("sig"));
    assert_eq!(events.samples(), []);
}
