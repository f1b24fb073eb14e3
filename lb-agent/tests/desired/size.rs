//! What 10,000 Services with 10 endpoints each cost.

use crate::support::{World, a_slice, endpoints};
use lb_agent::desired::Reconciler;
use serde_json::json;
use std::process::Command;
use std::time::Instant;

fn heap_kib() -> usize {
    // SAFETY: takes nothing and returns numbers.
    let info = unsafe { libc::mallinfo2() };
    info.uordblks / 1024
}

/// In a process of its own: the heap is everybody's.
#[test]
fn ten_thousand_services_fit() {
    const ALONE: &str = "LB_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let mut alone = Command::new(std::env::current_exe().expect("this program"));
        alone.args(["--exact", "size::ten_thousand_services_fit", "--nocapture"]).env(ALONE, "1");
        assert!(alone.status().expect("this program again").success());
        return;
    }
    let mut world = World::new();
    let before = heap_kib();
    for i in 0..10_000 {
        let (high, low) = (i / 250, i % 250 + 1);
        world.service(
            &format!("namespace-{}/service-{i}", i % 100),
            json!({"clusterIP": format!("10.96.{high}.{low}"), "ports": [{"name": "http", "port": 80}]}),
        );
        let list: Vec<_> = (0..10).map(|j| format!("10.{}.{high}.{low}", 100 + j)).collect();
        let port = json!([{"name": "http", "port": 8080}]);
        let at = format!("namespace-{}/service-{i}-abcde", i % 100);
        world.apply(a_slice(&at, &format!("service-{i}"), port, endpoints(&list.join(","))));
    }
    let store = heap_kib() - before;
    let mut reconciler = Reconciler::new(world.config.clone(), []);
    let start = Instant::now();
    let dirty = world.store.take_dirty();
    reconciler.update(&world.store, dirty.services);
    let diff = reconciler.diff();
    assert_eq!(diff.upserts.len(), 10_000);
    reconciler.committed(diff);
    let took = start.elapsed();
    let all = heap_kib() - before;
    println!("store {store} KiB, with the desired state {all} KiB, computed in {took:?}");
    assert!(all < 10_500, "{all} KiB");
}
