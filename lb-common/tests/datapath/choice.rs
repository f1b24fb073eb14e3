//! Which backend, which port, and what happens when there is none.

use crate::masqueraded::key;
use crate::send::pass;
use crate::support::build::{self, ACK, FIN, L4, RST, SYN};
use crate::support::cluster::{
    BACKEND, BOTH, CLIENT, Net, OVERLAY, UPLINK, backends_of, cluster, serve, sock,
};
use crate::support::frame::Frame;
use crate::support::paths::node;
use crate::support::world::{Action, Fam, Hook, World};
use lb_common::addr::{Ip4, Ip6};
use lb_common::datapath::Reason;
use lb_common::maps::{Device, Frontend, Side};
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

fn chosen(world: &World, src: SocketAddr, dst: SocketAddr, l4: L4) -> SocketAddr {
    pass(world, CLIENT, Hook::Ingress, src, dst, l4).expect("it passes").1
}

fn many(v6: bool, count: u16) -> Vec<(SocketAddr, bool)> {
    (0..count).map(|i| (sock(Net::of(v6).near, 8000 + i), true)).collect()
}

#[test]
fn all_backends_are_equally_likely() {
    for v6 in BOTH {
        let n = Net::of(v6);
        for count in [2u16, 3, 7, 10, 100] {
            let mut world = cluster();
            serve(&mut world, 6, sock(n.vip, 80), &many(v6, count));
            let mut seen: HashMap<SocketAddr, f64> = HashMap::new();
            let flows = 20_000u16;
            // As a client takes its ports: one after the other.
            for port in 30_000..30_000 + flows {
                *seen.entry(chosen(&world, sock(n.pod, port), sock(n.vip, 80), L4::Tcp(SYN))).or_default() +=
                    1.0;
            }
            let expected = f64::from(flows) / f64::from(count);
            let missed = f64::from(count) - seen.len() as f64;
            let chi2: f64 =
                seen.values().map(|n| (n - expected).powi(2) / expected).sum::<f64>() + missed * expected;
            // Wilson and Hilferty; four and a half standard deviations.
            let k = f64::from(count - 1);
            let z = ((chi2 / k).cbrt() - (1.0 - 2.0 / (9.0 * k))) / (2.0 / (9.0 * k)).sqrt();
            assert!(z < 4.5, "{count} backends: chi-square {chi2}, z {z}, {seen:?}");
        }
    }
}

#[test]
fn a_retransmitted_syn_goes_where_the_first_went() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let mut world = cluster();
        serve(&mut world, 6, sock(n.vip, 80), &many(v6, 50));
        for port in 1000..1200 {
            let first = chosen(&world, sock(n.pod, port), sock(n.vip, 80), L4::Tcp(SYN));
            assert_eq!(chosen(&world, sock(n.pod, port), sock(n.vip, 80), L4::Tcp(SYN)), first);
            // Even when the endpoints have changed meanwhile.
            serve(&mut world, 6, sock(n.vip, 80), &many(v6, 7 + port % 50));
            assert_eq!(chosen(&world, sock(n.pod, port), sock(n.vip, 80), L4::Tcp(SYN)), first);
            assert_eq!(chosen(&world, sock(n.pod, port), sock(n.vip, 80), L4::Tcp(ACK)), first);
        }
    }
}

#[test]
fn a_closed_connection_s_port_starts_a_new_flow() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let (client, vip) = (sock(n.pod, 5000), sock(n.vip, 80));
        for end in [FIN | ACK, RST] {
            let mut world = cluster();
            serve(&mut world, 6, vip, &[(sock(n.near, 8080), true)]);
            assert_eq!(chosen(&world, client, vip, L4::Tcp(SYN)), sock(n.near, 8080));
            serve(&mut world, 6, vip, &[(sock(n.far, 9090), false)]);
            assert_eq!(chosen(&world, client, vip, L4::Tcp(end)), sock(n.near, 8080));
            // What is still under way of the old connection.
            assert_eq!(chosen(&world, client, vip, L4::Tcp(ACK)), sock(n.near, 8080));
            assert_eq!(chosen(&world, client, vip, L4::Tcp(SYN)), sock(n.far, 9090));
            let left = if v6 { world.v6.flows().len() } else { world.v4.flows().len() };
            assert_eq!(left, 3, "of the old flow nothing");
        }
    }
}

#[test]
fn a_direct_connection_is_not_taken_for_the_one_through_the_service_that_is_over() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let (client, vip, backend) = (sock(n.pod, 5000), sock(n.vip, 80), sock(n.near, 8080));
        let mut world = cluster();
        serve(&mut world, 6, vip, &[(backend, true)]);
        assert_eq!(chosen(&world, client, vip, L4::Tcp(SYN)), backend);
        // The backend's device is where the client's end of the connection is seen.
        let leaves =
            |flags| pass(&world, BACKEND, Hook::Egress, client, backend, L4::Tcp(flags)).map(|(src, _)| src);
        assert_eq!(leaves(SYN), Some(client));
        assert_eq!(leaves(FIN | ACK), Some(client));
        assert_eq!(chosen(&world, client, backend, L4::Tcp(SYN)), backend);
        let left = if v6 { world.v6.flows().len() } else { world.v4.flows().len() };
        assert_eq!(left, 0, "nothing translates the direct connection's replies");
    }
}

#[test]
fn a_udp_flow_leaves_a_backend_that_is_gone_and_a_tcp_flow_stays() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let (client, vip) = (sock(n.pod, 5000), sock(n.vip, 80));
        let (old, new) = (sock(n.near, 8080), sock(n.far, 8080));
        let mut world = cluster();
        for (proto, id) in [(17, 1), (6, 0)] {
            let set = world.set(&[(old, true, id)]);
            world.frontend(proto, vip, Frontend { internal: set, external: set, ..Default::default() });
        }
        assert_eq!(chosen(&world, client, vip, L4::Udp), old);
        assert_eq!(chosen(&world, client, vip, L4::Tcp(SYN)), old);
        for (proto, id) in [(17, 2), (6, 0)] {
            let set = world.set(&[(new, false, id)]);
            world.frontend(proto, vip, Frontend { internal: set, external: set, ..Default::default() });
        }
        // Another endpoint appeared; this one still serves.
        assert_eq!(chosen(&world, client, vip, L4::Udp), old);
        world.epochs.insert(1, 1);
        assert_eq!(chosen(&world, client, vip, L4::Udp), new);
        assert_eq!(chosen(&world, client, vip, L4::Udp), new);
        assert_eq!(world.counter(Reason::BackendGone), 1);
        assert_eq!(chosen(&world, client, vip, L4::Tcp(ACK)), old);
        // The new backend's replies come from the VIP, and nothing is left of the old one's.
        assert_eq!(pass(&world, CLIENT, Hook::Egress, new, client, L4::Udp), Some((vip, client)));
        assert_eq!(pass(&world, CLIENT, Hook::Egress, old, client, L4::Udp), Some((old, client)));
        // None left: refused.
        serve(&mut world, 17, vip, &[]);
        world.epochs.insert(2, 1);
        let mut frame = Frame::new(build::packet(client, vip, L4::Udp, b""));
        assert_eq!(world.run(CLIENT, Hook::Ingress, &mut frame), Action::Reply);
    }
}

#[test]
fn pods_and_outsiders_have_their_own_sets() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let mut world = cluster();
        let internal = backends_of(&mut world, &[(sock(n.near, 1), true)]);
        let external = backends_of(&mut world, &[(sock(n.near, 2), true)]);
        world.frontend(6, sock(n.vip, 80), Frontend { internal, external, ..Default::default() });
        for (device, port, source) in
            [(CLIENT, 1, n.pod), (UPLINK, 2, n.outside), (OVERLAY, 2, n.far), (9, 2, n.router)]
        {
            let to = pass(&world, device, Hook::Ingress, sock(source, 5000), sock(n.vip, 80), L4::Tcp(SYN));
            assert_eq!(to.expect("it passes").1, sock(n.near, port), "device {device}");
        }
    }
}

#[test]
fn a_missing_slot_drops_and_is_counted() {
    let n = Net::of(false);
    let mut world = cluster();
    serve(&mut world, 6, sock(n.vip, 80), &many(false, 3));
    world.v4.slots.clear();
    assert_eq!(pass(&world, CLIENT, Hook::Ingress, sock(n.pod, 1), sock(n.vip, 80), L4::Tcp(SYN)), None);
    assert_eq!(world.counter(Reason::SlotMissing), 1);
}

fn masq<A: Fam>(v6: bool) {
    let n = Net::of(v6);
    let mut world = cluster();
    world.ports = (20_000, 20_019);
    world.reserved = (20_000..20_004).collect();
    let to = sock(n.internet, 443);
    for port in 20_004..20_008u16 {
        // A socket of the node that talks to the same peer.
        world_socket::<A>(&mut world, to, sock(n.node, port));
    }
    let mut taken = HashSet::new();
    let mut refused = 0;
    for port in 1..200 {
        match pass(&world, UPLINK, Hook::Egress, sock(n.pod, port), to, L4::Udp) {
            Some((src, dst)) => {
                assert_eq!((src.ip(), dst), (n.node, to));
                assert!((20_008..20_020).contains(&src.port()), "{src} is reserved or used");
                assert!(taken.insert(src), "{src} was taken twice");
            }
            None => refused += 1,
        }
    }
    assert_eq!(taken.len(), 12, "all free ports are used");
    assert_eq!(world.counter(Reason::MasqueradePortsExhausted), refused);
    assert_eq!(refused, 199 - 12);
    // The same ports serve other peers and protocols.
    for (to, l4) in [(sock(n.outside, 443), L4::Udp), (sock(n.internet, 444), L4::Udp), (to, L4::Tcp(SYN))] {
        assert!(pass(&world, UPLINK, Hook::Egress, sock(n.pod, 1), to, l4).is_some());
    }
}

fn world_socket<A: Fam>(world: &mut World, from: SocketAddr, to: SocketAddr) {
    let key = key::<A>(from, to, 17);
    A::of_mut(world).sockets.insert(key);
}

#[test]
fn masquerade_ports_are_free_ones_and_run_out() {
    masq::<Ip4>(false);
    masq::<Ip6>(true);
}

fn closed_ports(v6: bool) {
    let n = Net::of(v6);
    let mut world = cluster();
    world.ports = (20_000, 20_007);
    let to = sock(n.internet, 443);
    let out =
        |world: &World, port, flags| pass(world, UPLINK, Hook::Egress, sock(n.pod, port), to, L4::Tcp(flags));
    // Not every walk comes by every port.
    let all = |world: &World, clients: std::ops::Range<u16>| -> Vec<(u16, SocketAddr)> {
        clients.filter_map(|port| Some((port, out(world, port, SYN)?.0))).collect()
    };
    let given = all(&world, 1..100);
    assert_eq!(given.len(), 8);
    // Closed by both, by the server only, and reset.
    for (i, by_client, by_server) in [(0, FIN | ACK, FIN | ACK), (1, ACK, FIN | ACK), (2, ACK, RST)] {
        let (client, src) = given[i];
        pass(&world, UPLINK, Hook::Ingress, to, src, L4::Tcp(by_server)).expect("a reply");
        out(&world, client, by_client).expect("its answer");
    }
    assert_eq!(all(&world, 100..200), [], "they have only just been closed");
    world.now.set(world.now.get() + 3);
    let again = all(&world, 200..300);
    let ports = |given: &[(u16, SocketAddr)]| given.iter().map(|(_, src)| *src).collect::<HashSet<_>>();
    assert_eq!(ports(&again), ports(&[given[0], given[2]]), "one client has not closed its half");
    assert_eq!(again.len(), 2);
    for (client, src) in again {
        let back = pass(&world, UPLINK, Hook::Ingress, to, src, L4::Tcp(SYN | ACK));
        assert_eq!(back, Some((to, sock(n.pod, client))));
    }
    let (client, src) = given[1];
    let untouched = pass(&world, UPLINK, Hook::Ingress, to, src, L4::Tcp(ACK));
    assert_eq!(untouched, Some((to, sock(n.pod, client))));
}

#[test]
fn ports_of_closed_connections_are_used_again_when_no_other_is_left() {
    BOTH.into_iter().for_each(closed_ports);
}

fn half_reserved<A: Fam>(v6: bool) {
    let n = Net::of(v6);
    let mut world = cluster();
    world.ports = (20_001, 59_998);
    world.reserved = (0..u16::MAX).filter(|port| port % 2 == 1).collect();
    let to = sock(n.internet, 443);
    let mut given = Vec::new();
    for port in 1..2000 {
        let leaves = pass(&world, UPLINK, Hook::Egress, sock(n.pod, port), to, L4::Tcp(SYN));
        let (src, _) = leaves.expect("every walk finds a port");
        assert!(src.port().is_multiple_of(2), "{src} is reserved");
        given.push((port, src));
    }
    // Its own port is found again by a flow whose entry was lost, whatever is reserved by then.
    world.reserved.clear();
    let mut found = 0;
    for (port, src) in given {
        A::of_mut(&mut world).lose(&key::<A>(sock(n.pod, port), to, 6));
        let leaves = pass(&world, UPLINK, Hook::Egress, sock(n.pod, port), to, L4::Tcp(ACK));
        found += usize::from(leaves.expect("it passes").0 == src);
    }
    assert!(found > 1980, "{found} of 1999");
}

#[test]
fn with_half_of_the_ports_reserved_every_flow_gets_one_and_finds_it_again() {
    half_reserved::<Ip4>(false);
    half_reserved::<Ip6>(true);
}

#[test]
fn what_is_not_masqueraded() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let world = cluster();
        let special: [IpAddr; 2] = if v6 { ["fe80::1", "ff02::fb"] } else { ["169.254.1.1", "224.0.0.251"] }
            .map(|s| s.parse().expect("an address"));
        let [link_local, multicast] = special;
        for (src, dst, device) in [
            (n.pod, n.far, UPLINK),
            (n.pod, n.router, UPLINK),
            (n.pod, link_local, UPLINK),
            (n.pod, multicast, UPLINK),
            (n.node, n.internet, UPLINK),
            (n.outside, n.internet, UPLINK),
            (n.pod, n.internet, BACKEND),
            (n.pod, n.internet, 9),
        ] {
            let (src, dst) = (sock(src, 5000), sock(dst, 443));
            assert_eq!(pass(&world, device, Hook::Egress, src, dst, L4::Udp), Some((src, dst)));
        }
        assert_eq!(world.counter(Reason::NewFlow), 0);
    }
}

#[test]
fn no_address_to_masquerade_to() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let mut world = cluster();
        world.devices.insert(UPLINK, Device { flags: Device::MASQUERADE, ..Default::default() });
        assert_eq!(pass(&world, UPLINK, Hook::Egress, sock(n.pod, 1), sock(n.internet, 443), L4::Udp), None);
        assert_eq!(world.counter(Reason::NoMasqueradeAddress), 1);
    }
}

#[test]
fn a_reply_to_a_masquerade_port_is_no_nodeport_request() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let mut world = cluster();
        world.ports = (30_080, 30_080);
        serve(&mut world, 17, sock(n.node, 30_080), &[(sock(n.near, 8080), true)]);
        let (pod, peer) = (sock(n.pod, 5000), sock(n.internet, 443));
        let masq = sock(n.node, 30_080);
        assert_eq!(pass(&world, UPLINK, Hook::Egress, pod, peer, L4::Udp), Some((masq, peer)));
        assert_eq!(pass(&world, UPLINK, Hook::Ingress, peer, masq, L4::Udp), Some((peer, pod)));
        let other = sock(n.outside, 443);
        assert_eq!(
            pass(&world, UPLINK, Hook::Ingress, other, masq, L4::Udp),
            Some((other, sock(n.near, 8080)))
        );
    }
}

#[test]
fn a_full_table_drops_new_flows_whole_and_keeps_the_old() {
    for v6 in BOTH {
        let n = Net::of(v6);
        for spare in 0..3 {
            let mut world = node();
            let (client, vip, backend) = (sock(n.pod, 5000), sock(n.vip, 80), sock(n.near, 8080));
            assert_eq!(chosen(&world, client, vip, L4::Tcp(SYN)), backend);
            world.capacity = 3 + spare;
            assert_eq!(pass(&world, CLIENT, Hook::Ingress, sock(n.pod, 5001), vip, L4::Tcp(SYN)), None);
            assert_eq!(world.counter(Reason::FlowTableFull), 1);
            let left = if v6 { world.v6.flows().len() } else { world.v4.flows().len() };
            assert_eq!(left, 3, "no half of a flow stays behind");
            assert_eq!(chosen(&world, client, vip, L4::Tcp(ACK)), backend);
        }
        // Masquerade: two entries.
        for spare in 0..2 {
            let mut world = node();
            world.capacity = spare;
            assert_eq!(
                pass(&world, UPLINK, Hook::Egress, sock(n.pod, 1), sock(n.internet, 443), L4::Udp),
                None
            );
            let left = if v6 { world.v6.flows().len() } else { world.v4.flows().len() };
            assert_eq!((left, world.counter(Reason::FlowTableFull)), (0, 1));
        }
    }
}

#[test]
fn a_udp_checksum_never_becomes_none() {
    // Zero stands for "none" in UDP (and is forbidden in IPv6): what computes to zero is sent as all ones (RFC 768).
    for v6 in BOTH {
        let n = Net::of(v6);
        let (client, vip, backend) = (sock(n.pod, 5000), sock(n.vip, 80), sock(n.near, 8080));
        let zero = (0..=u16::MAX).map(|w| build::packet(client, backend, L4::Udp, &w.to_be_bytes()));
        let at = if v6 { 14 + 40 + 6 } else { 14 + 20 + 6 };
        let expected =
            zero.into_iter().find(|f| f[at..at + 2] == [0xff, 0xff]).expect("one word makes it zero");
        let data = &expected[at + 2..];
        let mut frame = Frame::new(build::packet(client, vip, L4::Udp, data));
        assert_eq!(node().run(CLIENT, Hook::Ingress, &mut frame), Action::Pass);
        assert_eq!(frame.bytes, expected);
    }
}

#[test]
fn udp_over_ipv4_without_a_checksum_stays_without() {
    let n = Net::of(false);
    let without = |dst| {
        let mut frame = build::packet(sock(n.pod, 5000), dst, L4::Udp, b"data");
        frame[40..42].fill(0);
        Frame::new(frame)
    };
    let mut frame = without(sock(n.vip, 80));
    assert_eq!(node().run(CLIENT, Hook::Ingress, &mut frame), Action::Pass);
    assert_eq!(frame, without(sock(n.near, 8080)));
}

#[test]
fn sides_of_a_flow() {
    let world = node();
    let n = Net::of(false);
    chosen(&world, sock(n.pod, 5000), sock(n.vip, 82), L4::Tcp(SYN));
    pass(&world, CLIENT, Hook::Egress, sock(n.pod, 5000), sock(n.pod, 8080), L4::Tcp(SYN));
    let mut sides: Vec<_> = world.v4.flows().values().filter_map(|f| Side::from_raw(f.side)).collect();
    sides.sort_by_key(|s| *s as u8);
    assert_eq!(sides, [Side::Front, Side::Forward, Side::Back, Side::Reply]);
    for (key, flow) in world.v4.flows() {
        assert_eq!(flow.key(Side::from_raw(flow.side).expect("a side")), key);
    }
}

#[test]
fn ports_that_others_masquerade_to_or_forward_are_theirs() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let world = cluster();
        let (peer, pod) = (sock(n.internet, 443), sock(n.pod, 5000));
        let ours = pass(&world, UPLINK, Hook::Egress, pod, peer, L4::Tcp(SYN)).expect("it leaves").0;
        for port in (10_000..30_000).filter(|port| *port != ours.port()) {
            let theirs = sock(n.node, port);
            let answer = pass(&world, UPLINK, Hook::Ingress, peer, theirs, L4::Tcp(ACK));
            assert_eq!(answer, Some((peer, theirs)));
        }
        assert_eq!(pass(&world, UPLINK, Hook::Ingress, peer, ours, L4::Tcp(ACK)), Some((peer, pod)));
    }
}

#[test]
fn a_connection_that_was_exempt_stays_as_it_is() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let mut world = cluster();
        let (pod, exempt, other) = (sock(n.pod, 5000), sock(n.router, 443), sock(n.internet, 443));
        let leaves = |world: &World, to, flags| pass(world, UPLINK, Hook::Egress, pod, to, L4::Tcp(flags));
        assert_eq!(leaves(&world, exempt, SYN), Some((pod, exempt)));
        let masqueraded = leaves(&world, other, SYN).expect("it leaves");
        assert_eq!(masqueraded.0.ip(), n.node);
        // Nothing is exempt any more.
        world.v4.cidrs.retain(|(_, _, bits)| *bits == lb_common::maps::cidr::CLUSTER);
        world.v6.cidrs.retain(|(_, _, bits)| *bits == lb_common::maps::cidr::CLUSTER);
        assert_eq!(leaves(&world, exempt, ACK), Some((pod, exempt)));
        // The middle of one whose entry was lost is still known by its port.
        let forward = |flow: &lb_common::maps::Flow<Ip4>| flow.side == Side::Forward as u8;
        if !v6 {
            let lost = world.v4.flows().into_iter().find(|(_, flow)| forward(flow)).expect("an entry").0;
            world.v4.lose(&lost);
        }
        assert_eq!(leaves(&world, other, ACK), Some(masqueraded));
        // What begins now is masqueraded.
        let new = pass(&world, UPLINK, Hook::Egress, sock(n.pod, 5001), exempt, L4::Tcp(SYN));
        assert_eq!(new.expect("it leaves").0.ip(), n.node);
    }
}

#[test]
fn a_full_table_takes_new_flows_in_place_of_those_that_are_over() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let (vip, to) = (sock(n.vip, 80), sock(n.internet, 443));
        for first in [L4::Tcp(SYN), L4::Udp] {
            let mut world = cluster();
            serve(&mut world, first.proto(v6), vip, &[(sock(n.near, 8080), true)]);
            world.remembered.set(10);
            world.capacity = 30;
            let begin =
                |world: &World, port| pass(world, CLIENT, Hook::Ingress, sock(n.pod, port), vip, first);
            for port in 1..=10 {
                assert!(begin(&world, port).is_some());
            }
            assert!(begin(&world, 11).is_none(), "all of them are young");
            assert_eq!(world.counter(Reason::FlowTableFull), 1);
            world.now.set(world.now.get() + 5);
            // One has gone on.
            let next = if first == L4::Udp { first } else { L4::Tcp(ACK) };
            pass(&world, CLIENT, Hook::Ingress, sock(n.pod, 2), vip, next);
            pass(&world, BACKEND, Hook::Egress, sock(n.pod, 2), sock(n.near, 8080), next);
            pass(&world, BACKEND, Hook::Egress, sock(n.pod, 2), sock(n.near, 8080), next);
            for port in 21..29 {
                assert!(begin(&world, port).is_some(), "{port}");
            }
            assert_eq!(world.counter(Reason::Reclaimed), 8);
            let replies =
                pass(&world, CLIENT, Hook::Egress, sock(n.near, 8080), sock(n.pod, 2), next.answer());
            assert_eq!(replies, Some((vip, sock(n.pod, 2))), "the one that goes on does");
            // What is only masqueraded, too.
            world.now.set(world.now.get() + 5);
            let leaves = || pass(&world, UPLINK, Hook::Egress, sock(n.pod, 50), to, first);
            assert!(leaves().is_some() || leaves().is_some(), "at the second attempt");
        }
    }
}
