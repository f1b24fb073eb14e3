//! The built `lb-agent` as a black box: real sockets, real devices, a lab for each test.

mod affinity;
mod api;
mod bridged;
mod churn;
mod cni;
mod collide;
mod devices;
mod endpoints;
mod flood;
mod fragments;
mod health;
mod hostile;
mod icmp;
mod inspect;
mod install;
mod log;
mod manifests;
mod masquerade;
mod monitoring;
mod neighbours;
mod node_ports;
mod paths;
mod refusals;
mod reordered;
mod restart;
mod support;
