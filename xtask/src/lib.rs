//! The builder's tool as a library: tests, demo, benchmark and the kernel matrix share one lab and one probe.

pub mod agent;
pub mod bench;
pub mod build;
pub mod cni;
pub mod demo;
pub mod image;
pub mod k3d;
pub mod lab;
pub mod probe;
pub mod system;
pub mod test;
pub mod vm;
