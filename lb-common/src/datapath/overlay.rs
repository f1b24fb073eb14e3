//! The packets that carry an overlay's: between nodes, every packet of every pod is in one. They are the node's own and none
//! of ours, which two or three look-ups of their ever new tuples would find out, too.

use super::Kernel;
use super::parse::{Headers, UDP};
use crate::maps::Addr;

/// Whether a packet is such a one; `ours` is its address at this node's end. (Pods and others may use the port as they like.)
#[inline(always)]
pub(super) fn carries<A: Addr, K: Kernel>(kernel: &K, headers: &Headers<A>, ours: A) -> bool {
    headers.key.proto == UDP
        && kernel
            .overlay()
            .is_some_and(|overlay| headers.key.dport == overlay.port && ours == A::carrier_addr(overlay))
}
