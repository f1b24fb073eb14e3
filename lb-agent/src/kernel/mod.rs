//! The only part of the agent that touches the kernel.
//!
//! - [`pins`]: where everything is pinned. - [`programs`]: loads the programs. - [`devices`]: follows the devices by
//!   netlink, and has [`lb_attach`] put programs on them. - [`sockets`]: puts programs on the cgroup.
//! - [`tables`]: the maps, typed. - [`presence`]: which packets need not be looked up. - [`fill`]: how full they are.
//! - [`losses`]: says what packets are lost for want of.
//! - [`writer`]: writes what [`crate::desired`] wants. - [`sweep`]: ends flows that have timed out.
//! - [`upgrade`]: takes over from another version. - [`leave`]: goes without cutting connections.
//! - [`destroy`]: ends connected UDP sockets whose backend is gone. - [`foreign`]: leaves to netfilter what it translated
//!   before we came. - [`netfilter`]: its connections and rules. - [`xdp`]: the accelerator for traffic that only passes
//!   through. - [`node_mounts`]: file systems, from inside a container
//!   too. - [`remove`]: takes it all away.

pub mod destroy;
pub mod devices;
mod diag;
pub mod fill;
pub(crate) mod flows;
pub mod foreign;
pub mod leave;
pub mod losses;
pub mod netfilter;
pub mod node_mounts;
pub mod ports;
pub mod presence;
pub mod programs;
pub mod remove;
pub mod served;
pub mod sockets;
pub mod sweep;
pub mod syscall;
pub mod tables;
#[cfg(test)]
pub(crate) mod testing;
pub mod upgrade;
pub mod writer;
pub mod xdp;

pub use lb_attach::pins;
