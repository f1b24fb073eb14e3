//! A client's port is used again for the same server.

use crate::masqueraded::{key, leaves};
use crate::send::pass;
use crate::support::build::{ACK, FIN, L4, RST, SYN};
use crate::support::cluster::{BACKEND, BOTH, CLIENT, Net, UPLINK, cluster, serve, sock};
use crate::support::world::{Fam, Hook, World};
use lb_common::addr::{Ip4, Ip6};
use lb_common::maps::{Flow, Side};
use std::net::SocketAddr;

/// Where a reply goes.
fn comes(world: &World, server: SocketAddr, to: SocketAddr, l4: L4) -> Option<SocketAddr> {
    pass(world, UPLINK, Hook::Ingress, server, to, l4).map(|(_, to)| to)
}

/// What has been noted on each side of the only flow.
fn states<A: Fam>(world: &World) -> Vec<(Option<Side>, u8)> {
    let mut all: Vec<_> = A::of(world).flows().values().map(|flow| (flow.side, flow.state)).collect();
    all.sort_unstable();
    all.into_iter().map(|(side, state)| (Side::from_raw(side), state)).collect()
}

fn closed(states: &[(Option<Side>, u8)]) -> bool {
    states.iter().any(|(_, state)| state & Flow::<Ip4>::CLOSING != 0)
}

/// A connection out of the cluster, and how it ends: what the client says last, and the server.
fn masqueraded<A: Fam>(v6: bool) {
    let n = Net::of(v6);
    let (pod, server) = (sock(n.pod, 5000), sock(n.internet, 443));
    for (client, answer) in [(FIN | ACK, FIN | ACK), (RST, ACK), (ACK, RST | ACK), (FIN | ACK, ACK)] {
        let world = cluster();
        let out = |flags| leaves(&world, pod, server, L4::Tcp(flags)).expect("it leaves");
        let first = out(SYN);
        let back = |flags| comes(&world, server, first, L4::Tcp(flags));
        for (client, answer) in [(ACK, SYN | ACK), (client, answer)] {
            assert_eq!(back(answer), Some(pod));
            assert_eq!(out(client), first);
        }
        assert!(closed(&states::<A>(&world)), "{client:#x}, {answer:#x}");
        let second = out(SYN);
        assert_eq!(comes(&world, server, second, L4::Tcp(SYN | ACK)), Some(pod));
        assert_eq!(leaves(&world, pod, server, L4::Tcp(ACK)), Some(second));
        let after = states::<A>(&world);
        assert_eq!(after.len(), 2, "the one before is gone: {after:?}");
        assert!(!closed(&after), "what the one before ended with is not this one's: {after:?}");
    }
}

#[test]
fn a_connection_out_of_the_cluster_begins_anew() {
    masqueraded::<Ip4>(false);
    masqueraded::<Ip6>(true);
}

/// As long as nothing is closed, a SYN that comes again is the same one.
#[test]
fn a_retransmitted_syn_changes_nothing() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let (world, pod, server) = (cluster(), sock(n.pod, 5000), sock(n.internet, 443));
        let first = leaves(&world, pod, server, L4::Tcp(SYN)).expect("it leaves");
        assert_eq!(leaves(&world, pod, server, L4::Tcp(SYN)), Some(first));
        assert_eq!(comes(&world, server, first, L4::Tcp(SYN | ACK)), Some(pod));
        assert_eq!(leaves(&world, pod, server, L4::Tcp(SYN)), Some(first));
    }
}

/// Two versions' tables, brought together, may say that two clients have one port: the one of before, and one that
/// began since.
fn dangling<A: Fam>(v6: bool) {
    let n = Net::of(v6);
    let server = sock(n.internet, 443);
    for ends in [&[][..], &[FIN | ACK], &[RST]] {
        let mut world = cluster();
        world.ports = (20_000, 20_001);
        let port = leaves(&world, sock(n.pod, 5000), server, L4::Tcp(SYN)).expect("it leaves");
        for flags in ends {
            leaves(&world, sock(n.pod, 5000), server, L4::Tcp(*flags)).expect("it leaves");
        }
        A::of_mut(&mut world).lose(&key::<A>(server, port, 6));
        world.reserved = [20_000, 20_001].into_iter().filter(|other| *other != port.port()).collect();
        let other = sock(n.pod, 5001);
        assert_eq!(leaves(&world, other, server, L4::Tcp(SYN)), Some(port));
        world.reserved.clear();
        // It has to be told from the other's.
        let second = leaves(&world, sock(n.pod, 5000), server, L4::Tcp(SYN)).expect("there is another port");
        assert_ne!(second, port, "{ends:?}");
        for (client, port) in [(sock(n.pod, 5000), second), (other, port)] {
            assert_eq!(comes(&world, server, port, L4::Tcp(SYN | ACK)), Some(client));
        }
    }
}

#[test]
fn a_port_that_is_anothers_by_now_is_not_used_again() {
    dangling::<Ip4>(false);
    dangling::<Ip6>(true);
}

/// A Service's backend refuses, the client tries again from the same port, and is let in.
fn refused<A: Fam>(v6: bool) {
    let n = Net::of(v6);
    let (client, vip, backend) = (sock(n.pod, 700), sock(n.vip, 80), sock(n.near, 8080));
    let mut world = cluster();
    serve(&mut world, 6, vip, &[(backend, true)]);
    let say = |flags| pass(&world, CLIENT, Hook::Ingress, client, vip, L4::Tcp(flags));
    let answer = |flags| {
        pass(&world, BACKEND, Hook::Ingress, backend, client, L4::Tcp(flags)).expect("it is let in");
        pass(&world, CLIENT, Hook::Egress, backend, client, L4::Tcp(flags))
    };
    for (flags, closes) in [(RST | ACK, true), (RST | ACK, true), (SYN | ACK, false)] {
        assert_eq!(say(SYN), Some((client, backend)));
        assert_eq!(answer(flags), Some((vip, client)));
        let states = states::<A>(&world);
        assert_eq!(closed(&states), closes, "{states:?}");
    }
    assert_eq!(say(ACK), Some((client, backend)));
}

#[test]
fn a_refusal_is_forgotten_when_the_next_attempt_succeeds() {
    refused::<Ip4>(false);
    refused::<Ip6>(true);
}
