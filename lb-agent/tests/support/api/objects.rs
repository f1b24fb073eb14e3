//! What the server stores: objects, their history, selectors.

use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};

/// Kind (plural), namespace, name.
pub(super) type Key = (String, String, String);

/// One change.
#[derive(Clone)]
pub(super) struct Entry {
    pub(super) version: u64,
    pub(super) kind: String,
    /// Before and after it.
    pub(super) old: Option<Value>,
    pub(super) new: Option<Value>,
}

/// The rest of a list: its version and what was not sent yet.
type Page = (u64, Vec<Value>);

#[derive(Default)]
pub(super) struct Objects {
    pub(super) version: u64,
    /// History before this version is forgotten.
    pub(super) compacted: u64,
    objects: BTreeMap<Key, Value>,
    pub(super) log: Vec<Entry>,
    pages: HashMap<String, Page>,
    cluster_ips: u16,
}

impl Objects {
    /// Creates or replaces. Returns the object as stored.
    pub(super) fn apply(&mut self, mut object: Value) -> Value {
        let kind = plural(object["kind"].as_str().expect("a kind"));
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let key = (kind.clone(), text(&object["metadata"]["namespace"]), text(&object["metadata"]["name"]));
        self.version += 1;
        let old = self.objects.get(&key).cloned();
        let meta = &mut object["metadata"];
        meta["resourceVersion"] = self.version.to_string().into();
        let kept = |field: &str| old.as_ref().map(|old| old["metadata"][field].clone());
        meta["uid"] = kept("uid").unwrap_or_else(|| format!("uid-{}", self.version).into());
        meta["creationTimestamp"] =
            kept("creationTimestamp").unwrap_or_else(|| "2026-01-01T00:00:00Z".into());
        // What real objects are full of.
        meta["managedFields"] = json!([{"manager": "test", "operation": "Update", "apiVersion": "v1"}]);
        if kind == "services"
            && object["spec"]["type"] != "ExternalName"
            && object["spec"]["clusterIP"].is_null()
        {
            let old_ip = old.as_ref().map(|old| old["spec"]["clusterIP"].clone());
            let ip = old_ip.unwrap_or_else(|| {
                self.cluster_ips += 1;
                let [high, low] = self.cluster_ips.to_be_bytes();
                format!("10.96.{high}.{low}").into()
            });
            object["spec"]["clusterIPs"] = json!([ip]);
            object["spec"]["clusterIP"] = ip;
        }
        self.log.push(Entry { version: self.version, kind, old, new: Some(object.clone()) });
        self.objects.insert(key, object.clone());
        object
    }

    pub(super) fn get(&self, key: &Key) -> Option<&Value> {
        self.objects.get(key)
    }

    pub(super) fn delete(&mut self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        let old = self.objects.remove(&(kind.into(), namespace.into(), name.into()))?;
        self.version += 1;
        self.log.push(Entry { version: self.version, kind: kind.into(), old: Some(old.clone()), new: None });
        Some(old)
    }

    pub(super) fn compact(&mut self) {
        self.compacted = self.version;
        self.log.clear();
        self.pages.clear();
    }

    pub(super) fn matching(&self, kind: &str, filter: &Filter) -> Vec<Value> {
        let of_kind = self.objects.iter().filter(|((other, ..), _)| other == kind);
        of_kind.map(|(_, object)| object).filter(|object| filter.admits(object)).cloned().collect()
    }

    /// One page of a list, or `None` if it cannot be continued any more.
    pub(super) fn page(
        &mut self,
        kind: &str,
        filter: &Filter,
        limit: usize,
        token: Option<&str>,
    ) -> Option<Value> {
        let (version, mut items) = match token {
            Some(token) => self.pages.remove(token)?,
            None => (self.version, self.matching(kind, filter)),
        };
        let rest = items.split_off(limit.min(items.len()));
        let mut meta = json!({"resourceVersion": version.to_string()});
        if !rest.is_empty() {
            let token = format!("{kind}-{version}-{}", rest.len());
            meta["remainingItemCount"] = rest.len().into();
            meta["continue"] = token.clone().into();
            self.pages.insert(token, (version, rest));
        }
        Some(json!({"kind": "List", "apiVersion": "v1", "metadata": meta, "items": items}))
    }
}

/// `services` from `Service`.
pub(super) fn plural(kind: &str) -> String {
    format!("{}s", kind.to_lowercase())
}

/// Namespace and selectors of a request.
#[derive(Clone, Debug, Default)]
pub(super) struct Filter {
    pub(super) namespace: Option<String>,
    pub(super) labels: String,
    pub(super) fields: String,
}

impl Filter {
    pub(super) fn admits(&self, object: &Value) -> bool {
        let meta = &object["metadata"];
        let terms = |text: &str| {
            text.split(',').filter(|term| !term.is_empty()).map(str::to_owned).collect::<Vec<_>>()
        };
        self.namespace.as_ref().is_none_or(|namespace| meta["namespace"] == **namespace)
            && terms(&self.labels).iter().all(|term| match (term.strip_prefix('!'), term.split_once('=')) {
                (Some(absent), _) => meta["labels"][absent].is_null(),
                (None, Some((label, value))) => meta["labels"][label] == value,
                (None, None) => !meta["labels"][term.as_str()].is_null(),
            })
            && terms(&self.fields).iter().all(|term| match term.split_once('=') {
                Some(("metadata.name", name)) => meta["name"] == name,
                other => panic!("field selector {other:?}"),
            })
    }

    /// What a watch with this filter says of a change.
    pub(super) fn event(&self, entry: &Entry) -> Option<Value> {
        let admitted = |object: &Option<Value>| object.clone().filter(|object| self.admits(object));
        match (admitted(&entry.old), admitted(&entry.new)) {
            (None, None) => None,
            (None, Some(object)) => Some(json!({"type": "ADDED", "object": object})),
            (Some(_), Some(object)) => Some(json!({"type": "MODIFIED", "object": object})),
            (Some(mut object), None) => {
                object["metadata"]["resourceVersion"] = entry.version.to_string().into();
                Some(json!({"type": "DELETED", "object": object}))
            }
        }
    }
}
