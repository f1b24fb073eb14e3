//! No endpoint: refused or dropped.

use crate::support::build::{self, ACK, ETH, L4, RST, SYN};
use crate::support::cluster::{BACKEND, BOTH, CLIENT, Net, UPLINK, cluster, serve, sock};
use crate::support::frame::Frame;
use crate::support::world::{Action, Hook};
use lb_common::datapath::Reason;
use lb_common::maps::Frontend;

#[test]
fn tcp_gets_a_reset_and_udp_an_icmp_error() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let (client, vip) = (sock(n.outside, 5000), sock(n.vip, 80));
        let mut world = cluster();
        serve(&mut world, 6, vip, &[]);
        serve(&mut world, 17, vip, &[]);
        for device in [CLIENT, UPLINK] {
            for partial in [false, true] {
                for data in [&b""[..], b"x", &[7; 1200]] {
                    let bytes = |l4| {
                        let whole = build::packet(client, vip, l4, data);
                        if partial { build::to_partial(whole) } else { whole }
                    };
                    let mut syn = Frame { bytes: bytes(L4::Tcp(SYN)), partial };
                    assert_eq!(world.run(device, Hook::Ingress, &mut syn), Action::Reply);
                    let got = if partial { build::complete(syn.bytes) } else { syn.bytes };
                    assert_eq!(got, build::reset(vip, client, 0x0102_0305), "partial {partial}");

                    let udp = bytes(L4::Udp);
                    let mut frame = Frame { bytes: udp.clone(), partial };
                    assert_eq!(world.run(device, Hook::Ingress, &mut frame), Action::Reply);
                    let header = if v6 { 40 } else { 20 };
                    let mut quoted = udp[ETH..ETH + header + 8].to_vec();
                    if partial {
                        // What the device will yet write, over what is left of the packet.
                        let sum = frame_sum(&quoted[header..]);
                        quoted[header + 6..].copy_from_slice(&(!sum).to_be_bytes());
                        let at = frame.bytes.len() - 2;
                        frame.bytes[at..].copy_from_slice(&(!sum).to_be_bytes());
                    }
                    assert_eq!(frame.bytes, build::refusal(vip.ip(), client.ip(), &quoted));
                    assert_eq!(build::valid(&frame.bytes), Some(true));
                }
            }
        }
        assert_eq!(world.counter(Reason::NoEndpoint), 24);
        assert_eq!(world.counter(Reason::NewFlow), 0);
    }
}

fn frame_sum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
    ((sum & 0xffff) + (sum >> 16)) as u16
}

#[test]
fn a_udp_packet_without_a_checksum_is_quoted_as_it_was() {
    let n = Net::of(false);
    let (client, vip) = (sock(n.outside, 5000), sock(n.vip, 80));
    let mut world = cluster();
    serve(&mut world, 17, vip, &[]);
    let mut bytes = build::packet(client, vip, L4::Udp, b"data");
    bytes[ETH + 26..ETH + 28].fill(0);
    let mut frame = Frame::new(bytes.clone());
    assert_eq!(world.run(UPLINK, Hook::Ingress, &mut frame), Action::Reply);
    assert_eq!(frame.bytes, build::refusal(vip.ip(), client.ip(), &bytes[ETH..ETH + 28]));
}

#[test]
fn a_local_policy_without_a_local_endpoint_drops() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let mut world = cluster();
        let all = crate::support::cluster::backends_of(&mut world, &[(sock(n.far, 8080), false)]);
        for (port, flag) in [(80, Frontend::INTERNAL_DROP), (81, Frontend::EXTERNAL_DROP)] {
            let mut value = Frontend { internal: all, external: all, flags: flag, ..Default::default() };
            *(if port == 80 { &mut value.internal } else { &mut value.external }) = Default::default();
            world.frontend(6, sock(n.vip, port), value);
        }
        for (port, device, action) in [
            (80, CLIENT, Action::Drop),
            (80, UPLINK, Action::Pass),
            (81, UPLINK, Action::Drop),
            (81, BACKEND, Action::Pass),
        ] {
            let syn = build::packet(sock(n.outside, 5000 + port), sock(n.vip, port), L4::Tcp(SYN), b"");
            let mut frame = Frame::new(syn.clone());
            assert_eq!(world.run(device, Hook::Ingress, &mut frame), action, "port {port}, device {device}");
            assert_eq!(frame.bytes == syn, action == Action::Drop);
        }
        assert_eq!(world.counter(Reason::NoLocalEndpoint), 2);
    }
}

#[test]
fn only_a_first_packet_is_refused() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let mut world = cluster();
        serve(&mut world, 6, sock(n.vip, 80), &[]);
        for flags in [ACK, RST, RST | ACK, SYN | ACK] {
            let bytes = build::packet(sock(n.pod, 5000), sock(n.vip, 80), L4::Tcp(flags), b"");
            let mut frame = Frame::new(bytes.clone());
            assert_eq!(world.run(CLIENT, Hook::Ingress, &mut frame), Action::Pass);
            assert_eq!(frame.bytes, bytes);
        }
        // A reset is never answered with a reset.
        let bytes = build::packet(sock(n.pod, 5000), sock(n.vip, 80), L4::Tcp(SYN | RST), b"");
        assert_eq!(world.run(CLIENT, Hook::Ingress, &mut Frame::new(bytes)), Action::Drop);
        assert_eq!(world.counter(Reason::RejectFailed), 1);
    }
}

#[test]
fn the_refusal_goes_out_untouched() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let mut world = cluster();
        for (proto, l4) in [(6, L4::Tcp(SYN)), (17, L4::Udp)] {
            serve(&mut world, proto, sock(n.vip, 80), &[]);
            let bytes = build::packet(sock(n.pod, 5000), sock(n.vip, 80), l4, b"");
            let mut frame = Frame::new(bytes);
            assert_eq!(world.run(CLIENT, Hook::Ingress, &mut frame), Action::Reply);
            let refusal = frame.bytes.clone();
            assert_eq!(world.run(CLIENT, Hook::Egress, &mut frame), Action::Pass);
            assert_eq!(frame.bytes, refusal);
        }
    }
}
