//! Any one entry of a flow is lost in mid-flow: nothing is sent elsewhere, and the flow goes on.

use crate::paths::protocols;
use crate::support::build::{ACK, L4, SYN};
use crate::support::cluster::BOTH;
use crate::support::paths::{Path, Talk, WAYS, Way, node, paths};
use crate::support::world::{Action, Fam, World};
use lb_common::addr::{Ip4, Ip6};
use lb_common::datapath::Reason;
use lb_common::maps::{Flow, FlowKey, Side};

fn start<'a>(path: &'a Path, l4: L4) -> (World, Talk<'a>, L4) {
    let mut world = node();
    let mut talk = Talk::new(path, l4, false);
    talk.send(&mut world, Way::Forward, l4, b"").expect("the first packet");
    talk.send(&mut world, Way::Reply, l4.answer(), b"").expect("its answer");
    (world, talk, if l4 == L4::Tcp(SYN) { L4::Tcp(ACK) } else { l4 })
}

/// The entries but for what differs from moment to moment.
fn entries<A: Fam>(world: &World) -> Vec<(FlowKey<A>, Flow<A>)> {
    let mut all: Vec<_> = A::of(world).flows().into_iter().collect();
    all.sort_by_key(|(_, flow)| flow.side);
    all
}

fn lose_each<A: Fam>(path: &Path, l4: L4) {
    let (world, ..) = start(path, l4);
    let all = entries::<A>(&world);
    let masqueraded = all.iter().any(|(_, flow)| flow.side == Side::Back as u8);
    let translated = path.vip != path.backend;
    assert_eq!(
        all.len(),
        3 * usize::from(translated) + if translated { 0 } else { 1 } + usize::from(masqueraded)
    );
    for (key, lost) in all {
        for first in WAYS {
            let (mut world, mut talk, l4) = start(path, l4);
            A::of(&world).lose(&key);
            world.now.set(world.now.get() + 1);
            let what = format!("{} {l4:?} {key:?} side {} lost, {first:?} first", path.name, lost.side);
            if first == Way::Reply {
                match talk.send(&mut world, Way::Reply, l4.answer(), b"1") {
                    Ok(()) => {}
                    // The one entry that a reply cannot do without. It must not go anywhere else.
                    Err(trouble) if lost.side == Side::Back as u8 => {
                        assert!(trouble.untouched, "{what}: {}", trouble.text);
                        if matches!(l4, L4::Tcp(_)) {
                            assert_eq!(trouble.action, Action::Drop, "{what}");
                            assert_eq!(world.counter(Reason::UnknownMasquerade), 1, "{what}");
                        }
                    }
                    Err(trouble) => panic!("{what}: {}", trouble.text),
                }
            }
            for (way, l4) in [(Way::Forward, l4), (Way::Reply, l4.answer()), (Way::Forward, l4)] {
                if let Err(trouble) = talk.send(&mut world, way, l4, b"2") {
                    panic!("{what}, {way:?}: {}", trouble.text);
                }
            }
            let back: Vec<_> = entries::<A>(&world).into_iter().filter(|(k, _)| *k == key).collect();
            assert_eq!(back.len(), 1, "{what}: not made again");
            assert_eq!(back[0].1.side, lost.side, "{what}");
            if [Side::Forward as u8, Side::Back as u8].contains(&lost.side) {
                let masq = |flow: &Flow<A>| (flow.flags, flow.masq, flow.masq_port);
                assert_eq!(masq(&back[0].1), masq(&lost), "{what}");
            }
        }
    }
}

#[test]
fn a_lost_entry_is_made_again() {
    for v6 in BOTH {
        for path in paths(v6) {
            for l4 in protocols(&path) {
                if v6 { lose_each::<Ip6>(&path, l4) } else { lose_each::<Ip4>(&path, l4) }
            }
        }
    }
}

#[test]
fn the_whole_flow_lost_tcp_is_left_to_the_host_and_not_sent_elsewhere() {
    for path in paths(false).into_iter().filter(|p| p.vip != p.backend) {
        let (mut world, mut talk, l4) = start(&path, L4::Tcp(SYN));
        for (key, _) in entries::<Ip4>(&world) {
            world.v4.lose(&key);
        }
        let trouble = talk.send(&mut world, Way::Forward, l4, b"").expect_err("nobody knows where to");
        assert_eq!((trouble.action, trouble.untouched), (Action::Pass, true), "{}", trouble.text);
        assert_eq!(world.counter(Reason::MidFlowPassed), 1);
        assert_eq!(world.counter(Reason::NewFlow), 1);
    }
}
