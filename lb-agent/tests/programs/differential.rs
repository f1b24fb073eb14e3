//! The kernel's programs and the host's do the same to the same packets, and remember the same.

use crate::loaded::{LOOPBACK, Loaded};
use crate::support::build;
use crate::support::cluster::{BACKEND, CLIENT, OVERLAY, UPLINK};
use crate::support::frame::Frame;
use crate::support::hostile::{Rng, bad, check, good};
use crate::support::paths::node;
use crate::support::world::{Action, Fam, Hook, World};
use lb_common::datapath::Reason;
use lb_common::maps::{Flow, FlowKey};
use std::collections::HashMap;

const PACKETS: usize = 6_000;
/// The kernel's test packets are one page, its own bookkeeping included.
const MAX_LEN: usize = 3_000;

fn timeless<A: Fam>(world: &World) -> HashMap<FlowKey<A>, Flow<A>> {
    let flows = A::of(world).flows().into_iter();
    flows.map(|(key, flow)| (key, Flow { last_seen: 0, ..flow })).collect()
}

/// Both at once; what came of it.
fn both(
    world: &World,
    loaded: &mut Loaded,
    (device, hook): (u32, Hook),
    frame: &mut Frame,
    what: &str,
) -> Action {
    let before = frame.bytes.clone();
    let mut theirs = frame.clone();
    let here = world.run(device, hook, frame);
    let Some(there) = loaded.try_run(device, hook, &mut theirs) else {
        // The kernel insists on an IP header's length.
        let header = if before.get(12) == Some(&8) { 20 } else { 40 };
        assert!(before.len() < build::ETH + header, "{what}: refused by the kernel: {before:02x?}");
        assert_eq!((here, &frame.bytes), (Action::Pass, &before), "{what}");
        return here;
    };
    assert_eq!(here, there, "{what}: {hook:?} of device {device}: {before:02x?}");
    assert_eq!(frame.bytes, theirs.bytes, "{what}: {hook:?} of device {device}, {here:?}: {before:02x?}");
    if let Err(why) = check(hook, &before, &theirs.bytes, there) {
        panic!("{what}: {why}");
    }
    here
}

fn compare(mut packet: impl FnMut(&mut Rng, bool) -> Vec<u8>, seed: u64, least: usize) {
    let mut world = node();
    // Few enough that replies to them can be guessed, and that they run out.
    world.ports = (10_000, 10_003);
    world.reserved.insert(10_002);
    world.known_as = Some(LOOPBACK);
    let mut loaded = Loaded::new(&world);
    let mut rng = Rng(seed);
    let mut changed = 0;
    for number in 0..PACKETS {
        let v6 = rng.one_in(2);
        let bytes = std::iter::repeat_with(|| packet(&mut rng, v6)).find(|bytes| bytes.len() <= MAX_LEN);
        let mut frame = Frame::new(bytes.expect("most are shorter"));
        for hook in [Hook::Ingress, Hook::Egress] {
            let device = rng.of(&[CLIENT, BACKEND, UPLINK, OVERLAY, 9]);
            let before = frame.bytes.clone();
            let what = format!("seed {seed}, packet {number}");
            if both(&world, &mut loaded, (device, hook), &mut frame, &what) != Action::Pass {
                break;
            }
            changed += usize::from(before != frame.bytes);
        }
        if rng.one_in(500) {
            let id = 1 + rng.below(4) as u32;
            let epoch = world.epochs.entry(id).or_default();
            *epoch += 1;
            loaded.set_epoch(id, *epoch);
        }
    }
    assert_eq!(timeless(&world), loaded.flows4());
    assert_eq!(timeless(&world), loaded.flows6());
    for reason in Reason::ALL {
        assert_eq!(world.counter(reason), loaded.counter(reason), "{reason:?}");
    }
    assert!(changed > least, "only {changed} rewrites: the corpus is too tame");
}

#[test]
fn good_packets() {
    compare(good, 1, PACKETS / 20);
}

#[test]
fn more_good_packets() {
    compare(good, 2, PACKETS / 20);
}

#[test]
fn bad_packets() {
    compare(bad, 3, PACKETS / 50);
}

#[test]
fn more_bad_packets() {
    compare(bad, 4, PACKETS / 50);
}

#[test]
fn arbitrary_bytes() {
    let mut world = node();
    world.ports = (10_000, 10_003);
    let mut loaded = Loaded::new(&world);
    let mut rng = Rng(5);
    for number in 0..PACKETS {
        let len = 15 + rng.below(200);
        let mut bytes = rng.bytes(len);
        if !rng.one_in(10) {
            bytes[12..14].copy_from_slice(&rng.of(&[[8, 0], [0x86, 0xdd]]));
            bytes[14] = rng.of(&[0x45, 0x46, 0x4f, 0x60]);
        }
        let device = rng.of(&[CLIENT, BACKEND, UPLINK, OVERLAY, 9]);
        for hook in [Hook::Ingress, Hook::Egress] {
            both(
                &world,
                &mut loaded,
                (device, hook),
                &mut Frame::new(bytes.clone()),
                &format!("packet {number}"),
            );
        }
    }
}
