//! Kubernetes Events: what `kubectl describe service` tells of a Service that is not served as it asks for.
//!
//! Nobody waits for them: they go into a short queue, and a task sends them slowly. The log has everything, so one that
//! finds no room is counted and forgotten; ten thousand broken Services must not become ten thousand requests of every
//! node.

mod send;

use crate::metrics::{Kind, Sample};
use crate::store::{ObjectName, Warning};
use ::kube::Client;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Events that may wait. At the sender's pace the last of them is some minutes late.
const QUEUE: usize = 64;

/// Where to tell of what happened; clones share it. The default is nowhere: manifests have no API server.
#[derive(Clone, Debug, Default)]
pub struct Events(Option<Arc<Shared>>);

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    news: Notify,
    sent: AtomicU64,
    failed: AtomicU64,
    dropped: AtomicU64,
}

#[derive(Debug, Default)]
struct Queue {
    /// With how often each happened.
    events: VecDeque<(Event, i32)>,
    /// Found no room since the queue was last empty.
    dropped: u64,
}

impl Queue {
    fn is_empty(&self) -> bool {
        self.events.is_empty() && self.dropped == 0
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Event {
    /// This node if it is no Service.
    service: Option<ObjectName>,
    warning: bool,
    reason: &'static str,
    action: &'static str,
    note: String,
}

impl Events {
    /// Sends to a cluster, in the name of this node, until the runtime ends.
    pub fn start(client: Client, node: &str) -> Self {
        let shared = Arc::new(Shared::default());
        tokio::spawn(send::Sender::new(client, node).run(shared.clone()));
        Self(Some(shared))
    }

    /// A queue that nobody sends from.
    #[cfg(test)]
    pub(crate) fn unsent() -> Self {
        Self(Some(Arc::default()))
    }

    /// The agent starts.
    pub fn starting(&self) {
        let note = format!("lb-agent {}", env!("CARGO_PKG_VERSION"));
        self.push(Event { service: None, warning: false, reason: "Starting", action: "Start", note });
    }

    /// Something is wrong with a Service.
    pub fn warning(
        &self,
        service: &ObjectName,
        reason: &'static str,
        action: &'static str,
        note: impl Into<String>,
    ) {
        let (service, note) = (Some(service.clone()), note.into());
        self.push(Event { service, warning: true, reason, action, note });
    }

    /// Something is wrong on this node.
    pub fn node(&self, reason: &'static str, note: impl Into<String>) {
        self.push(Event { service: None, warning: true, reason, action: "Forward", note: note.into() });
    }

    /// A part of a Service is not served.
    pub fn unserved(&self, service: &ObjectName, warning: &Warning) {
        self.warning(service, warning.reason(), "Serve", warning.to_string());
    }

    /// What became of them, for the metrics.
    pub fn samples(&self) -> Vec<Sample> {
        const NAME: &str = "lb_kubernetes_events_total";
        let Some(shared) = &self.0 else { return Vec::new() };
        [("sent", &shared.sent), ("failed", &shared.failed), ("dropped", &shared.dropped)]
            .map(|(result, count)| {
                let count = count.load(Relaxed) as f64;
                Sample::new(NAME, "Kubernetes Events", Kind::Counter, count).with("result", result)
            })
            .into()
    }

    fn push(&self, event: Event) {
        if let Some(shared) = &self.0 {
            shared.push(event);
        }
    }
}

impl Shared {
    fn push(&self, event: Event) {
        let mut queue = self.queue();
        if queue.events.len() == QUEUE {
            queue.dropped += 1;
            self.dropped.fetch_add(1, Relaxed);
            return;
        }
        match queue.events.iter_mut().find(|(other, _)| *other == event) {
            Some((_, count)) => *count += 1,
            None => queue.events.push_back((event, 1)),
        }
        self.news.notify_one();
    }

    /// The next one and how often it happened.
    fn pop(&self) -> Option<(Event, i32)> {
        let mut queue = self.queue();
        queue.events.pop_front().or_else(|| {
            let dropped = std::mem::take(&mut queue.dropped);
            let note = format!(
                "{dropped} events of Services were too many to be sent; the agent's log has them all, \
                 and lb_unserved among its metrics counts what is not served"
            );
            let event =
                Event { service: None, warning: true, reason: "EventsDropped", action: "Report", note };
            (dropped > 0).then_some((event, 1))
        })
    }

    /// Waits until there is one.
    async fn wait(&self) {
        loop {
            let news = self.news.notified();
            if !self.queue().is_empty() {
                return;
            }
            news.await;
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Plain data, whole at any moment.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(note: impl ToString) -> Event {
        let service = Some(ObjectName::new("shop", "web"));
        Event { service, warning: true, reason: "R", action: "A", note: note.to_string() }
    }

    #[test]
    fn the_queue_merges_and_is_bounded_and_says_what_it_lost() {
        let events = Events::unsent();
        let shared = events.0.clone().unwrap();
        for _ in 0..3 {
            events.push(event(0));
        }
        for note in 1..10_000 {
            events.push(event(note));
        }
        assert_eq!(shared.pop(), Some((event(0), 3)));
        for note in 1..QUEUE {
            assert_eq!(shared.pop(), Some((event(note), 1)));
        }
        let (summary, _) = shared.pop().expect("a summary");
        assert_eq!((summary.service, summary.reason), (None, "EventsDropped"));
        assert!(summary.note.starts_with("9936 events"), "{}", summary.note);
        assert_eq!(shared.pop(), None);
        let samples = events.samples();
        assert_eq!((samples[2].labels[0].1.as_str(), samples[2].value), ("dropped", 9936.0));
    }

    #[test]
    fn reasons_are_kube_proxys() {
        let wrong = Warning::Family {
            field: "spec.externalIPs",
            address: "2001:db8::1".parse().unwrap(),
            reason: "the Service has no clusterIP of that family",
        };
        assert_eq!(wrong.reason(), "KubeProxyIncorrectIPVersion");
    }
}
