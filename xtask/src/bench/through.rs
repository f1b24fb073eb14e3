//! Packets through a node, with nothing else in the figure. They come from where a wire's driver would put them, by
//! `BPF_PROG_TEST_RUN` with live frames, and what leaves by the same device ends at its other end, in an XDP program that
//! counts. All that the node does for them is done by one thread of the kernel's, the device's NAPI, whose processor time
//! is what is paid.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result, bail};
use aya::maps::{Array, Map, MapData, PerCpuArray};
use aya::programs::{TestRun as _, TestRunAttrs, TestRunOptions, Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader};
use etherparse::PacketBuilder;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::cores;
use super::programs::object;
use crate::lab::{Host, Lab};

/// The node's device; the wire calls its end by the node's name.
const UPLINK: &str = "eth0";
/// Source ports: that many flows.
const FLOWS: u32 = 64;
const FIRST_PORT: u32 = 20_000;
/// Frames that are sent at once: as many as a driver's poll takes, and a fraction of what a veth has room for.
const BATCH: u32 = 64;
/// Bytes of a frame that the programs write (`lb-ebpf/src/bench/driver.rs`): the smallest, without its check sequence.
const SENT: usize = 64;

/// The first kernel that sends the frames of a test run.
const SINCE: (u32, u32) = (5, 18);

/// Whether a kernel can do that; if not, why.
pub(super) fn possible(kernel: &str) -> Result<(), String> {
    let mut numbers = kernel.split(['.', '-']).map(|n| n.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let (major, minor) = SINCE;
    if version >= SINCE { Ok(()) } else { Err(format!("it takes Linux {major}.{minor}")) }
}

/// What a turn cost the node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Forwarded {
    /// Packets that came out.
    pub(super) packets: u64,
    /// Processor seconds that the node spent on all that came in.
    pub(super) cpu: f64,
}

/// A node's uplink between two ends of the benchmark's own.
pub(super) struct Through {
    wire: Host,
    node: Host,
    ebpf: Ebpf,
    core: usize,
    /// The kernel's thread that does the node's work.
    thread: u32,
    /// Ethernet addresses of the wire's bridge and of the node.
    macs: [[u8; 6]; 2],
}

impl std::fmt::Debug for Through {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Through")
            .field("node", &self.node)
            .field("thread", &self.thread)
            .finish_non_exhaustive()
    }
}

impl Through {
    /// Between the wire and its first node. The wire is one already ([`Lab::like_wires`]). While this value lives, UDP packets
    /// that leave the node go nowhere.
    pub(super) fn new(lab: &Lab, core: usize) -> Result<Self> {
        let (wire, node) = (lab.wire().clone(), lab.node(0).clone());
        // Frames are taken from a driver only where there is a NAPI.
        node.gather(UPLINK, true)?;
        let mut ebpf = EbpfLoader::new().load_file(object("lb-ebpf-bench")?)?;
        for name in ["send", "sink"] {
            xdp(&mut ebpf, name)?.load().with_context(|| format!("loading {name}"))?;
        }
        attach(&wire, &mut ebpf, "sink", node.name())?;
        threaded(&wire, node.name(), core)?;
        let thread = threaded(&node, UPLINK, core)?;
        let address = |host: &Host, device: &str| sysfs(host, |root| mac(root, device));
        let macs = [address(&wire, "lan0")?, address(&node, UPLINK)?];
        let index: u32 = sysfs(&wire, |root| read(root, node.name(), "ifindex"))?.parse()?;
        let mut sender: Array<&mut MapData, u32> = map(&mut ebpf, "SENDER")?.try_into()?;
        for (i, value) in [index, FIRST_PORT, FLOWS].into_iter().enumerate() {
            sender.set(i as u32, value, 0)?;
        }
        Ok(Self { wire, node, ebpf, core, thread, macs })
    }

    /// Sends so many packets, in turn by all flows.
    pub(super) fn turn(&mut self, from: SocketAddr, to: SocketAddr, count: u64) -> Result<Forwarded> {
        let frame = self.frame(from, to)?;
        let mut words = [0; SENT / 4];
        for (word, bytes) in words.iter_mut().zip(frame.chunks_exact(4)) {
            *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        let mut sent: Array<&mut MapData, [u32; SENT / 4]> = map(&mut self.ebpf, "SENT")?.try_into()?;
        sent.set(0, words, 0)?;
        let (before, seen) = (cores::seconds_of(self.thread)?, self.seen()?);
        let (core, ebpf) = (self.core, &mut self.ebpf);
        self.wire.run_in(|| {
            cores::pin(core)?;
            let attrs = TestRunAttrs::new().xdp_live_frames(BATCH);
            let options = TestRunOptions {
                data_in: Some(&frame),
                repeat: count as u32,
                attrs,
                ..TestRunOptions::default()
            };
            xdp(ebpf, "send")?.test_run(options).context("sending frames")
        })??;
        Ok(Forwarded { packets: self.seen()? - seen, cpu: cores::seconds_of(self.thread)? - before })
    }

    fn seen(&mut self) -> Result<u64> {
        let seen: PerCpuArray<&mut MapData, u64> = map(&mut self.ebpf, "SEEN")?.try_into()?;
        Ok(seen.get(&1, 0)?.iter().sum())
    }

    /// A packet of the least length, its checksum as of source port zero: the programs fill it in.
    fn frame(&self, from: SocketAddr, to: SocketAddr) -> Result<Vec<u8>> {
        let [src, dst] = self.macs;
        let ethernet = PacketBuilder::ethernet2(src, dst);
        let (builder, headers) = match (from, to) {
            (SocketAddr::V4(from), SocketAddr::V4(to)) => {
                (ethernet.ipv4(from.ip().octets(), to.ip().octets(), 64), 42)
            }
            (SocketAddr::V6(from), SocketAddr::V6(to)) => {
                (ethernet.ipv6(from.ip().octets(), to.ip().octets(), 64), 62)
            }
            _ => bail!("{from} and {to} are not of one family"),
        };
        let mut frame = Vec::new();
        // 60 bytes and their check sequence.
        builder.udp(0, to.port()).write(&mut frame, &[0; 18][..60usize.saturating_sub(headers).max(2)])?;
        Ok(frame)
    }
}

impl Drop for Through {
    fn drop(&mut self) {
        // The lab may be gone already.
        for (host, device) in [(&self.wire, self.node.name()), (&self.node, UPLINK)] {
            let _ = sysfs(host, |root| Ok(fs::write(attribute(root, device, "threaded"), "0")?));
        }
        let _ = self.node.gather(UPLINK, false);
    }
}

/// Attaches a program to a device of a host's.
pub(super) fn attach(host: &Host, ebpf: &mut Ebpf, name: &str, device: &str) -> Result<()> {
    host.run_in(|| {
        let attached = xdp(ebpf, name)?.attach(device, XdpMode::Driver);
        attached.map(drop).with_context(|| format!("attaching {name} to {device}"))
    })?
}

pub(super) fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    Ok(ebpf.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?)
}

fn map<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Map> {
    ebpf.map_mut(name).with_context(|| format!("no map {name}"))
}

/// Gives a device's NAPI a thread of its own, which comes before all others on its core: so what is sent at once is dealt
/// with at once.
fn threaded(host: &Host, device: &str, core: usize) -> Result<u32> {
    let before = threads(device)?;
    sysfs(host, |root| Ok(fs::write(attribute(root, device, "threaded"), "1")?))
        .with_context(|| format!("threads for {device}"))?;
    let new: Vec<_> = threads(device)?.into_iter().filter(|pid| !before.contains(pid)).collect();
    let &[thread] = &new[..] else { bail!("{} new threads for {device}, not one", new.len()) };
    cores::pin_process(thread, core)?;
    cores::before_others(thread)?;
    Ok(thread)
}

/// The kernel's threads for devices of that name.
fn threads(device: &str) -> Result<Vec<u32>> {
    let prefix = format!("napi/{device}-");
    let pids = fs::read_dir("/proc")?.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    let named = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.starts_with(&prefix))
    };
    Ok(pids.filter(named).collect())
}

/// Runs `f` where `/sys` shows a host's devices.
fn sysfs<T: Send>(host: &Host, f: impl FnOnce(&Path) -> Result<T> + Send) -> Result<T> {
    let none: Option<&str> = None;
    host.run_in(|| {
        unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace")?;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("private mounts")?;
        mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none).context("mounting sysfs")?;
        f(Path::new("/sys/class/net"))
    })?
}

fn attribute(root: &Path, device: &str, name: &str) -> std::path::PathBuf {
    root.join(device).join(name)
}

fn read(root: &Path, device: &str, name: &str) -> Result<String> {
    let path = attribute(root, device, name);
    Ok(fs::read_to_string(&path).with_context(|| path.display().to_string())?.trim().to_owned())
}

fn mac(root: &Path, device: &str) -> Result<[u8; 6]> {
    let text = read(root, device, "address")?;
    let bytes: Vec<u8> = text.split(':').map(|b| u8::from_str_radix(b, 16)).collect::<Result<_, _>>()?;
    let length = bytes.len();
    bytes.try_into().map_err(|_| anyhow::anyhow!("{text} has {length} bytes"))
}

#[cfg(test)]
mod tests {
    use super::possible;

    #[test]
    fn a_kernel_is_told_by_its_version() {
        assert!(possible("6.18.44-fc-v769").is_ok());
        assert!(possible("5.18.0").is_ok());
        assert_eq!(possible("5.15.0-91-generic").unwrap_err(), "it takes Linux 5.18");
        assert!(possible("").is_err());
    }
}
