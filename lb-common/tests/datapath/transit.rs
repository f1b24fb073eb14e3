//! XDP does at once what the two hooks and the router between them do, and nothing where it cannot.

use crate::support::build::{self, ACK, ETH, FIN, L4, RST, SYN};
use crate::support::cluster::{BOTH, Net, UPLINK, sock};
use crate::support::driver::{
    NETWORKS, Network, VXLANS, XdpNode, blank_ports, destination, without_source_port,
};
use crate::support::frame::Frame;
use crate::support::hostile::{Rng, bad, good, passing, spoil};
use crate::support::world::{Fam, World};
use lb_common::addr::{Ip4, Ip6};
use lb_common::datapath::{Reason, Sent};
use lb_common::maps::{Flow, FlowKey, Side, XdpDevice};
use std::collections::HashMap;
use std::net::SocketAddr;

/// Two nodes that see the same packets: on one of them XDP has the first word.
struct Twins {
    plain: XdpNode,
    fast: XdpNode,
    sent: usize,
}

impl Twins {
    fn new(network: Network) -> Self {
        Self { plain: XdpNode::new(network), fast: XdpNode::new(network), sent: 0 }
    }

    fn both(&mut self, change: impl Fn(&mut XdpNode)) {
        change(&mut self.plain);
        change(&mut self.fast);
    }

    /// A packet comes to both. Whether XDP sent it on; it must have done what the hooks do then, and nothing otherwise.
    fn packet(&mut self, frame: &Frame) -> (Option<Vec<u8>>, bool) {
        let expected = self.plain.hooks(frame).map(|frame| frame.bytes);
        let mut ours = frame.clone();
        let by = match self.fast.xdp(&mut ours) {
            Sent::No => {
                assert_eq!(&ours, frame, "left to others, but not as it came");
                let after = self.fast.hooks(frame).map(|frame| frame.bytes);
                assert_eq!(after, expected, "{:02x?}", frame.bytes);
                return (after, false);
            }
            Sent::Lost(reason) => panic!("lost ({reason:?}): {:02x?}", frame.bytes),
            Sent::By(device) => device,
        };
        assert_eq!(by, UPLINK);
        assert!(!frame.partial, "the checksum was the device's to complete: {:02x?}", frame.bytes);
        let expected =
            expected.unwrap_or_else(|| panic!("the hooks do not send it on: {:02x?}", frame.bytes));
        let wrapped = destination(&expected) == Some(Net::of(self.fast.over_v6()).router);
        if self.fast.network != Network::Routed && wrapped {
            let v6 = self.fast.over_v6();
            let ours = without_source_port(&ours.bytes, self.fast.network);
            assert_eq!(ours, blank_ports(expected, v6), "{:02x?}", frame.bytes);
        } else {
            assert_eq!(ours.bytes, expected, "{:02x?}", frame.bytes);
        }
        self.sent += 1;
        (Some(ours.bytes), true)
    }

    fn same(&self) {
        fn flows<A: Fam>(world: &World) -> HashMap<FlowKey<A>, Flow<A>> {
            A::of(world).flows()
        }
        assert_eq!(flows::<Ip4>(&self.plain.world), flows::<Ip4>(&self.fast.world));
        assert_eq!(flows::<Ip6>(&self.plain.world), flows::<Ip6>(&self.fast.world));
        let xdp = [Reason::XdpForwarded, Reason::XdpLeft];
        for reason in Reason::ALL.into_iter().filter(|reason| !xdp.contains(reason)) {
            let (plain, fast) = (self.plain.world.counter(reason), self.fast.world.counter(reason));
            assert_eq!(plain, fast, "{reason:?}");
        }
    }

    /// A packet from a backend on the other node, as it comes in here.
    fn from_far(&self, src: SocketAddr, dst: SocketAddr, l4: L4, data: &[u8]) -> Frame {
        let bytes = build::packet(src, dst, l4, data);
        Frame::new(self.arriving(bytes))
    }

    fn arriving(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        if self.fast.network == Network::Routed {
            return bytes;
        }
        bytes[..6].copy_from_slice(&crate::support::driver::VTEP);
        self.fast.wrap(&bytes, Some(40_000))
    }
}

/// A client's connection through the node.
struct Connection {
    twins: Twins,
    client: SocketAddr,
    vip: SocketAddr,
    backend: SocketAddr,
    masq: SocketAddr,
    l4: L4,
}

impl Connection {
    /// With the first packet, which XDP leaves to the hooks.
    fn open(network: Network, v6: bool, l4: L4) -> Self {
        Self::open_at(Twins::new(network), v6, l4)
    }

    fn open_at(mut twins: Twins, v6: bool, l4: L4) -> Self {
        let n = Net::of(v6);
        let (client, vip, backend) = (sock(n.outside, 5000), sock(n.node, 30081), sock(n.far, 8080));
        let first = Frame::new(build::packet(client, vip, l4, b""));
        let (bytes, sent) = twins.packet(&first);
        assert!(!sent, "nothing begins in XDP");
        assert!(bytes.is_some());
        let masq = masqueraded_to(&twins.fast.world, v6);
        let masq =
            *masq.iter().find(|(flow, _)| *flow == vip).map(|(_, masq)| masq).expect("a masqueraded flow");
        Self { twins, client, vip, backend, masq, l4 }
    }

    fn request(&self, l4: L4, data: &[u8]) -> Frame {
        Frame::new(build::packet(self.client, self.vip, l4, data))
    }

    fn reply(&self, l4: L4, data: &[u8]) -> Frame {
        self.twins.from_far(self.backend, self.masq, l4, data)
    }

    fn expect(&mut self, frame: &Frame, sent: bool, what: &str) {
        let network = self.twins.fast.network;
        assert_eq!(self.twins.packet(frame).1, sent, "{what}: {network:?} {:?} {}", self.l4, self.client);
        self.twins.same();
    }

    fn later(&self) -> L4 {
        if self.l4 == L4::Udp { L4::Udp } else { L4::Tcp(ACK) }
    }
}

/// What each flow is masqueraded to, by the Service's address.
fn masqueraded_to(world: &World, v6: bool) -> Vec<(SocketAddr, SocketAddr)> {
    fn all<A: Fam>(world: &World) -> Vec<(SocketAddr, SocketAddr)> {
        let flows = A::of(world).flows();
        let back = flows.values().filter(|flow| flow.side == Side::Back as u8);
        back.map(|f| (sock(f.vip.into(), f.vip_port.get()), sock(f.masq.into(), f.masq_port.get()))).collect()
    }
    if v6 { all::<Ip6>(world) } else { all::<Ip4>(world) }
}

fn every_kind(mut each: impl FnMut(Network, bool, L4)) {
    for network in NETWORKS {
        for v6 in BOTH {
            for l4 in [L4::Tcp(SYN), L4::Udp] {
                each(network, v6, l4);
            }
        }
    }
}

#[test]
fn whole_connections() {
    every_kind(|network, v6, l4| {
        let mut c = Connection::open(network, v6, l4);
        let (answer, later) = (l4.answer(), c.later());
        c.expect(&c.reply(answer, b"data"), true, "the first answer");
        c.expect(&c.request(later, b"x"), true, "a request");
        c.expect(&c.reply(later, &[7; 1300]), true, "a long answer");
        c.twins.both(|node| node.world.now.set(103));
        c.expect(&c.request(later, &[9; 1300]), true, "seconds later");
        c.expect(&c.reply(later, b""), true, "an answer, seconds later");
        if l4 == L4::Udp {
            return;
        }
        c.expect(&c.request(L4::Tcp(SYN), b""), false, "the same SYN again");
        c.expect(&c.reply(L4::Tcp(FIN | ACK), b""), true, "the server closes");
        c.expect(&c.request(L4::Tcp(FIN | ACK), b""), true, "the client closes");
        c.expect(&c.reply(L4::Tcp(RST), b""), true, "a reset");
        c.expect(&c.request(L4::Tcp(SYN), b""), false, "a new connection from the same port");
    });
}

#[test]
fn datagrams_without_a_checksum() {
    for network in NETWORKS {
        let mut c = Connection::open(network, false, L4::Udp);
        let blank = |mut bytes: Vec<u8>| {
            bytes[ETH + 26..ETH + 28].fill(0);
            bytes
        };
        let request = Frame::new(blank(build::packet(c.client, c.vip, L4::Udp, b"data")));
        let reply = Frame::new(c.twins.arriving(blank(build::packet(c.backend, c.masq, L4::Udp, b"data"))));
        // An outer checksum would have to cover a payload that nobody has summed up.
        let sent = !matches!(network, Network::Vxlan { checksum: true, .. });
        c.expect(&request, sent, "a request");
        c.expect(&reply, sent, "an answer");
    }
}

#[test]
fn frames_that_were_too_short_for_ethernet() {
    every_kind(|network, v6, l4| {
        let mut c = Connection::open(network, v6, l4);
        let mut frame = c.request(c.later(), b"");
        let padding = 80 - frame.bytes.len();
        frame.bytes.extend(vec![0; padding]);
        c.expect(&frame, true, "with padding");
    });
}

#[test]
fn a_partial_checksum_is_noticed() {
    every_kind(|network, v6, l4| {
        let mut c = Connection::open(network, v6, l4);
        let later = c.later();
        let partial = |bytes| build::to_partial(bytes);
        let request = partial(build::packet(c.client, c.vip, later, b"data"));
        c.expect(&Frame { bytes: request, partial: true }, false, "a request");
        let reply = c.twins.arriving(partial(build::packet(c.backend, c.masq, later, b"data")));
        c.expect(&Frame { bytes: reply, partial: true }, false, "an answer");
    });
}

/// Changes both ways of an established connection, one at a time.
fn unusual(what: &str, change: impl Fn(&mut Vec<u8>)) {
    every_kind(|network, v6, l4| {
        let mut c = Connection::open(network, v6, l4);
        let later = c.later();
        let mut bytes = build::packet(c.client, c.vip, later, b"some data");
        c.expect(&Frame::new(bytes.clone()), true, "as it should be");
        change(&mut bytes);
        c.expect(&Frame::new(bytes), false, what);
        let mut bytes = build::packet(c.backend, c.masq, later, b"some data");
        change(&mut bytes);
        let bytes = c.twins.arriving(bytes);
        c.expect(&Frame::new(bytes), false, what);
    });
}

/// Sets a field of either header, and the checksum of an IPv4 one right.
fn set(bytes: &mut [u8], v4: (usize, u8), v6: (usize, u8)) {
    let (at, value) = if bytes[12] == 8 { v4 } else { v6 };
    bytes[ETH + at] = value;
    if bytes[12] == 8 {
        let header = etherparse::Ipv4Header::from_slice(&bytes[ETH..]).expect("a header").0;
        bytes[24..26].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
    }
}

#[test]
fn what_has_come_too_far() {
    unusual("one hop left", |bytes| set(bytes, (8, 1), (7, 1)));
}

#[test]
fn what_says_to_be_longer_than_it_is() {
    unusual("too long", |bytes| {
        let len = bytes.len() as u8;
        set(bytes, (3, len), (5, len));
    });
}

#[test]
fn what_is_for_another_host() {
    every_kind(|network, v6, l4| {
        let mut c = Connection::open(network, v6, l4);
        for frame in [c.request(c.later(), b"data"), c.reply(c.later(), b"data")] {
            for mac in [[2, 0, 0, 0, 0, 3], [0xff; 6]] {
                let mut frame = frame.clone();
                frame.bytes[..6].copy_from_slice(&mac);
                assert_eq!(c.twins.fast.xdp(&mut frame), Sent::No);
            }
            c.expect(&frame, true, "for us");
        }
    });
}

#[test]
fn what_does_not_fit() {
    every_kind(|network, v6, l4| {
        let mut c = Connection::open(network, v6, l4);
        let frame = c.request(c.later(), &[1; 1020]);
        c.expect(&frame, true, "it fits");
        let overlaid = network != Network::Routed;
        // Too narrow for what is inside, then for what is around it, then for either.
        for (mtu, overlay_mtu, fits) in
            [(1500, 1040, !overlaid), (1080, 1500, !overlaid), (1040, 1040, false)]
        {
            c.twins.fast.mtu = mtu;
            c.twins.fast.overlay_mtu = overlay_mtu;
            let sent = c.twins.fast.xdp(&mut frame.clone()) != Sent::No;
            assert_eq!(sent, fits, "{network:?} {mtu} {overlay_mtu} {}", c.client);
        }
    });
}

#[test]
fn a_udp_backend_that_is_gone() {
    for network in NETWORKS {
        for v6 in BOTH {
            let mut c = Connection::open(network, v6, L4::Udp);
            c.expect(&c.request(L4::Udp, b"data"), true, "it serves");
            c.twins.both(|node| {
                node.world.epochs.insert(2, 7);
            });
            c.expect(&c.request(L4::Udp, b"data"), false, "it serves no more");
        }
    }
}

#[test]
fn one_port_to_two_services_of_one_backend() {
    for network in NETWORKS {
        for v6 in BOTH {
            let mut twins = Twins::new(network);
            let n = Net::of(v6);
            let other = sock(n.node, 30090);
            twins.both(|node| {
                let set = node.world.set(&[(sock(n.far, 8080), false, 0)]);
                let frontend =
                    lb_common::maps::Frontend { internal: set, external: set, ..Default::default() };
                node.world.frontend(17, other, frontend);
            });
            // The port is another flow's already: this one gets an alias.
            twins.packet(&Frame::new(build::packet(sock(n.outside, 5000), other, L4::Udp, b"first")));
            let mut c = Connection::open_at(twins, v6, L4::Udp);
            for _ in 0..2 {
                c.expect(&c.request(L4::Udp, b"data"), true, "the second one");
                let frame = Frame::new(build::packet(c.client, other, L4::Udp, b"data"));
                c.expect(&frame, true, "the first one");
                for (_, masq) in masqueraded_to(&c.twins.fast.world, v6) {
                    let reply = c.twins.from_far(c.backend, masq, L4::Udp, b"data");
                    c.expect(&reply, true, "an answer");
                }
            }
        }
    }
}

#[test]
fn what_is_around_a_packet_has_to_be_right() {
    for network in VXLANS {
        let v6_outside = XdpNode::new(network).over_v6();
        for v6 in BOTH {
            let mut c = Connection::open(network, v6, L4::Udp);
            let good = c.reply(L4::Udp, b"data").bytes;
            let udp = ETH + if v6_outside { 40 } else { 20 };
            let wrong: [(&str, usize, u8); 9] = [
                ("congestion", 15, if v6_outside { 0x30 } else { 3 }),
                ("another port", udp + 2, 0x22),
                ("a length that is too short", udp + 5, 1),
                ("no identifier", udp + 8, 0),
                ("another flag", udp + 8, 0x88),
                ("another identifier", udp + 14, 9),
                ("a reserved byte", udp + 15, 1),
                ("for another host's device", udp + 16, 0x66),
                ("no IP packet", udp + 28, 0x99),
            ];
            for (what, at, value) in wrong {
                let mut bytes = good.clone();
                assert_ne!(bytes[at], value, "{what}");
                bytes[at] = value;
                let mut frame = Frame::new(bytes);
                assert_eq!(c.twins.fast.xdp(&mut frame.clone()), Sent::No, "{what}");
                let before = frame.clone();
                c.twins.fast.xdp(&mut frame);
                assert_eq!(frame, before, "{what}");
            }
            // In one more frame than the lengths say.
            let longer = [good.as_slice(), &[0; 6]].concat();
            assert_eq!(c.twins.fast.xdp(&mut Frame::new(longer)), Sent::No);
            let later = if v6_outside { 20 } else { 14 + 6 };
            if !v6_outside {
                let mut fragment = good.clone();
                fragment[later] |= 0x20;
                assert_eq!(c.twins.fast.xdp(&mut Frame::new(fragment)), Sent::No);
            }
            c.expect(&Frame::new(good), true, "as it was");
        }
    }
}

#[test]
fn what_the_agent_has_not_confirmed_for_long_is_not_used() {
    for network in VXLANS {
        let mut c = Connection::open(network, false, L4::Udp);
        c.twins.both(|node| node.world.now.set(160));
        c.expect(&c.request(L4::Udp, b"data"), true, "in the last second");
        c.twins.both(|node| node.world.now.set(161));
        c.expect(&c.request(L4::Udp, b"data"), false, "after it");
        c.expect(&c.reply(L4::Udp, b"data"), false, "after it");
    }
}

/// Whatever comes, and in whatever order.
fn corpus(network: Network, seed: u64, mut packet: impl FnMut(&mut Rng, bool) -> Vec<u8>) -> usize {
    let mut twins = Twins::new(network);
    twins.both(|node| node.world.ports = (10_000, 10_003));
    let mut rng = Rng(seed);
    for number in 0..5_000 {
        let v6 = rng.one_in(2);
        let mut bytes = packet(&mut rng, v6);
        let partial = rng.one_in(10) && build::valid(&bytes) == Some(true) && has_offload(&bytes);
        if partial {
            bytes = build::to_partial(bytes);
        }
        if network != Network::Routed && bytes.len() > ETH && rng.one_in(2) {
            bytes = twins.arriving(bytes);
        }
        twins.packet(&Frame { bytes, partial });
        if rng.one_in(500) {
            let epoch = number as u32;
            twins.both(|node| {
                node.world.epochs.insert(2, epoch);
            });
        }
        if rng.one_in(50) {
            twins.both(|node| node.world.now.set(node.world.now.get() + 1));
            twins.both(|node| {
                let now = node.world.now.get();
                node.devices.values_mut().for_each(|device| device.until = now + XdpDevice::FRESH);
            });
        }
        if number % 100 == 0 {
            twins.same();
        }
    }
    twins.same();
    twins.sent
}

/// What senders leave to the device.
fn has_offload(bytes: &[u8]) -> bool {
    let proto = if bytes[12] == 8 { bytes[23] } else { bytes[20] };
    let fragment = bytes[12] == 8 && (bytes[20] & 0x3f != 0 || bytes[21] != 0);
    matches!(proto, 6 | 17)
        && bytes[14] != 0x46
        && !fragment
        && (bytes[12] != 8 || bytes[14] == 0x45)
        && !(proto == 17 && bytes[build::checksum_at(bytes)..][..2] == [0, 0])
}

#[test]
fn good_packets() {
    for network in NETWORKS {
        for seed in 0..3 {
            let packet = |rng: &mut Rng, v6| if rng.one_in(3) { good(rng, v6) } else { passing(rng, v6) };
            let sent = corpus(network, seed, packet);
            assert!(sent > 1_000, "only {sent} of 5,000 packets: the corpus is too tame");
        }
    }
}

#[test]
fn bad_packets() {
    for network in NETWORKS {
        for seed in 100..103 {
            let packet = |rng: &mut Rng, v6| {
                let frame = passing(rng, v6);
                if rng.one_in(3) { bad(rng, v6) } else { spoil(rng, frame) }
            };
            let sent = corpus(network, seed, packet);
            assert!(sent > 200, "only {sent} of 5,000 packets: the corpus is too tame");
        }
    }
}
