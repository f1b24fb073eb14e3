//! Watching a cluster over real HTTP.
//!
//! [`suite`] runs against the stand-in (`lb_stand_in`), or against the cluster that the kubeconfig file in
//! `LB_TEST_KUBECONFIG` names: there it makes a namespace and a Node of its own and removes them at the end.
//! [`faults`] and [`events`] need a server that fails on command, so they always run against the stand-in.

mod checks;
mod cluster;
mod events;
mod faults;
mod http;
mod suite;
mod view;
