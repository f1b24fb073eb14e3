//! The task that sends events, one at a time.

use super::{Event, Shared};
use crate::store::ObjectName;
use ::kube::api::{Api, ListParams, Patch, PatchParams, PostParams};
use ::kube::{Client, Error};
use k8s_openapi::api::core::v1::{ObjectReference, Service};
use k8s_openapi::api::events::v1 as api;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use serde_json::json;
use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, warn};

const CONTROLLER: &str = "lb-agent";
/// So many at once, then one in such a time: every node of a cluster may have the same to tell.
const BURST: u32 = 25;
const EVERY: Duration = Duration::from_secs(5);
/// Between attempts while the API server does not answer, doubled at each.
const RETRY: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(60);
const ATTEMPTS: u32 = 12;
/// No answer after that is none.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same once more within that time is counted at the first one, as client-go does.
const SERIES: Duration = Duration::from_secs(360);

// What the API server allows.
const NOTE: usize = 1024;
const INSTANCE: usize = 128;
const NAME: usize = 253;

/// Where events of what has no namespace belong, and where API servers before 1.21.6 and 1.22.3 want them.
const HOME: &str = "default";
const OLD_HOME: &str = "kube-system";

pub(super) struct Sender {
    client: Client,
    node: String,
    /// What was sent lately.
    recent: HashMap<Event, Recent>,
    /// Until when the allowance is used up.
    paid: Instant,
    /// Where this node's own go.
    home: &'static str,
    failing: bool,
    /// Being refused has been said.
    refused: bool,
}

struct Recent {
    name: String,
    count: i32,
    at: Instant,
}

/// Why an event was not sent.
enum Failure {
    /// It may work later.
    Again(String),
    Never(String),
    /// The Service is gone: nobody wants to know any more.
    Moot,
}

impl Sender {
    pub(super) fn new(client: Client, node: &str) -> Self {
        Self {
            client,
            node: node.into(),
            recent: HashMap::new(),
            paid: Instant::now(),
            home: HOME,
            failing: false,
            refused: false,
        }
    }

    pub(super) async fn run(mut self, shared: Arc<Shared>) {
        loop {
            shared.wait().await;
            self.pace().await;
            // Taken last, so that what happens again meanwhile is counted.
            let Some((event, count)) = shared.pop() else { continue };
            match self.send(&event, count).await {
                Ok(()) => drop(shared.sent.fetch_add(1, Relaxed)),
                Err(Failure::Moot) => {}
                Err(_) => drop(shared.failed.fetch_add(1, Relaxed)),
            }
        }
    }

    async fn pace(&mut self) {
        let now = Instant::now();
        self.paid = self.paid.max(now) + EVERY;
        sleep((self.paid - now).saturating_sub(EVERY * BURST)).await;
    }

    async fn send(&mut self, event: &Event, count: i32) -> Result<(), Failure> {
        let mut pause = *RETRY.start();
        for _ in 0..ATTEMPTS {
            match timeout(PATIENCE, self.attempt(event, count)).await {
                Ok(Ok(())) => {
                    self.failing = false;
                    return Ok(());
                }
                Ok(Err(Failure::Again(error))) => self.complain(&error),
                Ok(Err(Failure::Never(error))) => {
                    self.complain(&error);
                    return Err(Failure::Never(error));
                }
                Ok(Err(Failure::Moot)) => return Err(Failure::Moot),
                Err(_) => self.complain(&format!("no answer within {PATIENCE:?}")),
            }
            sleep(pause).await;
            pause = (pause * 2).min(*RETRY.end());
        }
        Err(Failure::Never("given up".into()))
    }

    fn complain(&mut self, error: &str) {
        if !std::mem::replace(&mut self.failing, true) {
            debug!("Kubernetes Events cannot be sent: {error}");
        }
    }

    async fn attempt(&mut self, event: &Event, count: i32) -> Result<(), Failure> {
        self.recent.retain(|_, recent| recent.at.elapsed() < SERIES);
        let regarding = self.regarding(event.service.as_ref()).await?;
        let namespace = regarding.namespace.clone().unwrap_or_else(|| self.home.into());
        let events: Api<api::Event> = Api::namespaced(self.client.clone(), &namespace);
        if let Some(recent) = self.recent.get_mut(event) {
            let total = recent.count.saturating_add(count);
            let patch = Patch::Merge(json!({ "series": series(total) }));
            match events.patch(&recent.name, &PatchParams::default(), &patch).await {
                Ok(_) => {
                    (recent.count, recent.at) = (total, Instant::now());
                    return Ok(());
                }
                // Events do not live for ever.
                Err(Error::Api(status)) if status.code == 404 => drop(self.recent.remove(event)),
                Err(error) => return Err(self.failure(error)),
            }
        }
        let new = self.event(event, count, regarding);
        let name = new.metadata.name.clone().unwrap_or_default();
        match events.create(&PostParams::default(), &new).await {
            Ok(_) => {}
            Err(Error::Api(status)) if status.code == 422 && event.service.is_none() && self.home == HOME => {
                self.home = OLD_HOME;
                return Err(Failure::Again(status.message));
            }
            Err(error) => return Err(self.failure(error)),
        }
        self.recent.insert(event.clone(), Recent { name, count, at: Instant::now() });
        Ok(())
    }

    fn failure(&mut self, error: Error) -> Failure {
        let Error::Api(status) = &error else { return Failure::Again(error.to_string()) };
        match status.code {
            // A namespace on its way out takes no new objects.
            403 if status.message.contains("being terminated") => Failure::Moot,
            401 | 403 => {
                if !std::mem::replace(&mut self.refused, true) {
                    let why = if status.code == 403 {
                        "the agent needs create and patch on events in events.k8s.io"
                    } else {
                        "its credentials are not accepted"
                    };
                    let refusal = &status.message;
                    warn!(
                        "Kubernetes Events are refused: {refusal} ({why}; the log has everything that they would say)"
                    );
                }
                Failure::Never(error.to_string())
            }
            429 | 500.. => Failure::Again(error.to_string()),
            _ => Failure::Never(error.to_string()),
        }
    }

    /// What the event is about. `kubectl describe` finds a Service's events by its uid, and a node's by its name.
    async fn regarding(&self, service: Option<&ObjectName>) -> Result<ObjectReference, Failure> {
        let Some(service) = service else {
            return Ok(ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Node".into()),
                name: Some(self.node.clone()),
                uid: Some(self.node.clone()),
                ..ObjectReference::default()
            });
        };
        // A list, because that is what an agent may do with Services.
        let services: Api<Service> = Api::namespaced(self.client.clone(), service.namespace());
        let named = ListParams::default().fields(&format!("metadata.name={}", service.name()));
        let uid = match services.list_metadata(&named).await {
            Ok(list) => list.items.into_iter().next().ok_or(Failure::Moot)?.metadata.uid,
            Err(Error::Api(status)) if matches!(status.code, 401 | 403) => None,
            Err(error) => return Err(Failure::Again(error.to_string())),
        };
        Ok(ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Service".into()),
            namespace: Some(service.namespace().into()),
            name: Some(service.name().into()),
            uid,
            ..ObjectReference::default()
        })
    }

    fn event(&self, event: &Event, count: i32, regarding: ObjectReference) -> api::Event {
        let now = Timestamp::now();
        let suffix = format!(".{:x}", now.as_nanosecond());
        let name = regarding.name.clone().unwrap_or_default();
        let name = cut(&name, NAME - suffix.len()).trim_end_matches(['.', '-']).to_owned() + &suffix;
        let instance = format!("{CONTROLLER}-{}", self.node);
        api::Event {
            metadata: ObjectMeta {
                name: Some(name),
                namespace: Some(regarding.namespace.clone().unwrap_or_else(|| self.home.into())),
                ..ObjectMeta::default()
            },
            event_time: Some(MicroTime(now)),
            type_: Some(if event.warning { "Warning" } else { "Normal" }.into()),
            reason: Some(event.reason.into()),
            action: Some(event.action.into()),
            note: Some(cut(&event.note, NOTE).into()),
            regarding: Some(regarding),
            reporting_controller: Some(CONTROLLER.into()),
            reporting_instance: Some(cut(&instance, INSTANCE).into()),
            series: (count > 1).then(|| series(count)),
            ..api::Event::default()
        }
    }
}

fn series(count: i32) -> api::EventSeries {
    api::EventSeries { count, last_observed_time: MicroTime(Timestamp::now()) }
}

/// At most so many bytes of it.
fn cut(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
}
