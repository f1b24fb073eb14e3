//! Which frontends a Service has.

use crate::support::{World, a_slice, endpoints};
use lb_agent::desired::node_port_addresses;
use lb_agent::store::{Change, LocalAddresses, Node};
use serde_json::{Value, json};
use std::time::Duration;

fn addresses(world: &World, service: &str) -> Vec<String> {
    let line = |line: String| line.split(": ").next().unwrap().to_owned();
    world.lines(service).into_iter().map(line).collect()
}

#[test]
fn every_kind_of_address_in_both_families() {
    let mut world = World::new();
    world.service(
        "web",
        json!({
            "type": "LoadBalancer",
            "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00:96::1"],
            "externalIPs": ["198.51.100.7", "2001:db8:7::7"],
            "ports": [{"port": 80, "nodePort": 30080}],
            "status": {"loadBalancer": {"ingress": [
                {"ip": "203.0.113.1"}, {"ip": "203.0.113.2", "ipMode": "VIP"}, {"ip": "203.0.113.3", "ipMode": "Proxy"},
                {"hostname": "lb.example"}, {"ip": "2001:db8:9::9"},
            ]}},
        }),
    );
    world.apply(a_slice("web-4", "web", json!([{"port": 8080}]), endpoints("10.0.0.1 @")));
    world.apply(a_slice("web-6", "web", json!([{"port": 8081}]), endpoints("fd00::1")));
    let (v4, v6) = ("10.0.0.1:8080@", "[fd00::1]:8081");
    assert_eq!(
        world.lines("web"),
        [
            format!("10.96.0.1:80/TCP ClusterIp: {v4}"),
            format!("192.0.2.1:30080/TCP NodePort: {v4}"),
            format!("198.51.100.7:80/TCP ExternalIp: {v4}"),
            format!("203.0.113.1:80/TCP LoadBalancer: {v4}"),
            format!("203.0.113.2:80/TCP LoadBalancer: {v4}"),
            format!("[2001:db8::1]:30080/TCP NodePort: {v6}"),
            format!("[2001:db8:7::7]:80/TCP ExternalIp: {v6}"),
            format!("[2001:db8:9::9]:80/TCP LoadBalancer: {v6}"),
            format!("[fd00:96::1]:80/TCP ClusterIp: {v6}"),
        ]
    );
    assert_eq!(world.warnings("web"), [""; 0]);
    world.config.external_ips = false;
    assert!(!world.lines("web").iter().any(|line| line.contains("ExternalIp")));
    assert_eq!(world.warnings("web"), ["spec.externalIPs is not served: --external-ips=false"]);
}

#[test]
fn a_family_without_cluster_ip_is_not_served() {
    let mut world = World::new();
    world.service(
        "web",
        json!({
            "type": "NodePort", "clusterIP": "10.96.0.1", "externalIPs": ["2001:db8:7::7"],
            "ports": [{"port": 80, "nodePort": 30080}],
        }),
    );
    assert_eq!(addresses(&world, "web"), ["10.96.0.1:80/TCP ClusterIp", "192.0.2.1:30080/TCP NodePort"]);
    let warnings = world.warnings("web");
    assert_eq!(
        warnings,
        ["spec.externalIPs: 2001:db8:7::7 is not served: the Service has no clusterIP of that family"]
    );
}

#[test]
fn some_services_are_none_of_our_business() {
    let ports = json!([{"port": 80, "nodePort": 30080}]);
    let labelled =
        |label: &str| json!({"clusterIP": "10.96.0.1", "ports": ports, "meta": {"labels": {label: "x"}}});
    for spec in [
        json!({"clusterIP": "None", "ports": ports}),
        json!({"clusterIP": "None", "clusterIPs": ["None"], "ports": ports}),
        json!({"type": "ExternalName", "externalName": "example.org", "clusterIP": "10.96.0.1", "ports": ports}),
        labelled("service.kubernetes.io/service-proxy-name"),
        labelled("service.kubernetes.io/headless"),
        json!({"clusterIP": "10.96.0.1"}),
    ] {
        let mut world = World::new();
        world.service("web", spec.clone()).endpoints("web", "10.0.0.1");
        assert_eq!(world.lines("web"), [""; 0], "{spec}");
        assert_eq!(world.warnings("web"), [""; 0], "{spec}");
    }
    let mut world = World::new();
    world.service("web", json!({"type": "NodePort", "clusterIP": "", "ports": ports}));
    assert_eq!(world.lines("web"), [""; 0]);
    assert!(world.warnings("web")[0].contains("it has no clusterIP"), "{:?}", world.warnings("web"));
}

#[test]
fn types_decide_what_counts() {
    let spec = |kind: &str| {
        json!({
            "type": kind, "clusterIP": "10.96.0.1", "ports": [{"port": 80, "nodePort": 30080}],
            "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}},
        })
    };
    for (kind, count) in [("ClusterIP", 1), ("NodePort", 2), ("LoadBalancer", 3)] {
        let mut world = World::new();
        world.service("web", spec(kind));
        assert_eq!(world.lines("web").len(), count, "{kind}: {:?}", world.lines("web"));
    }
    // allocateLoadBalancerNodePorts: false
    let mut world = World::new();
    let mut without = spec("LoadBalancer");
    without["ports"] = json!([{"port": 80, "nodePort": 0}, {"name": "b", "port": 81}]);
    world.service("web", without);
    assert!(!world.lines("web").iter().any(|line| line.contains("NodePort")));
}

#[test]
fn ports_that_cannot_be_served_are_named_and_the_rest_is_served() {
    let mut world = World::new();
    let ports = json!([
        {"name": "sctp", "port": 1, "protocol": "SCTP"}, {"name": "big", "port": 70000}, {"name": "ok", "port": 53, "protocol": "UDP"},
        {"name": "same", "port": 53, "nodePort": -1},
    ]);
    world.service("web", json!({"type": "NodePort", "clusterIP": "10.96.0.1", "ports": ports}));
    assert_eq!(addresses(&world, "web"), ["10.96.0.1:53/TCP ClusterIp", "10.96.0.1:53/UDP ClusterIp"]);
    assert_eq!(
        world.warnings("web"),
        [
            "port \"sctp\" is not served: protocol SCTP is not supported",
            "spec.ports[].nodePort: -1 is not a port number",
            "spec.ports[].port: 70000 is not a port number",
        ]
    );
}

#[test]
fn addresses_that_would_break_the_node_are_refused() {
    for ip in [
        "127.0.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "169.254.1.1",
        "255.255.255.255",
        "10.0.0.1/8",
        "10.00.0.1",
        "x",
    ] {
        let mut world = World::new();
        world.service("web", json!({"clusterIP": "10.96.0.1", "externalIPs": [ip], "ports": [{"port": 80}]}));
        assert_eq!(addresses(&world, "web"), ["10.96.0.1:80/TCP ClusterIp"], "{ip}");
        assert_eq!(world.warnings("web"), [format!("spec.externalIPs: {ip:?} is not a usable IP address")]);
        world.service("web", json!({"clusterIP": ip, "ports": [{"port": 80}]}));
        assert_eq!(world.warnings("web"), [format!("spec.clusterIPs: {ip:?} is not a usable IP address")]);
    }
}

#[test]
fn node_ports_on_the_addresses_that_the_flag_says() {
    let all = ["192.0.2.1", "192.0.2.9", "2001:db8::1"];
    for (flag, localhost, expected) in [
        ("", false, all.to_vec()),
        ("", true, ["127.0.0.1", all[0], all[1], "::1", all[2]].to_vec()),
        ("0.0.0.0/0", true, ["127.0.0.1", all[0], all[1], "::1", all[2]].to_vec()),
        ("192.0.2.8/29", false, vec!["192.0.2.9", "2001:db8::1"]),
        ("all", true, ["127.0.0.1", all[0], all[1], "::1", all[2]].to_vec()),
        ("0.0.0.0/0,::/0", true, ["127.0.0.1", all[0], all[1], "::1", all[2]].to_vec()),
        ("192.0.2.8/29,0.0.0.0/0", false, all.to_vec()),
        ("192.0.2.9/29", false, vec!["192.0.2.9", "2001:db8::1"]),
        ("192.0.2.8/29,::/0", true, vec!["192.0.2.9", "::1", "2001:db8::1"]),
        ("2001:db8::/32", false, all.to_vec()),
        ("198.51.100.0/24, fd00::/8", true, vec![]),
        ("127.0.0.0/8", true, vec!["127.0.0.1", "::1", "2001:db8::1"]),
        ("primary", true, vec!["192.0.2.9", "2001:db8::1"]),
    ] {
        let mut world = World::new();
        world.config.node_port_addresses = flag.parse().unwrap();
        world.config.localhost_node_ports = localhost;
        let local = ["192.0.2.1", "192.0.2.9", "2001:db8::1", "127.0.0.1", "::1", "fe80::1"];
        world.apply(Change::Addresses(local.iter().map(|ip| ip.parse().unwrap()).collect()));
        // The Node object says which address is the primary one, as far as it says anything.
        world.apply(Change::Node(Some(Node {
            addresses: vec!["192.0.2.9".parse().unwrap()],
            ..Node::default()
        })));
        let spec = json!({
            "type": "NodePort", "clusterIPs": ["10.96.0.1", "fd00:96::1"], "ports": [{"port": 80, "nodePort": 30080}],
        });
        world.service("web", spec);
        let ports = addresses(&world, "web").into_iter().filter(|line| line.ends_with("NodePort"));
        let ips: Vec<_> =
            ports.map(|line| line.rsplit_once(':').unwrap().0.trim_matches(['[', ']']).to_owned()).collect();
        assert_eq!(ips, expected, "--nodeport-addresses {flag:?}");
    }
}

/// The Node object says which it is, and it has to be here.
#[test]
fn primary_addresses() {
    let local = ["192.0.2.1", "192.0.2.9", "2001:db8::1"];
    for (listed, here, expected) in [
        (&["192.0.2.9", "192.0.2.1", "2001:db8::1"][..], &local[..], &["192.0.2.9", "2001:db8::1"][..]),
        (&[], &local, &["192.0.2.1", "2001:db8::1"]),
        // It is not here yet, or gone for now; the other family goes its own way.
        (&["198.51.100.1", "192.0.2.9"], &local, &["2001:db8::1"]),
        (&["192.0.2.9", "2001:db8::9"], &local[..1], &[]),
    ] {
        let ips =
            |list: &[&str]| list.iter().map(|ip| ip.parse().unwrap()).collect::<Vec<std::net::IpAddr>>();
        let node = Node { addresses: ips(listed), ..Node::default() };
        let local: LocalAddresses = ips(here).into_iter().collect();
        let found = node_port_addresses(&"primary".parse().unwrap(), true, &local, &node);
        assert_eq!(found, ips(expected), "{listed:?} {here:?}");
    }
}

#[test]
fn the_rest_of_the_spec_arrives() {
    use lb_agent::desired::{Config, Host, service};
    let affinity = |spec: Value| {
        let mut world = World::new();
        world.service("a/web", spec);
        let name = crate::support::name("a/web");
        let config = Config { masquerade_all: true, ..Config::default() };
        let node = "192.0.2.1".parse().unwrap();
        let found = world.store.service(&name).unwrap();
        let host = Host { node: world.store.node(), node_ports: &[node], addresses: world.store.addresses() };
        let desired = service(&name, found, [].into_iter(), &host, &config);
        desired
            .frontends
            .values()
            .map(|f| (f.affinity, f.masquerade_always, f.service.to_string()))
            .collect::<Vec<_>>()
    };
    let port = json!([{"name": "http", "port": 80, "nodePort": 30080}]);
    let name = "a/web:http".to_owned();
    assert_eq!(affinity(json!({"clusterIP": "10.96.0.1", "ports": port})), [(None, true, name.clone())]);
    let spec =
        json!({"type": "NodePort", "clusterIP": "10.96.0.1", "ports": port, "sessionAffinity": "ClientIP"});
    let day = Some(Duration::from_secs(10800));
    assert_eq!(
        affinity(spec.clone()),
        [(day, true, name.clone()), (day, false, name)],
        "ClusterIPs only are masqueraded"
    );
    let mut spec = spec;
    spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 30}});
    assert_eq!(affinity(spec)[0].0, Some(Duration::from_secs(30)));
}

#[test]
fn source_ranges_restrict_load_balancer_addresses_of_their_family() {
    let spec = |ranges: Value| {
        let ingress = json!([{"ip": "203.0.113.9"}, {"ip": "2001:db8::9"}]);
        json!({
            "type": "LoadBalancer", "clusterIPs": ["10.96.0.1", "fd00:96::1"], "externalIPs": ["198.51.100.1"],
            "ports": [{"port": 80, "nodePort": 30080}], "loadBalancerSourceRanges": ranges,
            "status": {"loadBalancer": {"ingress": ingress}},
        })
    };
    let sources = |world: &World| -> Vec<(String, Vec<String>, bool)> {
        let all = world.desired("web").frontends;
        let restricted = all.iter().filter_map(|(at, frontend)| Some((at, frontend.sources.as_ref()?)));
        let text = restricted.map(|(at, sources)| {
            (at.addr().to_string(), sources.ranges.iter().map(ToString::to_string).collect(), sources.node)
        });
        text.collect()
    };
    let mut world = World::new();
    world.service("web", spec(json!([" 203.0.113.0/24 ", "bad", "192.0.2.0/24"])));
    let restricted = |node| {
        let ranges = ["192.0.2.0/24", "203.0.113.0/24"].map(str::to_owned).to_vec();
        [("203.0.113.9:80".to_owned(), ranges, node)]
    };
    // None of the other family: that one is not restricted.
    assert_eq!(sources(&world), restricted(true));
    assert!(world.warnings("web").join("\n").contains("\"bad\" is not a CIDR"));
    // The node's address counts as it is now.
    world.store.take_dirty();
    world.apply(Change::Addresses(["198.51.100.7".parse().unwrap()].into_iter().collect()));
    assert!(world.store.take_dirty().services.contains(&crate::support::name("web")));
    assert_eq!(sources(&world), restricted(false));
    world.service("web", spec(json!([" "])));
    assert_eq!(sources(&world), []);
}

#[test]
fn endpoints_that_still_serve_linger() {
    let mut world = World::new();
    let ports = json!([{"name": "u", "port": 53, "protocol": "UDP"}, {"name": "t", "port": 53}]);
    world.service("dns", json!({"clusterIP": "10.96.0.1", "ports": ports}));
    let listed = crate::support::endpoints("10.42.0.1, 10.42.0.2 ~, 10.42.0.3 x, 10.42.0.4 !");
    let ports = json!([{"name": "u", "port": 53, "protocol": "UDP"}, {"name": "t", "port": 53}]);
    world.apply(crate::support::a_slice("dns-1", "dns", ports, listed));
    let lingering = |world: &World| -> Vec<(String, Vec<String>)> {
        let all = world.desired("dns").frontends.into_iter();
        all.map(|(at, f)| (at.protocol.to_string(), f.lingering.iter().map(ToString::to_string).collect()))
            .collect()
    };
    let still = vec!["10.42.0.2:53".to_owned()];
    assert_eq!(lingering(&world), [("TCP".to_owned(), vec![]), ("UDP".to_owned(), still)]);
    // It is used when nothing better is there: it does not linger then.
    let ports = json!([{"name": "u", "port": 53, "protocol": "UDP"}]);
    world.apply(crate::support::a_slice("dns-1", "dns", ports, crate::support::endpoints("10.42.0.2 ~")));
    assert_eq!(lingering(&world)[1].1, Vec::<String>::new());
}
