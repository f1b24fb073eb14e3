//! What each program costs a packet, by `BPF_PROG_TEST_RUN`.
//!
//! The kernel does not restore the packet between repetitions, so a second one would meet what the first left. Two ways
//! round that, both of which leave the programs as they are: an established flow's rewrite is undone by a second flow,
//! whose rewrite is as much work ([`Work::Rewrite`]); a new flow's packet is restored, with another source port, by a
//! little program that runs first, whose own cost is measured and taken off ([`Work::Fresh`]).

mod cases;

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, PerCpuArray, ProgramArray};
use aya::programs::{ProgramType, SchedClassifier, TestRun, TestRunOptions};
use aya::sys::{BpfHelper, is_helper_supported};
use aya::{Ebpf, EbpfLoader};
use indicatif::ProgressBar;
use lb_common::addr::{Ip4, Ip6};
use lb_common::datapath::Reason;
use lb_common::maps::{Device, Flow, FlowKey, Frontend, FrontendKey, Slot, SlotKey, cidr, flags};
use nix::sched::{CloneFlags, unshare};
use serde::Serialize;

use super::packet::{End, Family, Who};
use super::stats::Spread;
use super::{Effort, pin};
use crate::system::workspace;
use cases::{Case, On};

/// What a packet costs.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Cost {
    pub(super) packet: String,
    pub(super) hook: &'static str,
    /// Nanoseconds.
    pub(super) v4: Option<Spread>,
    /// Nanoseconds.
    pub(super) v6: Option<Spread>,
}

/// What a program does with a packet, and how it is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// Leaves it alone.
    Pass,
    /// Rewrites it; the next repetition rewrites it back.
    Rewrite,
    /// Enters a new flow and rewrites it: that many in a turn, three entries each.
    Fresh(u32),
}

/// The index that the kernel gives every namespace's loopback device, which test packets come by.
const LOOPBACK: u32 = 1;
/// `TC_ACT_UNSPEC`.
const PASS: u32 = u32::MAX;

/// Measures every case in both families, in turn.
pub(super) fn measure(core: usize, effort: Effort) -> Result<Vec<Cost>> {
    let on_thread = || {
        pin(core)?;
        // A namespace without sockets: looking for one costs the same on every machine.
        unshare(CloneFlags::CLONE_NEWNET).context("creating a network namespace")?;
        take_turns(effort)
    };
    std::thread::scope(|s| s.spawn(on_thread).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

fn take_turns(effort: Effort) -> Result<Vec<Cost>> {
    let (mut lb, mut own) = (Loaded::new()?, Own::new()?);
    let (v4, v6) = (cases::all::<Ip4>()?, cases::all::<Ip6>()?);
    lb.family::<Ip4>(&v4)?;
    lb.family::<Ip6>(&v6)?;
    v4.iter().try_for_each(|case| lb.check(case))?;
    v6.iter().try_for_each(|case| lb.check(case))?;
    let mut empty = Vec::new();
    let mut times = vec![(Vec::new(), Vec::new()); v4.len()];
    let bar = ProgressBar::new(effort.program_rounds as u64);
    for _ in 0..effort.program_rounds {
        // Whatever the table's state, the new flows find no entries but those of the cases.
        lb.reset(&v4)?;
        lb.reset(&v6)?;
        let bare = time(own.program("empty")?, &v4[0].packet, effort.packets)?;
        empty.push(bare);
        for (i, (v4, v6)) in v4.iter().zip(&v6).enumerate() {
            times[i].0.push(lb.measure(&mut own, v4, bare, effort.packets)?);
            times[i].1.push(lb.measure(&mut own, v6, bare, effort.packets)?);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let of = |times: &[f64]| Some(Spread::of(times));
    let mut costs =
        vec![Cost { packet: "any: an empty program".into(), hook: "–", v4: of(&empty), v6: None }];
    costs.extend(v4.iter().zip(&times).map(|(case, (v4, v6))| Cost {
        packet: case.name.into(),
        hook: case.hook,
        v4: of(v4),
        v6: of(v6),
    }));
    Ok(costs)
}

/// Nanoseconds of this thread's CPU time that a repetition takes: being preempted does not count.
fn time(program: &SchedClassifier, packet: &[u8], repeat: u32) -> Result<f64> {
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
fn object(name: &str) -> Result<PathBuf> {
    let path = workspace().join("target/ebpf/bpfel-unknown-none/ebpf").join(name);
    ensure!(path.is_file(), "no kernel programs at {}: cargo build -p lb-agent", path.display());
    Ok(path)
}

fn load(loader: &mut EbpfLoader<'_>, name: &str, programs: [&str; 2]) -> Result<Ebpf> {
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
struct Own(Ebpf);

impl Own {
    fn new() -> Result<Self> {
        Ok(Self(load(&mut EbpfLoader::new(), "lb-ebpf-bench", ["empty", "fresh"])?))
    }

    fn program(&self, name: &str) -> Result<&SchedClassifier> {
        program(&self.0, name)
    }

    /// Nanoseconds of `fresh` together with the program after it.
    fn fresh_then(&mut self, next: &SchedClassifier, packet: &[u8], count: u32) -> Result<f64> {
        let mut slot: ProgramArray<&mut MapData> = map(&mut self.0, "NEXT")?.try_into()?;
        slot.set(0, next.fd()?, 0)?;
        time(self.program("fresh")?, packet, count)
    }
}

/// The programs that are measured. Nothing is pinned: they go with this value.
struct Loaded(Ebpf);

impl Loaded {
    fn new() -> Result<Self> {
        let coarse = BpfHelper::BPF_FUNC_ktime_get_coarse_ns;
        let coarse = is_helper_supported(ProgramType::SchedClassifier, coarse).unwrap_or(false);
        let bits = if coarse { flags::COARSE_CLOCK } else { 0 };
        let mut loader = EbpfLoader::new();
        loader.override_global("FLAGS", &bits, true).override_global("HASH_SEED", &0x9e37_79b9u32, true);
        Ok(Self(load(&mut loader, "lb-ebpf", ["ingress", "egress"])?))
    }

    fn hash<K: aya::Pod, V: aya::Pod>(&mut self, name: &str) -> Result<HashMap<&mut MapData, K, V>> {
        map(&mut self.0, name)?.try_into().with_context(|| format!("map {name}"))
    }

    /// Fills a family's tables.
    fn family<A: Family>(&mut self, cases: &[Case<A>]) -> Result<()> {
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
        let mut slots = self.hash(&name("LB_SLOT"))?;
        for index in 0..set.count {
            let backend = End(Who::Backend, 8000 + index as u16);
            let slot: Slot<A> =
                Slot { addr: backend.addr(), port: backend.port(), flags: 1, ..Default::default() };
            slots.insert(SlotKey { set: set.id, index }, slot, 0)?;
        }
        self.reset(cases)
    }

    /// Empties the flow table but for the cases' own flows.
    fn reset<A: Family>(&mut self, cases: &[Case<A>]) -> Result<()> {
        let mut flows = self.hash::<FlowKey<A>, Flow<A>>(&format!("LB_FLOW{}", A::SUFFIX))?;
        let keys = flows.keys().collect::<Result<Vec<_>, _>>()?;
        keys.iter().try_for_each(|key| flows.remove(key))?;
        for (key, flow) in cases.iter().flat_map(|case| &case.flows) {
            flows.insert(key, flow, 0)?;
        }
        Ok(())
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
        Ok(self.hash("LB_DEVICE")?.insert(LOOPBACK, device, 0)?)
    }

    fn new_flows(&mut self) -> Result<u64> {
        let counters: PerCpuArray<&mut MapData, u64> = map(&mut self.0, "LB_COUNT")?.try_into()?;
        Ok(counters.get(&(Reason::NewFlow as u32), 0)?.iter().sum())
    }

    fn measure<A: Family>(&mut self, own: &mut Own, case: &Case<A>, bare: f64, packets: u32) -> Result<f64> {
        self.device(case.on)?;
        let Work::Fresh(count) = case.work else {
            return time(program(&self.0, case.hook)?, &case.packet, packets);
        };
        let before = self.new_flows()?;
        let both = own.fresh_then(program(&self.0, case.hook)?, &case.packet, count)?;
        let entered = self.new_flows()? - before;
        ensure!(entered == u64::from(count), "{}: {entered} of {count} flows were entered", case.name);
        let Own(ebpf) = &own;
        let empty = program(ebpf, "empty")?.fd()?.try_clone()?;
        let mut slot: ProgramArray<&mut MapData> = map(&mut own.0, "NEXT")?.try_into()?;
        slot.set(0, &empty, 0)?;
        Ok(both - time(own.program("fresh")?, &case.packet, count)? + bare)
    }

    /// Sees to it that a case is what its name says: what is measured is the rewrite, not an early way out.
    fn check<A: Family>(&mut self, case: &Case<A>) -> Result<()> {
        self.device(case.on)?;
        let program = program(&self.0, case.hook)?;
        let run = |repeat| -> Result<(u32, Vec<u8>)> {
            let mut out = vec![0; case.packet.len()];
            let (data_in, data_out) = (Some(&case.packet[..]), Some(&mut out[..]));
            let result =
                program.test_run(TestRunOptions { data_in, data_out, repeat, ..Default::default() })?;
            Ok((result.return_value, out))
        };
        let (verdict, once) = run(1)?;
        let rewritten = once != case.packet;
        let right = verdict == PASS
            && match case.work {
                Work::Pass => !rewritten,
                Work::Rewrite => rewritten && run(2)?.1 == case.packet,
                Work::Fresh(_) => rewritten,
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
