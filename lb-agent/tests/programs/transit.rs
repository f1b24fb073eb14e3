//! XDP in the kernel does what it does on the host, where `lb-common/tests/datapath/transit` holds it against the two
//! hooks: with the kernel's own routes, neighbours and devices around it.

use crate::devices::Devices;
use crate::support::build::{self, ACK, ETH, FIN, L4, SYN};
use crate::support::cluster::{BOTH, Net, OVERLAY, UPLINK, sock};
use crate::support::frame::Frame;
use crate::support::hostile::{Rng, bad, passing, spoil};
use crate::support::world::{Fam, World};
use crate::support::xdp_node::{NETWORKS, Network, VTEP, XdpNode};
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray};
use aya::programs::{Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader, Pod, TestRun as _, TestRunOptions};
use lb_common::addr::{Ip4, Ip6};
use lb_common::datapath::{Reason, Sent};
use lb_common::maps::{Flow, FlowKey, Side, VtepKey, XdpDevice};
use nix::time::{ClockId, clock_gettime};
use std::collections::HashMap as StdMap;
use std::net::SocketAddr;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-ebpf.o"));

const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;
/// Larger ones do not fit into the kernel's test page.
const MAX_LEN: usize = 3_000;

/// The program on a device, and beside it the host's.
struct Beside {
    node: XdpNode,
    ebpf: Ebpf,
    devices: Devices,
    epochs: Array<MapData, u32>,
    counters: PerCpuArray<MapData, u64>,
    v4: Table<Ip4>,
    v6: Table<Ip6>,
}

/// A flow table in the kernel, and what is in it.
struct Table<A> {
    map: HashMap<MapData, FlowKey<A>, Flow<A>>,
    known: StdMap<FlowKey<A>, Flow<A>>,
}

impl<A: Fam + Pod> Table<A> {
    fn new(map: Map) -> Self {
        Self { map: typed(map), known: StdMap::new() }
    }

    /// Makes it what the host has.
    fn follow(&mut self, world: &World) {
        let wanted = timeless(A::of(world).flows());
        for key in self.known.keys().filter(|key| !wanted.contains_key(key)) {
            self.map.remove(key).expect("an entry");
        }
        for (key, flow) in &wanted {
            if self.known.get(key) != Some(flow) {
                self.map.insert(key, flow, 0).expect("room for a flow");
            }
        }
        self.known = wanted;
    }

    /// What has become of it by the program.
    fn read(&mut self) -> StdMap<FlowKey<A>, Flow<A>> {
        timeless(self.map.iter().map(|entry| entry.expect("read the flows")).collect())
    }
}

fn timeless<A: Fam>(flows: StdMap<FlowKey<A>, Flow<A>>) -> StdMap<FlowKey<A>, Flow<A>> {
    flows.into_iter().map(|(key, flow)| (key, Flow { last_seen: 0, ..flow })).collect()
}

fn typed<T: TryFrom<Map, Error: std::fmt::Debug>>(map: Map) -> T {
    map.try_into().expect("a map of this type")
}

impl Beside {
    fn new(network: Network) -> Self {
        let devices = Devices::new(network);
        let node = XdpNode::new(network);
        let mut ebpf =
            EbpfLoader::new().override_global("FLAGS", &0u32, true).load(OBJECT).expect("load the maps");
        let program: &mut Xdp = ebpf.program_mut("transit").expect("the program").try_into().expect("XDP");
        program.load().unwrap_or_else(|e| panic!("load transit: {e:#?}"));
        // A veth is ready for test packets only if it runs a program.
        program.attach_to_if_index(devices.uplink, XdpMode::Driver).expect("attach to a veth");
        let mut take = |name: &str| ebpf.take_map(name).unwrap_or_else(|| panic!("no map {name}"));
        let mut table: Array<MapData, XdpDevice> = typed(take("LB_XDP"));
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the time").tv_sec() as u32;
        let mut vteps: HashMap<MapData, VtepKey, Ip6> = typed(take("LB_VTEP"));
        let real = |index| match index {
            UPLINK => devices.uplink,
            OVERLAY => devices.overlay,
            other => other,
        };
        for entry in node.devices.values() {
            let entry = XdpDevice {
                index: real(entry.index),
                overlay4: real(entry.overlay4),
                overlay6: real(entry.overlay6),
                link: real(entry.link),
                until: if entry.until == 0 { 0 } else { now + XdpDevice::FRESH },
                ..*entry
            };
            table.set(XdpDevice::place(entry.index), entry, 0).expect("write a device");
        }
        for (key, end) in &node.vteps {
            vteps.insert(VtepKey { device: real(key.device), ..*key }, end, 0).expect("write an end");
        }
        let (epochs, counters) = (typed(take("LB_EPOCH")), typed(take("LB_COUNT")));
        let (v4, v6) = (Table::new(take("LB_FLOW4")), Table::new(take("LB_FLOW6")));
        Self { node, ebpf, devices, epochs, counters, v4, v6 }
    }

    /// The same packet for both. Whether it was sent on, and as what.
    fn packet(&mut self, frame: &Frame) -> Option<Vec<u8>> {
        self.v4.follow(&self.node.world);
        self.v6.follow(&self.node.world);
        let (mut here, what) = (frame.clone(), &frame.bytes);
        let sent = self.node.xdp(&mut here);
        let (verdict, there) = self.run(&frame.bytes);
        match sent {
            Sent::No => assert_eq!((verdict, &there), (XDP_PASS, what)),
            Sent::By(UPLINK) => {
                assert_eq!(verdict, XDP_TX, "{what:02x?}");
                assert_eq!(self.known_part(there), self.known_part(here.bytes.clone()), "{what:02x?}");
            }
            Sent::By(_) | Sent::Lost(_) => panic!("{sent:?}: {what:02x?}"),
        }
        assert_eq!(self.v4.read(), timeless(Ip4::of(&self.node.world).flows()), "{what:02x?}");
        assert_eq!(self.v6.read(), timeless(Ip6::of(&self.node.world).flows()), "{what:02x?}");
        if sent == Sent::No {
            self.node.hooks(frame);
            return None;
        }
        Some(here.bytes)
    }

    /// An outer IPv4 header's identification is any number; its checksum follows.
    fn known_part(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        let Network::Vxlan { v6: false, .. } = self.node.network else { return bytes };
        if bytes.get(12) == Some(&8) && bytes[23] == 17 && bytes[36..38] == [0x21, 0x18] {
            assert_eq!(checksum(&bytes[ETH..ETH + 20]), 0xffff, "the outer header's checksum");
            bytes[18..20].fill(0);
            bytes[24..26].fill(0);
        }
        bytes
    }

    fn run(&mut self, frame: &[u8]) -> (u32, Vec<u8>) {
        let mut out = vec![0; frame.len() + 256];
        let context = [0, frame.len() as u32, 0, self.devices.uplink, 0, 0];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(bytemuck::bytes_of(&context)),
            ..TestRunOptions::default()
        };
        let program: &Xdp = self.ebpf.program("transit").expect("the program").try_into().expect("XDP");
        let result = program.test_run(options).expect("BPF_PROG_TEST_RUN");
        out.truncate(result.data_size_out as usize);
        (result.return_value, out)
    }

    fn raise_epoch(&mut self, id: u32) {
        let epoch = self.node.world.epochs.entry(id).or_default();
        *epoch += 1;
        self.epochs.set(id, *epoch, 0).expect("raise an epoch");
    }

    fn arriving(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        if self.node.network == Network::Routed {
            return bytes;
        }
        bytes[..6].copy_from_slice(&VTEP);
        self.node.wrap(&bytes, Some(40_000))
    }

    fn masqueraded_to(&self, v6: bool) -> SocketAddr {
        fn find<A: Fam>(world: &World) -> SocketAddr {
            let flows = A::of(world).flows();
            let back = flows.values().find(|flow| flow.side == Side::Back as u8).expect("a masqueraded flow");
            sock(back.masq.into(), back.masq_port.get())
        }
        if v6 { find::<Ip6>(&self.node.world) } else { find::<Ip4>(&self.node.world) }
    }
}

/// The one's-complement sum, as RFC 1071 has it.
fn checksum(bytes: &[u8]) -> u32 {
    let sum: u32 = bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
    (sum & 0xffff) + (sum >> 16)
}

#[test]
fn whole_connections() {
    for network in NETWORKS {
        for v6 in BOTH {
            for l4 in [L4::Tcp(SYN), L4::Udp] {
                let mut both = Beside::new(network);
                let n = Net::of(v6);
                let (client, vip, backend) = (sock(n.outside, 5000), sock(n.node, 30081), sock(n.far, 8080));
                let request = |l4, data: &[u8]| Frame::new(build::packet(client, vip, l4, data));
                assert!(both.packet(&request(l4, b"")).is_none(), "nothing begins in XDP");
                let masq = both.masqueraded_to(v6);
                let mut sent = |what: Vec<u8>| {
                    assert!(both.packet(&Frame::new(what)).is_some(), "{network:?} {v6} {l4:?}");
                };
                let later = if l4 == L4::Udp { L4::Udp } else { L4::Tcp(ACK) };
                for data in [&b"x"[..], &[7; 1300]] {
                    sent(request(later, data).bytes);
                }
                let fin = if l4 == L4::Udp { L4::Udp } else { L4::Tcp(FIN | ACK) };
                let replies: Vec<_> = [(l4.answer(), &b""[..]), (later, &[8; 1300]), (fin, b"bye")]
                    .into_iter()
                    .map(|(l4, data)| both.arriving(build::packet(backend, masq, l4, data)))
                    .collect();
                for reply in replies {
                    assert!(both.packet(&Frame::new(reply)).is_some(), "{network:?} {v6} {l4:?}");
                }
                let counter =
                    |reason| both.counters.get(&(reason as u32), 0).expect("counters").iter().sum::<u64>();
                assert_eq!((counter(Reason::XdpForwarded), counter(Reason::XdpLeft)), (5, 0));
                // Too large for the way, by a little.
                let large = request(later, &[1; 1480]);
                assert!(both.packet(&large).is_none());
            }
        }
    }
}

fn corpus(network: Network, seed: u64, least: usize, mut packet: impl FnMut(&mut Rng, bool) -> Vec<u8>) {
    let mut both = Beside::new(network);
    both.node.world.ports = (10_000, 10_003);
    let mut rng = Rng(seed);
    let mut sent = 0;
    for _ in 0..800 {
        let v6 = rng.one_in(2);
        let mut bytes = packet(&mut rng, v6);
        if network != Network::Routed && bytes.len() > ETH && rng.one_in(2) {
            bytes = both.arriving(bytes);
        }
        if (ETH + 1..MAX_LEN).contains(&bytes.len()) {
            sent += usize::from(both.packet(&Frame::new(bytes)).is_some());
        }
        if rng.one_in(500) {
            both.raise_epoch(2);
        }
    }
    assert!(sent > least, "only {sent} packets were sent on: the corpus is too tame");
}

#[test]
fn good_packets() {
    for (seed, network) in (0..).zip(NETWORKS) {
        corpus(network, seed, 250, passing);
    }
}

#[test]
fn bad_packets() {
    for (seed, network) in (10..).zip(NETWORKS) {
        corpus(network, seed, 40, |rng, v6| {
            let frame = passing(rng, v6);
            if rng.one_in(3) { bad(rng, v6) } else { spoil(rng, frame) }
        });
    }
}
