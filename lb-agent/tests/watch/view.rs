//! What an agent that watches a cluster sees.

use lb_agent::source::kube::{Cluster, Scope, run};
use lb_agent::source::{Event, QUEUE};
use lb_agent::store::{Change, Node, Service, Slice};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

/// The state that a source has described so far.
pub(crate) struct View {
    pub(crate) services: BTreeMap<String, Arc<Service>>,
    pub(crate) slices: BTreeMap<String, Arc<Slice>>,
    pub(crate) node: Option<Node>,
    pub(crate) synced: bool,
    /// Objects that were taken away, in order.
    pub(crate) deleted: Vec<String>,
    events: mpsc::Receiver<Event>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for View {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl View {
    pub(crate) fn new(cluster: Cluster, node: &str, namespace: Option<&str>) -> Self {
        let (send, events) = mpsc::channel(QUEUE);
        let (node, scope) = (node.to_owned(), Scope { namespace: namespace.map(str::to_owned) });
        let task = tokio::spawn(async move { run(cluster, &node, scope, send).await });
        Self {
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            node: None,
            synced: false,
            deleted: Vec::new(),
            events,
            task,
        }
    }

    fn take(&mut self, event: Event) {
        let changes = match event {
            Event::Synced { partial } => {
                assert!(!partial && !self.synced, "said once and whole");
                return self.synced = true;
            }
            Event::Changes(changes) => changes,
            Event::NoMasquerade(_) => panic!("no source of objects says this"),
        };
        for change in changes {
            match change {
                Change::Service(name, Some(service)) => {
                    drop(self.services.insert(name.name().into(), service))
                }
                Change::Slice(name, Some(slice)) => drop(self.slices.insert(name.name().into(), slice)),
                Change::Service(name, None) => {
                    self.services.remove(name.name());
                    self.deleted.push(name.name().into());
                }
                Change::Slice(name, None) => {
                    self.slices.remove(name.name());
                    self.deleted.push(name.name().into());
                }
                Change::Node(node) => self.node = node,
                Change::Addresses(_) => panic!("not a source's business"),
            }
        }
    }

    /// Waits until the view is as expected.
    pub(crate) async fn until(&mut self, what: &str, expected: impl Fn(&Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !expected(self) {
            let event = timeout_at(end, self.events.recv()).await.unwrap_or_else(|_| {
                let names = (self.services.keys(), self.slices.keys());
                panic!(
                    "{what}: in vain. There are {names:?}, {} synced",
                    if self.synced { "" } else { "not" }
                )
            });
            self.take(event.expect("the source gave up"));
        }
    }

    /// Takes what comes for a while.
    pub(crate) async fn settle(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while let Ok(event) = timeout_at(end, self.events.recv()).await {
            self.take(event.expect("the source gave up"));
        }
    }

    pub(crate) fn names(&self) -> Vec<&str> {
        self.services.keys().chain(self.slices.keys()).map(String::as_str).collect()
    }

    /// The addresses in a slice.
    pub(crate) fn addresses(&self, slice: &str) -> Vec<String> {
        let slice = self.slices.get(slice);
        slice.iter().flat_map(|slice| slice.endpoints()).map(|(ip, _)| ip.to_string()).collect()
    }
}
