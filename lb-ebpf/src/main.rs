//! The kernel programs. Only glue: the logic is in `lb_common`, where it runs under test.
//!
//! - `tc`: `ingress` and `egress`, attached to every pod veth, uplink and overlay device.
//! - `apart`: what is verified by itself.
//! - `frames`: packets that are kept for a while.
//! - `next_hop`: the bridge short-cut.
//! - `sockets`: the cgroup hooks for host processes.
//! - `tables`: the maps.
//! - `xdp`: the accelerator for traffic that only passes through.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod apart;
#[cfg(target_arch = "bpf")]
mod frames;
#[cfg(target_arch = "bpf")]
mod next_hop;
#[cfg(target_arch = "bpf")]
mod sockets;
#[cfg(target_arch = "bpf")]
mod tables;
#[cfg(target_arch = "bpf")]
mod tc;
#[cfg(target_arch = "bpf")]
mod xdp;

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel takes only programs under a licence that it knows; some helpers are for GPL-compatible ones.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Cargo builds every member for the host too; there is nothing to run there.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
