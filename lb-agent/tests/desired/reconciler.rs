//! Only what changed is written, and addresses that two Services claim are settled.

use crate::support::{World, a_service, name, show};
use lb_agent::desired::{Config, Diff, Reconciler};
use lb_agent::model::{FrontendAddr, Protocol};
use lb_agent::store::{Change, Node};
use serde_json::{Value, json};

struct Bench {
    world: World,
    reconciler: Reconciler,
    warnings: Vec<String>,
}

impl Bench {
    fn new() -> Self {
        let world = World::new();
        let mut bench =
            Self { reconciler: Reconciler::new(world.config.clone(), []), world, warnings: Vec::new() };
        bench.write();
        bench
    }

    fn diff(&mut self) -> Diff {
        let dirty = self.world.store.take_dirty();
        let news = self.reconciler.update(&self.world.store, dirty.services);
        self.warnings.extend(news.into_iter().map(|(name, warning)| format!("{name}: {warning}")));
        self.reconciler.diff()
    }

    /// Commits and shows what was written and (`-`) removed.
    fn write(&mut self) -> Vec<String> {
        let diff = self.diff();
        let mut lines: Vec<_> =
            diff.upserts.iter().map(|(address, frontend)| show(address, frontend)).collect();
        lines.extend(diff.deletes.iter().map(|address| format!("-{}", address.addr())));
        self.reconciler.committed(diff);
        lines
    }
}

fn at(created: &str, ip: &str) -> Value {
    json!({"clusterIP": ip, "ports": [{"port": 80}], "meta": {"creationTimestamp": created}})
}

#[test]
fn only_differences_are_written() {
    let mut bench = Bench::new();
    bench.world.service("web", at("2026-01-01T00:00:00Z", "10.96.0.1")).endpoints("web", "10.0.0.1");
    bench.world.service("db", at("2026-01-01T00:00:00Z", "10.96.0.2"));
    assert_eq!(
        bench.write(),
        ["10.96.0.1:80/TCP ClusterIp: 10.0.0.1:8080", "10.96.0.2:80/TCP ClusterIp: reject"]
    );
    assert_eq!(bench.write(), [""; 0]);
    // The same again, and a change back before anything was written.
    bench.world.endpoints("web", "10.0.0.1").endpoints("db", "10.0.0.9").endpoints("db", "");
    assert_eq!(bench.write(), [""; 0]);
    bench.world.endpoints("web", "10.0.0.1, 10.0.0.2");
    assert_eq!(bench.write(), ["10.96.0.1:80/TCP ClusterIp: 10.0.0.1:8080 10.0.0.2:8080"]);
    // Recreated with another address.
    bench.world.service("web", at("2026-01-02T00:00:00Z", "10.96.0.3"));
    assert_eq!(bench.write(), ["10.96.0.3:80/TCP ClusterIp: 10.0.0.1:8080 10.0.0.2:8080", "-10.96.0.1:80"]);
    bench.world.apply(Change::Service(name("web"), None));
    assert_eq!(bench.write(), ["-10.96.0.3:80"]);
    // Slices of no Service do not matter, until there is one.
    bench.world.endpoints("late", "10.0.0.5");
    assert_eq!(bench.write(), [""; 0]);
    bench.world.service("late", at("2026-01-02T00:00:00Z", "10.96.0.4"));
    assert_eq!(bench.write(), ["10.96.0.4:80/TCP ClusterIp: 10.0.0.5:8080"]);
}

#[test]
fn node_ports_follow_the_nodes_addresses() {
    let mut bench = Bench::new();
    let spec =
        json!({"type": "NodePort", "clusterIP": "10.96.0.1", "ports": [{"port": 80, "nodePort": 30080}]});
    bench.world.service("web", spec).service("db", at("2026-01-01T00:00:00Z", "10.96.0.2"));
    bench.write();
    let addresses = |ips: &[&str]| Change::Addresses(ips.iter().map(|ip| ip.parse().unwrap()).collect());
    bench.world.apply(addresses(&["192.0.2.1", "192.0.2.2"]));
    assert_eq!(bench.write(), ["192.0.2.2:30080/TCP NodePort: reject"]);
    bench.world.apply(addresses(&["192.0.2.2"]));
    assert_eq!(bench.write(), ["-192.0.2.1:30080"]);
}

#[test]
fn zones_matter_to_hints() {
    let mut bench = Bench::new();
    bench.world.service("web", at("2026-01-01T00:00:00Z", "10.96.0.1"));
    bench.world.endpoints("web", "10.0.0.1 zone=a, 10.0.0.2 zone=b");
    assert_eq!(bench.write(), ["10.96.0.1:80/TCP ClusterIp: 10.0.0.1:8080"]);
    bench.world.apply(Change::Node(Some(Node { zone: Some("b".into()), ..Node::default() })));
    assert_eq!(bench.write(), ["10.96.0.1:80/TCP ClusterIp: 10.0.0.2:8080"]);
}

#[test]
fn the_older_service_keeps_a_contested_address() {
    let mut bench = Bench::new();
    bench.world.service("b/old", at("2026-01-01T00:00:00Z", "10.96.0.1")).endpoints("b/old", "");
    bench.world.service("a/new", at("2026-01-02T00:00:00Z", "10.96.0.1"));
    bench.write();
    let owner = |bench: &Bench| bench.reconciler.written().next().map(|(_, f)| f.service.to_string());
    assert_eq!(owner(&bench).as_deref(), Some("b/old"));
    let expected = "a/new: TCP 10.96.0.1:80 is not served: b/old is older and has it already";
    assert_eq!(bench.warnings, [expected]);
    // Said once, but known as long as it lasts.
    bench.world.service(
        "b/old",
        json!({
            "clusterIP": "10.96.0.1", "ports": [{"port": 80}, {"name": "b", "port": 81}],
            "meta": {"creationTimestamp": "2026-01-01T00:00:00Z"},
        }),
    );
    bench.write();
    assert_eq!(bench.warnings.len(), 1);
    let known: Vec<_> =
        bench.reconciler.warnings().map(|(name, warning)| format!("{name}: {warning}")).collect();
    assert_eq!(known, [expected]);
    // The younger one takes over.
    bench.world.apply(Change::Service(name("b/old"), None));
    assert_eq!(bench.write(), ["10.96.0.1:80/TCP ClusterIp: reject", "-10.96.0.1:81"]);
    assert_eq!(owner(&bench).as_deref(), Some("a/new"));
    assert_eq!(bench.reconciler.warnings().count(), 0);
}

#[test]
fn age_then_name_decides_and_arrival_does_not() {
    for order in [["c", "a", "b"], ["b", "c", "a"], ["a", "b", "c"]] {
        let mut bench = Bench::new();
        for service in order {
            bench.world.service(service, at("2026-01-01T00:00:00Z", "10.96.0.1"));
            bench.write();
        }
        assert_eq!(bench.reconciler.written().next().unwrap().1.service.service.name(), "a", "{order:?}");
    }
}

#[test]
fn nobody_takes_over_a_cluster_ip() {
    let mut bench = Bench::new();
    let mut thief = at("2020-01-01T00:00:00Z", "10.96.0.66");
    thief["externalIPs"] = json!(["10.96.0.1"]);
    bench.world.service("thief", thief);
    bench.write();
    bench.world.service("web", at("2026-01-01T00:00:00Z", "10.96.0.1"));
    bench.write();
    assert_eq!(bench.reconciler.written().next().unwrap().1.service.service.name(), "web");
    assert!(
        bench.warnings[0].starts_with("default/thief: TCP 10.96.0.1:80 is not served"),
        "{:?}",
        bench.warnings
    );
}

#[test]
fn a_failed_write_leaves_nothing_to_chance() {
    let mut bench = Bench::new();
    bench.world.service("web", at("2026-01-01T00:00:00Z", "10.96.0.1")).endpoints("web", "10.0.0.1");
    bench.write();
    bench.world.endpoints("web", "10.0.0.2").service("db", at("2026-01-01T00:00:00Z", "10.96.0.2"));
    let diff = bench.diff();
    bench.reconciler.failed(&diff);
    // Both changes are taken back. The kernel may have got them.
    bench.world.endpoints("web", "10.0.0.1").apply(Change::Service(name("db"), None));
    assert_eq!(bench.write(), ["10.96.0.1:80/TCP ClusterIp: 10.0.0.1:8080", "-10.96.0.2:80"]);
    assert_eq!(bench.write(), [""; 0]);
}

fn adopted(ips: &[&str]) -> Vec<FrontendAddr> {
    ips.iter().map(|ip| FrontendAddr::new(format!("{ip}:80").parse().unwrap(), Protocol::Tcp)).collect()
}

#[test]
fn what_a_former_agent_left_is_rewritten_or_removed() {
    let mut reconciler = Reconciler::new(Config::default(), adopted(&["10.96.0.1", "10.96.0.9"]));
    let mut world = World::new();
    world
        .service("web", at("2026-01-01T00:00:00Z", "10.96.0.1"))
        .service("db", at("2026-01-01T00:00:00Z", "10.96.0.2"));
    let dirty = world.store.take_dirty().services;
    reconciler.update(&world.store, dirty);
    let diff = reconciler.diff();
    assert_eq!(diff.upserts.len(), 2);
    assert_eq!(diff.deletes, adopted(&["10.96.0.9"]));
    reconciler.committed(diff);
    assert!(reconciler.diff().is_empty());
}

#[test]
fn a_partial_source_takes_nothing_away() {
    let mut reconciler =
        Reconciler::new(Config::default(), adopted(&["10.96.0.1", "10.96.0.2", "10.96.0.3"]));
    reconciler.set_partial(true);
    let mut world = World::new();
    // .1 is known and has endpoints, .2 is known but its slices are not, .3 is not known.
    world.service("web", at("2026-01-01T00:00:00Z", "10.96.0.1")).endpoints("web", "10.0.0.1");
    world.service("db", at("2026-01-01T00:00:00Z", "10.96.0.2"));
    let dirty = world.store.take_dirty().services;
    reconciler.update(&world.store, dirty);
    let diff = reconciler.diff();
    assert_eq!(diff.upserts.iter().map(|(address, _)| *address).collect::<Vec<_>>(), adopted(&["10.96.0.1"]));
    assert!(diff.deletes.is_empty());
    reconciler.committed(diff);
    assert!(reconciler.diff().is_empty());
    reconciler.set_partial(false);
    let diff = reconciler.diff();
    assert_eq!(diff.upserts.iter().map(|(address, _)| *address).collect::<Vec<_>>(), adopted(&["10.96.0.2"]));
    assert_eq!(diff.deletes, adopted(&["10.96.0.3"]));
}

#[test]
fn totals_count_what_is_there() {
    let mut bench = Bench::new();
    let mut spec = json!({
        "type": "NodePort", "clusterIP": "10.96.0.1", "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local",
        "ports": [{"port": 80, "nodePort": 30080}, {"name": "s", "port": 1, "protocol": "SCTP"}],
    });
    bench.world.service("web", spec.clone()).endpoints("web", "10.0.0.1");
    bench.write();
    let totals = bench.reconciler.totals();
    assert_eq!((totals.services, totals.frontends, totals.unserved), (1, 2, [1, 0, 0, 0, 0]));
    assert_eq!((totals.without_local_internal, totals.without_local_external), (1, 1));
    spec["internalTrafficPolicy"] = "Cluster".into();
    bench.world.apply(a_service("web", spec));
    bench.write();
    let totals = bench.reconciler.totals();
    assert_eq!((totals.without_local_internal, totals.without_local_external), (0, 1));
    bench.world.apply(Change::Service(name("web"), None));
    bench.write();
    assert_eq!(bench.reconciler.totals(), lb_agent::desired::Totals::default());
}

#[test]
fn health_checks_come_and_go_with_what_asks_for_them() {
    let mut bench = Bench::new();
    let spec = |policy: &str| {
        json!({
            "type": "LoadBalancer", "clusterIP": "10.96.0.1", "externalTrafficPolicy": policy,
            "healthCheckNodePort": 32000, "ports": [{"port": 80}],
        })
    };
    let checks = |bench: &mut Bench| {
        bench.write();
        let checks = bench.reconciler.health_checks();
        checks.map(|(name, port, ready)| format!("{name} {port} {ready}")).collect::<Vec<_>>()
    };
    bench.world.service("db", at("2026-01-01T00:00:00Z", "10.96.0.2")).endpoints("db", "10.0.0.9 @");
    bench.world.service("web", spec("Local")).endpoints("web", "10.0.0.1 @, 10.0.0.2");
    assert_eq!(checks(&mut bench), ["default/web 32000 1"]);
    bench.world.endpoints("web", "10.0.0.2");
    assert_eq!(checks(&mut bench), ["default/web 32000 0"]);
    bench.world.service("web", spec("Cluster"));
    assert_eq!(checks(&mut bench), [""; 0]);
    bench.world.service("web", spec("Local"));
    assert_eq!(checks(&mut bench), ["default/web 32000 0"]);
    bench.world.apply(Change::Service(name("web"), None));
    assert_eq!(checks(&mut bench), [""; 0]);
}

#[test]
fn a_service_that_is_made_anew_and_loses_its_address_is_told() {
    let mut bench = Bench::new();
    bench.world.service("a", at("2026-01-01T00:00:00Z", "10.96.0.1"));
    bench.world.service("b", at("2026-01-02T00:00:00Z", "10.96.0.1"));
    bench.write();
    bench.warnings.clear();
    // Deleted and made again between two looks: the other one is the older now.
    bench.world.service("a", at("2026-01-03T00:00:00Z", "10.96.0.1"));
    bench.write();
    assert_eq!(bench.warnings.len(), 1, "{:?}", bench.warnings);
    assert!(bench.warnings[0].starts_with("default/a: TCP 10.96.0.1:80 is not served: default/b"));
}
