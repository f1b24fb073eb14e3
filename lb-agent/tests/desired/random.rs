//! Random histories: applied step by step they give what the last state gives from scratch.

use crate::support::{World, a_service, a_slice, endpoints, name};
use lb_agent::desired::Reconciler;
use lb_agent::model::{Frontend, FrontendAddr};
use lb_agent::store::{Change, LocalAddresses, Node, Warning};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;

const SERVICES: [&str; 4] = ["a", "b", "c", "other/a"];

fn service() -> impl Strategy<Value = Change> {
    let ips = subsequence(vec!["10.96.0.1", "fd00:96::1", "10.96.0.2", "None", "127.0.0.1"], 1..3);
    let external = subsequence(vec!["10.96.0.1", "198.51.100.1", "192.0.2.1"], 0..2);
    let ports = subsequence(
        vec![
            json!({"port": 80, "nodePort": 30080}),
            json!({"name": "x", "port": 81, "nodePort": 30080}),
            json!({"name": "u", "port": 80, "protocol": "UDP", "nodePort": 30081}),
            json!({"name": "s", "port": 9, "protocol": "SCTP"}),
        ],
        0..4,
    );
    let kind = select(vec!["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]);
    let policy = || select(vec!["Local", "Cluster"]);
    let created = select(vec!["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"]);
    (select(&SERVICES), ips, external, ports, kind, policy(), policy(), created).prop_map(
        |(at, ips, external, ports, kind, internal_policy, external_policy, created)| {
            a_service(
                at,
                json!({
                    "type": kind, "clusterIP": ips[0], "clusterIPs": ips, "externalIPs": external, "ports": ports,
                    "internalTrafficPolicy": internal_policy, "externalTrafficPolicy": external_policy,
                    "meta": {"creationTimestamp": created},
                    "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}},
                }),
            )
        },
    )
}

fn slice() -> impl Strategy<Value = Change> {
    let v4 = vec![
        "10.0.0.1 @",
        "10.0.0.2 zone=a",
        "10.0.0.3 ~",
        "10.0.0.4 @ ~ zone=b",
        "10.0.0.5 !",
        "10.0.0.2 zone=b",
    ];
    let v6 = vec!["fd00::1 @ node=node-a", "fd00::2 node=node-b", "fd00::3 x"];
    let endpoints_of = prop_oneof![subsequence(v4, 0..5), subsequence(v6, 0..3)];
    let ports = subsequence(
        vec![
            json!({"port": 8080}),
            json!({"name": "x", "port": 81}),
            json!({"name": "u", "port": 5, "protocol": "UDP"}),
        ],
        0..3,
    );
    (select(vec!["s1", "s2", "s3", "other/s1"]), select(vec!["a", "b", "c"]), ports, endpoints_of)
        .prop_map(|(at, service, ports, list)| a_slice(at, service, json!(ports), endpoints(&list.join(","))))
}

fn change() -> impl Strategy<Value = Change> {
    let ips = subsequence(vec!["192.0.2.1", "192.0.2.2", "2001:db8::1", "127.0.0.1"], 0..4);
    let addresses = ips.prop_map(|ips| ips.iter().map(|ip| ip.parse().unwrap()).collect::<LocalAddresses>());
    let zone = select(vec![None, Some("a"), Some("b")]);
    prop_oneof![
        4 => service(),
        4 => slice(),
        1 => select(&SERVICES).prop_map(|at| Change::Service(name(at), None)),
        1 => select(vec!["s1", "s2", "s3", "other/s1"]).prop_map(|at| Change::Slice(name(at), None)),
        1 => addresses.prop_map(Change::Addresses),
        1 => zone.prop_map(|zone| Change::Node(Some(Node { zone: zone.map(Into::into), ..Node::default() }))),
    ]
}

/// What happens to a difference.
#[derive(Clone, Debug)]
enum Outcome {
    Written,
    /// Some of it arrived.
    Failed(usize),
    /// Nobody asked for it: changes pile up.
    Nothing,
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![4 => Just(Outcome::Written), 1 => (0..5usize).prop_map(Outcome::Failed), 2 => Just(Outcome::Nothing)]
}

type Kernel = BTreeMap<FrontendAddr, Arc<Frontend>>;

fn write(kernel: &mut Kernel, diff: &lb_agent::desired::Diff, limit: usize) {
    kernel.extend(diff.upserts.iter().take(limit).cloned());
    for address in diff.deletes.iter().take(limit.saturating_sub(diff.upserts.len())) {
        kernel.remove(address);
    }
}

fn from_scratch(world: &World, adopted: &Kernel) -> Kernel {
    let mut reconciler = Reconciler::new(world.config.clone(), adopted.keys().copied());
    let all: Vec<_> = world.store.services().map(|(name, _)| name.clone()).collect();
    reconciler.update(&world.store, all);
    let mut kernel = adopted.clone();
    write(&mut kernel, &reconciler.diff(), usize::MAX);
    kernel
}

proptest! {
    #[test]
    fn step_by_step_is_from_scratch(history in prop::collection::vec((change(), outcome()), 1..60)) {
        let mut world = World::new();
        let mut reconciler = Reconciler::new(world.config.clone(), []);
        let mut kernel = Kernel::new();
        let mut warnings = Vec::new();
        for (change, outcome) in history {
            world.apply(change);
            if matches!(outcome, Outcome::Nothing) {
                continue;
            }
            let dirty = world.store.take_dirty();
            warnings.extend(reconciler.update(&world.store, dirty.services));
            let diff = reconciler.diff();
            if let Outcome::Failed(limit) = outcome {
                write(&mut kernel, &diff, limit);
                reconciler.failed(&diff);
                continue;
            }
            write(&mut kernel, &diff, usize::MAX);
            reconciler.committed(diff);
            prop_assert_eq!(&kernel, &from_scratch(&world, &Kernel::new()));
            prop_assert_eq!(&kernel, &from_scratch(&world, &kernel), "after a restart");
            let written: Kernel = reconciler.written().map(|(at, frontend)| (at, frontend.clone())).collect();
            prop_assert_eq!(&kernel, &written);
            prop_assert_eq!(reconciler.totals().frontends, kernel.len());
            prop_assert!(reconciler.diff().is_empty(), "a second difference");
        }
        // Every address is somebody's, and no claim that lost goes without a warning or uncounted.
        let mut unserved = [0; Warning::REASONS.len()];
        for (name, warning) in reconciler.warnings() {
            let told = warnings.iter().any(|(other, told)| *other == name && match (told, &warning) {
                // The owner may have been another one then.
                (Warning::Taken { frontend: a, .. }, Warning::Taken { frontend: b, .. }) => a == b,
                (told, warning) => told == warning,
            });
            prop_assert!(told, "{name}: {warning}");
            let place = Warning::REASONS.iter().position(|reason| *reason == warning.reason());
            unserved[place.expect("a known reason")] += 1;
        }
        prop_assert_eq!(reconciler.totals().unserved, unserved);
    }
}
