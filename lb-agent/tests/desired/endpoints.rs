//! Which endpoints a frontend has.

use crate::support::{World, a_slice, endpoints, name};
use lb_agent::store::{Change, Node};
use serde_json::{Value, json};

/// Readiness and termination, and the two policies: endpoints, then what (cluster policy, local policy) give.
#[test]
fn readiness_termination_and_locality() {
    for (given, cluster, local) in [
        ("", "reject", "reject"),
        ("10.0.0.1 @, 10.0.0.2", "10.0.0.1:8080@ 10.0.0.2:8080", "10.0.0.1:8080@"),
        ("10.0.0.2, 10.0.0.3", "10.0.0.2:8080 10.0.0.3:8080", "drop"),
        // Not ready: never.
        ("10.0.0.1 @ !", "reject", "reject"),
        ("10.0.0.1 @ !, 10.0.0.2", "10.0.0.2:8080", "drop"),
        // Serving and terminating: where nothing ready is left in that scope.
        ("10.0.0.1 @ ~, 10.0.0.2", "10.0.0.2:8080", "10.0.0.1:8080@"),
        ("10.0.0.1 @ ~, 10.0.0.2 ~", "10.0.0.1:8080@ 10.0.0.2:8080", "10.0.0.1:8080@"),
        ("10.0.0.1 @ ~, 10.0.0.3 @", "10.0.0.3:8080@", "10.0.0.3:8080@"),
        ("10.0.0.2 ~", "10.0.0.2:8080", "drop"),
        // Terminating and no longer serving: never.
        ("10.0.0.1 @ x, 10.0.0.2 x", "reject", "reject"),
        ("10.0.0.1 @ x, 10.0.0.2 ~", "10.0.0.2:8080", "drop"),
    ] {
        let mut world = World::new();
        world.endpoints("web", given);
        let spec = json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]});
        world.service("web", spec.clone());
        assert_eq!(world.lines("web"), [format!("10.96.0.1:80/TCP ClusterIp: {cluster}")], "{given:?}");

        let mut local_spec = spec.clone();
        local_spec["internalTrafficPolicy"] = "Local".into();
        world.service("web", local_spec);
        assert_eq!(world.lines("web"), [format!("10.96.0.1:80/TCP ClusterIp: {local}")], "{given:?}");

        // externalTrafficPolicy is for clients outside of the cluster only.
        let mut external = spec.clone();
        external["type"] = "NodePort".into();
        external["ports"] = json!([{"port": 80, "nodePort": 30080}]);
        external["externalTrafficPolicy"] = "Local".into();
        world.service("web", external.clone());
        let both = if cluster == local { cluster.to_owned() } else { format!("{cluster} | {local}") };
        let cluster_ip = format!("10.96.0.1:80/TCP ClusterIp: {cluster}");
        assert_eq!(
            world.lines("web"),
            [cluster_ip, format!("192.0.2.1:30080/TCP NodePort: {both}")],
            "{given:?}"
        );

        // Both policies: pods' short way to the NodePort is still the whole cluster.
        external["internalTrafficPolicy"] = "Local".into();
        world.service("web", external);
        let cluster_ip = format!("10.96.0.1:80/TCP ClusterIp: {local}");
        assert_eq!(
            world.lines("web"),
            [cluster_ip, format!("192.0.2.1:30080/TCP NodePort: {both}")],
            "{given:?}"
        );
    }
}

#[test]
fn missing_conditions_have_defaults() {
    for (conditions, usable) in [
        (json!(null), true),
        (json!({}), true),
        (json!({"ready": true}), true),
        (json!({"ready": false}), false),
        (json!({"ready": false, "serving": true}), false),
        // serving is true where it is not given.
        (json!({"ready": false, "terminating": true}), true),
        (json!({"ready": false, "serving": false, "terminating": true}), false),
        // publishNotReadyAddresses: the control plane says ready.
        (json!({"ready": true, "serving": false, "terminating": true}), true),
    ] {
        let mut world = World::new();
        world.service("web", json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}));
        let endpoint = json!([{"addresses": ["10.0.0.1"], "conditions": conditions}]);
        world.apply(a_slice("web-1", "web", json!([{"port": 1}]), endpoint));
        let expected = if usable { "10.0.0.1:1" } else { "reject" };
        assert_eq!(world.lines("web"), [format!("10.96.0.1:80/TCP ClusterIp: {expected}")], "{conditions}");
    }
}

#[test]
fn hints_count_all_or_nothing() {
    let both = "10.0.0.1:8080 10.0.0.2:8080";
    for (given, expected) in [
        ("10.0.0.1 zone=a, 10.0.0.2 zone=b", "10.0.0.1:8080"),
        ("10.0.0.1 zone=b+a, 10.0.0.2 zone=a", both),
        ("10.0.0.1 zone=a, 10.0.0.2", both),
        ("10.0.0.1 zone=b, 10.0.0.2 zone=c", both),
        // Nodes before zones.
        ("10.0.0.1 node=node-a zone=b, 10.0.0.2 node=node-b zone=a", "10.0.0.1:8080"),
        ("10.0.0.1 node=node-c zone=b, 10.0.0.2 node=node-b zone=a", "10.0.0.2:8080"),
        ("10.0.0.1 node=node-a zone=b, 10.0.0.2 zone=a", "10.0.0.2:8080"),
        ("10.0.0.1 node=node-a, 10.0.0.2", both),
        // Only ready endpoints have a say.
        ("10.0.0.1 zone=a, 10.0.0.2 !", "10.0.0.1:8080"),
        ("10.0.0.1 zone=b, 10.0.0.2 zone=a ~", "10.0.0.1:8080"),
        // Terminating ones are a last resort, wherever they are.
        ("10.0.0.1 zone=a ~, 10.0.0.2 zone=b ~", both),
    ] {
        let mut world = World::new();
        world.service("web", json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}));
        world.endpoints("web", given);
        assert_eq!(world.lines("web"), [format!("10.96.0.1:80/TCP ClusterIp: {expected}")], "{given:?}");
    }
    let mut world = World::new();
    world.service("web", json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}));
    world.endpoints("web", "10.0.0.1 zone=a, 10.0.0.2 zone=b").apply(Change::Node(Some(Node::default())));
    assert_eq!(world.lines("web"), [format!("10.96.0.1:80/TCP ClusterIp: {both}")], "a node without a zone");
}

#[test]
fn local_policies_ignore_hints() {
    let mut world = World::new();
    let spec = json!({
        "type": "NodePort", "clusterIP": "10.96.0.1", "externalTrafficPolicy": "Local",
        "ports": [{"port": 80, "nodePort": 30080}],
    });
    world.service("web", spec).endpoints("web", "10.0.0.1 @ zone=b, 10.0.0.2 zone=a");
    assert_eq!(world.lines("web")[1], "192.0.2.1:30080/TCP NodePort: 10.0.0.2:8080 | 10.0.0.1:8080@");
}

#[test]
fn slices_are_merged_by_port_name_and_protocol() {
    let mut world = World::new();
    let ports = json!([
        {"name": "http", "port": 80, "targetPort": "web"},
        {"name": "dns", "port": 53, "protocol": "UDP"},
        {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
        {"name": "nobody", "port": 99},
    ]);
    world.service("web", json!({"clusterIP": "10.96.0.1", "ports": ports}));
    // Named target ports resolve to different numbers; protocols have to agree as well as names.
    let one = json!([{"name": "http", "port": 8080}, {"name": "dns", "port": 5353, "protocol": "UDP"}]);
    let two = json!([
        {"name": "http", "port": 9090}, {"name": "dns", "port": 1, "protocol": "TCP"}, {"name": "nobody"},
        {"name": "dns-tcp", "port": 5354}, {"name": "other", "port": 2}
    ]);
    world.apply(a_slice("web-1", "web", one, endpoints("10.0.0.1, 10.0.0.2 @")));
    world.apply(a_slice("web-2", "web", two.clone(), endpoints("10.0.0.3, 10.0.0.3")));
    // Another Service's, and the same name in another namespace.
    world.apply(a_slice("db-1", "db", two.clone(), endpoints("10.0.0.8")));
    world.apply(a_slice("other/web-1", "web", two, endpoints("10.0.0.9")));
    assert_eq!(
        world.lines("web"),
        [
            "10.96.0.1:53/TCP ClusterIp: 10.0.0.3:5354",
            "10.96.0.1:53/UDP ClusterIp: 10.0.0.1:5353 10.0.0.2:5353@",
            "10.96.0.1:80/TCP ClusterIp: 10.0.0.1:8080 10.0.0.2:8080@ 10.0.0.3:9090",
            "10.96.0.1:99/TCP ClusterIp: reject",
        ]
    );
    // A slice moves to another Service.
    world.apply(a_slice("web-1", "db", json!([{"name": "http", "port": 7}]), endpoints("10.0.0.1")));
    world.apply(Change::Slice(name("web-2"), None));
    assert_eq!(world.lines("web")[2], "10.96.0.1:80/TCP ClusterIp: reject");
}

#[test]
fn an_endpoint_in_two_slices_counts_once_and_for_the_better() {
    let mut world = World::new();
    world.service("web", json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}));
    let port = json!([{"port": 8080}]);
    for (one, two) in [("10.0.0.1 @, 10.0.0.2", "10.0.0.1 !"), ("10.0.0.1 !", "10.0.0.1 @, 10.0.0.2")] {
        world.apply(a_slice("web-1", "web", port.clone(), endpoints(one)));
        world.apply(a_slice("web-2", "web", port.clone(), endpoints(two)));
        assert_eq!(world.lines("web"), ["10.96.0.1:80/TCP ClusterIp: 10.0.0.1:8080@ 10.0.0.2:8080"]);
    }
}

#[test]
fn health_checks_count_ready_local_endpoints_once() {
    let mut world = World::new();
    let spec = |policy: &str, kind: &str| {
        json!({
            "type": kind, "clusterIPs": ["10.96.0.1", "fd00:96::1"], "externalTrafficPolicy": policy,
            "healthCheckNodePort": 32000, "ports": [{"name": "a", "port": 80}, {"name": "b", "port": 81}],
        })
    };
    let ports = json!([{"name": "a", "port": 1}, {"name": "b", "port": 2}]);
    world.apply(a_slice(
        "web-1",
        "web",
        ports.clone(),
        endpoints("10.0.0.1 @, 10.0.0.2 @ ~, 10.0.0.3, 10.0.0.4 @ !"),
    ));
    world.apply(a_slice("web-2", "web", ports.clone(), endpoints("10.0.0.1 @, 10.0.0.5 @")));
    // The same pods, one of which is not ready in this family.
    world.apply(a_slice("web-3", "web", ports, endpoints("fd00::1 @, fd00::5 @ !")));
    for (policy, kind, expected) in [
        ("Local", "LoadBalancer", Some((32000, 2))),
        ("Cluster", "LoadBalancer", None),
        ("Local", "NodePort", None),
    ] {
        world.service("web", spec(policy, kind));
        assert_eq!(world.health_check("web"), expected, "{policy} {kind}");
    }
    // The family with more of them counts, whichever it is.
    let more = endpoints("fd00::1 @, fd00::5 @, fd00::6 @, fd00::7");
    world.apply(a_slice("web-3", "web", json!([{"name": "a", "port": 1}]), more));
    world.service("web", spec("Local", "LoadBalancer"));
    assert_eq!(world.health_check("web"), Some((32000, 3)));
    let mut single = spec("Local", "LoadBalancer");
    single["clusterIPs"] = json!(["10.96.0.1"]);
    world.service("web", single);
    assert_eq!(world.health_check("web"), Some((32000, 2)), "a family that the Service does not have");
}

#[test]
fn bad_endpoints_are_left_out_and_named() {
    let mut world = World::new();
    world.service("web", json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}));
    let warn = |world: &mut World, ports: Value, endpoints: Value| {
        world.apply(a_slice("web-1", "web", ports, endpoints));
        world.warnings("web").join("; ")
    };
    let port = json!([{"port": 8080}]);
    for (ip, expected) in [
        ("10.0.0", "EndpointSlice endpoints[].addresses: \"10.0.0\" is not a usable IP address"),
        ("127.0.0.1", "\"127.0.0.1\" is not a usable"),
        ("224.0.0.1", "\"224.0.0.1\" is not a usable"),
        ("0.0.0.0", "\"0.0.0.0\" is not a usable"),
    ] {
        let warning =
            warn(&mut world, port.clone(), json!([{"addresses": [ip]}, {"addresses": ["10.0.0.1"]}]));
        assert!(warning.contains(expected), "{warning}");
        assert_eq!(world.lines("web"), ["10.96.0.1:80/TCP ClusterIp: 10.0.0.1:8080"], "{ip}");
    }
    let mixed = json!([{"addresses": ["10.0.0.1"]}, {"addresses": ["fd00::1"]}]);
    assert!(warn(&mut world, port.clone(), mixed).contains("fd00::1 is not served: the slice's addressType"));
    assert!(warn(&mut world, json!([{"port": 70000}]), json!([])).contains("70000 is not a port number"));
    assert_eq!(warn(&mut world, port, json!([{"addresses": []}])), "");
}
