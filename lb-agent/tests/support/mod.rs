//! What the tests of the core share: objects in few words and frontends as text.

use lb_agent::desired::{Config, Host, node_port_addresses, service};
use lb_agent::model::{EndpointSet, Frontend, FrontendAddr};
use lb_agent::objects;
use lb_agent::store::{Change, Node, ObjectName, Slice, Store};
use serde_json::{Value, json};
use std::sync::Arc;

/// The node that everything is seen from.
pub(crate) const NODE: &str = "node-a";

pub(crate) fn name(text: &str) -> ObjectName {
    let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
    ObjectName::new(namespace, name)
}

fn from<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("{error} in {value}"))
}

/// A Service from its spec. `"meta"` and `"status"` in it go where they belong.
pub(crate) fn a_service(at: &str, mut spec: Value) -> Change {
    let at = name(at);
    let mut take = |key: &str| spec.as_object_mut().unwrap().remove(key).unwrap_or(json!({}));
    let (mut metadata, status) = (take("meta"), take("status"));
    metadata["name"] = at.name().into();
    metadata["namespace"] = at.namespace().into();
    let object: objects::Service = from(json!({"metadata": metadata, "spec": spec, "status": status}));
    Change::Service(at, Some(Arc::new((&object).into())))
}

/// A slice `at` of `service`; the family is that of its first endpoint.
pub(crate) fn a_slice(at: &str, service: &str, ports: Value, endpoints: Value) -> Change {
    let at = name(at);
    let v6 = endpoints[0]["addresses"][0].as_str().is_some_and(|ip| ip.contains(':'));
    let object: objects::EndpointSlice = from(json!({
        "metadata": {
            "name": at.name(), "namespace": at.namespace(), "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": if v6 { "IPv6" } else { "IPv4" },
        "ports": ports,
        "endpoints": endpoints,
    }));
    Change::Slice(at, Slice::new(&object, NODE).map(Arc::new))
}

/// Endpoints in short: `10.42.0.1` is ready, `@` here, `!` not ready, `~` serving but terminating,
/// `x` terminating and not serving; `zone=a` and `node=b` are hints.
pub(crate) fn endpoints(text: &str) -> Value {
    let endpoint = |words: &str| {
        let mut words = words.split_whitespace();
        let address = words.next().unwrap();
        let mut endpoint = json!({"addresses": [address], "conditions": {}});
        for word in words {
            match word {
                "@" => endpoint["nodeName"] = NODE.into(),
                "!" => {
                    endpoint["conditions"] = json!({"ready": false, "serving": false, "terminating": false})
                }
                "~" => endpoint["conditions"] = json!({"ready": false, "serving": true, "terminating": true}),
                "x" => {
                    endpoint["conditions"] = json!({"ready": false, "serving": false, "terminating": true})
                }
                hint => {
                    let (kind, names) = hint.split_once('=').unwrap();
                    let names: Vec<_> = names.split('+').map(|name| json!({"name": name})).collect();
                    let field = if kind == "zone" { "forZones" } else { "forNodes" };
                    endpoint["hints"][field] = names.into();
                }
            }
        }
        endpoint
    };
    text.split(',').map(str::trim).filter(|words| !words.is_empty()).map(endpoint).collect()
}

/// A store and the flags.
#[derive(Default)]
pub(crate) struct World {
    pub(crate) store: Store,
    pub(crate) config: Config,
}

impl World {
    /// A node with 192.0.2.1 and 2001:db8::1, in zone `a`.
    pub(crate) fn new() -> Self {
        let mut world =
            Self { config: Config { localhost_node_ports: false, ..Config::default() }, ..Self::default() };
        let addresses = ["192.0.2.1", "2001:db8::1", "127.0.0.1", "::1", "fe80::1"];
        world.apply(Change::Addresses(addresses.iter().map(|ip| ip.parse().unwrap()).collect()));
        world.apply(Change::Node(Some(Node { zone: Some("a".into()), ..Node::default() })));
        world
    }

    pub(crate) fn apply(&mut self, change: Change) -> &mut Self {
        self.store.apply(change);
        self
    }

    pub(crate) fn service(&mut self, at: &str, spec: Value) -> &mut Self {
        self.apply(a_service(at, spec))
    }

    /// A slice of the Service of the same name, with the one unnamed port 8080.
    pub(crate) fn endpoints(&mut self, service: &str, text: &str) -> &mut Self {
        let plain = json!([{"port": 8080}]);
        self.apply(a_slice(&format!("{service}-1"), service, plain, endpoints(text)))
    }

    pub(crate) fn desired(&self, at: &str) -> lb_agent::desired::DesiredService {
        let at = name(at);
        let (wanted, localhost) = (&self.config.node_port_addresses, self.config.localhost_node_ports);
        let addresses = node_port_addresses(wanted, localhost, self.store.addresses(), self.store.node());
        let Some(found) = self.store.service(&at) else { return Default::default() };
        let slices: Vec<_> = self.store.slices(&at).collect();
        let host =
            Host { node: self.store.node(), node_ports: &addresses, addresses: self.store.addresses() };
        service(&at, found, slices.iter().copied(), &host, &self.config)
    }

    /// The frontends of a Service as lines, see [`show`].
    pub(crate) fn lines(&self, at: &str) -> Vec<String> {
        self.desired(at).frontends.iter().map(|(address, frontend)| show(address, frontend)).collect()
    }

    pub(crate) fn warnings(&self, at: &str) -> Vec<String> {
        self.desired(at).warnings.iter().map(ToString::to_string).collect()
    }

    pub(crate) fn health_check(&self, at: &str) -> Option<(u16, usize)> {
        self.desired(at).health_check
    }
}

/// `ADDRESS/PROTOCOL KIND in -> out`, with `@` behind endpoints of this node; one set if both are the same.
pub(crate) fn show(address: &FrontendAddr, frontend: &Frontend) -> String {
    let set = |set: &EndpointSet| match set {
        EndpointSet::Reject => "reject".to_owned(),
        EndpointSet::Drop => "drop".to_owned(),
        EndpointSet::Endpoints(endpoints) => {
            assert!(endpoints.iter().is_sorted_by(|a, b| a < b), "sorted, no duplicates: {endpoints:?}");
            let one = |endpoint: lb_agent::model::Endpoint| {
                format!("{}{}", endpoint.addr, if endpoint.local { "@" } else { "" })
            };
            assert!(!endpoints.is_empty());
            endpoints.iter().map(one).collect::<Vec<_>>().join(" ")
        }
    };
    let (internal, external) = (set(&frontend.internal), set(&frontend.external));
    let sets = if internal == external { internal } else { format!("{internal} | {external}") };
    format!("{}/{} {:?}: {sets}", address.addr(), address.protocol, frontend.kind)
}
