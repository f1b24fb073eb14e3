//! `manifests/`: what a cluster operator applies is what the agent understands, and what an API server accepts.

mod access;
mod objects;
mod render;

use serde_json::Value;

/// Everything that `kubectl apply` takes as one file, and the directory that it is made of.
const FILES: [(&str, &str); 4] = [
    ("generic.yaml", "overlays/generic"),
    ("generic-uninstall.yaml", "overlays/generic-uninstall"),
    ("k3d.yaml", "overlays/k3d"),
    ("k3d-uninstall.yaml", "overlays/k3d-uninstall"),
];

/// All of them, by file name.
fn all() -> impl Iterator<Item = (&'static str, Vec<Value>)> {
    FILES.into_iter().map(|(file, dir)| (file, render::directory(&render::manifests().join(dir))))
}

fn of_kind<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    let mut found = objects.iter().filter(|object| object["kind"] == kind);
    let first = found.next().unwrap_or_else(|| panic!("no {kind}"));
    assert!(found.next().is_none(), "one {kind}");
    first
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn containers(objects: &[Value]) -> Vec<&Value> {
    let pod = &of_kind(objects, "DaemonSet")["spec"]["template"]["spec"];
    list(&pod["initContainers"]).iter().chain(list(&pod["containers"])).collect()
}
