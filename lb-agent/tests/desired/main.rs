//! The pure core against Kubernetes' rules, and the main loop against a writer that fails.

#[path = "../support/mod.rs"]
mod support;

mod addresses;
mod endpoints;
mod random;
mod reconciler;
mod size;
mod sync;
