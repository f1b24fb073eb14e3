//! The rights that the agent is given are those that it uses: found out by what it asks a server for.

use crate::{all, list, of_kind, text};
use lb_agent::events::Events;
use lb_agent::source::kube::{Access, Cluster, Scope, run};
use lb_agent::store::{ObjectName, Warning};
use lb_stand_in::{Api, Right, Streaming};
use serde_json::json;
use std::collections::BTreeSet;
use std::time::Duration;

/// Lets the agent do all that it ever does with an API server.
async fn used() -> BTreeSet<Right> {
    let mut rights = BTreeSet::new();
    for streaming in [Streaming::Supported, Streaming::Refused] {
        let api = Api::start().await;
        api.behave(|behaviour| behaviour.streaming = streaming);
        let meta = json!({"name": "web", "namespace": "shop"});
        api.apply(json!({"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {}}));
        api.apply(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"}}));
        let cluster = Cluster::open(Access::Anonymous, Some(&api.url())).await.expect("a client");

        let (send, mut receive) = tokio::sync::mpsc::channel(64);
        let watching = tokio::spawn(run_source(cluster.clone(), send));
        let watched = async {
            while let Some(event) = receive.recv().await {
                if matches!(event, lb_agent::source::Event::Synced { .. }) {
                    return;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), watched).await.expect("the lists");

        let events = Events::start(cluster.client(), "node-a");
        let service = ObjectName::new("shop", "web");
        let warning = Warning::Protocol { port: "sig".into(), protocol: "SCTP".into() };
        events.starting();
        events.unserved(&service, &warning);
        api.until("events", |events| events.len() == 2).await;
        // Once more is counted at the first one.
        events.unserved(&service, &warning);
        api.until("events", |events| events.iter().any(|event| event["series"].is_object())).await;
        watching.abort();
        rights.extend(api.rights());
    }
    rights
}

async fn run_source(cluster: Cluster, events: lb_agent::source::Sender) {
    run(cluster, "node-a", Scope::default(), events).await;
}

#[tokio::test]
async fn no_right_is_missing_and_none_is_too_many() {
    let used = used().await;
    for (file, objects) in all() {
        let mut granted = BTreeSet::new();
        for rule in list(&of_kind(&objects, "ClusterRole")["rules"]) {
            let fields: Vec<_> = rule.as_object().expect("a rule").keys().map(String::as_str).collect();
            assert_eq!(fields, ["apiGroups", "resources", "verbs"], "{file}");
            for group in list(&rule["apiGroups"]).iter().map(text) {
                for resource in list(&rule["resources"]).iter().map(text) {
                    for verb in list(&rule["verbs"]).iter().map(text) {
                        let (group, resource, verb) = (group.into(), resource.into(), verb.into());
                        granted.insert(Right { group, resource, verb });
                    }
                }
            }
        }
        assert_eq!(granted, used, "{file}: granted on the left, used on the right");
    }
}
