//! Flows that go from one to another: from another version's programs to ours, between netfilter and us.

use crate::paths::protocols;
use crate::send::pass;
use crate::support::build::{ACK, L4, SYN};
use crate::support::cluster::{BOTH, CLIENT, Net, UPLINK, serve, sock};
use crate::support::paths::{Path, Talk, WAYS, Way, node, paths};
use crate::support::world::{Fam, Hook, World};
use lb_common::addr::{Ip4, Ip6};
use lb_common::datapath::Reason;
use lb_common::maps::{Flow, FlowKey, Frontend, Side, stance};
use std::net::SocketAddr;

fn middle(l4: L4) -> L4 {
    if l4 == L4::Tcp(SYN) { L4::Tcp(ACK) } else { l4 }
}

fn begin(talk: &mut Talk<'_>, world: &mut World) {
    let l4 = talk.l4;
    talk.send(world, Way::Forward, l4, b"").unwrap_or_else(|t| panic!("{}", t.text));
    talk.send(world, Way::Reply, l4.answer(), b"").unwrap_or_else(|t| panic!("{}", t.text));
}

fn go_on(talk: &mut Talk<'_>, world: &mut World, what: &str) {
    for way in WAYS {
        let l4 = middle(talk.l4);
        let l4 = if way == Way::Reply { l4.answer() } else { l4 };
        talk.send(world, way, l4, b"more").unwrap_or_else(|t| panic!("{what}, {way:?}: {}", t.text));
    }
}

/// The programs of a new version in front of those that are there.
fn in_front_of(old: World, stance: u32) -> World {
    let mut new = node();
    new.behind = Some(Box::new(old));
    new.stance.set(stance);
    new
}

fn counted(world: &World, reason: Reason) -> u64 {
    world.counter(reason) + world.behind.as_ref().map_or(0, |behind| behind.counter(reason))
}

/// Copies the old version's entries one by one, in any order, and talks on after each.
fn move_one_by_one<A: Fam>(path: &Path, l4: L4, reverse: bool) {
    let mut old = node();
    let mut talk = Talk::new(path, l4, false);
    begin(&mut talk, &mut old);
    let mut entries: Vec<(FlowKey<A>, Flow<A>)> = A::of(&old).flows().into_iter().collect();
    entries.sort_by_key(|(_, flow)| flow.side);
    if reverse {
        entries.reverse();
    }
    let mut world = in_front_of(old, stance::LEAVE);
    go_on(&mut talk, &mut world, "nothing copied");
    for (key, flow) in entries {
        A::of(&world).enter(key, flow);
        go_on(&mut talk, &mut world, &format!("side {} copied", flow.side));
    }
    world.stance.set(stance::BEGIN);
    go_on(&mut talk, &mut world, "all copied");
    world.stance.set(stance::SERVE);
    world.behind = None;
    go_on(&mut talk, &mut world, "the old version gone");
    let new = world.counter(Reason::NewFlow);
    assert_eq!(new, 0, "{} {l4:?}: taken for a new flow", path.name);
}

#[test]
fn a_flow_goes_over_to_another_version_entry_by_entry() {
    for v6 in BOTH {
        for path in paths(v6) {
            for l4 in protocols(&path) {
                for reverse in [false, true] {
                    match v6 {
                        true => move_one_by_one::<Ip6>(&path, l4, reverse),
                        false => move_one_by_one::<Ip4>(&path, l4, reverse),
                    }
                }
            }
        }
    }
}

#[test]
fn who_enters_a_flow_that_begins_meanwhile() {
    for v6 in BOTH {
        for path in paths(v6) {
            for l4 in protocols(&path) {
                for (at, ours) in
                    [(stance::LEAVE, false), (stance::BEGIN, matches!(l4, L4::Tcp(_))), (stance::SERVE, true)]
                {
                    let mut world = in_front_of(node(), at);
                    let mut talk = Talk::new(&path, l4, false);
                    begin(&mut talk, &mut world);
                    go_on(&mut talk, &mut world, "begun");
                    assert_eq!(world.counter(Reason::NewFlow), u64::from(ours), "{} {l4:?} {at}", path.name);
                    assert_eq!(counted(&world, Reason::NewFlow), 1, "{} {l4:?} {at}", path.name);
                }
            }
        }
    }
}

/// With nobody behind, that is the host: kube-proxy's rules.
#[test]
fn new_flows_are_left_to_the_host_while_those_that_there_are_go_on() {
    for v6 in BOTH {
        for path in paths(v6) {
            for l4 in protocols(&path) {
                let mut world = node();
                let mut talk = Talk::new(&path, l4, false);
                begin(&mut talk, &mut world);
                world.stance.set(stance::DRAIN);
                go_on(&mut talk, &mut world, "left");
                if l4 == L4::EchoRequest {
                    continue;
                }
                let new = (sock(path.client.ip(), 6000), path.vip);
                for &(device, hook, _) in &path.forward {
                    let sent = pass(&world, device, hook, new.0, new.1, l4);
                    assert_eq!(sent, Some(new), "{} {l4:?}: not left alone", path.name);
                }
            }
        }
        let n = Net::of(v6);
        let mut world = node();
        let address =
            Frontend { flags: Frontend::ADDRESS | Frontend::REJECT_OTHER_PORTS, ..Default::default() };
        world.frontend(0, sock(n.vip, 0), address);
        world.stance.set(stance::DRAIN);
        let to = sock(n.vip, 12345);
        assert!(pass(&world, CLIENT, Hook::Ingress, sock(n.pod, 1), to, L4::Tcp(SYN)).is_some());
    }
}

fn foreign<A: Fam>(client: SocketAddr, vip: SocketAddr, backend: SocketAddr, proto: u8, id: u32) -> Flow<A> {
    let [(client, client_port), (vip, vip_port), (backend, backend_port)] =
        [client, vip, backend].map(|a| (A::from_ip(a.ip()), lb_common::addr::NetPort::new(a.port())));
    let key =
        FlowKey { src: client, dst: vip, sport: client_port, dport: vip_port, proto, ..FlowKey::default() };
    Flow { backend, backend_port, backend_id: id, side: Side::Foreign as u8, ..Flow::straight(&key, 100) }
}

fn enter_foreign(world: &World, client: SocketAddr, vip: SocketAddr, backend: SocketAddr, proto: u8) {
    if vip.is_ipv4() {
        let flow = foreign::<Ip4>(client, vip, backend, proto, 1);
        world.v4.enter(flow.key(Side::Foreign), flow);
    } else {
        let flow = foreign::<Ip6>(client, vip, backend, proto, 1);
        world.v6.enter(flow.key(Side::Foreign), flow);
    }
}

#[test]
fn datagrams_that_netfilter_translates_are_left_to_it_until_the_backend_is_gone() {
    for v6 in BOTH {
        let n = Net::of(v6);
        for (device, client, vip) in
            [(CLIENT, n.pod, sock(n.vip, 80)), (UPLINK, n.outside, sock(n.node, 30080))]
        {
            let (client, backend) = (sock(client, 5000), sock(n.near, 9999));
            let mut world = node();
            enter_foreign(&world, client, vip, backend, 17);
            let sent = |world: &World, from| pass(world, device, Hook::Ingress, from, vip, L4::Udp);
            for _ in 0..2 {
                assert_eq!(sent(&world, client), Some((client, vip)));
            }
            let other = sock(client.ip(), 5001);
            assert_eq!(sent(&world, other), Some((other, sock(n.near, 8080))), "another flow");
            world.epochs.insert(1, 7);
            serve(&mut world, 17, vip, &[(sock(n.far, 8080), false)]);
            assert_eq!(sent(&world, client), Some((client, sock(n.far, 8080))));
            assert_eq!(world.counter(Reason::BackendGone), 1);
        }
    }
}

#[test]
fn a_connection_that_netfilter_translates_ends_with_the_next_one_from_the_same_port() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let (client, vip) = (sock(n.pod, 5000), sock(n.vip, 80));
        let world = node();
        enter_foreign(&world, client, vip, sock(n.near, 9999), 6);
        let sent = |flags| pass(&world, CLIENT, Hook::Ingress, client, vip, L4::Tcp(flags));
        assert_eq!(sent(ACK), Some((client, vip)));
        assert_eq!(sent(SYN), Some((client, sock(n.near, 8080))));
        assert_eq!(sent(ACK), Some((client, sock(n.near, 8080))));
    }
}

fn hold<A: Fam>(world: &World) {
    for (key, flow) in A::of(world).flows() {
        A::of(world).enter(key, flow.as_side(Side::Held));
    }
}

#[test]
fn a_flow_that_is_being_handed_over_goes_nowhere() {
    for v6 in BOTH {
        for path in paths(v6) {
            for l4 in protocols(&path) {
                let mut world = node();
                let mut talk = Talk::new(&path, l4, false);
                begin(&mut talk, &mut world);
                if v6 {
                    hold::<Ip6>(&world)
                } else {
                    hold::<Ip4>(&world)
                }
                for (way, l4) in [(Way::Forward, middle(l4)), (Way::Reply, middle(l4).answer())] {
                    let sent = talk.send(&mut world, way, l4, b"more");
                    assert!(sent.is_err(), "{} {l4:?}: {way:?} got through", path.name);
                }
                assert_eq!(world.counter(Reason::HandedOver), 2, "{} {l4:?}", path.name);
            }
        }
    }
}
