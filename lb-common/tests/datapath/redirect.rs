//! Packets that are handed to pods past everything between the hooks.

use crate::support::build::{self, ACK, FIN, L4, SYN};
use crate::support::cluster::{BOTH, CLIENT, Net, OVERLAY, sock};
use crate::support::frame::Frame;
use crate::support::paths::{Path, Talk, WAYS, Way, paths};
use crate::support::redirect::{DATA, redirecting, send, shortened};
use crate::support::world::{Action, Fam, Hook, World};
use crate::support::xdp_node::one_hop_less;
use lb_common::addr::{Ip4, Ip6, NetPort};
use lb_common::maps::{Device, Flow, FlowKey, Side};

fn tcp_or_udp(tcp: bool, flags: u8) -> L4 {
    if tcp { L4::Tcp(flags) } else { L4::Udp }
}

/// Every path, with a first packet sent.
fn each(mut check: impl FnMut(&mut World, &mut Talk<'_>, bool)) {
    for (v6, tcp, partial) in
        BOTH.into_iter().flat_map(|a| BOTH.map(|b| (a, b))).flat_map(|(a, b)| BOTH.map(|c| (a, b, c)))
    {
        for path in paths(v6) {
            let mut world = redirecting();
            let mut talk = Talk::new(&path, tcp_or_udp(tcp, SYN), partial);
            talk.send(&mut world, Way::Forward, talk.l4, b"").unwrap_or_else(|e| panic!("{}", e.text));
            check(&mut world, &mut talk, tcp);
        }
    }
}

#[test]
fn all_but_the_first_packet_go_straight_to_the_pod() {
    each(|world, talk, tcp| {
        for (way, flags) in [
            (Way::Reply, SYN | ACK),
            (Way::Forward, ACK),
            (Way::Reply, ACK),
            (Way::Forward, FIN | ACK),
            (Way::Reply, FIN | ACK),
            (Way::Forward, ACK),
        ] {
            let redirected =
                send(world, talk, way, tcp_or_udp(tcp, flags)).unwrap_or_else(|e| panic!("{}", e.text));
            // That the client has closed is for the egress hook to see.
            let ends = tcp && way == Way::Forward && flags & FIN != 0;
            assert_eq!(
                redirected,
                shortened(talk.path, way).is_some() && !ends,
                "{} {way:?}",
                talk.path.name
            );
        }
    });
}

#[test]
fn a_pod_that_may_not_or_is_gone_gets_nothing_that_way() {
    each(|world, talk, tcp| {
        let devices = world.devices.clone();
        for way in WAYS {
            let Some((_, to)) = shortened(talk.path, way) else { continue };
            let flag =
                |world: &mut World| world.devices.get_mut(&to).expect("a device").flags &= !Device::REDIRECT;
            let gone = |world: &mut World| _ = world.devices.remove(&to);
            for change in [&flag as &dyn Fn(&mut World), &gone] {
                change(world);
                let redirected =
                    send(world, talk, way, tcp_or_udp(tcp, ACK)).unwrap_or_else(|e| panic!("{}", e.text));
                assert!(!redirected, "{} {way:?}", talk.path.name);
                world.devices.clone_from(&devices);
                let redirected =
                    send(world, talk, way, tcp_or_udp(tcp, ACK)).unwrap_or_else(|e| panic!("{}", e.text));
                assert!(redirected, "{} {way:?}", talk.path.name);
            }
        }
    });
}

#[test]
fn fragments_take_the_long_way() {
    let data: Vec<u8> = (0..4000).map(|i| (i * 7) as u8).collect();
    each(|world, talk, tcp| {
        if tcp || talk.partial {
            return;
        }
        for id in 1..3 {
            for way in WAYS {
                talk.fragments(world, way, L4::Udp, (&data, id, 1200))
                    .unwrap_or_else(|text| panic!("{text}"));
            }
        }
    });
}

/// A packet of the path that a node redirects to its overlay, from the client's device on; and what is expected of it there.
fn goes_out(
    world: &World,
    path: &Path,
    l4: L4,
    (partial, hops): (bool, usize),
) -> (Action, Vec<u8>, Vec<u8>) {
    let [mut sent, mut expected] =
        [path.vip, path.backend].map(|to| build::packet(path.client, to, l4, DATA));
    for bytes in [&mut sent, &mut expected] {
        (0..hops).for_each(|_| one_hop_less(bytes).expect("hops are left"));
    }
    let mut frame = Frame { bytes: if partial { build::to_partial(sent) } else { sent }, partial };
    let action = world.run(CLIENT, Hook::Ingress, &mut frame);
    let got = if partial { build::complete(frame.bytes) } else { frame.bytes };
    (action, got, expected)
}

#[test]
fn what_is_for_other_nodes_goes_out_by_the_overlay_at_once() {
    for (v6, tcp, partial) in
        BOTH.into_iter().flat_map(|a| BOTH.map(|b| (a, b))).flat_map(|(a, b)| BOTH.map(|c| (a, b, c)))
    {
        let path = &paths(v6)[1];
        let mut world = redirecting();
        world.routes.insert(path.backend.ip(), OVERLAY);
        world.devices.get_mut(&OVERLAY).expect("an overlay").flags |= Device::REDIRECT;
        let mut talk = Talk::new(path, tcp_or_udp(tcp, SYN), partial);
        talk.send(&mut world, Way::Forward, talk.l4, b"").unwrap_or_else(|e| panic!("{}", e.text));
        let later = tcp_or_udp(tcp, ACK);
        // A router's part is done, too; and the overlay's own hook has nothing to object.
        let (action, got, mut expected) = goes_out(&world, path, later, (partial, 0));
        one_hop_less(&mut expected).expect("hops are left");
        assert_eq!((action, &got), (Action::Route(OVERLAY), &expected));
        assert_eq!(world.run(OVERLAY, Hook::Egress, &mut Frame::new(got)), Action::Pass);
        // What the node has to answer, and what it cannot send on that way.
        let (action, got, expected) = goes_out(&world, path, later, (partial, 63));
        assert_eq!((action, got), (Action::Pass, expected), "no more hops");
        let routes = std::mem::take(&mut world.routes);
        let (action, got, expected) = goes_out(&world, path, later, (partial, 0));
        assert_eq!((action, got), (Action::Pass, expected), "no route");
        world.routes = routes;
        world.devices.get_mut(&OVERLAY).expect("an overlay").flags &= !Device::REDIRECT;
        let (action, got, expected) = goes_out(&world, path, later, (partial, 0));
        assert_eq!((action, got), (Action::Pass, expected), "not admitted");
    }
}

fn entries<A: Fam>(world: &World) -> Vec<(FlowKey<A>, Flow<A>)> {
    A::of(world).flows().into_iter().collect()
}

/// Each entry is lost once, in the middle of a conversation. (But for those that replies to a masquerade address find: they
/// wait for the client's next second, redirected or not.)
fn lose<A: Fam>(world: &mut World, talk: &mut Talk<'_>, tcp: bool) {
    for (key, lost) in entries::<A>(world).into_iter().filter(|(_, flow)| flow.side != Side::Back as u8) {
        A::of(world).lose(&key);
        for _ in 0..2 {
            for way in WAYS {
                send(world, talk, way, tcp_or_udp(tcp, ACK))
                    .unwrap_or_else(|e| panic!("{} without {lost:?}: {}", talk.path.name, e.text));
            }
        }
        for (_, entry) in entries::<A>(world) {
            if entry.flags & Flow::<A>::DEVICE == 0 {
                assert!(entry.flags & Flow::<A>::REDIRECT == 0);
                let masqueraded = entry.flags & Flow::<A>::MASQ_DONE != 0;
                assert!(masqueraded || entry.masq_port == entry.client_port, "{} {entry:?}", talk.path.name);
            }
        }
        A::of(world).enter(key, lost);
    }
}

#[test]
fn whatever_entry_is_lost_packets_arrive() {
    each(|world, talk, tcp| {
        send(world, talk, Way::Reply, tcp_or_udp(tcp, SYN | ACK)).unwrap_or_else(|e| panic!("{}", e.text));
        if talk.path.client.is_ipv4() {
            lose::<Ip4>(world, talk, tcp);
        } else {
            lose::<Ip6>(world, talk, tcp);
        }
    });
}

/// Whoever wants to know whether a flow is over asks this entry.
#[test]
fn the_forward_entry_knows_that_the_client_has_closed() {
    let mut seen = 0;
    each(|world, talk, tcp| {
        if !tcp || talk.path.client.is_ipv6() || shortened(talk.path, Way::Forward).is_none() {
            return;
        }
        send(world, talk, Way::Forward, L4::Tcp(FIN | ACK)).unwrap_or_else(|e| panic!("{}", e.text));
        for (_, entry) in entries::<Ip4>(world) {
            let client = entry.side != Side::Reply as u8;
            assert_eq!(entry.state & Flow::<Ip4>::FIN != 0, client, "{entry:?}");
            seen += 1;
        }
    });
    assert_eq!(seen, 2 * 2 * 3);
}

#[test]
fn datagrams_leave_a_backend_that_is_gone() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let path = &paths(v6)[0];
        let mut world = redirecting();
        let mut talk = Talk::new(path, L4::Udp, false);
        for redirected in [false, true] {
            assert!(send(&mut world, &mut talk, Way::Forward, L4::Udp).is_ok_and(|done| done == redirected));
        }
        *world.epochs.entry(1).or_default() += 1;
        let mut frame = Frame::new(build::packet(sock(n.pod, 5000), sock(n.vip, 80), L4::Udp, DATA));
        // Chosen anew, by the long way: the set may have another one.
        assert_eq!(world.run(CLIENT, Hook::Ingress, &mut frame), Action::Pass);
    }
}

#[test]
fn any_index_is_remembered() {
    let flow = Flow::<Ip4> { client_port: NetPort::new(4000), ..Flow::default() };
    for index in [1, 0xffff, 0x1_0000, 0x1234_5678, i32::MAX as u32] {
        let noted = flow.with_device(index);
        assert_eq!(noted.device(), index);
        let other = noted.as_side(Side::Forward);
        assert_eq!((other.flags, other.masq_port, other.masq_device), (0, flow.client_port, 0));
    }
}

#[test]
fn nothing_is_redirected_where_the_agent_does_not_say_so() {
    for v6 in BOTH {
        for path in paths(v6) {
            let mut world = redirecting();
            world.redirects = false;
            let mut talk = Talk::new(&path, L4::Tcp(SYN), false);
            for (way, flags) in
                [(Way::Forward, SYN), (Way::Reply, SYN | ACK), (Way::Forward, ACK), (Way::Reply, ACK)]
            {
                talk.send(&mut world, way, L4::Tcp(flags), DATA).unwrap_or_else(|e| panic!("{}", e.text));
            }
        }
    }
}
