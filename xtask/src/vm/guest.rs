//! What runs on each kernel.

use super::report::Report;
use super::{OBJECT_FILE, REPORT_FILE};
use anyhow::{Context as _, Result, ensure};
use futures::TryStreamExt as _;
use rtnetlink::{LinkBridge, LinkUnspec, LinkVeth, LinkVxlan};
use std::fs;
use std::path::Path;

/// Options of this subcommand.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// As the guest's first process: mount, load modules, run the payload, power off
    #[arg(long)]
    init: bool,
}

/// Runs the subcommand.
///
/// # Errors
/// If a check fails on this kernel.
pub fn run(args: Args) -> Result<()> {
    if args.init {
        super::init::main();
    }
    let mut report = Report {
        release: nix::sys::utsname::uname()?.release().to_string_lossy().into_owned(),
        boot_seconds: uptime()?,
        ..Report::default()
    };
    println!("Linux {}", report.release);
    report.check("bpffs", mounted("/sys/fs/bpf", "bpf"));
    report.check("cgroup2", mounted("/sys/fs/cgroup", "cgroup2"));
    report.check("BTF", fs::metadata("/sys/kernel/btf/vmlinux").map(drop).context("/sys/kernel/btf/vmlinux"));
    report.check("IPv6", fs::metadata("/proc/net/if_inet6").map(drop).context("/proc/net/if_inet6"));
    report.check(
        "netns, bridge, veth, vxlan",
        std::thread::spawn(devices).join().expect("devices() does not panic"),
    );
    if let Err(error) = super::verifier::load_all(&mut report, Path::new(OBJECT_FILE)) {
        report.check("verifier", Err(error));
    }
    if let Err(error) = super::paths::try_all(&mut report) {
        report.check("lab", Err(error));
    }
    fs::write(REPORT_FILE, serde_json::to_string(&report)?)?;
    let failed = report.checks.len() - report.passed();
    ensure!(failed == 0, "{failed} of {} checks failed", report.checks.len());
    Ok(())
}

/// Seconds since this kernel was started.
pub(super) fn uptime() -> Result<f64> {
    let uptime = fs::read_to_string("/proc/uptime")?;
    uptime.split(' ').next().and_then(|s| s.parse().ok()).context("parse /proc/uptime")
}

fn mounted(target: &str, kind: &str) -> Result<()> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    let found = mounts.lines().any(|l| l.split(' ').skip(1).take(2).eq([target, kind]));
    ensure!(found, "no {kind} on {target}");
    Ok(())
}

/// The devices that the lab is made of, in a network namespace of their own.
fn devices() -> Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("unshare the network namespace")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, netlink, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        let links = netlink.link();
        links.add(LinkBridge::new("br0").up().build()).execute().await.context("add a bridge")?;
        links.add(LinkVeth::new("v0", "v1").up().build()).execute().await.context("add a veth pair")?;
        let vxlan = LinkVxlan::new("vx0", 1).port(8472).learning(false).up().build();
        links.add(vxlan).execute().await.context("add a vxlan device")?;
        let bridge = links.get().match_name("br0").execute().try_next().await?.context("find the bridge")?;
        let port = LinkUnspec::new_with_name("v0").controller(bridge.header.index).build();
        links.set(port).execute().await.context("put a veth on the bridge")
    })
}
