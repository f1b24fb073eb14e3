//! The objects of a cluster, watched through its API server.
//!
//! Deletions are believed in two cases only: the server says so, or a new list is complete and lacks the object.
//! An API server that goes away therefore changes nothing.

use super::{Event, Sender};
use crate::store::{Change, Node, ObjectName, Slice};
use ::kube::api::Api;
use ::kube::config::{KubeConfigOptions, Kubeconfig};
use ::kube::runtime::{WatchStreamExt, watcher};
use ::kube::{Client, Config, Resource, ResourceExt};
use futures::StreamExt;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde::de::DeserializeOwned;
use std::collections::HashSet;
use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

/// Objects that every service proxy but an explicitly named one leaves alone.
const SERVICES: &str = "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name";
const SLICES: &str = "!service.kubernetes.io/headless";

/// Bookmarks arrive every minute, so a connection that is silent for longer is dead.
const SILENCE: Duration = Duration::from_secs(90);
/// An old server takes a streaming list for an ordinary watch and never says that the list is complete.
const STREAMING_PATIENCE: Duration = Duration::from_secs(5);
/// Before a list is started over by us; [`watcher`]'s own attempts have their back-off.
const PAUSE: Duration = Duration::from_secs(1);
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
    /// Certificates or keys do not work.
    #[error("cannot set up the connection to the API server: {0}")]
    Client(#[source] ::kube::Error),
}

/// Where the API server is and how to be let in.
#[derive(Clone, Copy, Debug)]
pub enum Access<'a> {
    /// What a kubeconfig file says.
    Kubeconfig(&'a Path),
    /// What the cluster gives its pods.
    InCluster,
    /// No credentials.
    Anonymous,
}

/// A client for the API server; `master` overrides the address.
///
/// # Errors
/// If the configuration is unusable. That the server cannot be reached is not an error: it may come.
pub async fn client(access: Access<'_>, master: Option<&str>) -> Result<Client, Error> {
    let url = master.map(|url| {
        let parsed = url.parse::<hyper::Uri>().ok().filter(|uri| uri.scheme().is_some());
        parsed.ok_or_else(|| Error::Master(url.into()))
    });
    let url = url.transpose()?;
    let mut config = match access {
        Access::Kubeconfig(path) => {
            let fail = |error| Error::Kubeconfig(path.display().to_string(), error);
            let kubeconfig = Kubeconfig::read_from(path).map_err(fail)?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(fail)?
        }
        Access::InCluster => Config::incluster().map_err(Error::InCluster)?,
        Access::Anonymous => Config::new(url.clone().ok_or_else(|| Error::Master(String::new()))?),
    };
    if let Some(url) = url {
        config.cluster_url = url;
    }
    config.connect_timeout = Some(Duration::from_secs(10));
    config.read_timeout = Some(SILENCE);
    Client::try_from(config).map_err(Error::Client)
}

/// Which part of a cluster to watch.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    /// Only this namespace. A test on a cluster in use must not see the rest.
    pub namespace: Option<String>,
}

/// Watches Services, EndpointSlices and this Node until the receiver is dropped.
pub async fn run(client: Client, node_name: &str, scope: Scope, events: Sender) {
    let services: Api<core::Service> = api(&client, &scope);
    let slices: Api<EndpointSlice> = api(&client, &scope);
    let nodes: Api<core::Node> = Api::all(client);
    let unlisted = Arc::new(AtomicUsize::new(3));
    let task = |what, selector| Task { what, selector, unlisted: unlisted.clone(), events: events.clone() };

    let of_services = watcher::Config::default().labels(SERVICES);
    let services = task("Services", of_services).run(services, |name, service: Option<&core::Service>| {
        Change::Service(name, service.map(|service| Arc::new(service.into())))
    });
    let of_slices = watcher::Config::default().labels(SLICES);
    let slices = task("EndpointSlices", of_slices).run(slices, |name, slice: Option<&EndpointSlice>| {
        Change::Slice(name, slice.and_then(|slice| Slice::new(slice, node_name)).map(Arc::new))
    });
    let of_node = watcher::Config::default().fields(&format!("metadata.name={node_name}"));
    let node = task("this Node", of_node)
        .run(nodes, |_, node: Option<&core::Node>| Change::Node(node.map(Node::from)));
    futures::join!(services, slices, node);
}

fn api<K>(client: &Client, scope: &Scope) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = ::kube::core::NamespaceResourceScope>,
{
    match &scope.namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

/// The watch on one kind.
struct Task {
    what: &'static str,
    selector: watcher::Config,
    /// Kinds whose first list is not complete yet.
    unlisted: Arc<AtomicUsize>,
    events: Sender,
}

/// Why a watcher has to be thrown away.
enum Restart {
    /// The server does not know streaming lists, or we need a list that is certainly recent.
    List,
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
    /// The server could not be reached, and that has been said.
    failing: bool,
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
        loop {
            let streaming = config.initial_list_strategy == watcher::InitialListStrategy::StreamingList;
            let stream = watcher(api.clone(), config).default_backoff().ready_chunks(BATCH);
            match self.follow(Box::pin(stream), streaming, &mut known, &convert).await {
                Restart::Stop => return,
                Restart::List => sleep(if streaming { Duration::ZERO } else { PAUSE }).await,
            }
            config = self.selector.clone().page_size(PAGE);
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
        let mut first_list = streaming;
        loop {
            let patience = if first_list { STREAMING_PATIENCE } else { Duration::MAX };
            let Ok(Some(chunk)) = timeout(patience, stream.next()).await else {
                debug!("{}: no end of the streaming list in sight, using an ordinary one", self.what);
                return Restart::List;
            };
            let mut changes = Vec::with_capacity(chunk.len());
            let mut complete = false;
            let mut restart = None;
            for event in chunk {
                match event {
                    Ok(event) => {
                        // `Init` comes before the server is asked.
                        let alive = !matches!(event, watcher::Event::Init);
                        if alive && std::mem::take(&mut known.failing) {
                            info!("{}: the API server is back", self.what);
                        }
                        complete |= known.take(event, &mut changes, convert);
                    }
                    Err(error) => {
                        self.report(&error, known);
                        restart = restart.or(needs_list(&error, first_list).then_some(Restart::List));
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
        if std::mem::replace(&mut known.listed_once, true) {
            return true;
        }
        info!("{}: {} listed", self.what, known.names.len());
        if self.unlisted.fetch_sub(1, Ordering::AcqRel) > 1 {
            return true;
        }
        self.events.send(Event::Synced { partial: false }).await.is_ok()
    }

    fn report(&self, error: &watcher::Error, known: &mut Known) {
        use watcher::Error::{InitialListFailed, WatchStartFailed};
        // The end of a connection is everyday business; that no new one can be had is not.
        let serious =
            matches!(error, InitialListFailed(_) | WatchStartFailed(_)) && status(error) != Some(410);
        if !serious || std::mem::replace(&mut known.failing, true) {
            return debug!("{}: {error}", self.what);
        }
        let advice = match status(error) {
            Some(401 | 403) => " (the agent needs get, list and watch on services, endpointslices and nodes)",
            _ => "",
        };
        warn!("{}: {error}{advice}; what is known stays served, trying again", self.what);
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
fn needs_list(error: &watcher::Error, first_list: bool) -> bool {
    match status(error) {
        // The version that we would continue from is gone. `watcher` notices that in an event of the stream but goes
        // on asking for ever where the server refuses the whole request.
        Some(410) => true,
        // A server that does not know or allow streaming lists.
        Some(code) => first_list && (400..500).contains(&code) && !matches!(code, 401 | 403 | 429),
        None => false,
    }
}

fn status(error: &watcher::Error) -> Option<u16> {
    match error {
        watcher::Error::InitialListFailed(::kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(::kube::Error::Api(status))
        | watcher::Error::WatchFailed(::kube::Error::Api(status))
        | watcher::Error::WatchError(status) => Some(status.code),
        _ => None,
    }
}
