//! API groups, and what an older one says differently.

use serde_json::{Value, json};

/// The group and version that a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dialect {
    prefix: &'static str,
    api_version: &'static str,
}

const ALL: [Dialect; 5] = [
    Dialect { prefix: "/api/v1/", api_version: "v1" },
    Dialect { prefix: "/apis/discovery.k8s.io/v1/", api_version: "discovery.k8s.io/v1" },
    Dialect { prefix: "/apis/discovery.k8s.io/v1beta1/", api_version: "discovery.k8s.io/v1beta1" },
    Dialect { prefix: "/apis/events.k8s.io/v1/", api_version: "events.k8s.io/v1" },
    Dialect { prefix: "/apis/networking.k8s.io/v1/", api_version: "networking.k8s.io/v1" },
];

/// What an `EndpointSlice` of version 1 has fields of its own for.
const HOSTNAME: &str = "kubernetes.io/hostname";

impl Dialect {
    /// That of a path, and what comes after it.
    pub(crate) fn of(path: &str) -> Option<(Self, &str)> {
        ALL.into_iter().find_map(|dialect| Some((dialect, path.strip_prefix(dialect.prefix)?)))
    }

    /// The group, as access rules name it.
    pub(crate) fn group(self) -> &'static str {
        self.api_version.split_once('/').map_or("", |(group, _)| group)
    }

    /// Kind and version of an object of `kind` (`services` …).
    pub(crate) fn type_of(self, kind: &str) -> (&'static str, &'static str) {
        let kind = match kind {
            "services" => "Service",
            "nodes" => "Node",
            "endpointslices" => "EndpointSlice",
            "servicecidrs" => "ServiceCIDR",
            "events" => "Event",
            "namespaces" => "Namespace",
            // Nobody decodes these by their kind.
            _ => "",
        };
        (kind, self.api_version)
    }

    /// An object as it is said in this dialect.
    pub(crate) fn say(self, object: &mut Value) {
        if self.api_version != "discovery.k8s.io/v1beta1" || object["kind"] != "EndpointSlice" {
            return;
        }
        object["apiVersion"] = self.api_version.into();
        for endpoint in object["endpoints"].as_array_mut().into_iter().flatten() {
            if let Some(node) = endpoint.as_object_mut().and_then(|fields| fields.remove("nodeName")) {
                endpoint["topology"] = json!({HOSTNAME: node});
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_of_the_older_version_name_their_nodes_otherwise() {
        let slice = json!({
            "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
            "endpoints": [{"addresses": ["10.0.0.1"], "nodeName": "n1"}, {"addresses": ["10.0.0.2"]}],
        });
        let (new, rest) = Dialect::of("/apis/discovery.k8s.io/v1/endpointslices").unwrap();
        let (old, _) = Dialect::of("/apis/discovery.k8s.io/v1beta1/endpointslices").unwrap();
        assert_eq!(rest, "endpointslices");
        let mut said = slice.clone();
        new.say(&mut said);
        assert_eq!(said, slice);
        old.say(&mut said);
        let expected = json!({
            "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1beta1",
            "endpoints": [{"addresses": ["10.0.0.1"], "topology": {HOSTNAME: "n1"}}, {"addresses": ["10.0.0.2"]}],
        });
        assert_eq!(said, expected);
        assert_eq!(old.type_of("endpointslices"), ("EndpointSlice", "discovery.k8s.io/v1beta1"));
        assert_eq!(old.group(), "discovery.k8s.io");
        assert_eq!(Dialect::of("/api/v1/services").unwrap().0.group(), "");
        assert!(Dialect::of("/apis/apps/v1/deployments").is_none());
    }
}
