//! What is known of the devices, for metrics.

use super::Role;
use crate::metrics::{Kind, Sample};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

/// What the device manager counts; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Stats(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    counts: Mutex<Counts>,
    repaired: AtomicU64,
}

/// Devices at one look.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pods: usize,
    uplinks: usize,
    overlays: usize,
    failing: usize,
}

impl Counts {
    /// One that is to be served, and whether it is.
    pub(super) fn add(&mut self, role: Role, served: bool) {
        *match role {
            _ if !served => &mut self.failing,
            Role::Pod => &mut self.pods,
            Role::Uplink => &mut self.uplinks,
            Role::Overlay => &mut self.overlays,
        } += 1;
    }
}

impl Stats {
    pub(super) fn set(&self, counts: Counts) {
        *self.0.counts.lock().unwrap_or_else(PoisonError::into_inner) = counts;
    }

    /// What somebody else had removed was put back.
    pub(super) fn repaired(&self) {
        self.0.repaired.fetch_add(1, Relaxed);
    }

    /// Devices by role.
    pub fn samples(&self) -> Vec<Sample> {
        let counts = *self.0.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let roles =
            [(Role::Pod, counts.pods), (Role::Uplink, counts.uplinks), (Role::Overlay, counts.overlays)];
        let served = roles.map(|(role, count)| {
            let help = "Devices that the programs are attached to";
            Sample::new("lb_devices", help, Kind::Gauge, count as f64).with("role", role.to_string())
        });
        let help = "Devices that the programs should be attached to, but could not be";
        let failing = Sample::new("lb_devices_failing", help, Kind::Gauge, counts.failing as f64);
        let help = "Programs or entries of devices that somebody else had removed, and that were put back";
        let repaired = self.0.repaired.load(Relaxed) as f64;
        let repaired = Sample::new("lb_device_repairs_total", help, Kind::Counter, repaired);
        served.into_iter().chain([failing, repaired]).collect()
    }
}
