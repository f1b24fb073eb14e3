//! What tests with netfilter share.

use nix::sched::{CloneFlags, unshare};

/// A network namespace for this thread alone, gone with it.
pub(crate) struct Namespace;

impl Namespace {
    pub(crate) fn new() -> Self {
        unshare(CloneFlags::CLONE_NEWNET)
            .expect("these tests make a network namespace of their own: run them as root");
        Self
    }
}
