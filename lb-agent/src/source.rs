//! Where Services come from: a cluster's API server or a directory of manifests.
//!
//! A source is a task that sends [`Event`]s to the main loop ([`crate::sync`]). Objects are cut down before they are
//! sent. A source that loses its connection or cannot read a file sends nothing: what is served stays.

pub mod kube;
pub mod manifests;

use crate::store::Change;
use ipnet::IpNet;
use tokio::sync::mpsc;

/// What a source, or anything else that watches the world, tells the main loop.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Observations, in order.
    Changes(Vec<Change>),
    /// Everything that exists has been sent at least once.
    Synced {
        /// Some of it could not be read, so what is missing may not be taken as deleted.
        partial: bool,
    },
    /// Pods reach these with their own address.
    NoMasquerade(Vec<IpNet>),
}

/// The main loop's end of the line is [`crate::sync::run`]'s argument.
pub type Sender = mpsc::Sender<Event>;

/// Events that may wait: enough to keep a list flowing, few enough to bound memory.
pub const QUEUE: usize = 16;
