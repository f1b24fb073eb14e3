//! What holds on every cluster.

use crate::cluster::{Cluster, service, slice, with_cluster};
use crate::view::View;
use serde_json::json;
use std::time::Duration;

fn view(cluster: &Cluster) -> View {
    View::new(cluster.server.clone(), &cluster.node, Some(&cluster.namespace))
}

fn port(number: u16) -> serde_json::Value {
    json!({"ports": [{"name": "", "port": number, "protocol": "TCP"}]})
}

#[tokio::test]
async fn what_exists_is_seen_before_it_is_called_complete() {
    with_cluster(|cluster| async move {
        for i in 0..20 {
            cluster.apply(service(&format!("web-{i}"), port(80))).await;
            cluster.apply(slice(&format!("slice-{i}"), &format!("web-{i}"), &["10.0.0.1", "10.0.0.2"])).await;
        }
        let mut view = view(&cluster);
        view.until("the lists", |view| view.synced).await;
        assert_eq!((view.services.len(), view.slices.len()), (20, 20));
        assert_eq!(view.addresses("slice-7"), ["10.0.0.1", "10.0.0.2"]);
        let node = view.node.as_ref().expect("the Node");
        assert_eq!(node.zone.as_deref(), Some("zone-a"));
        assert_eq!(node.pod_cidrs, ["10.42.7.0/24".parse().unwrap()]);
        assert!(node.eligible);
        let web = &view.services["web-7"];
        assert_eq!((web.cluster_ips.len(), web.ports[0].port), (1, 80));
    })
    .await;
}

#[tokio::test]
async fn changes_and_deletions_are_seen() {
    with_cluster(|cluster| async move {
        let mut view = view(&cluster);
        view.until("empty lists", |view| view.synced).await;
        cluster.apply(service("web", port(80))).await;
        cluster.apply(slice("web-1", "web", &["10.0.0.1"])).await;
        view.until("new objects", |view| view.names() == ["web", "web-1"]).await;
        cluster.apply(slice("web-1", "web", &["10.0.0.2"])).await;
        view.until("other endpoints", |view| view.addresses("web-1") == ["10.0.0.2"]).await;
        cluster.apply(service("web", port(81))).await;
        view.until("another port", |view| view.services["web"].ports[0].port == 81).await;
        cluster.delete_slice("web-1").await;
        view.until("no slice", |view| view.names() == ["web"]).await;
        cluster.delete_service("web").await;
        view.until("nothing", |view| view.names().is_empty()).await;
        assert_eq!(view.deleted, ["web-1", "web"]);
    })
    .await;
}

#[tokio::test]
async fn labels_take_objects_out_and_in() {
    with_cluster(|cluster| async move {
        let mut view = view(&cluster);
        cluster.apply(service("web", port(80))).await;
        cluster.apply(service("other", port(80))).await;
        cluster.apply(slice("web-1", "web", &["10.0.0.1"])).await;
        view.until("the objects", |view| view.synced && view.names() == ["other", "web", "web-1"]).await;
        for label in ["service.kubernetes.io/headless", "service.kubernetes.io/service-proxy-name"] {
            let mut labelled = service("web", port(80));
            labelled["metadata"]["labels"] = json!({label: "somebody"});
            cluster.apply(labelled).await;
            view.until(label, |view| view.names() == ["other", "web-1"]).await;
            cluster.apply(service("web", port(80))).await;
            view.until("the label to go", |view| view.names() == ["other", "web", "web-1"]).await;
        }
        let mut headless = slice("web-1", "web", &["10.0.0.1"]);
        headless["metadata"]["labels"]["service.kubernetes.io/headless"] = "".into();
        cluster.apply(headless).await;
        view.until("a headless slice", |view| view.names() == ["other", "web"]).await;
    })
    .await;
}

#[tokio::test]
async fn other_nodes_and_irrelevant_changes_do_not_disturb() {
    with_cluster(|cluster| async move {
        cluster.apply(service("web", port(80))).await;
        let mut view = View::new(cluster.server.clone(), "no-such-node", Some(&cluster.namespace));
        view.until("complete lists without a Node", |view| view.synced).await;
        assert_eq!(view.node, None);
        let before = view.services["web"].clone();
        let mut annotated = service("web", port(80));
        annotated["metadata"]["annotations"] = json!({"example.org/note": "x".repeat(1000)});
        cluster.apply(annotated).await;
        view.settle(Duration::from_millis(500)).await;
        assert_eq!(view.services["web"], before, "annotations are not kept");
    })
    .await;
}
