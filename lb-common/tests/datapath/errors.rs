//! ICMP errors about translated packets, both ways: outer and quoted addresses, ports and all checksums.

use crate::paths::protocols;
use crate::support::build::{ACK, L4, PORT_UNREACHABLE, SYN, TIME_EXCEEDED, TOO_BIG};
use crate::support::cluster::{BOTH, Net};
use crate::support::paths::{Talk, WAYS, Way, node, paths};

/// Runs `check` for each path, family and protocol on an established flow.
fn established(check: impl Fn(&mut Talk<'_>, &mut crate::support::world::World, Net, L4)) {
    for v6 in BOTH {
        for path in paths(v6) {
            for l4 in protocols(&path) {
                let mut world = node();
                let mut talk = Talk::new(&path, l4, false);
                talk.send(&mut world, Way::Forward, l4, b"").expect("the first packet");
                talk.send(&mut world, Way::Reply, l4.answer(), b"").expect("its answer");
                let l4 = if l4 == L4::Tcp(SYN) { L4::Tcp(ACK) } else { l4 };
                check(&mut talk, &mut world, Net::of(v6), l4);
            }
        }
    }
}

#[test]
fn errors_are_translated_both_ways() {
    established(|talk, world, net, l4| {
        for way in WAYS {
            let quoted = if way == Way::Forward { l4 } else { l4.answer() };
            for error in [TOO_BIG, PORT_UNREACHABLE, TIME_EXCEEDED] {
                for router in [None, Some(net.router)] {
                    // All of the packet; with TCP's checksum; what RFC 792 asks for.
                    let header = if net.pod.is_ipv4() { 20 } else { 40 };
                    for quote in [1000, header + 20, header + 18, header + 8] {
                        if let Err(text) = talk.error(world, way, quoted, (error, quote, router)) {
                            panic!("{text}");
                        }
                    }
                }
            }
        }
    });
}

#[test]
fn an_error_that_quotes_less_than_the_ports_is_left_alone() {
    use crate::support::build;
    use crate::support::frame::Frame;
    use crate::support::world::Action;
    established(|talk, world, _, l4| {
        let (src, dst, hops) = talk.start(Way::Reply);
        let quoted = build::packet(dst, src, l4, b"");
        let header = if src.is_ipv4() { 20 } else { 40 };
        for quote in 0..header + 8 {
            let bytes = build::error(src.ip(), dst.ip(), TOO_BIG, &quoted[build::ETH..build::ETH + quote]);
            let mut frame = Frame::new(bytes.clone());
            for &(device, hook, _) in hops {
                assert_eq!(world.run(device, hook, &mut frame), Action::Pass);
                assert_eq!(frame.bytes, bytes, "{quote} bytes quoted");
            }
        }
    });
}

#[test]
fn an_error_about_a_stranger_s_packet_is_left_alone() {
    use crate::support::build;
    use crate::support::frame::Frame;
    use crate::support::world::Action;
    established(|talk, world, net, l4| {
        let (mut src, dst, hops) = talk.start(Way::Reply);
        src.set_port(src.port() ^ 1);
        let quoted = build::packet(dst, src, L4::Udp, b"");
        let bytes = build::error(net.router, dst.ip(), TOO_BIG, &quoted[build::ETH..]);
        if l4 == L4::EchoRequest {
            return;
        }
        for &(device, hook, _) in hops {
            let mut frame = Frame::new(bytes.clone());
            assert_eq!(world.run(device, hook, &mut frame), Action::Pass);
            assert_eq!(frame.bytes, bytes);
        }
    });
}
