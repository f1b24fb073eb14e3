//! A cluster to write to: the stand-in or a real one.

use k8s_openapi::api::core::v1::{Namespace, Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Resource;
use kube::api::{DeleteParams, PostParams};
use lb_agent::source::kube::{Access, Cluster as Server};
use lb_stand_in::Api;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

pub(crate) struct Cluster {
    pub(crate) server: Server,
    pub(crate) namespace: String,
    pub(crate) node: String,
    /// Kept running.
    _api: Option<Api>,
}

/// Runs a test against a cluster and cleans up behind it, whatever happened.
pub(crate) async fn with_cluster<F: Future<Output = ()> + Send + 'static>(test: impl FnOnce(Cluster) -> F) {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let unique = format!("lb-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let kubeconfig = std::env::var_os("LB_TEST_KUBECONFIG").filter(|path| !path.is_empty());
    let (server, api) = match &kubeconfig {
        Some(path) => {
            println!("against the cluster of {}", Path::new(path).display());
            (Server::open(Access::Kubeconfig(path.into()), None).await.unwrap(), None)
        }
        None => {
            println!("against the stand-in");
            let api = Api::start().await;
            (Server::open(Access::Anonymous, Some(&api.url())).await.unwrap(), Some(api))
        }
    };
    let namespaces = kube::Api::<Namespace>::all(server.client());
    let nodes = kube::Api::<Node>::all(server.client());
    let object =
        |kind: &str, name: &str| json!({"apiVersion": "v1", "kind": kind, "metadata": {"name": name}});
    let namespace: Namespace = from(object("Namespace", &unique));
    namespaces.create(&PostParams::default(), &namespace).await.unwrap();
    let mut node = object("Node", &unique);
    node["metadata"]["labels"] = json!({"topology.kubernetes.io/zone": "zone-a"});
    node["spec"] = json!({"podCIDR": "10.42.7.0/24", "podCIDRs": ["10.42.7.0/24"]});
    nodes.create(&PostParams::default(), &from(node)).await.unwrap();

    let cluster = Cluster { server, namespace: unique.clone(), node: unique.clone(), _api: api };
    let result = tokio::spawn(test(cluster)).await;
    if kubeconfig.is_some() {
        let _ = nodes.delete(&unique, &DeleteParams::default()).await;
        let _ = namespaces.delete(&unique, &DeleteParams::default()).await;
    }
    if let Err(error) = result {
        std::panic::resume_unwind(error.into_panic());
    }
}

fn from<K: serde::de::DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).unwrap()
}

pub(crate) fn service(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec})
}

pub(crate) fn slice(name: &str, service: &str, addresses: &[&str]) -> Value {
    let endpoints: Vec<_> =
        addresses.iter().map(|ip| json!({"addresses": [ip], "conditions": {"ready": true}})).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "ports": [{"name": "", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints,
    })
}

impl Cluster {
    /// Creates or replaces.
    pub(crate) async fn apply(&self, object: Value) {
        match object["kind"].as_str() {
            Some("Service") => self.write::<Service>(object).await,
            Some("EndpointSlice") => self.write::<EndpointSlice>(object).await,
            other => panic!("{other:?}"),
        }
    }

    async fn write<K>(&self, object: Value)
    where
        K: Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + serde::Serialize
            + serde::de::DeserializeOwned,
    {
        let api = kube::Api::<K>::namespaced(self.server.client(), &self.namespace);
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        let mut wanted: Value = object;
        match api.get_opt(&name).await.unwrap() {
            None => drop(api.create(&PostParams::default(), &from(wanted)).await.unwrap()),
            Some(current) => {
                // What a real server wants to see again.
                let current = serde_json::to_value(&current).unwrap();
                wanted["metadata"]["resourceVersion"] = current["metadata"]["resourceVersion"].clone();
                if K::kind(&()) == "Service" && wanted["spec"]["clusterIP"].is_null() {
                    wanted["spec"]["clusterIP"] = current["spec"]["clusterIP"].clone();
                    wanted["spec"]["clusterIPs"] = current["spec"]["clusterIPs"].clone();
                }
                api.replace(&name, &PostParams::default(), &from(wanted)).await.unwrap();
            }
        }
    }

    pub(crate) async fn delete_service(&self, name: &str) {
        let api = kube::Api::<Service>::namespaced(self.server.client(), &self.namespace);
        api.delete(name, &DeleteParams::default()).await.unwrap();
    }

    pub(crate) async fn delete_slice(&self, name: &str) {
        let api = kube::Api::<EndpointSlice>::namespaced(self.server.client(), &self.namespace);
        api.delete(name, &DeleteParams::default()).await.unwrap();
    }
}
