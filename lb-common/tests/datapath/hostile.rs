//! Input from people who mean harm: no panic, no rewrite of what is no packet, no checksum made wrong.

use crate::support::build;
use crate::support::cluster::{BACKEND, BOTH, CLIENT, Net, OVERLAY, UPLINK, sock};
use crate::support::frame::Frame;
use crate::support::hostile::{Rng, bad, check, good};
use crate::support::paths::node;
use crate::support::world::{Action, Hook};
use lb_common::datapath::Reason;
use proptest::prelude::*;

#[test]
fn mutated_packets_at_every_hook() {
    let mut changed = 0;
    for seed in 0..40 {
        let mut rng = Rng(seed);
        let mut world = node();
        // Few enough that replies to them can be guessed.
        world.ports = (10_000, 10_003);
        for _ in 0..2_500 {
            let v6 = rng.one_in(2);
            let mut frame = Frame::new(bad(&mut rng, v6));
            for hook in [Hook::Ingress, Hook::Egress] {
                let device = rng.of(&[CLIENT, BACKEND, UPLINK, OVERLAY, 9]);
                let before = frame.bytes.clone();
                let action = world.run(device, hook, &mut frame);
                if let Err(why) = check(hook, &before, &frame.bytes, action) {
                    panic!("seed {seed}: {why}");
                }
                changed += u32::from(before != frame.bytes);
                if action != Action::Pass {
                    break;
                }
            }
        }
        assert_eq!(world.counter(Reason::SlotMissing), 0);
    }
    assert!(changed > 5_000, "only {changed} rewrites of 100,000 packets: the corpus is too tame");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    #[test]
    fn arbitrary_bytes(mut bytes in prop::collection::vec(any::<u8>(), 0..200), v6: Option<bool>, egress: bool) {
        if let (Some(v6), Some(ethertype)) = (v6, bytes.get_mut(12..14)) {
            ethertype.copy_from_slice(if v6 { &[0x86, 0xdd] } else { &[8, 0] });
        }
        let hook = if egress { Hook::Egress } else { Hook::Ingress };
        let mut frame = Frame::new(bytes.clone());
        let action = node().run(UPLINK, hook, &mut frame);
        prop_assert_eq!(check(hook, &bytes, &frame.bytes, action), Ok(()));
    }

    #[test]
    fn good_packets_stay_good(seed: u64, v6: bool) {
        let mut rng = Rng(seed);
        let world = node();
        for _ in 0..20 {
            let before = good(&mut rng, v6);
            let device = rng.of(&[CLIENT, BACKEND, UPLINK, OVERLAY]);
            let hook = rng.of(&[Hook::Ingress, Hook::Egress]);
            let mut frame = Frame::new(before.clone());
            let action = world.run(device, hook, &mut frame);
            prop_assert_eq!(check(hook, &before, &frame.bytes, action), Ok(()));
        }
        prop_assert_eq!(world.counter(Reason::Malformed), 0);
    }
}

#[test]
fn every_truncation_of_a_first_packet() {
    for v6 in BOTH {
        let n = Net::of(v6);
        for l4 in [build::L4::Tcp(build::SYN), build::L4::Udp] {
            let whole = build::packet(sock(n.pod, 5000), sock(n.vip, 80), l4, b"data");
            let checksum = build::checksum_at(&whole) + 2;
            for len in 0..checksum {
                let mut frame = Frame::new(whole[..len].to_vec());
                let action = node().run(CLIENT, Hook::Ingress, &mut frame);
                assert!(action == Action::Drop || frame.bytes == whole[..len], "{len} bytes of {l4:?}");
            }
        }
    }
}

#[test]
fn options_and_extension_headers_are_stepped_over() {
    let n = Net::of(false);
    let frame = |dst| {
        let mut bytes = Vec::new();
        etherparse::PacketBuilder::ethernet2([2; 6], [4; 6])
            .ip(etherparse::IpHeaders::Ipv4(
                etherparse::Ipv4Header {
                    time_to_live: 9,
                    source: octets4(n.pod),
                    destination: octets4(dst),
                    options: [1, 1, 1, 0, 1, 1, 1, 0][..].try_into().expect("options"),
                    ..Default::default()
                },
                Default::default(),
            ))
            .udp(5000, if dst == n.vip { 80 } else { 8080 })
            .write(&mut bytes, b"data")
            .expect("a Vec");
        Frame::new(bytes)
    };
    let mut with_options = frame(n.vip);
    assert_eq!(node().run(CLIENT, Hook::Ingress, &mut with_options), Action::Pass);
    assert_eq!(with_options, frame(n.near));

    let n = Net::of(true);
    let frame = |dst| {
        let pad = etherparse::Ipv6RawExtHeader::new_raw(etherparse::IpNumber(0), &[1, 4, 0, 0, 0, 0]);
        let pad = pad.expect("an extension header");
        let mut bytes = Vec::new();
        etherparse::PacketBuilder::ethernet2([2; 6], [4; 6])
            .ip(etherparse::IpHeaders::Ipv6(
                etherparse::Ipv6Header {
                    hop_limit: 9,
                    source: octets6(n.pod),
                    destination: octets6(dst),
                    ..Default::default()
                },
                etherparse::Ipv6Extensions {
                    hop_by_hop_options: Some(pad.clone()),
                    destination_options: Some(pad),
                    fragment: Some(etherparse::Ipv6FragmentHeader::new(
                        etherparse::IpNumber(0),
                        etherparse::IpFragOffset::ZERO,
                        false,
                        7,
                    )),
                    ..Default::default()
                },
            ))
            .udp(5000, if dst == n.vip { 80 } else { 8080 })
            .write(&mut bytes, b"data")
            .expect("a Vec");
        Frame::new(bytes)
    };
    let mut with_extensions = frame(n.vip);
    assert_eq!(node().run(CLIENT, Hook::Ingress, &mut with_extensions), Action::Pass);
    assert_eq!(with_extensions, frame(n.near));
}

#[test]
fn extension_headers_that_are_too_long_are_nobody_s_traffic() {
    // 2,048 bytes of destination options, in which a UDP header is where one would be without them.
    let n = Net::of(true);
    let inner = build::packet(sock(n.pod, 5000), sock(n.vip, 80), build::L4::Udp, b"data");
    let mut options = vec![0u8; 2048];
    options[..2].copy_from_slice(&[17, 255]);
    // Where a length of 40 + 2,048, cut to eleven bits, would look.
    options[..8].copy_from_slice(&[17, 255, 0, 80, 0, 20, 0, 0]);
    let mut bytes = inner.clone();
    bytes[build::ETH + 6] = 60;
    bytes.splice(54..54, options);
    let len = (bytes.len() - 54) as u16;
    bytes[18..20].copy_from_slice(&len.to_be_bytes());
    let world = node();
    let mut frame = Frame::new(bytes.clone());
    let action = world.run(CLIENT, Hook::Ingress, &mut frame);
    assert_eq!(check(Hook::Ingress, &bytes, &frame.bytes, action), Ok(()));
    // Rewritten where the real header is, or left alone; the options are not touched.
    assert_eq!(frame.bytes[54..54 + 2048], bytes[54..54 + 2048]);
    assert!(world.v6.flows().keys().all(|k| k.sport.get() == 5000 || k.dport.get() == 5000));
}

#[test]
fn neighbour_discovery_is_left_alone() {
    let world = node();
    let n = Net::of(true);
    for kind in 133..=137 {
        let mut bytes = Vec::new();
        etherparse::PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv6(octets6(n.pod), octets6(n.internet), 255)
            .icmpv6_raw(kind, 0, [0; 4])
            .write(&mut bytes, &[0; 24])
            .expect("a Vec");
        for hook in [Hook::Ingress, Hook::Egress] {
            let mut frame = Frame::new(bytes.clone());
            assert_eq!(world.run(UPLINK, hook, &mut frame), Action::Pass);
            assert_eq!(frame.bytes, bytes);
        }
    }
}

fn octets4(ip: std::net::IpAddr) -> [u8; 4] {
    let std::net::IpAddr::V4(ip) = ip else { panic!("{ip} is not IPv4") };
    ip.octets()
}

fn octets6(ip: std::net::IpAddr) -> [u8; 16] {
    let std::net::IpAddr::V6(ip) = ip else { panic!("{ip} is not IPv6") };
    ip.octets()
}
