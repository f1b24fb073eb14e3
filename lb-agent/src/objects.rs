//! Kubernetes objects as they are read: the fields that decide where a packet goes, and no others. Who has ten thousand
//! of them to look through need not build the rest first: managed fields, annotations and conditions are passed over
//! while the text is parsed.
//!
//! Names are Kubernetes' own. [`crate::store`] makes of these what is kept.

use ::kube::Resource;
use ::kube::core::{ClusterResourceScope, NamespaceResourceScope};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

/// Labels and annotations that are looked at.
pub mod label {
    /// Of a slice: its Service.
    pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
    /// Not meant for service proxies.
    pub const HEADLESS: &str = "service.kubernetes.io/headless";
    /// Served only by a proxy of that name; we have none.
    pub const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
    /// Of a node.
    pub const ZONE: &str = "topology.kubernetes.io/zone";
    /// Annotation of a slice: when the control plane saw what changed it.
    pub const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";

    pub(super) const ALL: [&str; 5] = [SERVICE_NAME, HEADLESS, PROXY_NAME, ZONE, TRIGGER_TIME];
}

macro_rules! objects {
    ($($name:ident: $group:literal, $version:literal, $plural:literal, $scope:ty;)*) => {$(
        impl Resource for $name {
            type DynamicType = ();
            type Scope = $scope;

            fn kind((): &()) -> Cow<'_, str> {
                stringify!($name).into()
            }

            fn group((): &()) -> Cow<'_, str> {
                $group.into()
            }

            fn version((): &()) -> Cow<'_, str> {
                $version.into()
            }

            fn plural((): &()) -> Cow<'_, str> {
                $plural.into()
            }

            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    )*};
}

objects! {
    Service: "", "v1", "services", NamespaceResourceScope;
    EndpointSlice: "discovery.k8s.io", "v1", "endpointslices", NamespaceResourceScope;
    Node: "", "v1", "nodes", ClusterResourceScope;
}

macro_rules! fields {
    ($($(#[$of_struct:meta])* $name:ident { $($(#[$attribute:meta])* $field:ident: $ty:ty,)* })*) => {$(
        $(#[$of_struct])*
        #[derive(Clone, Debug, Default, Deserialize)]
        #[serde(rename_all = "camelCase", default)]
        #[expect(missing_docs, reason = "they are Kubernetes' own")]
        pub struct $name { $($(#[$attribute])* pub $field: $ty,)* }
    )*};
}

// What may be absent may be null, too: so Go writes an empty list.
fields! {
    /// A Service.
    Service {
        #[serde(deserialize_with = "metadata")]
        metadata: ObjectMeta,
        spec: Option<ServiceSpec>,
        status: Option<ServiceStatus>,
    }
    /// `spec` of a Service.
    ServiceSpec {
        #[serde(rename = "type")]
        type_: Option<String>,
        #[serde(rename = "clusterIP")]
        cluster_ip: Option<String>,
        #[serde(rename = "clusterIPs")]
        cluster_ips: Option<Vec<String>>,
        #[serde(rename = "externalIPs")]
        external_ips: Option<Vec<String>>,
        ports: Option<Vec<ServicePort>>,
        internal_traffic_policy: Option<String>,
        external_traffic_policy: Option<String>,
        session_affinity: Option<String>,
        session_affinity_config: Option<SessionAffinityConfig>,
        health_check_node_port: Option<i32>,
        load_balancer_source_ranges: Option<Vec<String>>,
    }
    /// `spec.ports[]` of a Service.
    ServicePort {
        name: Option<String>,
        protocol: Option<String>,
        port: i32,
        node_port: Option<i32>,
    }
    /// `spec.sessionAffinityConfig` of a Service.
    SessionAffinityConfig {
        #[serde(rename = "clientIP")]
        client_ip: Option<ClientIpConfig>,
    }
    /// `spec.sessionAffinityConfig.clientIP` of a Service.
    ClientIpConfig {
        timeout_seconds: Option<i32>,
    }
    /// `status` of a Service.
    ServiceStatus {
        load_balancer: Option<LoadBalancerStatus>,
    }
    /// `status.loadBalancer` of a Service.
    LoadBalancerStatus {
        ingress: Option<Vec<LoadBalancerIngress>>,
    }
    /// `status.loadBalancer.ingress[]` of a Service.
    LoadBalancerIngress {
        ip: Option<String>,
        ip_mode: Option<String>,
    }
    /// An EndpointSlice.
    EndpointSlice {
        #[serde(deserialize_with = "metadata")]
        metadata: ObjectMeta,
        address_type: String,
        ports: Option<Vec<EndpointPort>>,
        endpoints: Option<Vec<Endpoint>>,
    }
    /// `ports[]` of an EndpointSlice.
    EndpointPort {
        name: Option<String>,
        protocol: Option<String>,
        port: Option<i32>,
    }
    /// `endpoints[]` of an EndpointSlice.
    Endpoint {
        addresses: Option<Vec<String>>,
        conditions: Option<EndpointConditions>,
        hints: Option<EndpointHints>,
        node_name: Option<String>,
    }
    /// `endpoints[].conditions` of an EndpointSlice.
    EndpointConditions {
        ready: Option<bool>,
        serving: Option<bool>,
        terminating: Option<bool>,
    }
    /// `endpoints[].hints` of an EndpointSlice.
    EndpointHints {
        for_nodes: Option<Vec<Named>>,
        for_zones: Option<Vec<Named>>,
    }
    /// The name of a node or of a zone.
    Named {
        name: String,
    }
    /// A Node.
    Node {
        #[serde(deserialize_with = "metadata")]
        metadata: ObjectMeta,
        spec: Option<NodeSpec>,
        status: Option<NodeStatus>,
    }
    /// `spec` of a Node.
    NodeSpec {
        #[serde(rename = "podCIDR")]
        pod_cidr: Option<String>,
        #[serde(rename = "podCIDRs")]
        pod_cidrs: Option<Vec<String>>,
        taints: Option<Vec<Taint>>,
    }
    /// `spec.taints[]` of a Node.
    Taint {
        key: String,
    }
    /// `status` of a Node.
    NodeStatus {
        addresses: Option<Vec<NodeAddress>>,
    }
    /// `status.addresses[]` of a Node.
    NodeAddress {
        #[serde(rename = "type")]
        type_: String,
        address: String,
    }
}

/// `metadata`, without what nobody asks for.
fn metadata<'de, D: Deserializer<'de>>(from: D) -> Result<ObjectMeta, D::Error> {
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "camelCase", default)]
    struct Metadata {
        name: Option<String>,
        namespace: Option<String>,
        resource_version: Option<String>,
        creation_timestamp: Option<Time>,
        deletion_timestamp: Option<Time>,
        labels: Option<Labels>,
        annotations: Option<Labels>,
    }
    let found = Option::<Metadata>::deserialize(from)?.unwrap_or_default();
    Ok(ObjectMeta {
        name: found.name,
        namespace: found.namespace,
        resource_version: found.resource_version,
        creation_timestamp: found.creation_timestamp,
        deletion_timestamp: found.deletion_timestamp,
        labels: found.labels.map(|labels| labels.0),
        annotations: found.annotations.map(|labels| labels.0),
        ..ObjectMeta::default()
    })
}

/// Those of [`label::ALL`].
struct Labels(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Labels {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Each;

        impl<'de> Visitor<'de> for Each {
            type Value = Labels;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of strings")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Labels, M::Error> {
                let mut kept = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    if label::ALL.contains(&key.as_str()) {
                        kept.insert(key, map.next_value()?);
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(Labels(kept))
            }
        }

        from.deserialize_map(Each)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::{Metadata, Resource as Known};
    use serde_json::{Value, json};

    #[test]
    fn they_are_where_kubernetes_has_them() {
        fn same<T: Resource<DynamicType = ()>, K: Known + Metadata>() {
            assert_eq!(
                (T::kind(&()), T::group(&()), T::version(&())),
                (K::KIND.into(), K::GROUP.into(), K::VERSION.into())
            );
            assert_eq!(T::plural(&()), K::URL_PATH_SEGMENT);
        }
        use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
        same::<Service, core::Service>();
        same::<EndpointSlice, discovery::EndpointSlice>();
        same::<Node, core::Node>();
    }

    /// Our own and Kubernetes' reading of a text with every field that we know agree about it.
    #[test]
    fn no_field_is_misspelt() {
        use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
        let service = json!({
            "metadata": {
                "name": "web", "namespace": "shop", "resourceVersion": "7", "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": {"service.kubernetes.io/headless": "", "app": "web"}, "managedFields": [{"manager": "m"}],
            },
            "spec": {
                "type": "LoadBalancer", "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"], "externalIPs": ["192.0.2.1"],
                "ports": [{"name": "http", "protocol": "TCP", "port": 80, "nodePort": 30080}],
                "internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local", "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 5}}, "healthCheckNodePort": 32000,
                "loadBalancerSourceRanges": ["10.0.0.0/8"],
            },
            "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.9", "ipMode": "VIP"}]}},
        });
        let ours: Service = serde_json::from_value(service.clone()).expect("a Service");
        let theirs: core::Service = serde_json::from_value(service.clone()).expect("a Service");
        assert_known(&service, &serde_json::to_value(theirs).expect("JSON"));
        assert_full(&(&ours.spec, &ours.status));
        assert_eq!(ours.metadata.labels.map(|kept| kept.len()), Some(1));

        let slice = json!({
            "metadata": {"name": "web-1", "annotations": {label::TRIGGER_TIME: "2026-01-01T00:00:00Z", "x": "y"}},
            "addressType": "IPv4", "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
            "endpoints": [{
                "addresses": ["10.1.0.1"], "conditions": {"ready": true, "serving": true, "terminating": false},
                "hints": {"forNodes": [{"name": "n1"}], "forZones": [{"name": "a"}]}, "nodeName": "n1",
            }],
        });
        let ours: EndpointSlice = serde_json::from_value(slice.clone()).expect("a slice");
        let theirs: discovery::EndpointSlice = serde_json::from_value(slice.clone()).expect("a slice");
        assert_known(&slice, &serde_json::to_value(theirs).expect("JSON"));
        assert_full(&(&ours.address_type, &ours.ports, &ours.endpoints));
        assert_eq!(ours.metadata.annotations.map(|kept| kept.len()), Some(1));

        let node = json!({
            "metadata": {"name": "n1", "labels": {label::ZONE: "a"}},
            "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24"], "taints": [{"key": "k", "effect": "NoSchedule"}]},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
        });
        let ours: Node = serde_json::from_value(node.clone()).expect("a Node");
        let theirs: core::Node = serde_json::from_value(node.clone()).expect("a Node");
        assert_known(&node, &serde_json::to_value(theirs).expect("JSON"));
        assert_full(&(&ours.spec, &ours.status));
    }

    /// No field of ours was left empty.
    fn assert_full(ours: &impl fmt::Debug) {
        let text = format!("{ours:?}");
        assert!(!text.contains("None") && !text.contains("\"\""), "{text}");
    }

    /// `object`'s fields are all in what the full type understood of it.
    fn assert_known(object: &Value, understood: &Value) {
        match (object, understood) {
            (Value::Object(fields), Value::Object(known)) => {
                for (field, value) in fields {
                    assert_known(value, known.get(field).unwrap_or_else(|| panic!("no field {field}")));
                }
            }
            (Value::Array(items), Value::Array(known)) => {
                items.iter().zip(known).for_each(|(item, known)| assert_known(item, known));
            }
            _ => assert_eq!(object, understood),
        }
    }

    #[test]
    fn what_is_absent_may_be_null() {
        let slice = json!({"metadata": {"name": "a", "labels": null}, "addressType": "IPv4", "endpoints": null, "ports": null});
        let slice: EndpointSlice = serde_json::from_value(slice).expect("as Go writes it");
        assert!(slice.endpoints.is_none() && slice.ports.is_none());
        let service: Service =
            serde_json::from_value(json!({"metadata": null, "spec": null})).expect("nothing");
        assert!(service.spec.is_none());
    }
}
