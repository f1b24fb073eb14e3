//! Ports are shared with others who masquerade to the node's addresses: netfilter, for flannel or kube-proxy.

use crate::send::pass;
use crate::support::build::{ACK, L4, SYN};
use crate::support::cluster::{BACKEND, BOTH, CLIENT, Net, OVERLAY, UPLINK, cluster, serve, sock};
use crate::support::world::{Fam, Hook, World};
use lb_common::addr::{Ip4, Ip6, NetPort};
use lb_common::datapath::Reason;
use lb_common::maps::{FlowKey, Overlay, stance};
use std::net::{IpAddr, SocketAddr};

const FIRST: [L4; 2] = [L4::Tcp(SYN), L4::Udp];

pub(crate) fn leaves(world: &World, src: SocketAddr, dst: SocketAddr, l4: L4) -> Option<SocketAddr> {
    let (left, to) = pass(world, UPLINK, Hook::Egress, src, dst, l4)?;
    assert_eq!(to, dst);
    Some(left)
}

/// Where a reply goes.
fn comes(world: &World, src: SocketAddr, dst: SocketAddr, l4: L4) -> Option<SocketAddr> {
    let (from, to) = pass(world, UPLINK, Hook::Ingress, src, dst, l4.answer())?;
    assert_eq!(from, src);
    Some(to)
}

/// What follows a first packet.
fn next(l4: L4) -> L4 {
    if l4 == L4::Udp { l4 } else { L4::Tcp(ACK) }
}

fn entries(world: &World, v6: bool) -> usize {
    if v6 { world.v6.flows().len() } else { world.v4.flows().len() }
}

#[test]
fn a_port_of_ours_that_another_takes_too_becomes_a_different_one() {
    let stances = [stance::SERVE, stance::DRAIN];
    let all = BOTH.into_iter().flat_map(|v6| FIRST.map(|l4| (v6, l4)));
    for (at, (v6, l4)) in stances.into_iter().flat_map(|at| all.clone().map(move |one| (at, one))) {
        let n = Net::of(v6);
        let world = cluster();
        let (pod, server) = (sock(n.pod, 5000), sock(n.internet, 443));
        let ours = leaves(&world, pod, server, l4).expect("it leaves");
        world.stance.set(at);
        // Netfilter has made another pod's packet this.
        let theirs = leaves(&world, ours, server, l4).expect("it leaves");
        assert_eq!(theirs.ip(), ours.ip());
        assert_ne!(theirs, ours);
        for l4 in [l4, next(l4), next(l4)] {
            assert_eq!(comes(&world, server, ours, l4), Some(pod));
            assert_eq!(comes(&world, server, theirs, l4), Some(ours), "netfilter translates it further");
            assert_eq!(leaves(&world, pod, server, l4), Some(ours));
            assert_eq!(leaves(&world, ours, server, l4), Some(theirs));
        }
        assert_eq!(entries(&world, v6), 4);
    }
}

#[test]
fn what_another_has_is_not_given_to_us() {
    for (v6, l4) in BOTH.into_iter().flat_map(|v6| FIRST.map(|l4| (v6, l4))) {
        let n = Net::of(v6);
        // Also if its connection is older than we are.
        for first in [l4, next(l4)] {
            let mut world = cluster();
            world.ports = (20_000, 20_001);
            let (theirs, server) = (sock(n.node, 20_000), sock(n.internet, 443));
            assert_eq!(leaves(&world, theirs, server, first), Some(theirs));
            let ours = sock(n.node, 20_001);
            assert_eq!(leaves(&world, sock(n.pod, 5000), server, l4), Some(ours));
            assert_eq!(leaves(&world, sock(n.pod, 5001), server, l4), None);
            assert_eq!(world.counter(Reason::MasqueradePortsExhausted), 1);
            assert_eq!(comes(&world, server, theirs, l4), Some(theirs));
            assert_eq!(leaves(&world, theirs, server, next(l4)), Some(theirs));
            // To other servers the port is free.
            assert_eq!(
                leaves(&world, sock(n.pod, 5000), sock(n.outside, 443), l4).map(|s| s.ip()),
                Some(n.node)
            );
        }
    }
}

#[test]
fn the_middle_of_a_connection_keeps_its_port() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let world = cluster();
        let (pod, server) = (sock(n.pod, 5000), sock(n.internet, 443));
        let ours = leaves(&world, pod, server, L4::Tcp(SYN)).expect("it leaves");
        assert_eq!(leaves(&world, ours, server, L4::Tcp(ACK)), Some(ours));
        assert_eq!(comes(&world, server, ours, L4::Tcp(ACK)), Some(pod));
    }
}

fn lose_forward<A: Fam>(v6: bool) {
    let n = Net::of(v6);
    let mut world = cluster();
    let server = sock(n.internet, 443);
    let ours = leaves(&world, sock(n.pod, 5000), server, L4::Tcp(SYN)).expect("it leaves");
    let theirs = leaves(&world, ours, server, L4::Tcp(SYN)).expect("it leaves");
    let alone = sock(n.node, 20_000);
    assert_eq!(leaves(&world, alone, server, L4::Tcp(SYN)), Some(alone));
    for (source, left) in [(ours, theirs), (alone, alone)] {
        A::of_mut(&mut world).lose(&key::<A>(source, server, 6));
        assert_eq!(leaves(&world, source, server, L4::Tcp(ACK)), Some(left));
        assert_eq!(comes(&world, server, left, L4::Tcp(ACK)), Some(source));
    }
    assert_eq!(entries(&world, v6), 6);
}

#[test]
fn a_lost_entry_is_made_again() {
    lose_forward::<Ip4>(false);
    lose_forward::<Ip6>(true);
}

/// The key of packets between two sockets.
pub(crate) fn key<A: Fam>(src: SocketAddr, dst: SocketAddr, proto: u8) -> FlowKey<A> {
    FlowKey {
        src: A::from_ip(src.ip()),
        dst: A::from_ip(dst.ip()),
        sport: NetPort::new(src.port()),
        dport: NetPort::new(dst.port()),
        proto,
        ..FlowKey::default()
    }
}

#[test]
fn our_own_packets_may_leave_by_a_second_device() {
    for (v6, l4) in BOTH.into_iter().flat_map(|v6| FIRST.map(|l4| (v6, l4))) {
        let n = Net::of(v6);
        let mut world = cluster();
        // A VLAN's device and the one below it, say.
        let below = world.devices[&UPLINK];
        world.devices.insert(9, below);
        let server = sock(n.internet, 443);
        let ours = leaves(&world, sock(n.pod, 5000), server, l4).expect("it leaves");
        for l4 in [l4, next(l4)] {
            assert_eq!(pass(&world, 9, Hook::Egress, ours, server, l4), Some((ours, server)));
        }
        assert_eq!(entries(&world, v6), 2);
    }
}

fn not_shared<A: Fam>(v6: bool) {
    let n = Net::of(v6);
    let mut world = cluster();
    let server = sock(n.internet, 443);
    let (process, service) = (sock(n.node, 20_000), sock(n.node, 20_001));
    A::of_mut(&mut world).sockets.insert(key::<A>(server, process, 17));
    serve(&mut world, 17, service, &[(sock(n.near, 53), true)]);
    for source in [process, service, sock(n.node, 9_999), sock(n.node, 30_000), sock(n.outside, 20_000)] {
        assert_eq!(leaves(&world, source, server, L4::Udp), Some(source));
    }
    let broadcast = sock(if v6 { "ff02::1" } else { "255.255.255.255" }.parse().expect("an address"), 67);
    assert_eq!(leaves(&world, sock(n.node, 20_002), broadcast, L4::Udp), Some(sock(n.node, 20_002)));
    assert_eq!(entries(&world, v6), 0, "those are nobody's masqueraded flows");
    // Another device, another address.
    let (theirs, backend) = (sock(n.overlay, 20_000), sock(n.far, 8080));
    assert_eq!(pass(&world, OVERLAY, Hook::Egress, theirs, backend, L4::Udp), Some((theirs, backend)));
    assert_eq!(entries(&world, v6), 2);
    // A process of the node whose port we have given before it came.
    let ours = leaves(&world, sock(n.pod, 5000), server, L4::Udp).expect("it leaves");
    A::of_mut(&mut world).sockets.insert(key::<A>(server, ours, 17));
    assert_ne!(leaves(&world, ours, server, L4::Udp), Some(ours));
}

#[test]
fn what_is_left_alone() {
    not_shared::<Ip4>(false);
    not_shared::<Ip6>(true);
}

#[test]
fn a_full_table_does_not_stop_others() {
    for v6 in BOTH {
        let n = Net::of(v6);
        for capacity in [0, 1] {
            let mut world = cluster();
            world.capacity = capacity;
            let (theirs, server) = (sock(n.node, 20_000), sock(n.internet, 443));
            assert_eq!(leaves(&world, theirs, server, L4::Udp), Some(theirs));
            assert_eq!(entries(&world, v6), 0);
            assert_eq!(pass(&world, CLIENT, Hook::Ingress, server, theirs, L4::Udp), Some((server, theirs)));
        }
    }
}

fn straight_to_a_pod<A: Fam>(v6: bool) {
    let n = Net::of(v6);
    let world = cluster();
    let pod = sock(n.near, 53);
    // Each as it comes in, goes to the pod, and the answer back.
    let comes = |client, l4| {
        assert_eq!(pass(&world, UPLINK, Hook::Ingress, client, pod, l4), Some((client, pod)));
        assert_eq!(pass(&world, BACKEND, Hook::Egress, client, pod, l4), Some((client, pod)));
    };
    let answered = |client, l4: L4| {
        let answer = Some((pod, client));
        assert_eq!(pass(&world, BACKEND, Hook::Ingress, pod, client, l4.answer()), answer);
        assert_eq!(pass(&world, UPLINK, Hook::Egress, pod, client, l4.answer()), answer);
    };
    // Another node's address, and one far away; the pod's own flows to both are masqueraded.
    for (count, client) in (1..).zip([sock(n.outside, 20_000), sock(n.internet, 4000)]) {
        for _ in 0..3 {
            comes(client, L4::Udp);
            // One that is answered at length.
            for _ in 0..4 {
                world.now.set(world.now.get() + 20);
                answered(client, L4::Udp);
            }
        }
        let flows = A::of(&world).flows();
        assert_eq!(flows.len(), 3 * count - 2, "one entry each: {flows:?}");
        assert!(flows.iter().any(|(_, flow)| flow.last_seen == world.now.get()), "answers count: {flows:?}");
        let own = leaves(&world, sock(n.near, 5000), client, L4::Udp).map(|left| left.ip());
        assert_eq!(own, Some(n.node));
    }
    // An answer that came first, before we had seen any question.
    let late = sock(n.internet, 4001);
    assert_eq!(leaves(&world, pod, late, L4::Udp).map(|left| left.ip()), Some(n.node));
    comes(late, L4::Udp);
    answered(late, L4::Udp);
    // Connections tell by their first packet, and what the cluster sends to itself is not masqueraded either.
    for (client, l4) in
        [(sock(n.outside, 1), L4::Tcp(SYN)), (sock(n.pod, 1), L4::Udp), (sock(n.router, 1), L4::Udp)]
    {
        comes(client, l4);
        answered(client, l4);
    }
    assert_eq!(entries(&world, v6), 7);
}

#[test]
fn answers_to_datagrams_straight_to_a_pod_keep_their_source() {
    straight_to_a_pod::<Ip4>(false);
    straight_to_a_pod::<Ip6>(true);
}

/// Their source ports are any, those among them that we masquerade to, and no socket is behind them.
#[test]
fn what_carries_overlays_is_left_alone() {
    let l4 = L4::Udp;
    for v6 in BOTH {
        let n = Net::of(v6);
        let mut world = cluster();
        let (ours, theirs) = (sock(n.node, 20_000), sock(n.internet, 8472));
        assert_eq!(leaves(&world, ours, theirs, l4), Some(ours));
        assert_eq!(entries(&world, v6), 2, "as a flow that somebody else has masqueraded");
        world = cluster();
        let port = NetPort::new(8472);
        world.overlay = match n.node {
            IpAddr::V4(node) => Overlay { port, addr4: node.into(), ..Overlay::default() },
            IpAddr::V6(node) => Overlay { port, addr6: node.into(), ..Overlay::default() },
        };
        assert_eq!(leaves(&world, ours, theirs, l4), Some(ours));
        let (there, here) = (sock(n.internet, 20_000), sock(n.node, 8472));
        assert_eq!(comes(&world, there, here, l4), Some(here));
        assert_eq!((entries(&world, v6), world.left.get()), (0, 2));
        // A pod's packets to that port are not the overlay's.
        let pod = leaves(&world, sock(n.pod, 5000), theirs, l4).expect("it leaves");
        assert_eq!(pod.ip(), n.node);
        assert_eq!(comes(&world, theirs, pod, l4), Some(sock(n.pod, 5000)));
    }
}
