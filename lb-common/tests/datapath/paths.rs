//! Every path in both families, requests and replies, checksums finished or left to the device.

use crate::support::build::{ACK, FIN, L4, SYN};
use crate::support::cluster::BOTH;
use crate::support::paths::{Path, Talk, Way, node, paths};
use crate::support::world::World;
use lb_common::datapath::Reason;
use proptest::prelude::*;

/// The first packet's protocols.
pub(crate) fn protocols(path: &Path) -> Vec<L4> {
    let mut all = vec![L4::Tcp(SYN), L4::Udp];
    if path.ping {
        all.push(L4::EchoRequest);
    }
    all
}

/// A first packet, its answer, and more of both.
fn talk(talk: &mut Talk<'_>, world: &mut World, data: &[u8]) {
    let first = talk.l4;
    let mut send = |way, l4, data: &[u8]| {
        if let Err(trouble) = talk.send(world, way, l4, data) {
            panic!("{}", trouble.text);
        }
    };
    send(Way::Forward, first, if first == L4::Tcp(SYN) { b"" } else { data });
    send(Way::Reply, first.answer(), if first == L4::Tcp(SYN) { b"" } else { data });
    for _ in 0..2 {
        let l4 = if first == L4::Tcp(SYN) { L4::Tcp(ACK) } else { first };
        send(Way::Forward, l4, data);
        send(Way::Reply, l4.answer(), data);
    }
    if first == L4::Tcp(SYN) {
        send(Way::Forward, L4::Tcp(FIN | ACK), b"");
        send(Way::Reply, L4::Tcp(FIN | ACK), data);
        send(Way::Forward, L4::Tcp(ACK), b"");
    }
}

#[test]
fn every_hook_of_every_path_does_its_one_rewrite() {
    for v6 in BOTH {
        for path in paths(v6) {
            for l4 in protocols(&path) {
                for partial in [false, true].into_iter().filter(|p| !p || l4 != L4::EchoRequest) {
                    let mut world = node();
                    talk(&mut Talk::new(&path, l4, partial), &mut world, b"some data");
                    assert_eq!(world.counter(Reason::NewFlow), 1, "{} {l4:?}", path.name);
                    let trouble = Reason::ALL.into_iter().filter(|r| *r != Reason::NewFlow);
                    for reason in trouble {
                        assert_eq!(world.counter(reason), 0, "{} {l4:?} {reason:?}", path.name);
                    }
                }
            }
        }
    }
}

#[test]
fn the_paths_do_not_disturb_each_other() {
    let mut world = node();
    for v6 in BOTH {
        for (port, mut path) in (5000..).zip(paths(v6)) {
            path.client.set_port(port);
            for l4 in protocols(&path) {
                talk(&mut Talk::new(&path, l4, false), &mut world, b"data");
            }
        }
    }
}

proptest! {
    #[test]
    fn any_ports_and_any_payload(
        v6: bool,
        which in 0usize..9,
        udp: bool,
        partial: bool,
        port in 1u16..,
        data in prop::collection::vec(any::<u8>(), 0..1400),
    ) {
        let mut path = paths(v6).swap_remove(which);
        path.client.set_port(port);
        let l4 = if udp { L4::Udp } else { L4::Tcp(SYN) };
        talk(&mut Talk::new(&path, l4, partial), &mut node(), &data);
    }

    #[test]
    fn any_echo(v6: bool, id: u16, data in prop::collection::vec(any::<u8>(), 0..1400)) {
        let mut path = paths(v6).into_iter().find(|p| p.ping).expect("a path for pings");
        path.client.set_port(id);
        talk(&mut Talk::new(&path, L4::EchoRequest, false), &mut node(), &data);
    }
}
