//! What the agent remembers of the cluster: Services, EndpointSlices and this Node, cut down to the fields that decide
//! where a packet goes.
//!
//! Both sources ([`crate::source`]) turn Kubernetes objects into these at arrival, so nothing larger is ever kept.
//! The store also knows which Services have to be looked at again ([`Store::take_dirty`]).

mod name;
mod node;
mod port_names;
mod service;
mod slice;
mod warning;

pub use name::ObjectName;
pub use node::{LocalAddresses, Node};
pub use service::{Port, Service};
pub use slice::{Slice, SliceEndpoint, SlicePort};
pub use warning::Warning;

use port_names::PortNames;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::SystemTime;

/// One observation of the world outside. `None` means that the object is gone.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// A Service appeared, changed or vanished.
    Service(ObjectName, Option<Arc<Service>>),
    /// An EndpointSlice appeared, changed or vanished.
    Slice(ObjectName, Option<Arc<Slice>>),
    /// This node's Node object appeared, changed or vanished.
    Node(Option<Node>),
    /// The addresses of this host, as the kernel has them now.
    Addresses(LocalAddresses),
}

/// The Services to compute anew, and what made them so.
#[derive(Debug, Default)]
pub struct Dirty {
    /// Names of Services, existing or just deleted.
    pub services: BTreeSet<ObjectName>,
    /// When the control plane saw the causes (`endpoints.kubernetes.io/last-change-trigger-time`).
    pub triggers: Vec<SystemTime>,
    /// Number of Service changes since the last time.
    pub service_changes: usize,
    /// Number of EndpointSlice changes since the last time.
    pub slice_changes: usize,
}

/// The trimmed objects, slices by their Service.
#[derive(Debug, Default)]
pub struct Store {
    objects: HashMap<ObjectName, Entry>,
    /// Which Service a slice belongs to; its label may change while it lives.
    owners: HashMap<ObjectName, ObjectName>,
    port_names: PortNames,
    node: Node,
    addresses: LocalAddresses,
    dirty: Dirty,
}

/// What is known under the name of a Service.
#[derive(Debug, Default)]
struct Entry {
    service: Option<Arc<Service>>,
    /// Sorted by slice name: most Services have one, so a map of maps would cost more than the slices.
    slices: Vec<(ObjectName, Arc<Slice>)>,
}

impl Store {
    /// Takes over one observation. Returns whether anything changed.
    pub fn apply(&mut self, change: Change) -> bool {
        match change {
            Change::Service(name, service) => self.apply_service(name, service),
            Change::Slice(name, slice) => self.apply_slice(name, slice),
            Change::Node(node) => {
                let node = node.unwrap_or_default();
                let changed = node != self.node;
                if changed && (node.zone != self.node.zone || node.addresses != self.node.addresses) {
                    self.mark_all();
                }
                self.node = node;
                changed
            }
            Change::Addresses(addresses) => {
                let changed = addresses != self.addresses;
                if changed {
                    self.mark_dependent_on_addresses();
                    self.addresses = addresses;
                }
                changed
            }
        }
    }

    fn apply_service(&mut self, name: ObjectName, mut service: Option<Arc<Service>>) -> bool {
        if let Some(service) = service.as_mut().and_then(Arc::get_mut) {
            service.ports.iter_mut().for_each(|port| self.port_names.share(&mut port.name));
        }
        let entry = self.objects.entry(name.clone()).or_default();
        let changed = entry.service != service;
        entry.service = service;
        self.forget_if_empty(&name);
        if !changed {
            return false;
        }
        self.dirty.services.insert(name);
        self.dirty.service_changes += 1;
        true
    }

    fn apply_slice(&mut self, name: ObjectName, slice: Option<Arc<Slice>>) -> bool {
        let old = self.detach(&name);
        let changed = old.as_deref() != slice.as_deref();
        if changed {
            self.dirty.slice_changes += 1;
            self.dirty.services.extend(old.map(|old| old.service.clone()));
            if let Some(slice) = &slice {
                self.dirty.services.insert(slice.service.clone());
                self.dirty.triggers.extend(slice.trigger);
            }
        }
        if let Some(mut slice) = slice {
            // One copy of each name in memory.
            if let Some(slice) = Arc::get_mut(&mut slice) {
                if let Some((known, _)) = self.objects.get_key_value(&slice.service) {
                    slice.service = known.clone();
                }
                slice.ports.iter_mut().for_each(|port| self.port_names.share(&mut port.name));
            }
            self.owners.insert(name.clone(), slice.service.clone());
            let slices = &mut self.objects.entry(slice.service.clone()).or_default().slices;
            let at = slices.partition_point(|(other, _)| *other < name);
            slices.reserve_exact(1);
            slices.insert(at, (name, slice));
        }
        changed
    }

    fn detach(&mut self, name: &ObjectName) -> Option<Arc<Slice>> {
        let service = self.owners.remove(name)?;
        let slices = &mut self.objects.get_mut(&service)?.slices;
        let at = slices.iter().position(|(other, _)| other == name)?;
        let (_, slice) = slices.remove(at);
        self.forget_if_empty(&service);
        Some(slice)
    }

    fn forget_if_empty(&mut self, name: &ObjectName) {
        if self.objects.get(name).is_some_and(|entry| entry.service.is_none() && entry.slices.is_empty()) {
            self.objects.remove(name);
        }
    }

    fn mark_all(&mut self) {
        self.dirty.services.extend(self.objects.keys().cloned());
    }

    fn mark_dependent_on_addresses(&mut self) {
        for (name, entry) in &self.objects {
            if entry.service.as_ref().is_some_and(|service| service.depends_on_addresses()) {
                self.dirty.services.insert(name.clone());
            }
        }
    }

    /// The Service of that name.
    pub fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.objects.get(name)?.service.as_deref()
    }

    /// All Services, in no order.
    pub fn services(&self) -> impl Iterator<Item = (&ObjectName, &Service)> {
        self.objects.iter().filter_map(|(name, entry)| Some((name, entry.service.as_deref()?)))
    }

    /// The slices of a Service, sorted by name.
    pub fn slices(&self, service: &ObjectName) -> impl Iterator<Item = &Slice> {
        let entry = self.objects.get(service);
        entry.into_iter().flat_map(|entry| &entry.slices).map(|(_, slice)| &**slice)
    }

    /// This node's object; empty while there is none.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// The addresses of this host.
    pub fn addresses(&self) -> &LocalAddresses {
        &self.addresses
    }

    /// The Services that changed since the last call.
    pub fn take_dirty(&mut self) -> Dirty {
        std::mem::take(&mut self.dirty)
    }
}
