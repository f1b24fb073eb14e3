//! One watch: what it says and when it ends.

use crate::dialect::Dialect;
use crate::objects::Filter;
use crate::{Gone, Shared, Streaming, lock};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// What the client asked for.
#[derive(Clone, Debug)]
pub(crate) struct Watch {
    pub(crate) kind: String,
    pub(crate) dialect: Dialect,
    pub(crate) filter: Filter,
    pub(crate) version: u64,
    pub(crate) bookmarks: bool,
    pub(crate) initial_events: bool,
    pub(crate) timeout: Duration,
}

/// Says what a status code means.
pub(crate) fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message})
}

impl Watch {
    /// Why the whole request is refused.
    pub(crate) fn refusal(&self, shared: &Shared) -> Option<Value> {
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
    pub(crate) async fn run(self, shared: Arc<Shared>, send: mpsc::Sender<Value>) {
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
                let _ = send.send(self.said(json!({"type": "ADDED", "object": *object}))).await;
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
        let news = objects.since(version, &self.kind, &self.filter);
        (news.into_iter().map(|event| self.said(event)).collect(), objects.version)
    }

    fn said(&self, mut event: Value) -> Value {
        self.dialect.say(&mut event["object"]);
        event
    }

    fn bookmark(&self, version: u64, end_of_list: bool) -> Value {
        let (kind, api_version) = self.dialect.type_of(&self.kind);
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
