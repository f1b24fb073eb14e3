//! What the agent and its CNI plugin share: where everything is pinned, what devices there are, and how the pinned tc
//! programs get onto them. No tokio, no Kubernetes: the plugin runs for every pod that starts, and has to be small.
//!
//! - [`pins`]: where everything is pinned, and whose turn it is to change that. - [`attach`]: the pinned programs, put on
//!   devices. - [`snapshot`]: devices and addresses as the kernel has them. - [`netlink`], [`syscall`]: how
//!   it is asked.
//! - [`records`]: what the plugin remembers of pods.
//! - [`vxlan`]: how an overlay wraps packets.

pub mod attach;
mod clsact;
pub mod netlink;
pub mod pins;
pub mod records;
pub mod snapshot;
pub mod syscall;
mod tcx;
pub mod vxlan;
