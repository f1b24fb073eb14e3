//! What the server stores: objects, their history, selectors.

use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Kind (plural), namespace, name.
pub(crate) type Key = (String, String, String);

/// An object as stored. Never changed, so that a list of them costs nothing.
pub(crate) type Object = Arc<Value>;

/// One change.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) version: u64,
    pub(crate) kind: String,
    /// Before and after it.
    pub(crate) old: Option<Object>,
    pub(crate) new: Option<Object>,
}

/// One page of a list.
pub(crate) struct Page {
    pub(crate) version: u64,
    pub(crate) items: Vec<Object>,
    /// How many there are after it, and the token to ask for them with.
    pub(crate) rest: Option<(usize, String)>,
}

#[derive(Default)]
pub(crate) struct Objects {
    pub(crate) version: u64,
    /// History before this version is forgotten.
    pub(crate) compacted: u64,
    objects: BTreeMap<Key, Object>,
    /// By version.
    log: Vec<Entry>,
    /// What was not sent yet of a list, with the list's version.
    pages: HashMap<String, (u64, Vec<Object>)>,
    cluster_ips: u16,
}

impl Objects {
    /// Creates or replaces. Returns the object as stored.
    pub(crate) fn apply(&mut self, mut object: Value) -> Object {
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
        let object = Arc::new(object);
        self.log.push(Entry { version: self.version, kind, old, new: Some(object.clone()) });
        self.objects.insert(key, object.clone());
        object
    }

    pub(crate) fn get(&self, key: &Key) -> Option<&Object> {
        self.objects.get(key)
    }

    pub(crate) fn delete(&mut self, kind: &str, namespace: &str, name: &str) -> Option<Object> {
        let old = self.objects.remove(&(kind.into(), namespace.into(), name.into()))?;
        self.version += 1;
        self.log.push(Entry { version: self.version, kind: kind.into(), old: Some(old.clone()), new: None });
        Some(old)
    }

    pub(crate) fn compact(&mut self) {
        self.compacted = self.version;
        self.log.clear();
        self.pages.clear();
    }

    pub(crate) fn matching(&self, kind: &str, filter: &Filter) -> Vec<Object> {
        let of_kind = self.objects.range((kind.to_owned(), String::new(), String::new())..);
        let of_kind = of_kind.take_while(|((other, ..), _)| other == kind);
        of_kind.map(|(_, object)| object).filter(|object| filter.admits(object)).cloned().collect()
    }

    /// What happened to a kind after `version`, as a watch with this filter says it.
    pub(crate) fn since(&self, version: u64, kind: &str, filter: &Filter) -> Vec<Value> {
        let first = self.log.partition_point(|entry| entry.version <= version);
        let news = self.log[first..].iter().filter(|entry| entry.kind == kind);
        news.filter_map(|entry| filter.event(entry)).collect()
    }

    /// One page of a list, or `None` if it cannot be continued any more.
    pub(crate) fn page(
        &mut self,
        kind: &str,
        filter: &Filter,
        limit: usize,
        token: Option<&str>,
    ) -> Option<Page> {
        let (version, mut items) = match token {
            Some(token) => self.pages.remove(token)?,
            None => (self.version, self.matching(kind, filter)),
        };
        let after = items.split_off(limit.min(items.len()));
        let rest = (!after.is_empty()).then(|| {
            let (left, token) = (after.len(), format!("{kind}-{version}-{}", after.len()));
            self.pages.insert(token.clone(), (version, after));
            (left, token)
        });
        Some(Page { version, items, rest })
    }
}

/// `services` from `Service`.
pub(crate) fn plural(kind: &str) -> String {
    format!("{}s", kind.to_lowercase())
}

/// Namespace and selectors of a request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Filter {
    pub(crate) namespace: Option<String>,
    pub(crate) labels: String,
    pub(crate) fields: String,
}

impl Filter {
    pub(crate) fn admits(&self, object: &Value) -> bool {
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
    fn event(&self, entry: &Entry) -> Option<Value> {
        let admitted = |object: &Option<Object>| object.clone().filter(|object| self.admits(object));
        match (admitted(&entry.old), admitted(&entry.new)) {
            (None, None) => None,
            (None, Some(object)) => Some(json!({"type": "ADDED", "object": *object})),
            (Some(_), Some(object)) => Some(json!({"type": "MODIFIED", "object": *object})),
            (Some(object), None) => {
                let mut object = (*object).clone();
                object["metadata"]["resourceVersion"] = entry.version.to_string().into();
                Some(json!({"type": "DELETED", "object": object}))
            }
        }
    }
}
