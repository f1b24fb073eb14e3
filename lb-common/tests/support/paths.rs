//! The paths of `docs/design.md`, hook by hook: what each hook has to do to a packet.

use super::build::{self, Error, L4};
use super::cluster::{BACKEND, CLIENT, Net, OVERLAY, UPLINK, cluster, sock};
use super::frame::Frame;
use super::world::{Action, Hook, World};
use lb_common::maps::Frontend;
use std::net::{IpAddr, SocketAddr};

/// What runs the programs: the host's copy, or the kernel.
pub(crate) trait Runner {
    fn run(&mut self, device: u32, hook: Hook, frame: &mut Frame) -> Action;

    /// Packets that were held and now come again, where they can be had.
    fn released(&mut self) -> Vec<Frame> {
        Vec::new()
    }
}

impl Runner for World {
    fn run(&mut self, device: u32, hook: Hook, frame: &mut Frame) -> Action {
        World::run(self, device, hook, frame)
    }

    fn released(&mut self) -> Vec<Frame> {
        self.released.take().into_iter().map(|(_, bytes)| Frame::new(bytes)).collect()
    }
}

/// What a hook does to a packet's tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Keep,
    ToBackend,
    /// To this address and a port of the masquerade range.
    ToMasq(IpAddr),
    ToClient,
    ToVip,
}

pub(crate) type Hop = (u32, Hook, Change);

pub(crate) struct Path {
    pub(crate) name: &'static str,
    pub(crate) client: SocketAddr,
    pub(crate) vip: SocketAddr,
    pub(crate) backend: SocketAddr,
    pub(crate) forward: Vec<Hop>,
    pub(crate) reply: Vec<Hop>,
    /// Whether pings take it too.
    pub(crate) ping: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Forward,
    Reply,
}

pub(crate) const WAYS: [Way; 2] = [Way::Forward, Way::Reply];

/// The node with one Service for each path.
pub(crate) fn node() -> World {
    let mut world = cluster();
    for v6 in [false, true] {
        let n = Net::of(v6);
        for (at, backend, local, id, flags) in [
            (sock(n.vip, 80), sock(n.near, 8080), true, 1, 0),
            (sock(n.vip, 81), sock(n.far, 8080), false, 2, 0),
            (sock(n.vip, 82), sock(n.pod, 8080), true, 3, 0),
            (sock(n.vip, 83), sock(n.internet, 443), false, 4, 0),
            (sock(n.vip, 84), sock(n.near, 8084), true, 1, Frontend::MASQUERADE_ALWAYS),
            (sock(n.node, 30080), sock(n.near, 8080), true, 1, 0),
            (sock(n.node, 30081), sock(n.far, 8080), false, 2, 0),
        ] {
            for (proto, id) in [(6, 0), (17, id)] {
                let set = world.set(&[(backend, local, id)]);
                let value =
                    Frontend { internal: set, external: set, service: 1, flags, ..Default::default() };
                world.frontend(proto, at, value);
            }
        }
    }
    world
}

pub(crate) fn paths(v6: bool) -> Vec<Path> {
    use Change::{Keep, ToBackend, ToClient, ToMasq, ToVip};
    use Hook::{Egress, Ingress};
    let n = Net::of(v6);
    let path = |name, client, vip, backend, forward: &[Hop], reply: &[Hop]| Path {
        name,
        client: sock(client, 5000),
        vip,
        backend,
        forward: forward.to_vec(),
        reply: reply.to_vec(),
        ping: false,
    };
    vec![
        path(
            "pod to ClusterIP, same node",
            n.pod,
            sock(n.vip, 80),
            sock(n.near, 8080),
            &[(CLIENT, Ingress, ToBackend), (BACKEND, Egress, Keep)],
            &[(BACKEND, Ingress, Keep), (CLIENT, Egress, ToVip)],
        ),
        path(
            "pod to ClusterIP, other node",
            n.pod,
            sock(n.vip, 81),
            sock(n.far, 8080),
            &[(CLIENT, Ingress, ToBackend), (OVERLAY, Egress, Keep)],
            &[(OVERLAY, Ingress, Keep), (CLIENT, Egress, ToVip)],
        ),
        path(
            "outside to NodePort, backend here",
            n.outside,
            sock(n.node, 30080),
            sock(n.near, 8080),
            &[(UPLINK, Ingress, ToBackend), (BACKEND, Egress, Keep)],
            &[(BACKEND, Ingress, Keep), (UPLINK, Egress, ToVip)],
        ),
        path(
            "outside to NodePort, backend behind the overlay",
            n.outside,
            sock(n.node, 30081),
            sock(n.far, 8080),
            &[(UPLINK, Ingress, ToBackend), (OVERLAY, Egress, ToMasq(n.overlay))],
            &[(OVERLAY, Ingress, ToClient), (UPLINK, Egress, ToVip)],
        ),
        path(
            "outside to NodePort, backend behind the same uplink",
            n.outside,
            sock(n.node, 30081),
            sock(n.far, 8080),
            &[(UPLINK, Ingress, ToBackend), (UPLINK, Egress, ToMasq(n.node))],
            &[(UPLINK, Ingress, ToClient), (UPLINK, Egress, ToVip)],
        ),
        Path {
            ping: true,
            ..path(
                "pod to the outside",
                n.pod,
                sock(n.internet, 443),
                sock(n.internet, 443),
                &[(CLIENT, Ingress, Keep), (UPLINK, Egress, ToMasq(n.node))],
                &[(UPLINK, Ingress, ToClient), (CLIENT, Egress, Keep)],
            )
        },
        path(
            "hairpin",
            n.pod,
            sock(n.vip, 82),
            sock(n.pod, 8080),
            &[(CLIENT, Ingress, ToBackend), (CLIENT, Egress, ToMasq(n.gateway))],
            &[(CLIENT, Ingress, ToClient), (CLIENT, Egress, ToVip)],
        ),
        path(
            "pod to ClusterIP, backend outside the cluster",
            n.pod,
            sock(n.vip, 83),
            sock(n.internet, 443),
            &[(CLIENT, Ingress, ToBackend), (UPLINK, Egress, ToMasq(n.node))],
            &[(UPLINK, Ingress, ToClient), (CLIENT, Egress, ToVip)],
        ),
        path(
            "pod to ClusterIP, masquerade always",
            n.pod,
            sock(n.vip, 84),
            sock(n.near, 8084),
            &[(CLIENT, Ingress, ToBackend), (BACKEND, Egress, ToMasq(n.gateway))],
            &[(BACKEND, Ingress, ToClient), (CLIENT, Egress, ToVip)],
        ),
    ]
}

/// A conversation over a path.
pub(crate) struct Talk<'a> {
    pub(crate) path: &'a Path,
    /// The first packet's; later ones follow from it.
    pub(crate) l4: L4,
    /// Whether the sender leaves checksums to the device.
    pub(crate) partial: bool,
    masq: Option<SocketAddr>,
}

impl<'a> Talk<'a> {
    pub(crate) fn new(path: &'a Path, l4: L4, partial: bool) -> Self {
        Self { path, l4, partial, masq: None }
    }

    /// An echo has one identifier, and none at the other end.
    fn far(&self, end: SocketAddr) -> SocketAddr {
        if self.l4 == L4::EchoRequest { sock(end.ip(), 0) } else { end }
    }

    /// Source, destination and hooks of a packet that sets out.
    pub(crate) fn start(&self, way: Way) -> (SocketAddr, SocketAddr, &'a [Hop]) {
        match way {
            Way::Forward => (self.path.client, self.far(self.path.vip), &self.path.forward),
            Way::Reply => {
                (self.far(self.path.backend), self.masq.unwrap_or(self.path.client), &self.path.reply)
            }
        }
    }

    fn change(&self, change: Change, (src, dst): (SocketAddr, SocketAddr)) -> (SocketAddr, SocketAddr) {
        match change {
            Change::Keep => (src, dst),
            Change::ToBackend => (src, self.far(self.path.backend)),
            Change::ToMasq(_) => (self.masq.expect("a masqueraded packet was seen"), dst),
            Change::ToClient => (src, self.path.client),
            Change::ToVip => (self.far(self.path.vip), dst),
        }
    }

    /// Sends one packet and compares it after every hook. The action and the place of the first hook that did not pass
    /// it or did something else.
    pub(crate) fn send(
        &mut self,
        runner: &mut impl Runner,
        way: Way,
        l4: L4,
        data: &[u8],
    ) -> Result<(), Trouble> {
        let (mut src, mut dst, hops) = self.start(way);
        let bytes = build::packet(src, dst, l4, data);
        let mut frame = Frame { bytes, partial: self.partial };
        if self.partial {
            frame.bytes = build::to_partial(frame.bytes);
        }
        for &(device, hook, change) in hops {
            let before = frame.bytes.clone();
            let action = runner.run(device, hook, &mut frame);
            if action != Action::Pass {
                return Err(Trouble {
                    action,
                    untouched: frame.bytes == before,
                    text: self.at(device, hook, &action),
                });
            }
            if let (Change::ToMasq(addr), None) = (change, self.masq) {
                self.masq = Some(sock(addr, source_port(&frame.bytes)));
            }
            (src, dst) = self.change(change, (src, dst));
            let expected = build::packet(src, dst, l4, data);
            let got = if self.partial { build::complete(frame.bytes.clone()) } else { frame.bytes.clone() };
            if got != expected {
                let text = format!(
                    "{}\n  got      {got:02x?}\n  expected {expected:02x?}",
                    self.at(device, hook, &src)
                );
                return Err(Trouble { action, untouched: frame.bytes == before, text });
            }
            assert_eq!(build::valid(&got), Some(true));
        }
        Ok(())
    }

    /// Sends a packet in fragments of `size` bytes and compares them after every hook.
    pub(crate) fn fragments(
        &mut self,
        runner: &mut impl Runner,
        way: Way,
        l4: L4,
        (data, id, size): (&[u8], u16, usize),
    ) -> Result<(), String> {
        let order: Vec<usize> = (0..=data.len().div_ceil(8)).collect();
        self.shuffled(runner, way, l4, (data, id, size), &order)
    }

    /// The same in another order. What a hook holds comes to it again when it lets it go.
    pub(crate) fn shuffled(
        &mut self,
        runner: &mut impl Runner,
        way: Way,
        l4: L4,
        (data, id, size): (&[u8], u16, usize),
        order: &[usize],
    ) -> Result<(), String> {
        let (mut src, mut dst, hops) = self.start(way);
        let split = |src, dst| build::fragments(&build::packet(src, dst, l4, data), id, size);
        for &(device, hook, change) in hops {
            let sent = split(src, dst);
            let (mut arrived, mut first) = (Vec::new(), Vec::new());
            for (index, bytes) in order.iter().filter_map(|index| Some((*index, sent.get(*index)?))) {
                let mut frame = Frame::new(bytes.clone());
                match runner.run(device, hook, &mut frame) {
                    Action::Pass => arrived.push(frame.bytes.clone()),
                    // Held, or it will be missed.
                    Action::Drop => {}
                    action => return Err(self.at(device, hook, &action)),
                }
                if index == 0 {
                    first = frame.bytes;
                }
                for mut again in runner.released() {
                    if runner.run(device, hook, &mut again) != Action::Pass {
                        return Err(self.at(device, hook, &"held again"));
                    }
                    arrived.push(again.bytes);
                }
            }
            if let (Change::ToMasq(addr), None) = (change, self.masq) {
                self.masq = Some(sock(addr, source_port(&first)));
            }
            (src, dst) = self.change(change, (src, dst));
            let mut expected = split(src, dst);
            expected.sort_unstable();
            arrived.sort_unstable();
            if arrived != expected {
                let at = self.at(device, hook, &src);
                return Err(format!("{at}\n  got      {arrived:02x?}\n  expected {expected:02x?}"));
            }
        }
        Ok(())
    }

    /// Sends an ICMP error against the way of a packet that went `quoted_way`, from the far end of that way or from a
    /// router, quoting `quote` bytes, and compares it after every hook.
    pub(crate) fn error(
        &mut self,
        runner: &mut impl Runner,
        quoted_way: Way,
        l4: L4,
        (error, quote, mut router): (Error, usize, Option<IpAddr>),
    ) -> Result<(), String> {
        let way = if quoted_way == Way::Forward { Way::Reply } else { Way::Forward };
        let (mut src, mut dst, hops) = self.start(way);
        let build = |src: SocketAddr, dst: SocketAddr, router: Option<IpAddr>| {
            // What is quoted went from where the error goes to.
            let quoted = build::packet(dst, src, l4, b"a quoted packet of some length");
            let quoted = &quoted[build::ETH..];
            build::error(router.unwrap_or(src.ip()), dst.ip(), error, &quoted[..quote.min(quoted.len())])
        };
        let mut frame = Frame::new(build(src, dst, router));
        for &(device, hook, change) in hops {
            let action = runner.run(device, hook, &mut frame);
            (src, dst) = self.change(change, (src, dst));
            // A masqueraded flow's errors come from the masquerade address, whoever sent them.
            if matches!(change, Change::ToMasq(_)) {
                router = None;
            }
            let expected = build(src, dst, router);
            if action != Action::Pass || frame.bytes != expected {
                let at = self.at(device, hook, &(quoted_way, error, quote, action));
                return Err(format!("{at}\n  got      {:02x?}\n  expected {expected:02x?}", frame.bytes));
            }
        }
        Ok(())
    }

    fn at(&self, device: u32, hook: Hook, what: &dyn std::fmt::Debug) -> String {
        format!(
            "{} {:?} {}: {hook:?} of device {device}: {what:?}",
            self.path.name,
            self.l4,
            self.path.client.ip()
        )
    }
}

/// A packet that was not translated as it should have been.
#[derive(Debug)]
pub(crate) struct Trouble {
    pub(crate) action: Action,
    /// The hook left it as it came.
    pub(crate) untouched: bool,
    pub(crate) text: String,
}

/// Source port, or echo identifier.
fn source_port(frame: &[u8]) -> u16 {
    let (l4, proto) = match frame[12] {
        8 => (34, frame[23]),
        _ if frame[20] == 44 => (62, frame[54]),
        _ => (54, frame[20]),
    };
    let at = if matches!(proto, 6 | 17) { l4 } else { l4 + 4 };
    u16::from_be_bytes([frame[at], frame[at + 1]])
}
