//! Watching a cluster over real HTTP.
//!
//! [`suite`] runs against the stand-in (`lb_stand_in`), or against the cluster that the kubeconfig file in
//! `LB_TEST_KUBECONFIG` names: there it makes a namespace and a Node of its own and removes them at the end.
//! The others need a server that fails on command, so they always run against the stand-in.

mod access;
mod checks;
mod cluster;
mod events;
mod faults;
mod http;
mod log;
mod outage;
mod suite;
mod view;
