//! Every path of `docs/design.md` through the loaded programs.

use crate::loaded::Loaded;
use crate::support::build::{self, ACK, FIN, L4, PORT_UNREACHABLE, SYN, TIME_EXCEEDED, TOO_BIG};
use crate::support::cluster::{BOTH, CLIENT, Net, UPLINK, serve, sock};
use crate::support::frame::Frame;
use crate::support::paths::{Runner as _, Talk, WAYS, Way, node, paths};
use crate::support::redirect::{self, redirecting};
use crate::support::world::{Action, Fam, Hook};
use lb_common::datapath::Reason;
use lb_common::maps::{Frontend, Side};

fn talk(loaded: &mut Loaded, talk: &mut Talk<'_>) {
    let first = talk.l4;
    let mut send = |way, l4, data: &[u8]| {
        if let Err(trouble) = talk.send(loaded, way, l4, data) {
            panic!("{}", trouble.text);
        }
    };
    send(Way::Forward, first, b"");
    send(Way::Reply, first.answer(), b"");
    let next = if first == L4::Tcp(SYN) { L4::Tcp(ACK) } else { first };
    for data in [&b"x"[..], &[7; 1400]] {
        send(Way::Forward, next, data);
        send(Way::Reply, next.answer(), data);
    }
}

#[test]
fn every_hook_of_every_path_does_its_one_rewrite() {
    let mut loaded = Loaded::new(&node());
    let mut flows = 0;
    for v6 in BOTH {
        for (port, mut path) in (5000..).zip(paths(v6)) {
            path.client.set_port(port);
            for l4 in [L4::Tcp(SYN), L4::Udp, L4::EchoRequest].into_iter().take(if path.ping { 3 } else { 2 })
            {
                let mut conversation = Talk::new(&path, l4, false);
                talk(&mut loaded, &mut conversation);
                flows += 1;
                let l4 = if l4 == L4::Tcp(SYN) { L4::Tcp(ACK) } else { l4 };
                for way in WAYS {
                    let quoted = if way == Way::Forward { l4 } else { l4.answer() };
                    for error in [TOO_BIG, PORT_UNREACHABLE, TIME_EXCEEDED] {
                        for (quote, router) in
                            [(1000, None), (1000, Some(Net::of(v6).router)), (48, None), (28, None)]
                        {
                            let header = if v6 { 40 } else { 20 };
                            let quote = quote.max(header + 8);
                            if let Err(text) =
                                conversation.error(&mut loaded, way, quoted, (error, quote, router))
                            {
                                panic!("{text}");
                            }
                        }
                    }
                }
            }
        }
    }
    for reason in Reason::ALL {
        let expected = if reason == Reason::NewFlow { flows } else { 0 };
        assert_eq!(loaded.counter(reason), expected, "{reason:?}");
    }
}

/// The kernel takes both rewrites at once, and says where to: `TC_ACT_REDIRECT`. (There is one device here, so that
/// only ways from pod to pod can be told apart from others.)
#[test]
fn packets_are_redirected_from_pod_to_pod() {
    let mut loaded = Loaded::new(&redirecting());
    let mut redirected = 0;
    for v6 in BOTH {
        for (port, mut path) in (5000..).zip(paths(v6)) {
            path.client.set_port(port);
            for l4 in [L4::Tcp(SYN), L4::Udp] {
                let mut conversation = Talk::new(&path, l4, false);
                let first = conversation.send(&mut loaded, Way::Forward, l4, b"");
                first.unwrap_or_else(|trouble| panic!("{}", trouble.text));
                for flags in [ACK, ACK, FIN | ACK] {
                    let l4 = if l4 == L4::Udp { l4 } else { L4::Tcp(flags) };
                    for way in WAYS {
                        let sent = redirect::send(&mut loaded, &mut conversation, way, l4);
                        redirected += usize::from(sent.unwrap_or_else(|trouble| panic!("{}", trouble.text)));
                    }
                }
            }
        }
    }
    // But for the client's FIN.
    assert_eq!(redirected, 2 * (2 * 3 * 2 - 1));
}

#[test]
fn fragments_of_every_path() {
    let data = [7; 2_800];
    let mut loaded = Loaded::new(&node());
    for v6 in BOTH {
        for path in paths(v6) {
            loaded.forget();
            let mut conversation = Talk::new(&path, L4::Udp, false);
            for id in 1..3 {
                for way in WAYS {
                    if let Err(text) = conversation.fragments(&mut loaded, way, L4::Udp, (&data, id, 1200)) {
                        panic!("{text}");
                    }
                }
            }
            assert_eq!(loaded.counter(Reason::FragmentPassed), 0);
        }
    }
}

#[test]
fn flows_that_collide_get_an_alias() {
    let mut world = node();
    for v6 in BOTH {
        let n = Net::of(v6);
        for proto in [6, 17] {
            serve(&mut world, proto, sock(n.vip, 90), &[(sock(n.near, 8080), true)]);
        }
    }
    let host = world;
    let mut loaded = Loaded::new(&host);
    for v6 in BOTH {
        let n = Net::of(v6);
        let (client, backend) = (sock(n.pod, 5000), sock(n.near, 8080));
        for first in [L4::Tcp(SYN), L4::Udp] {
            let next = if first == L4::Udp { first } else { L4::Tcp(ACK) };
            for l4 in [first, next, next] {
                // By one Service, by the other, and straight.
                for to in [sock(n.vip, 80), sock(n.vip, 90), backend] {
                    let packet = build::packet(client, to, l4, b"data");
                    let (mut here, mut there) = (Frame::new(packet.clone()), Frame::new(packet));
                    assert_eq!(host.run(CLIENT, Hook::Ingress, &mut here), Action::Pass);
                    assert_eq!(loaded.run(CLIENT, Hook::Ingress, &mut there), Action::Pass);
                    assert_eq!(here.bytes, there.bytes, "{to} {l4:?}");
                    let source = source(&there.bytes);
                    assert_eq!(source == client.port(), to == sock(n.vip, 80), "{to} {l4:?}");
                    // And back, with an error on the way.
                    let reply = build::packet(backend, sock(client.ip(), source), l4.answer(), b"data");
                    let mut there = Frame::new(reply);
                    assert_eq!(loaded.run(CLIENT, Hook::Egress, &mut there), Action::Pass);
                    assert_eq!(there.bytes, build::packet(to, client, l4.answer(), b"data"));
                    let quoted =
                        |to, from| build::packet(from, to, l4, b"a quoted packet")[build::ETH..].to_vec();
                    let seen = quoted(backend, sock(client.ip(), source));
                    let mut there = Frame::new(build::error(n.router, client.ip(), TIME_EXCEEDED, &seen));
                    assert_eq!(loaded.run(CLIENT, Hook::Egress, &mut there), Action::Pass);
                    let expected = build::error(n.router, client.ip(), TIME_EXCEEDED, &quoted(to, client));
                    assert_eq!(there.bytes, expected, "{to} {l4:?}");
                }
            }
        }
    }
    assert_eq!(loaded.counter(Reason::NewFlow), 12);
}

#[test]
fn affinity_source_ranges_and_other_ports() {
    let mut world = node();
    for v6 in BOTH {
        let n = Net::of(v6);
        let backends: Vec<_> = (1..100).map(|port| (sock(n.near, port), true)).collect();
        let set = crate::support::cluster::backends_of(&mut world, &backends);
        let value = Frontend { internal: set, external: set, ..Default::default() };
        world.frontend(6, sock(n.vip, 90), Frontend { affinity: 60, service: 9, ..value });
        let flags = Frontend::SOURCE_RANGES;
        world.frontend(6, sock(n.vip, 91), Frontend { flags, service: 10, ..value });
        let flags = Frontend::ADDRESS | Frontend::REJECT_OTHER_PORTS;
        world.frontend(0, sock(n.vip, 0), Frontend { flags, ..Default::default() });
    }
    let of = |v6| Net::of(v6).outside;
    world.v4.sources.push((10, Fam::from_ip(of(false)), 24));
    world.v6.sources.push((10, Fam::from_ip(of(true)), 64));
    let mut loaded = Loaded::new(&world);
    for v6 in BOTH {
        let n = Net::of(v6);
        let mut send = |device, from, to| {
            let mut frame = Frame::new(build::packet(from, to, L4::Tcp(SYN), b""));
            let action = loaded.run(device, Hook::Ingress, &mut frame);
            (action, frame.bytes)
        };
        let port = |bytes: &[u8]| {
            let at = build::ETH + if v6 { 40 } else { 20 } + 2;
            u16::from_be_bytes([bytes[at], bytes[at + 1]])
        };
        let (_, first) = send(CLIENT, sock(n.pod, 1), sock(n.vip, 90));
        assert!((1..100).contains(&port(&first)));
        for client in 2..30 {
            assert_eq!(port(&send(CLIENT, sock(n.pod, client), sock(n.vip, 90)).1), port(&first));
        }
        let others: std::collections::HashSet<_> = [n.far, n.near, n.outside, n.router]
            .map(|ip| port(&send(UPLINK, sock(ip, 1), sock(n.vip, 90)).1))
            .into();
        assert!(others.len() > 1, "{others:?}");
        assert_eq!(send(UPLINK, sock(n.outside, 1), sock(n.vip, 91)).0, Action::Pass);
        assert_eq!(send(UPLINK, sock(n.router, 1), sock(n.vip, 91)).0, Action::Drop);
        assert_eq!(send(CLIENT, sock(n.pod, 1), sock(n.vip, 91)).0, Action::Drop);
        let (action, answer) = send(CLIENT, sock(n.pod, 1), sock(n.vip, 92));
        assert_eq!(action, Action::Reply);
        assert_eq!(answer, build::reset(sock(n.vip, 92), sock(n.pod, 1), 0x0102_0305));
    }
    assert_eq!(loaded.counter(Reason::SourceRange), 4);
    assert_eq!(loaded.counter(Reason::NoSuchPort), 2);
}

fn source(frame: &[u8]) -> u16 {
    let at = build::ETH + if frame[12] == 8 { 20 } else { 40 };
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

#[test]
fn a_lost_entry_is_made_again() {
    let mut loaded = Loaded::new(&node());
    for v6 in BOTH {
        for path in paths(v6) {
            for l4 in [L4::Tcp(SYN), L4::Udp] {
                let next = if l4 == L4::Tcp(SYN) { L4::Tcp(ACK) } else { l4 };
                for side in [Side::Front, Side::Forward, Side::Reply] {
                    loaded.forget();
                    let mut conversation = Talk::new(&path, l4, false);
                    talk(&mut loaded, &mut conversation);
                    let lost = if v6 {
                        let key = loaded.flows6().into_iter().find(|(_, f)| f.side == side as u8);
                        key.map(|(key, _)| loaded.lose6(&key))
                    } else {
                        let key = loaded.flows4().into_iter().find(|(_, f)| f.side == side as u8);
                        key.map(|(key, _)| loaded.lose4(&key))
                    };
                    assert!(lost.is_some() || path.vip == path.backend, "{}: no {side:?}", path.name);
                    for way in [Way::Reply, Way::Forward, Way::Reply] {
                        if let Err(trouble) = conversation.send(&mut loaded, way, next, b"data") {
                            panic!("{side:?} lost: {}", trouble.text);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn without_endpoints() {
    let mut world = node();
    for v6 in BOTH {
        let n = Net::of(v6);
        for proto in [6, 17] {
            serve(&mut world, proto, sock(n.vip, 90), &[]);
            let flags = Frontend::INTERNAL_DROP | Frontend::EXTERNAL_DROP;
            world.frontend(proto, sock(n.vip, 91), Frontend { flags, ..Default::default() });
        }
    }
    let mut loaded = Loaded::new(&world);
    for v6 in BOTH {
        let n = Net::of(v6);
        let (client, vip) = (sock(n.outside, 5000), sock(n.vip, 90));
        for device in [CLIENT, UPLINK] {
            for data in [&b""[..], b"x", &[7; 1200]] {
                let mut syn = Frame::new(build::packet(client, vip, L4::Tcp(SYN), data));
                assert_eq!(loaded.run(device, Hook::Ingress, &mut syn), Action::Reply);
                assert_eq!(syn.bytes, build::reset(vip, client, 0x0102_0305));
                let udp = build::packet(client, vip, L4::Udp, data);
                let mut frame = Frame::new(udp.clone());
                assert_eq!(loaded.run(device, Hook::Ingress, &mut frame), Action::Reply);
                let header = if v6 { 40 } else { 20 };
                let quoted = &udp[build::ETH..build::ETH + header + 8];
                assert_eq!(frame.bytes, build::refusal(vip.ip(), client.ip(), quoted));
                for l4 in [L4::Tcp(SYN), L4::Udp] {
                    let mut frame = Frame::new(build::packet(client, sock(n.vip, 91), l4, data));
                    assert_eq!(loaded.run(device, Hook::Ingress, &mut frame), Action::Drop);
                }
            }
        }
    }
    assert_eq!(loaded.counter(Reason::NoEndpoint), 24);
    assert_eq!(loaded.counter(Reason::NoLocalEndpoint), 24);
}

#[test]
fn a_udp_flow_leaves_a_backend_that_is_gone_and_a_closed_port_starts_again() {
    let mut world = node();
    let n = Net::of(true);
    let (client, vip) = (sock(n.pod, 5000), sock(n.vip, 95));
    for proto in [6, 17] {
        serve(&mut world, proto, vip, &[(sock(n.far, 9090), false)]);
        let set = world.set(&[(sock(n.near, 9090), true, if proto == 17 { 9 } else { 0 })]);
        world.frontend(
            proto,
            sock(n.vip, 96),
            Frontend { internal: set, external: set, ..Default::default() },
        );
    }
    let mut loaded = Loaded::new(&world);
    let send = |loaded: &mut Loaded, l4| {
        let mut frame = Frame::new(build::packet(client, sock(n.vip, 96), l4, b""));
        assert_eq!(loaded.run(CLIENT, Hook::Ingress, &mut frame), Action::Pass);
        assert_eq!(frame.bytes, build::packet(client, sock(n.near, 9090), l4, b""));
    };
    send(&mut loaded, L4::Udp);
    loaded.set_epoch(9, 1);
    // The slot is as old as the flow: it is chosen again, and again left.
    send(&mut loaded, L4::Udp);
    send(&mut loaded, L4::Udp);
    assert_eq!(loaded.counter(Reason::BackendGone), 2);
    assert_eq!(loaded.counter(Reason::NewFlow), 3);
    send(&mut loaded, L4::Tcp(SYN));
    send(&mut loaded, L4::Tcp(SYN));
    assert_eq!(loaded.counter(Reason::NewFlow), 4);
    send(&mut loaded, L4::Tcp(FIN | ACK));
    send(&mut loaded, L4::Tcp(ACK));
    send(&mut loaded, L4::Tcp(SYN));
    assert_eq!(loaded.counter(Reason::NewFlow), 5);
}

/// What is not marked is not looked up, and what is there is marked.
#[test]
fn only_marked_pairs_of_addresses_are_looked_up() {
    let mut loaded = Loaded::new(&node());
    let path = paths(false).into_iter().find(|path| path.vip != path.backend).expect("a path to a Service");
    let mut conversation = Talk::new(&path, L4::Tcp(SYN), false);
    talk(&mut loaded, &mut conversation);
    let entries: Vec<_> = loaded.flows4().into_keys().collect();
    let mut answered = |loaded: &mut Loaded| {
        conversation.send(loaded, Way::Reply, L4::Tcp(ACK), b"a reply").is_ok()
            && conversation.send(loaded, Way::Forward, L4::Tcp(ACK), b"and on").is_ok()
    };
    // Entered in a round, an entry is found in the two after it, and then for as long as it is met.
    for _ in 0..2 {
        loaded.renew(&[]);
        assert!(answered(&mut loaded));
    }
    for _ in 0..4 {
        loaded.renew(&entries);
        assert!(answered(&mut loaded));
    }
    for _ in 0..2 {
        loaded.renew(&[]);
    }
    assert!(!answered(&mut loaded), "it is looked up although nothing says that it is there");
    loaded.trust(false);
    assert!(answered(&mut loaded));
}
