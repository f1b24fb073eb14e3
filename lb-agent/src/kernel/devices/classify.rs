//! What a device is to us.

use crate::cli::RunArgs;
use lb_attach::snapshot::{Link, Snapshot};

/// What traffic a device carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The host's end of a pod's veth.
    Pod,
    /// The way out of the node.
    Uplink,
    /// The way to other nodes' pods.
    Overlay,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Pod => "pod",
            Self::Uplink => "uplink",
            Self::Overlay => "overlay",
        })
    }
}

/// Devices of overlays, by the kernel's name for their kind.
const OVERLAYS: [&str; 3] = ["vxlan", "geneve", "gretap"];

/// A device's role; `None` for those that are none of our business. `--devices` and `--pod-devices` have the first
/// word; what neither names is looked at only where the flag is not given.
pub(super) fn classify(link: &Link, snapshot: &Snapshot, args: &RunArgs) -> Option<Role> {
    if link.loopback || !link.ethernet {
        return None;
    }
    let kind = link.kind.as_deref().unwrap_or_default();
    let outward = if OVERLAYS.contains(&kind) { Role::Overlay } else { Role::Uplink };
    if args.pod_devices.matches(&link.name) {
        return Some(Role::Pod);
    }
    if args.devices.matches(&link.name) {
        return Some(outward);
    }
    let addressed = snapshot.has_global_address(link.index);
    let is_pod = kind == "veth"
        && (link.bridge.is_some()
            || !addressed
            || link.peer_netns.is_some() && !snapshot.is_way_out(link.index));
    if is_pod {
        return args.pod_devices.is_empty().then_some(Role::Pod);
    }
    // A bridge's traffic is met at its ports and uplinks.
    if kind == "bridge" || link.bridge.is_some() || !addressed {
        return None;
    }
    args.devices.is_empty().then_some(outward)
}
