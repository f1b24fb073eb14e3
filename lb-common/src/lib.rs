//! What the kernel programs and the agent share: the layouts of the BPF maps, and the packet logic.
//!
//! Everything here is plain `no_std` Rust without a dependency on either side, so that it is unit-tested,
//! property-tested and fuzzed on the host. `lb-ebpf` gives it real packets and maps.
//!
//! - [`addr`]: addresses and ports in network order.
//! - [`maps`]: keys and values of the BPF maps.
//! - `layout`: the same, described for other versions.
//! - [`datapath`]: the programs' logic; start at [`datapath::ingress`] and [`datapath::egress`].
//! - [`socket`]: the logic of the cgroup socket hooks.
#![cfg_attr(not(test), no_std)]

pub mod addr;
mod affinity;
pub mod checksum;
pub mod datapath;
#[cfg(not(target_arch = "bpf"))]
pub mod layout;
pub mod maps;
pub mod socket;
