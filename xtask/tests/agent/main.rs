//! The built `lb-agent` as a black box: real sockets, real devices, a lab for each test.

mod api;
mod churn;
mod devices;
mod endpoints;
mod flood;
mod health;
mod hostile;
mod icmp;
mod inspect;
mod manifests;
mod masquerade;
mod neighbours;
mod paths;
mod refusals;
mod restart;
mod support;
