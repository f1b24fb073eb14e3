//! The main loop: takes in changes, computes what they mean, has the difference written.
//!
//! Level-triggered: only the latest state counts, and a failed write is tried again until it works.

use crate::desired::{Config, NodePortAddresses, Reconciler};
use crate::events::Events;
use crate::health::services::addresses;
use crate::health::{Health, ServiceChecks};
use crate::memory;
use crate::metrics::Metrics;
use crate::model::FrontendAddr;
use crate::source::Event;
use crate::store::{Change, Dirty, LocalAddresses, Node, Store};
use ipnet::IpNet;
use std::time::Duration;
use tokio::sync::mpsc::Receiver;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, error, info, warn};

pub use crate::desired::Diff;

/// The first change is written at once. After that we rest for [`REST`] times as long as the writing took, so that a
/// storm of changes costs a fifth of a core at most, this long at most.
const LONGEST_REST: Duration = Duration::from_secs(1);
const REST: u32 = 5;
/// The shortest rest: doubled at the second of those in a row that changes come in, so that a burst is written together and
/// one change after another is not kept waiting.
const GATHER: std::ops::RangeInclusive<Duration> = Duration::from_micros(1500)..=Duration::from_millis(6);
/// Between attempts to write, doubled at each.
const RETRY: std::ops::RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(5);

/// Brings differences into the kernel.
pub trait Writer: Send {
    /// The frontends that the kernel holds already, left by a former agent.
    ///
    /// # Errors
    /// If the kernel cannot be asked; the agent gives up then.
    fn adopt(&mut self) -> anyhow::Result<Vec<FrontendAddr>>;

    /// Writes a difference. What is in it may be in the kernel already: [`Writer::adopt`]'s frontends and those of a
    /// failed attempt are given again.
    ///
    /// # Errors
    /// If anything could not be written; the same will be given again, or something newer.
    fn apply(&mut self, diff: &Diff) -> anyhow::Result<()>;

    /// Pods reach these with their own address. [`Writer::node_changed`] follows.
    fn no_masquerade(&mut self, ranges: Vec<IpNet>) {
        let _ = ranges;
    }

    /// The Node object or the host's addresses changed. Called before the difference that follows from it.
    ///
    /// # Errors
    /// If anything could not be written; it will be called again.
    fn node_changed(&mut self, node: &Node, addresses: &LocalAddresses) -> anyhow::Result<()> {
        let _ = (node, addresses);
        Ok(())
    }
}

/// Whom the main loop tells what it does. Clones share what they hold.
#[derive(Clone, Debug, Default)]
pub struct Reports {
    /// `/healthz`.
    pub health: Health,
    /// `/metrics`.
    pub metrics: Metrics,
    /// The health checks of Services.
    pub checks: ServiceChecks,
    /// Kubernetes Events.
    pub events: Events,
}

/// Runs until all senders of `events` are gone. One of them has to send [`Change::Addresses`] and one
/// [`Event::Synced`] before anything is written.
///
/// # Errors
/// If the writer cannot say what the kernel holds.
pub async fn run(
    config: Config,
    mut events: Receiver<Event>,
    mut writer: impl Writer,
    reports: Reports,
) -> anyhow::Result<()> {
    let adopted = writer.adopt()?;
    if !adopted.is_empty() {
        info!("{} frontends of a former run are in place", adopted.len());
    }
    let node_port_addresses = config.node_port_addresses.clone();
    let mut sync = Loop::new(Reconciler::new(config, adopted), writer, node_port_addresses, reports);
    loop {
        let due = sync.due();
        tokio::select! {
            event = events.recv() => match event {
                Some(event) => sync.take(event),
                None => return Ok(()),
            },
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                while let Ok(event) = events.try_recv() {
                    sync.take(event);
                }
                sync.write();
            }
        }
    }
}

struct Loop<W> {
    store: Store,
    reconciler: Reconciler,
    writer: W,
    node_port_addresses: NodePortAddresses,
    reports: Reports,
    /// Computed but not written yet.
    pending: Dirty,
    node_changed: bool,
    listed: bool,
    addressed: bool,
    dirty: bool,
    first: bool,
    not_before: Instant,
    /// The shortest rest at present, whether something changed during it, and in how many in a row before.
    gather: Duration,
    kept_waiting: bool,
    busy: u32,
    retry: Duration,
}

impl<W: Writer> Loop<W> {
    fn new(
        reconciler: Reconciler,
        writer: W,
        node_port_addresses: NodePortAddresses,
        reports: Reports,
    ) -> Self {
        Self {
            store: Store::default(),
            reconciler,
            writer,
            node_port_addresses,
            reports,
            pending: Dirty::default(),
            node_changed: false,
            listed: false,
            addressed: false,
            dirty: false,
            first: true,
            not_before: Instant::now(),
            gather: *GATHER.start(),
            kept_waiting: false,
            busy: 0,
            retry: *RETRY.start(),
        }
    }

    /// When to write next.
    fn due(&self) -> Option<Instant> {
        (self.dirty && self.listed && self.addressed).then_some(self.not_before)
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Synced { partial } => {
                if partial {
                    warn!("some manifests cannot be read: what a former run served for them stays");
                }
                self.listed = true;
                self.dirty = true;
                self.reconciler.set_partial(partial);
            }
            Event::NoMasquerade(ranges) => {
                self.writer.no_masquerade(ranges);
                self.node_changed = true;
                self.dirty = true;
            }
            Event::Changes(changes) => {
                let mut changed = false;
                for change in changes {
                    self.addressed |= matches!(change, Change::Addresses(_));
                    let of_node = matches!(change, Change::Addresses(_) | Change::Node(_));
                    let new = self.store.apply(change);
                    self.node_changed |= of_node && new;
                    changed |= new;
                }
                if !changed {
                    return;
                }
                self.dirty = true;
                self.kept_waiting |= Instant::now() < self.not_before;
                self.reports.health.set_node_eligible(self.store.node().eligible);
            }
        }
        self.collect();
        self.reports.health.queued();
        self.reports.metrics.queued(self.pending.service_changes, self.pending.slice_changes);
    }

    fn collect(&mut self) {
        let dirty = self.store.take_dirty();
        self.pending.services.extend(dirty.services);
        self.pending.triggers.extend(dirty.triggers);
        self.pending.service_changes += dirty.service_changes;
        self.pending.slice_changes += dirty.slice_changes;
    }

    fn write(&mut self) {
        let start = Instant::now();
        let services = std::mem::take(&mut self.pending.services);
        let computed = services.len();
        for (name, warning) in self.reconciler.update(&self.store, services) {
            warn!("Service {name}: {warning}");
            self.reports.events.unserved(&name, &warning);
        }
        let diff = self.reconciler.diff();
        let (upserts, deletes) = (diff.upserts.len(), diff.deletes.len());
        if let Err(error) = self.try_write(&diff) {
            self.reconciler.failed(&diff);
            self.reports.metrics.failed();
            error!(
                "cannot write {upserts} and remove {deletes} frontends: {error:#}; trying again in {:?}",
                self.retry
            );
            self.not_before = Instant::now() + self.retry;
            self.retry = (self.retry * 2).min(*RETRY.end());
            return;
        }
        self.reconciler.committed(diff);
        let (store, checks) = (&self.store, self.reconciler.health_checks());
        let addresses = addresses(&self.node_port_addresses, store.addresses(), store.node());
        self.reports.checks.set(addresses, checks);
        let took = start.elapsed();
        debug!("{computed} Services: {upserts} frontends written, {deletes} removed in {took:?}");
        let totals = self.reconciler.totals();
        let first = std::mem::take(&mut self.first);
        if first {
            info!(
                "{} Services with {} frontends are in place after {took:?}",
                totals.services, totals.frontends
            );
        }
        let done = std::mem::take(&mut self.pending);
        // Starting is over, too.
        if first || computed > memory::MANY {
            memory::give_back();
        }
        self.reports.metrics.synced(took, totals, &done.triggers);
        self.reports.health.synced();
        self.dirty = false;
        self.retry = *RETRY.start();
        self.busy = if std::mem::take(&mut self.kept_waiting) { self.busy.saturating_add(1) } else { 0 };
        self.gather = if self.busy < 2 { *GATHER.start() } else { (self.gather * 2).min(*GATHER.end()) };
        self.not_before = Instant::now() + (took * REST).clamp(self.gather, LONGEST_REST);
    }

    fn try_write(&mut self, diff: &Diff) -> anyhow::Result<()> {
        if self.node_changed {
            self.writer.node_changed(self.store.node(), self.store.addresses())?;
            self.node_changed = false;
        }
        if !diff.is_empty() {
            self.writer.apply(diff)?;
        }
        Ok(())
    }
}
