//! Packets that go past the hooks between: which they are, and what they become.

use super::build::{self, L4};
use super::cluster::{BACKEND, CLIENT, OVERLAY, UPLINK};
use super::frame::Frame;
use super::paths::{Path, Runner, Talk, Trouble, Way, node};
use super::world::{Action, Hook, World};
use lb_common::maps::Device;
use std::net::SocketAddr;

pub(crate) const DATA: &[u8] = b"some data";

/// A node that redirects to its pods.
pub(crate) fn redirecting() -> World {
    let mut world = node();
    world.redirects = true;
    for pod in [CLIENT, BACKEND] {
        world.devices.get_mut(&pod).expect("a pod's device").flags |= Device::REDIRECT;
    }
    world
}

/// Where packets that go that way are redirected to: where they come in, and whose device it is that they go to.
pub(crate) fn shortened(path: &Path, way: Way) -> Option<(u32, u32)> {
    match (path.name, way) {
        ("pod to ClusterIP, same node", Way::Forward) => Some((CLIENT, BACKEND)),
        ("pod to ClusterIP, same node", Way::Reply) => Some((BACKEND, CLIENT)),
        ("pod to ClusterIP, other node", Way::Reply) => Some((OVERLAY, CLIENT)),
        ("outside to NodePort, backend here", Way::Forward) => Some((UPLINK, BACKEND)),
        _ => None,
    }
}

/// How a packet sets out and arrives.
fn ends(path: &Path, way: Way) -> [(SocketAddr, SocketAddr); 2] {
    match way {
        Way::Forward => [(path.client, path.vip), (path.client, path.backend)],
        Way::Reply => [(path.backend, path.client), (path.vip, path.client)],
    }
}

/// A packet that is redirected, whole at the other end; the long way if it is not for redirecting.
pub(crate) fn send(runner: &mut impl Runner, talk: &mut Talk<'_>, way: Way, l4: L4) -> Result<bool, Trouble> {
    let Some((from, to)) = shortened(talk.path, way) else {
        return talk.send(runner, way, l4, DATA).map(|()| false);
    };
    let [sent, arrives] = ends(talk.path, way).map(|(src, dst)| build::packet(src, dst, l4, DATA));
    let partial = talk.partial;
    let mut frame = Frame { bytes: if partial { build::to_partial(sent) } else { sent }, partial };
    match runner.run(from, Hook::Ingress, &mut frame) {
        // The kernel's program does not say where to.
        action @ (Action::Redirect(_) | Action::Reply) => {
            assert!(
                action == Action::Reply || action == Action::Redirect(to),
                "{}: {action:?}",
                talk.path.name
            );
            let got = if partial { build::complete(frame.bytes) } else { frame.bytes };
            assert_eq!(got, arrives, "{} {way:?} {l4:?}", talk.path.name);
            Ok(true)
        }
        _ => talk.send(runner, way, l4, DATA).map(|()| false),
    }
}
