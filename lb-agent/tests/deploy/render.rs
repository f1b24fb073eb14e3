//! The little of kustomize that `manifests/` uses, so that the single files can be kept in step with what they are made of
//! where there is no kustomize. Whatever it does not know, it refuses.

use crate::{FILES, text};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Set to have the single files written.
const WRITE: &str = "LB_WRITE_MANIFESTS";

/// Lists whose elements have names: a patch changes the one that it names. All others it replaces.
const KEYS: [(&str, &str); 5] = [
    ("containers", "name"),
    ("initContainers", "name"),
    ("env", "name"),
    ("volumes", "name"),
    ("volumeMounts", "mountPath"),
];

pub(crate) fn manifests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests")
}

/// The objects of a YAML file.
pub(crate) fn file(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let objects = serde_saphyr::from_multiple::<Value>(&text);
    let objects = objects.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    objects.into_iter().filter(|object| !object.is_null()).collect()
}

/// What `kubectl kustomize DIR` prints.
pub(crate) fn directory(dir: &Path) -> Vec<Value> {
    let kustomization = kustomization(dir);
    let mut objects = Vec::new();
    for (key, value) in &kustomization {
        for item in value.as_array().into_iter().flatten() {
            match key.as_str() {
                "resources" if dir.join(text(item)).is_dir() => {
                    objects.extend(directory(&dir.join(text(item))))
                }
                "resources" => objects.extend(file(&dir.join(text(item)))),
                "components" | "patches" | "images" => {}
                other => panic!("{}: {other} is not known here", dir.display()),
            }
        }
    }
    let items = |key: &str| kustomization.get(key).and_then(Value::as_array).into_iter().flatten();
    for component in items("components") {
        let dir = dir.join(text(component));
        for patch in kustomization_patches(&dir) {
            apply(&mut objects, &patch);
        }
    }
    for patch in kustomization_patches(dir) {
        apply(&mut objects, &patch);
    }
    for image in items("images") {
        let (name, new) =
            (text(&image["name"]), format!("{}:{}", text(&image["newName"]), text(&image["newTag"])));
        objects.iter_mut().for_each(|object| set_image(object, name, &new));
    }
    objects
}

fn kustomization(dir: &Path) -> Map<String, Value> {
    let mut all = file(&dir.join("kustomization.yaml"));
    let Some(Value::Object(mut fields)) = all.pop() else { panic!("{}: no kustomization", dir.display()) };
    fields.remove("apiVersion");
    fields.remove("kind");
    fields
}

fn kustomization_patches(dir: &Path) -> Vec<Value> {
    let fields = kustomization(dir);
    let patches = fields.get("patches").and_then(Value::as_array).into_iter().flatten();
    patches.flat_map(|patch| file(&dir.join(text(&patch["path"])))).collect()
}

fn apply(objects: &mut [Value], patch: &Value) {
    let id = |object: &Value| (object["kind"].clone(), object["metadata"]["name"].clone());
    let target = objects.iter_mut().find(|object| id(object) == id(patch));
    merge(target.unwrap_or_else(|| panic!("nothing to patch: {patch}")), patch, None);
}

/// A strategic merge patch.
fn merge(target: &mut Value, patch: &Value, key: Option<&str>) {
    match (target, patch) {
        (Value::Object(target), Value::Object(patch)) => {
            for (name, value) in patch {
                let key = KEYS.iter().find(|(list, _)| list == name).map(|(_, key)| *key);
                match target.get_mut(name) {
                    _ if value.is_null() => drop(target.shift_remove(name)),
                    Some(old) => merge(old, value, key),
                    None => drop(target.insert(name.clone(), value.clone())),
                }
            }
        }
        (Value::Array(target), Value::Array(patch)) if key.is_some() => {
            let key = key.unwrap_or_default();
            for value in patch {
                match target.iter_mut().find(|old| old[key] == value[key]) {
                    Some(old) => merge(old, value, None),
                    None => target.push(value.clone()),
                }
            }
        }
        (target, patch) => *target = patch.clone(),
    }
}

fn set_image(value: &mut Value, name: &str, new: &str) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                match value {
                    Value::String(image) if key == "image" && image.split(':').next() == Some(name) => {
                        *image = new.into();
                    }
                    value => set_image(value, name, new),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| set_image(item, name, new)),
        _ => {}
    }
}

#[test]
fn the_single_files_are_what_the_directories_make() {
    for (name, dir) in FILES {
        let (path, rendered) = (manifests().join(name), directory(&manifests().join(dir)));
        if std::env::var_os(WRITE).is_some() {
            let objects = rendered.iter().map(|object| serde_saphyr::to_string(object).expect("YAML"));
            let head = format!(
                "# Made of {dir} (`kubectl kustomize` prints the same); with {WRITE}=1, `cargo test -p lb-agent --test deploy` writes it.\n"
            );
            std::fs::write(&path, head + &objects.collect::<Vec<_>>().join("---\n")).expect("write");
        }
        assert!(
            path.exists() && file(&path) == rendered,
            "manifests/{name} is out of date: run {WRITE}=1 cargo test -p lb-agent --test deploy"
        );
    }
}

#[test]
fn patches_merge_as_kustomizes_do() {
    use serde_json::json;
    let mut object = json!({
        "containers": [{"name": "a", "args": ["x", "y"], "env": [{"name": "E", "value": "1"}]}, {"name": "b"}],
        "keep": {"one": 1, "two": 2},
    });
    let patch = json!({
        "containers": [{"name": "a", "args": ["z"], "env": [{"name": "E", "value": "2"}, {"name": "F"}]}],
        "keep": {"one": null, "three": 3}, "new": true,
    });
    merge(&mut object, &patch, None);
    let expected = json!({
        "containers": [
            {"name": "a", "args": ["z"], "env": [{"name": "E", "value": "2"}, {"name": "F"}]}, {"name": "b"},
        ],
        "keep": {"two": 2, "three": 3}, "new": true,
    });
    assert_eq!(object, expected);
}
