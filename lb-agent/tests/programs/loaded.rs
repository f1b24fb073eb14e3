//! The programs in the kernel, beside the host's tables.

use crate::support::frame::Frame;
use crate::support::paths::Runner;
use crate::support::world::{Action, Fam, Hook, World};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray};
use aya::programs::{ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfLoader, Pod, TestRun as _, TestRunOptions};
use lb_agent::kernel::programs::{Features, held_places};
use lb_common::addr::{Ip4, Ip6};
use lb_common::datapath::Reason;
use lb_common::maps::{
    Device, Flow, FlowKey, Frontend, FrontendKey, Masquerading, Presence, Range, Served, SlotGroup,
    SlotGroupKey, SourceKey, flags,
};
use nix::sched::{CloneFlags, unshare};
use std::collections::HashMap as StdMap;

/// What the agent embeds.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-ebpf.o"));
/// The loopback device of the test's own namespace: every test packet is on it.
pub(crate) const LOOPBACK: u32 = 1;

pub(crate) struct Loaded {
    ebpf: Ebpf,
    /// What runs at ingress and egress.
    programs: [&'static str; 2],
    devices: StdMap<u32, Device>,
    device: HashMap<MapData, u32, Device>,
    masquerading: Array<MapData, u64>,
    epochs: Array<MapData, u32>,
    counters: PerCpuArray<MapData, u64>,
    presence: Array<MapData, Presence>,
    marks: Array<MapData, u32>,
    v4: HashMap<MapData, FlowKey<Ip4>, Flow<Ip4>>,
    v6: HashMap<MapData, FlowKey<Ip6>, Flow<Ip6>>,
}

impl Loaded {
    /// Loads the programs and fills the maps with what is in `world`.
    pub(crate) fn new(world: &World) -> Self {
        assert!(
            !OBJECT.is_empty(),
            "lb-agent was built without its programs (LB_EBPF_SKIP): build it again without"
        );
        unshare(CloneFlags::CLONE_NEWNET)
            .expect("the program tests make network namespaces: run them as root");
        let features = Features::probe().expect("the program tests load BPF programs: run them as root");
        let (bits, first, last) =
            (features.flags & flags::COARSE_CLOCK, u32::from(world.ports.0), u32::from(world.ports.1));
        let mut loader = EbpfLoader::new();
        loader
            .override_global("FLAGS", &bits, true)
            .override_global("HASH_SEED", &world.seed, true)
            .override_global("MASQ_FIRST", &first, true)
            .override_global("MASQ_LAST", &last, true);
        for flows in ["LB_FLOW4", "LB_FLOW6"] {
            loader.map_max_entries(flows, u32::try_from(world.capacity).unwrap_or(1 << 16));
        }
        loader.map_max_entries("LB_HELD", held_places().expect("count the processors"));
        let mut ebpf = loader.load(OBJECT).expect("load the maps");
        let programs =
            if world.redirects { ["ingress_redirect", "egress_redirect"] } else { ["ingress", "egress"] };
        for name in programs {
            program(&mut ebpf, name).load().unwrap_or_else(|e| panic!("load {name}: {e:#?}"));
        }
        fill::<Ip4>(&mut ebpf, world, '4');
        fill::<Ip6>(&mut ebpf, world, '6');
        let mut ports: Array<MapData, u64> = typed(take(&mut ebpf, "LB_PORTS"));
        for port in &world.reserved {
            let word = u32::from(port >> 6);
            let bits = ports.get(&word, 0).expect("read the ports");
            ports.set(word, bits | 1 << (port & 63), 0).expect("reserve a port");
        }
        // As after a sweep of an empty table: what the programs enter themselves is found, and nothing else.
        let mut presence: Array<MapData, Presence> = typed(take(&mut ebpf, "LB_PRESENCE"));
        presence.set(0, Presence { complete: 1, round: Presence::FIRST }, 0).expect("have marks count");
        let mut loaded = Self {
            presence,
            marks: typed(take(&mut ebpf, "LB_MARK")),
            devices: world.devices.clone(),
            programs,
            device: typed(take(&mut ebpf, "LB_DEVICE")),
            masquerading: typed(take(&mut ebpf, "LB_MASQUERADE")),
            epochs: typed(take(&mut ebpf, "LB_EPOCH")),
            counters: typed(take(&mut ebpf, "LB_COUNT")),
            v4: typed(take(&mut ebpf, "LB_FLOW4")),
            v6: typed(take(&mut ebpf, "LB_FLOW6")),
            ebpf,
        };
        for (id, epoch) in &world.epochs {
            loaded.set_epoch(*id, *epoch);
        }
        loaded
    }

    pub(crate) fn set_epoch(&mut self, id: u32, epoch: u32) {
        self.epochs.set(id, epoch, 0).expect("raise an epoch");
    }

    pub(crate) fn counter(&self, reason: Reason) -> u64 {
        self.counters.get(&(reason as u32), 0).expect("read the counters").iter().sum()
    }

    /// All flow entries of one family. The clock is the only thing that the host has not got.
    pub(crate) fn flows4(&self) -> StdMap<FlowKey<Ip4>, Flow<Ip4>> {
        flows(&self.v4)
    }

    /// As [`Self::flows4`].
    pub(crate) fn flows6(&self) -> StdMap<FlowKey<Ip6>, Flow<Ip6>> {
        flows(&self.v6)
    }

    pub(crate) fn lose4(&mut self, key: &FlowKey<Ip4>) {
        self.v4.remove(key).expect("an entry to lose");
    }

    pub(crate) fn lose6(&mut self, key: &FlowKey<Ip6>) {
        self.v6.remove(key).expect("an entry to lose");
    }

    /// Begins another round of marks, as a sweep does that has met those entries.
    pub(crate) fn renew(&mut self, met: &[FlowKey<Ip4>]) {
        let round = self.presence.get(&0, 0).expect("read the round").round;
        for key in met {
            self.marks.set(key.mark(), round, 0).expect("mark an entry");
        }
        self.presence.set(0, Presence { complete: 1, round: round + 1 }, 0).expect("begin a round");
    }

    /// Whether the marks count at all.
    pub(crate) fn trust(&mut self, complete: bool) {
        let round = self.presence.get(&0, 0).expect("read the round").round;
        self.presence
            .set(0, Presence { complete: complete.into(), round }, 0)
            .expect("have marks count or not");
    }

    /// As if nothing had been sent yet: loading anew takes a second.
    pub(crate) fn forget(&mut self) {
        for key in self.v4.keys().collect::<Result<Vec<_>, _>>().expect("read the flows") {
            self.v4.remove(&key).expect("an entry");
        }
        for key in self.v6.keys().collect::<Result<Vec<_>, _>>().expect("read the flows") {
            self.v6.remove(&key).expect("an entry");
        }
    }

    /// Runs a program. `None` where the kernel will not take such a frame for a test: it has to be too short for
    /// anything but to pass.
    pub(crate) fn try_run(&mut self, device: u32, hook: Hook, frame: &mut Frame) -> Option<Action> {
        let masquerades = self.devices.get(&device).is_some_and(|d| d.flags & Device::MASQUERADE != 0);
        let bit = Masquerading::bit(LOOPBACK);
        let mask = if masquerades { bit.mask } else { 0 };
        self.masquerading.set(bit.word, mask, 0).expect("say whether the device masquerades");
        match self.devices.get(&device) {
            Some(value) => self.device.insert(LOOPBACK, value, 0).expect("write the device"),
            None => {
                let _ = self.device.remove(&LOOPBACK);
            }
        }
        let name = if hook == Hook::Ingress { self.programs[0] } else { self.programs[1] };
        let mut out = vec![0; frame.bytes.len() + 256];
        let options = TestRunOptions {
            data_in: Some(&frame.bytes),
            data_out: Some(&mut out),
            ..TestRunOptions::default()
        };
        let result = match program(&mut self.ebpf, name).test_run(options) {
            Ok(result) => result,
            Err(ProgramError::SyscallError(e)) if e.io_error.raw_os_error() == Some(libc::EINVAL) => {
                return None;
            }
            Err(e) => panic!("BPF_PROG_TEST_RUN of {name}: {e:?}"),
        };
        out.truncate(result.data_size_out as usize);
        frame.bytes = out;
        Some(match result.return_value as i32 {
            -1 => Action::Pass,
            2 => Action::Drop,
            7 => Action::Reply,
            other => panic!("{name} returned {other}"),
        })
    }
}

impl Runner for Loaded {
    fn run(&mut self, device: u32, hook: Hook, frame: &mut Frame) -> Action {
        self.try_run(device, hook, frame).expect("the kernel takes the frame")
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> &'a mut SchedClassifier {
    ebpf.program_mut(name).expect("the object has it").try_into().expect("a tc program")
}

fn take(ebpf: &mut Ebpf, name: &str) -> Map {
    ebpf.take_map(name).unwrap_or_else(|| panic!("the object has no map {name}"))
}

fn typed<T: TryFrom<Map, Error: std::fmt::Debug>>(map: Map) -> T {
    map.try_into().expect("a map of this type")
}

fn fill<A: Fam + Pod>(ebpf: &mut Ebpf, world: &World, suffix: char) {
    let family = A::of(world);
    let mut frontends: HashMap<MapData, FrontendKey<A>, Frontend> =
        typed(take(ebpf, &format!("LB_FRONT{suffix}")));
    let mut served: Array<MapData, u64> = typed(take(ebpf, &format!("LB_SERVED{suffix}")));
    for (key, value) in &family.frontends {
        let bit = Served::bit(key.addr);
        let word = served.get(&bit.word, 0).expect("read which addresses are served");
        served.set(bit.word, word | bit.mask, 0).expect("write which addresses are served");
        frontends.insert(key, value, 0).expect("write a frontend");
    }
    let mut slots: HashMap<MapData, SlotGroupKey, SlotGroup<A>> =
        typed(take(ebpf, &format!("LB_SLOT{suffix}")));
    for (key, value) in &family.slots {
        slots.insert(key, value, 0).expect("write slots");
    }
    let mut sources: LpmTrie<MapData, SourceKey<A>, u32> = typed(take(ebpf, &format!("LB_SOURCE{suffix}")));
    for (service, addr, len) in &family.sources {
        let key = SourceKey { service: *service, addr: *addr };
        sources.insert(&Key::new(32 + u32::from(*len), key), 1, 0).expect("write a source range");
    }
    let mut range: Array<MapData, Range<A>> = typed(take(ebpf, &format!("LB_RANGE{suffix}")));
    range.set(0, family.cluster_ips, 0).expect("write the range of the ClusterIPs");
    let mut cidrs: LpmTrie<MapData, A, u32> = typed(take(ebpf, &format!("LB_CIDR{suffix}")));
    for (net, len, bits) in &family.cidrs {
        cidrs.insert(&Key::new(u32::from(*len), *net), bits, 0).expect("write an address range");
    }
}

fn flows<A: Fam + Pod>(map: &HashMap<MapData, FlowKey<A>, Flow<A>>) -> StdMap<FlowKey<A>, Flow<A>> {
    map.iter()
        .map(|entry| entry.expect("read the flows"))
        .map(|(key, flow)| (key, Flow { last_seen: 0, ..flow }))
        .collect()
}
