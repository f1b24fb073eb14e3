//! Candidates for a port, always the same ones for the same tuple.

use super::Kernel;
use crate::affinity::scale;
use crate::maps::{Addr, FlowKey};

/// A walk through the masquerade ports that follows from a tuple's hash: a flow whose entry was lost finds its own
/// port again.
pub(super) struct Ports {
    at: u32,
    step: u32,
    first: u16,
    span: u32,
}

impl Ports {
    #[inline(always)]
    pub(super) fn new<A: Addr, K: Kernel>(kernel: &K, of: &FlowKey<A>) -> Self {
        let (first, last) = kernel.masquerade_ports();
        let hash = of.hash(kernel.hash_seed());
        // An odd stride spreads the tries of neighbours that start at the same candidate.
        let step = ((hash >> 16) | 1).wrapping_mul(0x9e37_79b1);
        let span = u32::from(last).wrapping_sub(u32::from(first)).wrapping_add(1);
        Self { at: hash, step, first, span }
    }

    /// Host order.
    #[inline(always)]
    pub(super) fn next(&mut self) -> u16 {
        self.at = self.at.wrapping_add(self.step);
        self.first.wrapping_add(scale(self.at, self.span) as u16)
    }

    /// The next candidate or, if the host has reserved it, its neighbour. (A whole walk may be of even ports only: without
    /// neighbours, having every second port reserved would leave some flows none.)
    #[inline(always)]
    pub(super) fn next_free<K: Kernel>(&mut self, kernel: &K) -> Option<u16> {
        let mut port = self.next();
        if kernel.port_reserved(port) {
            port = neighbour(port);
            let inside = u32::from(port.wrapping_sub(self.first)) < self.span;
            if !inside || kernel.port_reserved(port) {
                return None;
            }
        }
        Some(kernel.launder_number(port.into()) as u16)
    }
}

/// The port that is tried in place of a reserved one.
#[inline(always)]
pub(super) fn neighbour(port: u16) -> u16 {
    port ^ 1
}
