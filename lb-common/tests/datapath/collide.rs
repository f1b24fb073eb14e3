//! Flows that would be the same tuple once they are translated.

use crate::send::pass;
use crate::support::build::{ACK, FIN, L4, RST, SYN};
use crate::support::cluster::{BACKEND, BOTH, CLIENT, Net, UPLINK, cluster, serve, sock};
use crate::support::world::{Fam, Hook, World};
use lb_common::addr::{Ip4, Ip6, NetPort};
use lb_common::datapath::Reason;
use lb_common::maps::{FlowKey, Side};
use std::net::SocketAddr;

/// Two Services with one backend, and a pod with one port.
struct Case {
    world: World,
    vips: [SocketAddr; 2],
    backend: SocketAddr,
    client: SocketAddr,
}

fn case(v6: bool) -> Case {
    let n = Net::of(v6);
    let (vips, backend) = ([sock(n.vip, 80), sock(n.vip, 90)], sock(n.near, 8080));
    let mut world = cluster();
    for proto in [6, 17] {
        for vip in vips {
            serve(&mut world, proto, vip, &[(backend, true)]);
        }
    }
    Case { world, vips, backend, client: sock(n.pod, 5000) }
}

impl Case {
    /// From the pod, through its device and the backend's; the source that the backend sees.
    fn send(&self, to: SocketAddr, l4: L4) -> SocketAddr {
        let (src, dst) = pass(&self.world, CLIENT, Hook::Ingress, self.client, to, l4).expect("it is let in");
        assert_eq!(dst, self.backend);
        assert_eq!(src.ip(), self.client.ip(), "the address is for routing and policies to see");
        let out = pass(&self.world, BACKEND, Hook::Egress, src, dst, l4).expect("it is let out");
        assert_eq!(out, (src, dst));
        src
    }

    /// The backend's answer to `source`, as the pod gets it.
    fn answer(&self, source: SocketAddr, l4: L4) -> (SocketAddr, SocketAddr) {
        let (src, dst) =
            pass(&self.world, BACKEND, Hook::Ingress, self.backend, source, l4).expect("it is let in");
        assert_eq!((src, dst), (self.backend, source));
        pass(&self.world, CLIENT, Hook::Egress, src, dst, l4).expect("it is let out")
    }

    /// Both ways through all hooks: what was sent to `to` is answered from there.
    fn talk(&self, to: SocketAddr, l4: L4) -> SocketAddr {
        let source = self.send(to, l4);
        assert_eq!(self.answer(source, l4.answer()), (to, self.client));
        source
    }

    fn key<A: Fam>(&self, from: SocketAddr, to: SocketAddr, proto: u8) -> FlowKey<A> {
        FlowKey {
            src: A::from_ip(from.ip()),
            dst: A::from_ip(to.ip()),
            sport: NetPort::new(from.port()),
            dport: NetPort::new(to.port()),
            proto,
            ..FlowKey::default()
        }
    }
}

const FIRST: [L4; 2] = [L4::Tcp(SYN), L4::Udp];

fn next(l4: L4) -> L4 {
    if l4 == L4::Udp { l4 } else { L4::Tcp(ACK) }
}

#[test]
fn one_port_to_two_services_of_one_backend() {
    for v6 in BOTH {
        for first in FIRST {
            let c = case(v6);
            let one = c.talk(c.vips[0], first);
            let other = c.talk(c.vips[1], first);
            assert_eq!(one, c.client);
            assert_ne!(other, one);
            assert!((10_000..30_000).contains(&other.port()), "{other}");
            for _ in 0..3 {
                assert_eq!(c.talk(c.vips[0], next(first)), one);
                assert_eq!(c.talk(c.vips[1], next(first)), other);
                // A retransmitted first packet is none of another flow.
                assert_eq!(c.talk(c.vips[1], first), other);
            }
            assert_eq!(c.world.counter(Reason::NewFlow), 2);
        }
    }
}

#[test]
fn one_port_to_a_service_and_then_to_its_backend() {
    for v6 in BOTH {
        for first in FIRST {
            let c = case(v6);
            let service = c.talk(c.vips[0], first);
            let direct = c.talk(c.backend, first);
            assert_ne!(direct, service);
            for _ in 0..3 {
                assert_eq!(c.talk(c.backend, next(first)), direct);
                assert_eq!(c.talk(c.vips[0], next(first)), service);
            }
            if first == L4::Udp {
                continue;
            }
            // The Service's connection ends, and the port goes to it again: the direct one does not notice.
            c.talk(c.vips[0], L4::Tcp(FIN | ACK));
            assert_ne!(c.talk(c.vips[0], first), direct);
            assert_eq!(c.talk(c.backend, next(first)), direct);
            // And the other way round.
            c.talk(c.backend, L4::Tcp(RST));
            c.talk(c.backend, first);
            c.talk(c.vips[0], next(first));
        }
    }
}

#[test]
fn a_direct_connection_s_port_then_used_for_a_service() {
    fn test<A: Fam>(v6: bool) {
        let mut c = case(v6);
        // Ours know nothing of it, but the pod's kernel does.
        let netns = 4;
        for device in [CLIENT, BACKEND] {
            c.world.devices.get_mut(&device).expect("a device").netns = netns + 1;
        }
        let theirs = c.key::<A>(c.backend, c.client, 6);
        A::of_mut(&mut c.world).connections.insert((netns, theirs));
        let service = c.talk(c.vips[0], L4::Tcp(SYN));
        assert_ne!(service, c.client);
        for _ in 0..3 {
            assert_eq!(c.talk(c.backend, L4::Tcp(ACK)), c.client);
            assert_eq!(c.talk(c.vips[0], L4::Tcp(ACK)), service);
        }
    }
    test::<Ip4>(false);
    test::<Ip6>(true);
}

#[test]
fn entries_of_a_flow_with_an_alias_are_made_again() {
    fn test<A: Fam>(v6: bool) {
        for first in FIRST {
            for side in [Side::Front, Side::Forward, Side::Reply] {
                for second in [0, 1] {
                    let c = case(v6);
                    let to = [c.vips[1], c.backend][second];
                    c.talk(c.vips[0], first);
                    let source = c.talk(to, first);
                    assert_ne!(source, c.client);
                    let all = A::of(&c.world).flows();
                    let lost = all.iter().find(|(_, flow)| {
                        flow.side == side as u8
                            && flow.vip == A::from_ip(to.ip())
                            && flow.vip_port.get() == to.port()
                    });
                    A::of(&c.world).lose(lost.expect("an entry").0);
                    // A straight flow's first entry alone is not: nothing tells it from one that we never saw.
                    if second == 1 && side == Side::Front && first != L4::Udp {
                        continue;
                    }
                    for _ in 0..2 {
                        assert_eq!(c.answer(source, next(first)), (to, c.client), "{side:?}");
                        assert_eq!(c.talk(to, next(first)), source, "{side:?}");
                        assert_eq!(c.talk(c.vips[0], next(first)), c.client, "{side:?}");
                    }
                }
            }
        }
    }
    test::<Ip4>(false);
    test::<Ip6>(true);
}

#[test]
fn a_service_whose_address_is_its_endpoint_s() {
    for v6 in BOTH {
        for first in FIRST {
            let mut c = case(v6);
            for proto in [6, 17] {
                serve(&mut c.world, proto, c.backend, &[(c.backend, true)]);
            }
            assert_eq!(c.talk(c.backend, first), c.client);
            for _ in 0..3 {
                assert_eq!(c.talk(c.backend, next(first)), c.client);
            }
            let other = c.talk(c.vips[0], first);
            assert_ne!(other, c.client);
            assert_eq!(c.talk(c.backend, next(first)), c.client);
        }
    }
}

#[test]
fn from_outside_too() {
    for v6 in BOTH {
        let (c, n) = (case(v6), Net::of(v6));
        let client = sock(n.outside, 5000);
        let through =
            |vip| pass(&c.world, UPLINK, Hook::Ingress, client, vip, L4::Tcp(SYN)).expect("it is let in");
        let (one, other) = (through(c.vips[0]), through(c.vips[1]));
        assert_eq!(one, (client, c.backend));
        assert_ne!(other, one);
        for (vip, (source, _)) in [(c.vips[0], one), (c.vips[1], other)] {
            let reply = pass(&c.world, UPLINK, Hook::Egress, c.backend, source, L4::Tcp(SYN | ACK));
            assert_eq!(reply, Some((vip, client)));
        }
    }
}

#[test]
fn when_all_aliases_are_taken_the_flow_is_dropped_and_the_others_go_on() {
    for v6 in BOTH {
        let mut c = case(v6);
        c.world.ports = (10_000, 10_001);
        let n = Net::of(v6);
        for port in 91..95 {
            serve(&mut c.world, 6, sock(n.vip, port), &[(c.backend, true)]);
        }
        let through = |port| {
            let to = sock(n.vip, port);
            pass(&c.world, CLIENT, Hook::Ingress, c.client, to, L4::Tcp(SYN)).map(|(source, _)| (to, source))
        };
        let got: Vec<_> = (90..95).filter_map(through).collect();
        assert_eq!(got.len(), 3);
        assert_eq!(c.world.counter(Reason::Collision), 2);
        for (to, source) in got {
            assert_eq!(c.answer(source, L4::Tcp(SYN | ACK)), (to, c.client));
        }
    }
}
