//! What a frontend asks of its clients: affinity, source ranges, its own ports.

use crate::send::pass;
use crate::support::build::{self, ACK, L4, SYN};
use crate::support::cluster::{BOTH, CLIENT, Net, UPLINK, backends_of, cluster, serve, sock};
use crate::support::frame::Frame;
use crate::support::world::{Action, Fam, Hook, World};
use lb_common::addr::{Ip4, Ip6};
use lb_common::datapath::Reason;
use lb_common::maps::{Frontend, FrontendKey, Range, Side};
use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

const TIMEOUT: u32 = 60;

/// `count` endpoints from `first` on behind the VIP and a NodePort, for UDP and TCP, with affinity.
fn affine(world: &mut World, v6: bool, endpoints: impl Iterator<Item = u16>) {
    let n = Net::of(v6);
    let backends: Vec<_> = endpoints.map(|port| (sock(n.near, port), true)).collect();
    let set = backends_of(world, &backends);
    for proto in [6, 17] {
        for at in [sock(n.vip, 80), sock(n.node, 30_080)] {
            let service = u32::from(proto);
            let value =
                Frontend { internal: set, external: set, service, affinity: TIMEOUT, ..Default::default() };
            world.frontend(proto, at, value);
        }
    }
}

/// Where a new flow from `client` goes.
fn goes(world: &World, device: u32, client: SocketAddr, to: SocketAddr, l4: L4) -> SocketAddr {
    pass(world, device, Hook::Ingress, client, to, l4).expect("it passes").1
}

#[test]
fn a_client_s_flows_go_to_one_endpoint() {
    for v6 in BOTH {
        for l4 in [L4::Tcp(SYN), L4::Udp] {
            let n = Net::of(v6);
            let mut world = cluster();
            affine(&mut world, v6, 1..50);
            let vip = sock(n.vip, 80);
            let first = goes(&world, CLIENT, sock(n.pod, 1), vip, l4);
            for port in 2..40 {
                world.now.set(world.now.get() + TIMEOUT);
                assert_eq!(
                    goes(&world, CLIENT, sock(n.pod, port), vip, l4),
                    first,
                    "each flow begins the time anew"
                );
            }
            // Through any frontend of the Service port, from wherever the client comes in.
            assert_eq!(goes(&world, UPLINK, sock(n.pod, 50), sock(n.node, 30_080), l4), first);
            // Other clients, other protocols (which are other ports of the Service): as they like.
            let others: HashSet<_> =
                (1..40).map(|host| goes(&world, CLIENT, sock(neighbour(n.far, host), 9), vip, l4)).collect();
            assert!(others.len() > 10, "{others:?}");
            let later: HashSet<_> = (100..140)
                .map(|port| {
                    world.now.set(world.now.get() + TIMEOUT + 1);
                    goes(&world, CLIENT, sock(n.pod, port), vip, l4)
                })
                .collect();
            assert!(later.len() > 10, "after a while a client may go elsewhere: {later:?}");
        }
    }
}

/// An address that differs in its last byte.
fn neighbour(ip: IpAddr, last: u8) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => IpAddr::from([ip.octets()[0], ip.octets()[1], ip.octets()[2], last]),
        IpAddr::V6(ip) => {
            let mut bytes = ip.octets();
            bytes[15] = last;
            IpAddr::from(bytes)
        }
    }
}

#[test]
fn affinity_follows_the_endpoint_into_other_sets_and_ends_with_it() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let vip = sock(n.vip, 80);
        for client in 1..30 {
            let mut world = cluster();
            affine(&mut world, v6, 100..160);
            let from = |port| sock(neighbour(n.pod, client), port);
            let first = goes(&world, CLIENT, from(1), vip, L4::Tcp(SYN));
            let sets = [
                (first.port()..first.port() + 1).collect::<Vec<_>>(),
                (90..160).collect(),
                (first.port()..170).collect(),
                (100..first.port() + 1).collect(),
                (100..200)
                    .step_by(2)
                    .chain([first.port()])
                    .collect::<std::collections::BTreeSet<_>>()
                    .into_iter()
                    .collect(),
            ];
            for (port, set) in (2..).zip(sets) {
                affine(&mut world, v6, set.into_iter());
                assert_eq!(goes(&world, CLIENT, from(port), vip, L4::Tcp(SYN)), first);
            }
            affine(&mut world, v6, (100..160).filter(|port| *port != first.port()));
            let second = goes(&world, CLIENT, from(20), vip, L4::Tcp(SYN));
            assert_ne!(second, first);
            affine(&mut world, v6, 100..160);
            assert_eq!(
                goes(&world, CLIENT, from(21), vip, L4::Tcp(SYN)),
                second,
                "the new one counts from now on"
            );
        }
    }
}

#[test]
fn affinity_without_room_to_remember_goes_by_the_address() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let mut world = cluster();
        world.affinity_capacity = 0;
        affine(&mut world, v6, 1..50);
        let mut all = HashSet::new();
        for host in 1..40 {
            let client = |port| sock(neighbour(n.pod, host), port);
            let first = goes(&world, CLIENT, client(1), sock(n.vip, 80), L4::Tcp(SYN));
            all.insert(first);
            for port in 2..10 {
                assert_eq!(goes(&world, CLIENT, client(port), sock(n.vip, 80), L4::Tcp(SYN)), first);
            }
        }
        assert!(all.len() > 10, "{all:?}");
    }
}

#[test]
fn a_lost_entry_of_a_flow_with_affinity_is_made_again() {
    fn test<A: Fam>(v6: bool) {
        let n = Net::of(v6);
        let mut world = cluster();
        affine(&mut world, v6, 100..160);
        let vip = sock(n.vip, 80);
        // The second flow goes where the first went, and not where its own hash says.
        let first = goes(&world, CLIENT, sock(n.pod, 1), vip, L4::Tcp(SYN));
        goes(&world, CLIENT, sock(n.pod, 2), vip, L4::Tcp(SYN));
        let flows = A::of(&world).flows();
        let front = flows.iter().find(|(_, f)| f.side == Side::Front as u8 && f.client_port.get() == 2);
        A::of(&world).lose(front.expect("an entry").0);
        assert_eq!(goes(&world, CLIENT, sock(n.pod, 2), vip, L4::Tcp(ACK)), first);
        assert_eq!(world.counter(Reason::Repaired), 1);
    }
    test::<Ip4>(false);
    test::<Ip6>(true);
}

#[test]
fn only_clients_in_the_source_ranges_are_admitted() {
    fn test<A: Fam>(v6: bool) {
        let n = Net::of(v6);
        let mut world = cluster();
        let (balancer, vip) = (sock(n.vip, 443), sock(n.vip, 80));
        let set = backends_of(&mut world, &[(sock(n.near, 8080), true)]);
        for (at, flags, service) in [
            (balancer, Frontend::SOURCE_RANGES, 7),
            (vip, 0, 7),
            (sock(n.vip, 444), Frontend::SOURCE_RANGES, 8),
        ] {
            world.frontend(
                6,
                at,
                Frontend { internal: set, external: set, service, flags, ..Default::default() },
            );
        }
        let bits = if v6 { 120 } else { 24 };
        A::of_mut(&mut world).sources.push((7, A::from_ip(n.outside), bits));
        A::of_mut(&mut world).sources.push((8, A::from_ip(n.router), bits));
        let passes =
            |device, from, to| pass(&world, device, Hook::Ingress, sock(from, 5), to, L4::Tcp(SYN)).is_some();
        assert!(passes(UPLINK, n.outside, balancer));
        assert!(passes(UPLINK, neighbour(n.outside, 9), balancer));
        assert!(!passes(UPLINK, n.router, balancer));
        assert!(!passes(CLIENT, n.pod, balancer), "pods, too");
        assert!(passes(UPLINK, n.router, vip), "for load balancer addresses only");
        assert!(passes(UPLINK, n.router, sock(n.vip, 444)), "each Service port has its own");
        assert!(!passes(UPLINK, n.outside, sock(n.vip, 444)));
        assert_eq!(world.counter(Reason::SourceRange), 3);
        // What is established stays when the ranges change.
        A::of_mut(&mut world).sources.clear();
        let ack = pass(&world, UPLINK, Hook::Ingress, sock(n.outside, 5), balancer, L4::Tcp(ACK));
        assert!(ack.is_some());
    }
    test::<Ip4>(false);
    test::<Ip6>(true);
}

#[test]
fn other_ports_of_a_cluster_ip_are_rejected() {
    fn test<A: Fam>(v6: bool) {
        let n = Net::of(v6);
        let mut world = cluster();
        serve(&mut world, 6, sock(n.vip, 80), &[(sock(n.near, 8080), true)]);
        let flags = Frontend::ADDRESS | Frontend::REJECT_OTHER_PORTS;
        let entry = Frontend { flags, ..Frontend::default() };
        A::of_mut(&mut world).frontends.insert(FrontendKey::address(A::from_ip(n.vip)), entry);
        let send = |world: &World, device, to, l4| {
            let mut frame = Frame::new(build::packet(sock(n.outside, 5), to, l4, b""));
            (world.run(device, Hook::Ingress, &mut frame), frame.bytes)
        };
        // Outside of the range it is not even looked for.
        let elsewhere = Range { first: A::from_ip(n.router), mask: A::from_ip(n.router) };
        A::of_mut(&mut world).cluster_ips = elsewhere;
        assert_eq!(send(&world, UPLINK, sock(n.vip, 81), L4::Tcp(SYN)).0, Action::Pass);
        A::of_mut(&mut world).cluster_ips = Range::default();
        for device in [UPLINK, CLIENT] {
            let (action, answer) = send(&world, device, sock(n.vip, 81), L4::Tcp(SYN));
            assert_eq!(action, Action::Reply);
            assert_eq!(answer, build::reset(sock(n.vip, 81), sock(n.outside, 5), 0x0102_0305));
            assert_eq!(send(&world, device, sock(n.vip, 80), L4::Udp).0, Action::Reply, "the other protocol");
        }
        assert_eq!(world.counter(Reason::NoSuchPort), 4);
        for (to, l4) in [
            (sock(n.vip, 80), L4::Tcp(SYN)),
            (sock(n.vip, 81), L4::Tcp(ACK)),
            (sock(n.vip, 0), L4::EchoRequest),
            (sock(n.router, 81), L4::Tcp(SYN)),
        ] {
            assert_eq!(send(&world, UPLINK, to, l4).0, Action::Pass, "{to} {l4:?}");
        }
    }
    test::<Ip4>(false);
    test::<Ip6>(true);
}
