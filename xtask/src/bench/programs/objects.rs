//! The programs that are measured and those that help, loaded for the length of a run.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, PerCpuArray, ProgramArray};
use aya::programs::{ProgramType, SchedClassifier, TestRun, TestRunOptions};
use aya::sys::{BpfHelper, is_helper_supported};
use aya::{Ebpf, EbpfLoader};
use lb_common::datapath::Reason;
use lb_common::maps::{
    Device, Flow, FlowKey, Frontend, FrontendKey, Masquerading, Presence, Served, Slot, SlotGroup,
    SlotGroupKey, SlotKey, cidr, flags,
};

use super::super::packet::{self, End, Family, Transport, Who};
use super::Work;
use super::cases::{self, Case, Floor, On};
use crate::system::workspace;

/// The index that the kernel gives every namespace's loopback device, which test packets come by.
const LOOPBACK: u32 = 1;
/// `TC_ACT_UNSPEC`.
const PASS: u32 = u32::MAX;

/// Nanoseconds of this thread's CPU time that a repetition takes: being preempted does not count.
pub(super) fn time(program: &SchedClassifier, packet: &[u8], repeat: u32) -> Result<f64> {
    let start = cpu_time();
    program.test_run(TestRunOptions { data_in: Some(packet), repeat, ..Default::default() })?;
    Ok((cpu_time() - start) / f64::from(repeat))
}

fn cpu_time() -> f64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes a timespec. It cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) };
    now.tv_sec as f64 * 1e9 + now.tv_nsec as f64
}

/// An object that the last build left.
pub(in crate::bench) fn object(name: &str) -> Result<PathBuf> {
    let path = workspace().join("target/ebpf/bpfel-unknown-none/ebpf").join(name);
    ensure!(path.is_file(), "no kernel programs at {}: cargo build -p lb-agent", path.display());
    Ok(path)
}

fn load(loader: &mut EbpfLoader<'_>, name: &str, programs: &[&str]) -> Result<Ebpf> {
    let path = object(name)?;
    let mut ebpf = loader.load_file(&path).with_context(|| format!("loading {}", path.display()))?;
    for program in programs {
        let p: &mut SchedClassifier =
            ebpf.program_mut(program).with_context(|| format!("no program {program}"))?.try_into()?;
        p.load().with_context(|| format!("loading {program}"))?;
    }
    Ok(ebpf)
}

fn program<'a>(ebpf: &'a Ebpf, name: &str) -> Result<&'a SchedClassifier> {
    Ok(ebpf.program(name).with_context(|| format!("no program {name}"))?.try_into()?)
}

fn map<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Map> {
    ebpf.map_mut(name).with_context(|| format!("no map {name}"))
}

/// The benchmark's own programs.
pub(super) struct Own(Ebpf);

/// Value of the bare programs' map: an address, a port, and two zero bytes.
#[repr(C)]
#[derive(Clone, Copy)]
struct To<A>(A, u16, u16);

// SAFETY: as long as its parts together, all of which are plain bytes.
unsafe impl<A: aya::Pod> aya::Pod for To<A> {}

impl Own {
    pub(super) fn new() -> Result<Self> {
        let programs = ["empty", "fresh", "bare_rewrite4", "bare_rewrite6", "bare_miss4", "bare_miss6"];
        Ok(Self(load(&mut EbpfLoader::new(), "lb-ebpf-bench", &programs)?))
    }

    /// Gives the bare programs a flow there and back, and sees to it that they do what they say.
    pub(super) fn family<A: Family>(&mut self) -> Result<()> {
        let ends = [End(Who::Vip, 81), End(Who::Backend, 8080)];
        let mut flows: HashMap<&mut MapData, FlowKey<A>, To<A>> =
            map(&mut self.0, &format!("BARE_FLOW{}", A::SUFFIX))?.try_into()?;
        for [from, to] in [ends, [ends[1], ends[0]]] {
            let client = End(Who::Client, BARE_PORT);
            let key = FlowKey {
                src: client.addr(),
                dst: from.addr(),
                sport: client.port(),
                dport: from.port(),
                proto: Transport::Ack.number(),
                ..FlowKey::default()
            };
            flows.insert(key, To(to.addr(), to.port().wire(), 0), 0)?;
        }
        for floor in [Floor::Rewrite, Floor::Miss] {
            let (program, packet) = (self.program(&bare_name::<A>(floor))?, bare_packet::<A>(floor)?);
            let (verdict, once) = run(program, &packet, 1)?;
            let rewrites = once != packet && run(program, &packet, 2)?.1 == packet;
            let right = verdict == PASS && rewrites == (floor == Floor::Rewrite);
            ensure!(right, "{}: verdict {verdict:#x}, rewritten: {rewrites}", bare_name::<A>(floor));
        }
        Ok(())
    }

    /// Nanoseconds of a bare program.
    pub(super) fn bare<A: Family>(&self, floor: Floor, packets: u32) -> Result<f64> {
        time(self.program(&bare_name::<A>(floor))?, &bare_packet::<A>(floor)?, packets)
    }

    pub(super) fn program(&self, name: &str) -> Result<&SchedClassifier> {
        program(&self.0, name)
    }

    /// Nanoseconds of `fresh` together with the program after it.
    fn fresh_then(&mut self, next: &SchedClassifier, packet: &[u8], count: u32) -> Result<f64> {
        let mut slot: ProgramArray<&mut MapData> = map(&mut self.0, "NEXT")?.try_into()?;
        slot.set(0, next.fd()?, 0)?;
        time(self.program("fresh")?, packet, count)
    }
}

/// Client's port of the bare programs' flow.
const BARE_PORT: u16 = 40_000;

fn bare_name<A: Family>(floor: Floor) -> String {
    format!("{}{}", if floor == Floor::Rewrite { "bare_rewrite" } else { "bare_miss" }, A::SUFFIX)
}

fn bare_packet<A: Family>(floor: Floor) -> Result<Vec<u8>> {
    let to = if floor == Floor::Rewrite { End(Who::Vip, 81) } else { End(Who::Outside, 443) };
    packet::build::<A>(End(Who::Client, BARE_PORT), to, Transport::Ack, false)
}

/// The verdict on a packet, and what the last of so many repetitions left of it.
fn run(program: &SchedClassifier, packet: &[u8], repeat: u32) -> Result<(u32, Vec<u8>)> {
    let mut out = vec![0; packet.len()];
    let options =
        TestRunOptions { data_in: Some(packet), data_out: Some(&mut out), repeat, ..Default::default() };
    let verdict = program.test_run(options)?.return_value;
    Ok((verdict, out))
}

/// The programs that are measured. Nothing is pinned: they go with this value.
pub(super) struct Loaded(Ebpf);

impl Loaded {
    pub(super) fn new() -> Result<Self> {
        let coarse = BpfHelper::BPF_FUNC_ktime_get_coarse_ns;
        let coarse = is_helper_supported(ProgramType::SchedClassifier, coarse).unwrap_or(false);
        let bits = if coarse { flags::COARSE_CLOCK } else { 0 };
        let mut loader = EbpfLoader::new();
        loader.override_global("FLAGS", &bits, true).override_global("HASH_SEED", &0x9e37_79b9u32, true);
        Ok(Self(load(&mut loader, "lb-ebpf", &["ingress", "egress"])?))
    }

    fn hash<K: aya::Pod, V: aya::Pod>(&mut self, name: &str) -> Result<HashMap<&mut MapData, K, V>> {
        map(&mut self.0, name)?.try_into().with_context(|| format!("map {name}"))
    }

    /// Fills a family's tables.
    pub(super) fn family<A: Family>(&mut self, cases: &[Case<A>]) -> Result<()> {
        let name = |table: &str| format!("{table}{}", A::SUFFIX);
        let (pods, prefix) = A::pods();
        let mut cidrs: LpmTrie<&mut MapData, A, u32> = map(&mut self.0, &name("LB_CIDR"))?.try_into()?;
        cidrs.insert(&aya::maps::lpm_trie::Key::new(prefix, pods), cidr::CLUSTER, 0)?;
        let mut epochs: Array<&mut MapData, u32> = map(&mut self.0, "LB_EPOCH")?.try_into()?;
        epochs.set(cases::BACKEND_ID, cases::EPOCH, 0)?;
        let set = lb_common::maps::Set { id: 1, count: 10 };
        let vip = End(Who::Vip, 80);
        let frontend = Frontend { internal: set, external: set, service: 1, kind: 1, ..Default::default() };
        let key = FrontendKey::new(vip.addr::<A>(), vip.port(), 6);
        self.hash(&name("LB_FRONT"))?.insert(key, frontend, 0)?;
        let (served, bit) = (name("LB_SERVED"), Served::bit(key.addr));
        let mut served: Array<&mut MapData, u64> = map(&mut self.0, &served)?.try_into()?;
        served.set(bit.word, bit.mask, 0)?;
        let mut slots = self.hash(&name("LB_SLOT"))?;
        let mut groups = std::collections::BTreeMap::<_, SlotGroup<A>>::new();
        for index in 0..set.count {
            let backend = End(Who::Backend, 8000 + index as u16);
            let slot = Slot { addr: backend.addr(), port: backend.port(), flags: 1, ..Default::default() };
            let (group, place) = SlotKey { set: set.id, index }.group();
            groups.entry(group.group).or_default().slots[place] = slot;
        }
        for (group, value) in groups {
            slots.insert(SlotGroupKey { set: set.id, group }, value, 0)?;
        }
        self.mark(cases)?;
        self.reset(cases)
    }

    /// Empties the flow table but for the cases' own flows.
    pub(super) fn reset<A: Family>(&mut self, cases: &[Case<A>]) -> Result<()> {
        let mut flows = self.hash::<FlowKey<A>, Flow<A>>(&format!("LB_FLOW{}", A::SUFFIX))?;
        let keys = flows.keys().collect::<Result<Vec<_>, _>>()?;
        keys.iter().try_for_each(|key| flows.remove(key))?;
        for (key, flow) in cases.iter().flat_map(|case| &case.flows) {
            flows.insert(key, flow, 0)?;
        }
        Ok(())
    }

    /// As the sweep does that has met the cases' flows.
    fn mark<A: Family>(&mut self, cases: &[Case<A>]) -> Result<()> {
        let round = Presence::FIRST;
        let mut marks: Array<&mut MapData, u32> = map(&mut self.0, "LB_MARK")?.try_into()?;
        for (key, _) in cases.iter().flat_map(|case| &case.flows) {
            marks.set(key.mark(), round, 0)?;
        }
        let mut presence: Array<&mut MapData, Presence> = map(&mut self.0, "LB_PRESENCE")?.try_into()?;
        Ok(presence.set(0, Presence { complete: 1, round }, 0)?)
    }

    fn device(&mut self, on: On) -> Result<()> {
        let node = End(Who::Node, 0);
        let device = match on {
            On::Pod => Device { flags: Device::POD, ..Default::default() },
            On::Uplink => Device {
                flags: Device::MASQUERADE,
                masq4: node.addr(),
                masq6: node.addr(),
                ..Device::default()
            },
        };
        let bit = Masquerading::bit(LOOPBACK);
        let mask = if device.flags & Device::MASQUERADE == 0 { 0 } else { bit.mask };
        let mut masquerading: Array<&mut MapData, u64> = map(&mut self.0, "LB_MASQUERADE")?.try_into()?;
        masquerading.set(bit.word, mask, 0)?;
        Ok(self.hash("LB_DEVICE")?.insert(LOOPBACK, device, 0)?)
    }

    fn new_flows(&mut self) -> Result<u64> {
        let counters: PerCpuArray<&mut MapData, u64> = map(&mut self.0, "LB_COUNT")?.try_into()?;
        Ok(counters.get(&(Reason::NewFlow as u32), 0)?.iter().sum())
    }

    pub(super) fn measure<A: Family>(
        &mut self,
        own: &mut Own,
        (case, cases): (&Case<A>, &[Case<A>]),
        bare: f64,
        packets: u32,
    ) -> Result<f64> {
        self.device(case.on)?;
        let Work::Fresh { count, at_once } = case.work else {
            return time(program(&self.0, case.hook)?, &case.packet, packets);
        };
        let turns = count / at_once;
        let (mut both, mut alone) = (0.0, 0.0);
        for turn in 0..turns {
            if turn > 0 {
                self.reset(cases)?;
            }
            let before = self.new_flows()?;
            both += own.fresh_then(program(&self.0, case.hook)?, &case.packet, at_once)?;
            let entered = self.new_flows()? - before;
            ensure!(
                entered == u64::from(at_once),
                "{}: {entered} of {at_once} flows were entered",
                case.name
            );
            let Own(ebpf) = &own;
            let empty = program(ebpf, "empty")?.fd()?.try_clone()?;
            let mut slot: ProgramArray<&mut MapData> = map(&mut own.0, "NEXT")?.try_into()?;
            slot.set(0, &empty, 0)?;
            alone += time(own.program("fresh")?, &case.packet, at_once)?;
        }
        Ok((both - alone) / f64::from(turns) + bare)
    }

    /// Sees to it that a case is what its name says: what is measured is the rewrite, not an early way out.
    pub(super) fn check<A: Family>(&mut self, case: &Case<A>) -> Result<()> {
        self.device(case.on)?;
        let program = program(&self.0, case.hook)?;
        let (verdict, once) = run(program, &case.packet, 1)?;
        let rewritten = once != case.packet;
        let right = verdict == PASS
            && match case.work {
                Work::Pass => !rewritten,
                Work::Rewrite => rewritten && run(program, &case.packet, 2)?.1 == case.packet,
                Work::Fresh { .. } => rewritten,
            };
        if !right {
            bail!(
                "{} (IPv{}, {}): verdict {verdict:#x}, rewritten: {rewritten}; it is {:?} that was to be measured",
                case.name,
                A::SUFFIX,
                case.hook,
                case.work,
            );
        }
        Ok(())
    }
}
