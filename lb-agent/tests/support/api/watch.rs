//! One watch: what it says and when it ends.

use super::objects::Filter;
use super::{Gone, Shared, Streaming, lock};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// What the client asked for.
#[derive(Clone, Debug)]
pub(super) struct Watch {
    pub(super) kind: String,
    pub(super) filter: Filter,
    pub(super) version: u64,
    pub(super) bookmarks: bool,
    pub(super) initial_events: bool,
    pub(super) timeout: Duration,
}

/// Says what a status code means.
pub(super) fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message})
}

impl Watch {
    /// Why the whole request is refused.
    pub(super) fn refusal(&self, shared: &Shared) -> Option<Value> {
        let behaviour = lock(&shared.behaviour).clone();
        if self.initial_events && behaviour.streaming == Streaming::Refused {
            let message =
                "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled";
            return Some(status(422, "Invalid", message));
        }
        (behaviour.gone == Gone::Status && self.is_gone(shared)).then(gone)
    }

    fn is_gone(&self, shared: &Shared) -> bool {
        self.version != 0 && self.version < lock(&shared.objects).compacted
    }

    /// Sends events until somebody has enough.
    pub(super) async fn run(self, shared: Arc<Shared>, send: mpsc::Sender<Value>) {
        let behaviour = lock(&shared.behaviour).clone();
        if self.is_gone(&shared) {
            let _ = send.send(json!({"type": "ERROR", "object": gone()})).await;
            return;
        }
        let mut news = shared.news.subscribe();
        let mut at = self.version;
        if at == 0 {
            let (version, objects) = {
                let objects = lock(&shared.objects);
                (objects.version, objects.matching(&self.kind, &self.filter))
            };
            at = version;
            for object in objects {
                let _ = send.send(json!({"type": "ADDED", "object": object})).await;
            }
            if self.initial_events && behaviour.streaming == Streaming::Supported {
                let _ = send.send(self.bookmark(version, true)).await;
            }
        }
        let end = tokio::time::sleep(self.timeout);
        tokio::pin!(end);
        loop {
            let (events, version) = self.since(&shared, at);
            at = version;
            for event in events {
                if send.send(event).await.is_err() {
                    return;
                }
            }
            tokio::select! {
                _ = news.changed() => {}
                () = tokio::time::sleep(behaviour.bookmarks), if self.bookmarks => {
                    if !lock(&shared.behaviour).paused && send.send(self.bookmark(at, false)).await.is_err() {
                        return;
                    }
                }
                () = &mut end => return,
                () = send.closed() => return,
            }
        }
    }

    /// Events after `version`, and the version that they lead to.
    fn since(&self, shared: &Shared, version: u64) -> (Vec<Value>, u64) {
        if lock(&shared.behaviour).paused {
            return (Vec::new(), version);
        }
        let objects = lock(&shared.objects);
        let news = objects.log.iter().filter(|entry| entry.version > version && entry.kind == self.kind);
        (news.filter_map(|entry| self.filter.event(entry)).collect(), objects.version)
    }

    fn bookmark(&self, version: u64, end_of_list: bool) -> Value {
        let (kind, api_version) = match self.kind.as_str() {
            "services" => ("Service", "v1"),
            "nodes" => ("Node", "v1"),
            _ => ("EndpointSlice", "discovery.k8s.io/v1"),
        };
        let mut meta = json!({"resourceVersion": version.to_string(), "creationTimestamp": null});
        if end_of_list {
            meta["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        json!({"type": "BOOKMARK", "object": {"kind": kind, "apiVersion": api_version, "metadata": meta}})
    }
}

fn gone() -> Value {
    status(410, "Expired", "too old resource version")
}
