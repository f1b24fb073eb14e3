//! The objects of a cluster, watched through its API server.
//!
//! Deletions are believed in two cases only: the server says so, or a new list is complete and lacks the object.
//! An API server that goes away therefore changes nothing.

mod access;
mod link;
mod patient;

pub use access::{Access, Cluster};

use super::{Event, Sender};
use crate::objects::{EndpointSlice, Node as NodeObject, Service};
use crate::store::{Change, Node, ObjectName, Slice};
use ::kube::api::Api;
use ::kube::core::{NamespaceResourceScope, Status};
use ::kube::runtime::watcher;
use ::kube::{Resource, ResourceExt};
use futures::StreamExt;
use patient::Patient;
use serde::de::DeserializeOwned;
use std::collections::HashSet;
use std::fmt::Debug;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

/// Objects that every service proxy but an explicitly named one leaves alone.
const SERVICES: &str = "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name";
const SLICES: &str = "!service.kubernetes.io/headless";

/// An old server takes a streaming list for an ordinary watch and never says that the list is complete.
const STREAMING_PATIENCE: Duration = Duration::from_secs(5);
/// Before a list is started over by us, doubled at each; between [`watcher`]'s own attempts we are [`Patient`].
const PAUSE: Duration = Duration::from_secs(1);
/// So many lists in a row that were lost before they were complete.
const LOST_PAGES: u32 = 3;
/// Objects in one page of a list: whole objects are large, and a page of them is in memory at once.
const PAGE: u32 = 250;
/// Events handed over together.
const BATCH: usize = 512;

/// Why the API server cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubeconfig file does not work.
    #[error("kubeconfig {0}: {1}")]
    Kubeconfig(String, #[source] ::kube::config::KubeconfigError),
    /// The pod's ServiceAccount does not work.
    #[error("not running as a pod with a ServiceAccount: {0}")]
    InCluster(#[source] ::kube::config::InClusterError),
    /// The address of the API server is not a URL.
    #[error("--master {0:?} is not a URL like https://10.0.0.1:6443")]
    Master(String),
    /// A file of certificates has none.
    #[error("there is no certificate in the file of the cluster's authority")]
    NoCertificate,
    /// The kubeconfig file asks for a proxy.
    #[error(
        "kubeconfig {0}: proxy-url is not supported: the agent has to reach the API server before any Service works"
    )]
    Proxy(String),
    /// Certificates or keys do not work.
    #[error("cannot set up the connection to the API server: {0}")]
    Client(#[source] ::kube::Error),
}

/// Which part of a cluster to watch.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    /// Only this namespace. A test on a cluster in use must not see the rest.
    pub namespace: Option<String>,
}

/// Watches Services, EndpointSlices and this Node until the receiver is dropped.
pub async fn run(cluster: Cluster, node_name: &str, scope: Scope, events: Sender) {
    let services: Api<Service> = api(&cluster, &scope);
    let slices: Api<EndpointSlice> = api(&cluster, &scope);
    let nodes: Api<NodeObject> = Api::all(cluster.watching());
    let unlisted = Arc::new(AtomicUsize::new(3));
    let task = |what, selector| {
        let (cluster, unlisted, events) = (cluster.clone(), Arc::clone(&unlisted), events.clone());
        Task { what, selector, cluster, unlisted, events }
    };

    let of_services = watcher::Config::default().labels(SERVICES);
    let services = task("Services", of_services).run(services, |name, service: Option<&Service>| {
        Change::Service(name, service.map(|service| Arc::new(service.into())))
    });
    let of_slices = watcher::Config::default().labels(SLICES);
    let slices = task("EndpointSlices", of_slices).run(slices, |name, slice: Option<&EndpointSlice>| {
        Change::Slice(name, slice.and_then(|slice| Slice::new(slice, node_name)).map(Arc::new))
    });
    let of_node = watcher::Config::default().fields(&format!("metadata.name={node_name}"));
    let node = task("this Node", of_node)
        .run(nodes, |_, node: Option<&NodeObject>| Change::Node(node.map(Node::from)));
    futures::join!(services, slices, node);
}

fn api<K>(cluster: &Cluster, scope: &Scope) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    match &scope.namespace {
        Some(namespace) => Api::namespaced(cluster.watching(), namespace),
        None => Api::all(cluster.watching()),
    }
}

/// The watch on one kind.
struct Task {
    what: &'static str,
    selector: watcher::Config,
    cluster: Cluster,
    /// Kinds whose first list is not complete yet.
    unlisted: Arc<AtomicUsize>,
    events: Sender,
}

/// Why a watcher has to be thrown away.
enum Restart {
    /// The server does not know streaming lists.
    NoStreaming,
    /// What we would go on from is gone: a list that is certainly recent is needed.
    Gone,
    /// Nobody listens any more.
    Stop,
}

/// What is known of one kind.
#[derive(Default)]
struct Known {
    names: HashSet<ObjectName>,
    /// The names of the list in progress.
    listing: HashSet<ObjectName>,
    listed_once: bool,
    /// A list was completed since the last one was lost.
    completed: bool,
    /// The server will not have us watch it, and that has been said.
    refused: bool,
}

impl Task {
    async fn run<K>(self, api: Api<K>, convert: impl Fn(ObjectName, Option<&K>) -> Change)
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
    {
        let mut known = Known::default();
        // A streaming list costs neither side a buffer, but may come from a cache that is older than what we have
        // seen already. That does not matter for the first list; all others are consistent reads.
        let mut config = self.selector.clone().streaming_lists();
        let mut lost = 0;
        loop {
            let watcher = Box::pin(watcher(api.clone(), config));
            let stream = Patient::new(watcher, self.cluster.link.clone()).ready_chunks(BATCH);
            let streaming = !known.listed_once && lost == 0;
            match self.follow(stream, streaming, &mut known, &convert).await {
                Restart::Stop => return,
                Restart::NoStreaming => lost = 1,
                Restart::Gone => {
                    lost = if std::mem::take(&mut known.completed) { 1 } else { lost + 1 };
                    sleep(pause(lost)).await;
                }
            }
            config = self.selector.clone();
            // Where even the pages of a list grow too old before the last one has come, it has to be one.
            config.page_size = (lost < LOST_PAGES).then_some(PAGE);
        }
    }

    async fn follow<K, S>(
        &self,
        mut stream: S,
        streaming: bool,
        known: &mut Known,
        convert: &impl Fn(ObjectName, Option<&K>) -> Change,
    ) -> Restart
    where
        K: Resource<DynamicType = ()>,
        S: futures::Stream<Item = Vec<watcher::Result<watcher::Event<K>>>> + Unpin,
    {
        let (mut first_list, mut open) = (streaming, false);
        loop {
            let patience = if first_list && open { STREAMING_PATIENCE } else { Duration::MAX };
            let Ok(Some(chunk)) = timeout(patience, stream.next()).await else {
                debug!("{}: no end of the streaming list in sight, using an ordinary one", self.what);
                return Restart::NoStreaming;
            };
            let mut changes = Vec::with_capacity(chunk.len());
            let mut complete = false;
            let mut restart = None;
            for event in chunk {
                match event {
                    Ok(event) => {
                        // Of an ordinary list, `Init` comes before the server is asked.
                        let works = streaming || !matches!(event, watcher::Event::Init);
                        open |= works;
                        if works && std::mem::take(&mut known.refused) {
                            self.cluster.link.refused(self.what, false);
                            info!("{}: can be watched now", self.what);
                        }
                        complete |= known.take(event, &mut changes, convert);
                    }
                    Err(error) => {
                        restart = restart.or(remedy(&error, first_list));
                        if restart.is_none() {
                            self.report(&error, known).await;
                        } else {
                            debug!("{}: {error}", self.what);
                        }
                    }
                }
            }
            first_list &= !complete;
            if !changes.is_empty() && self.events.send(Event::Changes(changes)).await.is_err() {
                return Restart::Stop;
            }
            if complete && !self.completed(known).await {
                return Restart::Stop;
            }
            if let Some(restart) = restart {
                return restart;
            }
        }
    }

    /// A list is complete. Returns whether anybody listens.
    async fn completed(&self, known: &mut Known) -> bool {
        self.cluster.link.listed(self.what);
        known.completed = true;
        if std::mem::replace(&mut known.listed_once, true) {
            debug!("{}: {} listed again", self.what, known.names.len());
            return true;
        }
        info!("{}: {} listed", self.what, known.names.len());
        if self.unlisted.fetch_sub(1, Ordering::AcqRel) > 1 {
            return true;
        }
        self.events.send(Event::Synced { partial: false }).await.is_ok()
    }

    /// That the server cannot be reached, [`link`] says for all kinds; here is what concerns this one.
    async fn report(&self, error: &watcher::Error, known: &mut Known) {
        let refusal = refusal(error);
        let Some(status) = refusal.filter(|_| !std::mem::replace(&mut known.refused, true)) else {
            return debug!("{}: {error}", self.what);
        };
        self.cluster.link.refused(self.what, true);
        let advice = match status.code {
            403 => " (the agent needs get, list and watch on services, endpointslices and nodes)".into(),
            404 => {
                let version = self.cluster.client().apiserver_version().await;
                let version =
                    version.map_or_else(|_| "of some other version".into(), |info| info.git_version);
                format!(" (Kubernetes 1.21 or later is needed; this API server is {version})")
            }
            _ => String::new(),
        };
        let message = status.message.trim();
        warn!("{}: refused by the API server ({}): {message}{advice}; trying again", self.what, status.code);
    }
}

impl Known {
    /// Translates one event. Returns whether it completed a list.
    fn take<K: Resource<DynamicType = ()>>(
        &mut self,
        event: watcher::Event<K>,
        changes: &mut Vec<Change>,
        convert: &impl Fn(ObjectName, Option<&K>) -> Change,
    ) -> bool {
        let name = |object: &K| {
            ObjectName::new(object.namespace().as_deref().unwrap_or_default(), object.name_any().as_str())
        };
        match event {
            watcher::Event::Init => self.listing.clear(),
            watcher::Event::InitApply(object) => {
                let name = name(&object);
                self.listing.insert(name.clone());
                self.names.insert(name.clone());
                changes.push(convert(name, Some(&object)));
            }
            watcher::Event::InitDone => {
                let listed = std::mem::take(&mut self.listing);
                let vanished = self.names.extract_if(|name| !listed.contains(name));
                changes.extend(vanished.map(|name| convert(name, None)));
                return true;
            }
            watcher::Event::Apply(object) => {
                let name = name(&object);
                self.names.insert(name.clone());
                changes.push(convert(name, Some(&object)));
            }
            watcher::Event::Delete(object) => {
                let name = name(&object);
                self.names.remove(&name);
                changes.push(convert(name, None));
            }
        }
        false
    }
}

/// Whether only a new watcher helps.
fn remedy(error: &watcher::Error, first_list: bool) -> Option<Restart> {
    match status(error)?.code {
        // The version that we would continue from is gone. `watcher` notices that in an event of the stream but goes
        // on asking for ever where the server refuses the whole request.
        410 => Some(Restart::Gone),
        // A server that does not know or allow streaming lists.
        401 | 403 | 429 => None,
        400..500 if first_list => Some(Restart::NoStreaming),
        _ => None,
    }
}

/// What the server has against the request itself. (That it does not know us or has no time concerns all requests.)
fn refusal(error: &watcher::Error) -> Option<&Status> {
    status(error)
        .filter(|status| (400..500).contains(&status.code) && !matches!(status.code, 401 | 410 | 429))
}

fn status(error: &watcher::Error) -> Option<&Status> {
    match error {
        watcher::Error::InitialListFailed(::kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(::kube::Error::Api(status))
        | watcher::Error::WatchFailed(::kube::Error::Api(status))
        | watcher::Error::WatchError(status) => Some(status),
        _ => None,
    }
}

/// Before the so-manieth list in a row is started over: every agent of a cluster may have lost its place at once.
fn pause(lost: u32) -> Duration {
    let random = RandomState::new().build_hasher().finish() as f64 / u64::MAX as f64;
    let most = PAUSE * (1 << lost.saturating_sub(1).min(5));
    most.mul_f64(0.5 + random / 2.0)
}
