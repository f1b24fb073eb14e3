//! Datagrams in several packets.

use crate::support::build::{self, L4};
use crate::support::cluster::{BACKEND, BOTH, CLIENT, Net, OVERLAY, UPLINK, serve, sock};
use crate::support::frame::Frame;
use crate::support::paths::{Talk, Way, node, paths};
use crate::support::world::{Action, Hook, World};
use lb_common::datapath::Reason;
use std::net::SocketAddr;

const DATA: usize = 4000;

/// What a datagram from `src` to `dst` looks like in fragments of 1200 bytes.
fn split(src: SocketAddr, dst: SocketAddr, id: u16) -> Vec<Vec<u8>> {
    let data: Vec<u8> = (0..DATA).map(|i| (i * 7) as u8).collect();
    build::fragments(&build::packet(src, dst, L4::Udp, &data), id, 1200)
}

fn run(world: &World, device: u32, hook: Hook, packets: Vec<Vec<u8>>) -> (Vec<Vec<u8>>, Vec<Action>) {
    let mut frames: Vec<Frame> = packets.into_iter().map(Frame::new).collect();
    let actions = frames.iter_mut().map(|frame| world.run(device, hook, frame)).collect();
    (frames.into_iter().map(|frame| frame.bytes).collect(), actions)
}

#[test]
fn all_fragments_of_every_path_are_rewritten() {
    let data: Vec<u8> = (0..DATA).map(|i| (i * 7) as u8).collect();
    for v6 in BOTH {
        for path in paths(v6) {
            for l4 in [L4::Udp, L4::EchoRequest].into_iter().take(if path.ping { 2 } else { 1 }) {
                let mut world = node();
                let mut talk = Talk::new(&path, l4, false);
                for id in 1..4 {
                    for (way, l4) in [(Way::Forward, l4), (Way::Reply, l4.answer())] {
                        // The smallest first fragment has just the ports.
                        for size in [8, 1200, 1480] {
                            if let Err(text) = talk.fragments(&mut world, way, l4, (&data, id, size)) {
                                panic!("{way:?} in {size} bytes: {text}");
                            }
                        }
                    }
                }
                assert_eq!(world.counter(Reason::FragmentPassed), 0);
                assert_eq!(world.counter(Reason::NewFlow), 1);
            }
        }
    }
}

#[test]
fn fragments_of_others_are_left_alone() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let world = node();
        for (device, hook) in [(CLIENT, Hook::Ingress), (BACKEND, Hook::Egress), (OVERLAY, Hook::Ingress)] {
            let packets = split(sock(n.pod, 5), sock(n.far, 6), 9);
            let (after, _) = run(&world, device, hook, packets.clone());
            assert_eq!(after, packets);
        }
    }
}

#[test]
fn what_a_refused_datagram_leaves_is_dropped() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let mut world = node();
        serve(&mut world, 17, sock(n.vip, 99), &[]);
        let (_, actions) = run(&world, UPLINK, Hook::Ingress, split(sock(n.outside, 5), sock(n.vip, 99), 1));
        // There is no answer to packets with extension headers.
        let first = if v6 { Action::Drop } else { Action::Reply };
        assert_eq!(actions, [first, Action::Drop, Action::Drop, Action::Drop]);
        assert_eq!(world.counter(Reason::FragmentDropped), 3);
    }
}

#[test]
fn fragments_that_overtake_the_first_wait_for_it() {
    let data: Vec<u8> = (0..DATA).map(|i| (i * 7) as u8).collect();
    for v6 in BOTH {
        for path in paths(v6) {
            for l4 in [L4::Udp, L4::EchoRequest].into_iter().take(if path.ping { 2 } else { 1 }) {
                let mut world = node();
                let mut talk = Talk::new(&path, l4, false);
                for (id, order) in
                    (1..).step_by(2).zip([[3, 2, 1, 0], [1, 0, 2, 3], [2, 3, 0, 1], [1, 2, 3, 0]])
                {
                    for (way, l4) in [(Way::Forward, l4), (Way::Reply, l4.answer())] {
                        if let Err(text) =
                            talk.shuffled(&mut world, way, l4, (&data, id + way as u16, 1200), &order)
                        {
                            panic!("{way:?} in the order {order:?}: {text}");
                        }
                    }
                }
                assert_eq!(world.counter(Reason::FragmentPassed), 0);
                assert!(world.counter(Reason::FragmentHeld) > 0);
            }
        }
    }
}

#[test]
fn what_is_too_large_to_be_held_is_left_to_the_host() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let world = node();
        let whole = build::packet(sock(n.outside, 5), sock(n.node, 30081), L4::Udp, &[7; 9000]);
        let late = build::fragments(&whole, 1, 4000).remove(1);
        let (after, actions) = run(&world, UPLINK, Hook::Ingress, vec![late.clone()]);
        assert_eq!((after, actions), (vec![late], vec![Action::Pass]));
        assert_eq!(world.counter(Reason::FragmentPassed), 1);
    }
}

#[test]
fn an_identification_that_comes_again_much_later_is_another_datagram() {
    for v6 in BOTH {
        let n = Net::of(v6);
        let world = node();
        let vip = sock(n.vip, 80);
        run(&world, CLIENT, Hook::Ingress, split(sock(n.pod, 5), vip, 1));
        world.now.set(world.now.get() + 11);
        let late = split(sock(n.pod, 5), vip, 1).remove(1);
        let mut frame = Frame::new(late.clone());
        assert_eq!(world.run(CLIENT, Hook::Ingress, &mut frame), Action::Drop);
        assert_eq!(frame.bytes, late);
        assert_eq!(world.counter(Reason::FragmentHeld), 1);
        // What waited for too long is not let go with the next one.
        world.now.set(world.now.get() + 11);
        run(&world, CLIENT, Hook::Ingress, split(sock(n.pod, 5), vip, 1));
        assert_eq!(world.released.borrow().len(), 0);
    }
}
