//! Packets of all sorts.

use super::twins::Twins;
use crate::support::build::{self, ETH};
use crate::support::frame::Frame;
use crate::support::hostile::{Rng, bad, good, passing, spoil};
use crate::support::xdp_node::{NETWORKS, Network};
use lb_common::maps::XdpDevice;

/// Whatever comes, and in whatever order.
fn corpus(network: Network, seed: u64, mut packet: impl FnMut(&mut Rng, bool) -> Vec<u8>) -> usize {
    let mut twins = Twins::new(network);
    twins.both(|node| node.world.ports = (10_000, 10_003));
    let mut rng = Rng(seed);
    for number in 0..5_000 {
        let v6 = rng.one_in(2);
        let mut bytes = packet(&mut rng, v6);
        let partial = rng.one_in(10) && build::valid(&bytes) == Some(true) && has_offload(&bytes);
        if partial {
            bytes = build::to_partial(bytes);
        }
        if network != Network::Routed && bytes.len() > ETH && rng.one_in(2) {
            bytes = twins.arriving(bytes);
        }
        twins.packet(&Frame { bytes, partial });
        if rng.one_in(500) {
            let epoch = number as u32;
            twins.both(|node| {
                node.world.epochs.insert(2, epoch);
            });
        }
        if rng.one_in(50) {
            twins.both(|node| node.world.now.set(node.world.now.get() + 1));
            twins.both(|node| {
                let now = node.world.now.get();
                node.devices.values_mut().for_each(|device| device.until = now + XdpDevice::FRESH);
            });
        }
        if number % 100 == 0 {
            twins.same();
        }
    }
    twins.same();
    twins.sent
}

/// What senders leave to the device.
fn has_offload(bytes: &[u8]) -> bool {
    let proto = if bytes[12] == 8 { bytes[23] } else { bytes[20] };
    let fragment = bytes[12] == 8 && (bytes[20] & 0x3f != 0 || bytes[21] != 0);
    matches!(proto, 6 | 17)
        && bytes[14] != 0x46
        && !fragment
        && (bytes[12] != 8 || bytes[14] == 0x45)
        && !(proto == 17 && bytes[build::checksum_at(bytes)..][..2] == [0, 0])
}

#[test]
fn good_packets() {
    for network in NETWORKS {
        for seed in 0..3 {
            let packet = |rng: &mut Rng, v6| if rng.one_in(3) { good(rng, v6) } else { passing(rng, v6) };
            let sent = corpus(network, seed, packet);
            assert!(sent > 1_000, "only {sent} of 5,000 packets: the corpus is too tame");
        }
    }
}

#[test]
fn bad_packets() {
    for network in NETWORKS {
        for seed in 100..103 {
            let packet = |rng: &mut Rng, v6| {
                let frame = passing(rng, v6);
                if rng.one_in(3) { bad(rng, v6) } else { spoil(rng, frame) }
            };
            let sent = corpus(network, seed, packet);
            assert!(sent > 200, "only {sent} of 5,000 packets: the corpus is too tame");
        }
    }
}
