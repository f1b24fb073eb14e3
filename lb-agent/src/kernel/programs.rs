//! Loads the programs: what the kernel can do is found out first, and compiled in by constants.

use super::pins::{Pins, Place};
use super::upgrade;
use super::xdp;
use crate::cli::{Redirect, RunArgs, SocketLb, XdpArg};
use anyhow::{Context as _, Result, anyhow, bail};
use aya::maps::MapInfo;
use aya::programs::{Program, ProgramError, ProgramType, SchedClassifier, Xdp};
use aya::sys::{BpfHelper, is_helper_supported, is_program_supported};
use aya::util::{KernelVersion, nr_cpus};
use aya::{Ebpf, EbpfLoader};
use aya_obj::programs::XdpAttachType;
use lb_attach::attach::{self, Attacher, Hook};
use lb_common::datapath::Reason;
use lb_common::maps::{Held, Overlay, flags};
use std::fs;
use std::os::fd::AsRawFd as _;
use std::panic::resume_unwind;
use std::thread;
use tracing::warn;

/// The compiled programs.
pub(crate) static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-ebpf.o"));

/// Every map of the object, all pinned.
pub(crate) const MAPS: [&str; 34] = [
    "LB_FLOW4",
    "LB_FLOW6",
    "LB_FRONT4",
    "LB_FRONT6",
    "LB_SERVED4",
    "LB_SERVED6",
    "LB_SLOT4",
    "LB_SLOT6",
    "LB_CIDR4",
    "LB_CIDR6",
    "LB_SOURCE4",
    "LB_SOURCE6",
    "LB_RANGE4",
    "LB_RANGE6",
    "LB_FRAG4",
    "LB_FRAG6",
    "LB_AFFINITY",
    "LB_HELD",
    "LB_TAKEN",
    "LB_EPOCH",
    "LB_DEVICE",
    "LB_MASQUERADE",
    "LB_OVERLAY",
    "LB_MARK",
    "LB_PRESENCE",
    "LB_XDP",
    "LB_VTEP",
    "LB_PORTS",
    "LB_COUNT",
    "LB_NAME",
    "LB_SOCKET",
    "LB_NETNS",
    "LB_STANCE",
    "LB_LAYOUT",
];
const FLOW_TABLES: [&str; 2] = ["LB_FLOW4", "LB_FLOW6"];
/// Entries of a flow: see `lb_common::maps::Side`.
const ENTRIES_PER_FLOW: u32 = 4;

/// What this kernel can do, beyond what we insist on.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// tcx links (6.6); otherwise clsact filters.
    pub tcx: bool,
    /// Bits of [`flags`].
    pub flags: u32,
}

impl Features {
    /// Asks the kernel.
    ///
    /// # Errors
    /// Without the right to use BPF, or without BPF.
    pub fn probe() -> Result<Self> {
        let has = |program, helper| is_helper_supported(program, helper).unwrap_or(false);
        // Any kernel that we run on has this one: it tells a missing right from a missing feature.
        if let Err(error) = is_program_supported(ProgramType::SchedClassifier) {
            bail!(
                "the kernel does not let us load BPF programs ({error}): run as root or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON; in a container that has these, its seccomp profile forbids bpf()"
            );
        }
        let mut bits = 0;
        if has(ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_ktime_get_coarse_ns) {
            bits |= flags::COARSE_CLOCK;
        }
        if has(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval) {
            bits |= flags::SET_RETVAL;
        }
        Ok(Self { tcx: attach::has_tcx(), flags: bits })
    }

    /// One line for the log.
    pub fn describe(&self) -> String {
        let mut lacks = Vec::new();
        if !self.tcx {
            lacks.push("no tcx: tc programs are attached by clsact");
        }
        if self.flags & flags::COARSE_CLOCK == 0 {
            lacks.push("no coarse clock: the exact one is used");
        }
        if self.flags & flags::SET_RETVAL == 0 {
            lacks.push(
                "no bpf_set_retval: a host process's connect to a Service without endpoints fails with EPERM",
            );
        }
        if lacks.is_empty() { "the kernel has everything".into() } else { lacks.join("; ") }
    }
}

/// Loads the object with this agent's constants, for a place; maps are taken from their pins or made and pinned.
///
/// # Errors
/// If the kernel refuses.
pub fn load(pins: &Pins, args: &RunArgs, features: Features, place: Place) -> Result<Ebpf> {
    if OBJECT.is_empty() {
        bail!("this binary was built without the kernel programs (LB_EBPF_SKIP): build it again without");
    }
    let mut bits = features.flags;
    if args.socket_lb == SocketLb::All {
        bits |= flags::SOCKETS_ALL;
    }
    if args.log_packets {
        bits |= flags::LOG;
    }
    if place == Place::Front {
        bits |= flags::FRONT;
    }
    let seed = hash_seed()?;
    let (first, last) = (u32::from(args.masquerade_ports.low), u32::from(args.masquerade_ports.high));
    let cookie = netns_cookie();
    let mut loader = EbpfLoader::new();
    loader
        .override_global("FLAGS", &bits, true)
        .override_global("HASH_SEED", &seed, true)
        .override_global("MASQ_FIRST", &first, true)
        .override_global("MASQ_LAST", &last, true)
        .override_global("NETNS_COOKIE", &cookie, true);
    for map in FLOW_TABLES {
        loader.map_max_entries(map, entries(args.flow_table_max));
    }
    loader.map_max_entries("LB_HELD", held_places()?);
    for map in MAPS {
        loader.map_pin_path(map, pins.map(map));
    }
    renew(pins)?;
    let mut ebpf = loader.load(OBJECT).context("load the BPF maps and programs")?;
    upgrade::describe(pins)?;
    if let Some(warning) = kept_size(pins, args.flow_table_max)? {
        warn!("{warning}");
    }
    if args.redirect != Redirect::Off {
        match load_redirecting(&mut ebpf) {
            Ok(()) => return Ok(ebpf),
            Err(error) => {
                // The verifier's log has thousands of lines.
                let error = format!("{error:#}");
                let error = error.lines().next().unwrap_or_default();
                warn!("--redirect: going on without, this kernel does not take the programs: {error}");
            }
        }
    }
    load_tc(&mut ebpf, Hook::BOTH.map(Hook::program))?;
    Ok(ebpf)
}

/// The programs that redirect, in place of those that are named as their hooks are.
const REDIRECTING: [&str; 2] = ["ingress_redirect", "egress_redirect"];

/// Linux 6.12. Before, the verifier rounds each frame of the stack up to 32 bytes, not 16, and they do not fit; but it says so
/// only after it has looked through all of them, several times over to tell why, while nothing is served.
const REDIRECTING_SINCE: KernelVersion = KernelVersion::new(6, 12, 0);

fn load_redirecting(ebpf: &mut Ebpf) -> Result<()> {
    if KernelVersion::current().map_err(|error| anyhow!("{error}"))? < REDIRECTING_SINCE {
        bail!("they need the stack of Linux 6.12 or later");
    }
    load_tc(ebpf, REDIRECTING)
}

/// The programs that were loaded.
fn tc_programs(ebpf: &Ebpf) -> [&'static str; 2] {
    let is_loaded = |name: &&str| {
        let program = ebpf.program(name).and_then(|program| <&SchedClassifier>::try_from(program).ok());
        program.is_some_and(|program| program.fd().is_ok())
    };
    if REDIRECTING.iter().all(is_loaded) { REDIRECTING } else { Hook::BOTH.map(Hook::program) }
}

/// Removes what another build of this version has laid out otherwise, though nothing is lost with it: who counts more, or less,
/// begins counting again, and what carries overlays' packets is told anew.
fn renew(pins: &Pins) -> Result<()> {
    let counts = |info: &MapInfo| info.max_entries() as usize == Reason::ALL.len();
    let overlay = |info: &MapInfo| info.value_size() as usize == size_of::<Overlay>();
    for (map, is_ours) in [("LB_COUNT", counts as fn(&MapInfo) -> bool), ("LB_OVERLAY", overlay)] {
        let pin = pins.map(map);
        if MapInfo::from_pin(&pin).is_ok_and(|info| !is_ours(&info)) {
            fs::remove_file(&pin).with_context(|| format!("remove {}", pin.display()))?;
        }
    }
    Ok(())
}

/// Loads the tc programs side by side: to verify them is nearly all that the agent does until it is ready, and the kernel
/// can do that on as many processors as there are programs.
fn load_tc(ebpf: &mut Ebpf, names: [&str; 2]) -> Result<()> {
    for name in names {
        program(ebpf, name)?;
    }
    thread::scope(|scope| {
        let programs = ebpf.programs_mut().filter(|(name, _)| names.contains(name));
        let loads: Vec<_> = programs
            .map(|(name, program)| {
                let name = name.to_owned();
                scope.spawn(move || -> Result<()> {
                    let program: &mut SchedClassifier = program.try_into()?;
                    program.load().with_context(|| format!("load the tc program {name}"))
                })
            })
            .collect();
        loads.into_iter().try_for_each(|load| load.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Program> {
    ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))
}

/// Loads and pins the XDP program; or takes it off, if it is not wanted or the kernel refuses it: everything is served
/// without it, too.
pub fn pin_xdp(ebpf: &mut Ebpf, pins: &Pins, args: &RunArgs) -> Option<xdp::Xdp> {
    if args.xdp != XdpArg::Off {
        match open_xdp(ebpf, pins, args) {
            Ok(xdp) => return Some(xdp),
            Err(error) => warn!("XDP: {error:#}; going on without, by tc alone"),
        }
    }
    xdp::switch_off(pins);
    None
}

/// With a pin, it stays in the kernel without its object.
fn open_xdp(ebpf: &mut Ebpf, pins: &Pins, args: &RunArgs) -> Result<xdp::Xdp> {
    let loaded: &mut Xdp = program(ebpf, xdp::PROGRAM)?.try_into()?;
    loaded.load().map_err(|error| match error {
        // The verifier's log has thousands of lines.
        ProgramError::LoadError { io_error, .. } => anyhow!("the kernel refuses the program: {io_error}"),
        error => anyhow!("load the program: {error}"),
    })?;
    let pin = pins.program(Place::Main, xdp::PROGRAM);
    attach::pin_program(&pins.lock()?, pins, Place::Main, xdp::PROGRAM, program(ebpf, xdp::PROGRAM)?)?;
    let program = Xdp::from_pin(&pin, XdpAttachType::Interface)
        .with_context(|| format!("open the program {}", pin.display()))?;
    xdp::Xdp::open(program, pins, args.xdp)
}

/// Pins the tc programs for a place: from now on the CNI plugin attaches these, too.
///
/// # Errors
/// If the kernel refuses.
pub fn pin(ebpf: &mut Ebpf, pins: &Pins, features: Features, place: Place) -> Result<Attacher> {
    let turn = pins.lock()?;
    for (hook, name) in Hook::BOTH.into_iter().zip(tc_programs(ebpf)) {
        attach::pin_program(&turn, pins, place, hook.program(), program(ebpf, name)?)?;
    }
    Attacher::open(&turn, pins, features.tcx)?.context("the programs that were just pinned are gone")
}

/// Room for fragments that overtook the first one: some on every processor that the kernel may use.
///
/// # Errors
/// If nobody says how many those are.
pub fn held_places() -> Result<u32> {
    let cpus = nr_cpus().map_err(|(what, error)| anyhow!("{what}: {error}"))?;
    Ok(u32::try_from(cpus)?.saturating_mul(Held::PER_CPU))
}

/// What to say if the pinned flow tables, which keep the size that they were made with, have another one than asked for.
fn kept_size(pins: &Pins, flows: u32) -> Result<Option<String>> {
    let asked = entries(flows);
    let (mut kept, mut files) = (asked, Vec::new());
    for map in FLOW_TABLES {
        let pin = pins.map(map);
        let info =
            MapInfo::from_pin(&pin).with_context(|| format!("ask for the size of {}", pin.display()))?;
        if info.max_entries() != asked {
            kept = info.max_entries();
            files.push(pin.display().to_string());
        }
    }
    Ok((!files.is_empty()).then(|| {
        format!(
            "--flow-table-max={flows} has no effect yet: the flow tables of a former run, which hold the open \
             connections, have room for {} flows ({kept} entries) each. To change it, drain the node (connections \
             through Services and masqueraded ones are cut), stop the agent, rm {}, and start it again",
            kept / ENTRIES_PER_FLOW,
            files.join(" ")
        )
    }))
}

/// Entries of each family's flow table.
const fn entries(flows: u32) -> u32 {
    flows.saturating_mul(ENTRIES_PER_FLOW)
}

/// The same for the life of the node: choices by hash can be made again, by a later agent too.
fn hash_seed() -> Result<u32> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").context("read the boot id")?;
    // FNV-1a: any mixing will do, but it has to be the same in the next version.
    Ok(boot.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)))
}

/// The cookie of our network namespace, zero where the kernel cannot tell (before 5.14).
pub fn netns_cookie() -> u64 {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let Ok(socket) = std::net::UdpSocket::bind("127.0.0.1:0") else { return 0 };
    let (mut cookie, mut len) = (0u64, size_of::<u64>() as libc::socklen_t);
    // SAFETY: the kernel writes at most `len` bytes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if result == 0 { cookie } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testing::Bpffs;

    #[test]
    fn a_flow_table_that_keeps_its_size_is_told_of() {
        let bpffs = Bpffs::with_flows(4096);
        assert_eq!(kept_size(&bpffs.pins, 1024).expect("sizes"), None);
        let warning = kept_size(&bpffs.pins, 2048).expect("sizes").expect("another size");
        for words in ["--flow-table-max=2048", "1024 flows (4096 entries)", "LB_FLOW4", "LB_FLOW6"] {
            assert!(warning.contains(words), "{words} is not in: {warning}");
        }
    }
}
