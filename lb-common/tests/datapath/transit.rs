//! XDP does at once what the two hooks and the router between them do, and nothing where it cannot.

mod corpus;
mod twins;

use crate::support::build::{self, ACK, ETH, FIN, L4, RST, SYN};
use crate::support::cluster::{BOTH, Net, sock};
use crate::support::frame::Frame;
use crate::support::xdp_node::{NETWORKS, Network, VXLANS, XdpNode};
use lb_common::datapath::Sent;
use twins::{Connection, Twins, masqueraded_to};

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
                    let reply = c.twins.arriving_from(c.backend, masq, L4::Udp, b"data");
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
            if !v6_outside {
                let mut fragment = good.clone();
                fragment[ETH + 6] |= 0x20;
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
