//! The kernel matrix: boots Debian's kernels in QEMU and tests on each.

mod apt;
pub mod guest;
mod init;
mod initramfs;
mod kernel;
mod loaded;
mod paths;
mod payload;
mod plugin;
mod qemu;
mod report;
mod services;
mod verifier;

use crate::system::{ensure_debian_packages, workspace};
use anyhow::{Context as _, Result, ensure};
use apt::Apt;
use kernel::Kernel;
use payload::File;
use qemu::{Boot, Outcome};
use report::Row;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// From the oldest that is supported to Debian's newest; tc programs are attached by clsact up to 6.5, by tcx from 6.6.
const MATRIX: &str = "5.10,6.1,6.12,6.18,7.2";

const PAYLOAD_DIR: &str = "/bin";
const MODULE_DIR: &str = "/modules";
/// The kernel programs, for loading them without the agent.
const OBJECT_FILE: &str = "/bin/lb-ebpf.o";
const REPORT_FILE: &str = "/run/report.json";
/// What follows `--` are init's arguments.
const COMMAND_LINE: &str =
    "console=ttyS0 quiet panic=-1 mitigations=off rdinit=/bin/xtask -- vm-guest --init";

/// Options of this subcommand.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Kernel series to test on; also others that Debian still has, such as 6.16
    #[arg(long, value_name = "SERIES", value_delimiter = ',', default_value = MATRIX)]
    kernel: Vec<String>,
    /// Test on this kernel image instead
    #[arg(long, value_name = "FILE", requires = "modules", conflicts_with = "kernel")]
    kernel_image: Option<PathBuf>,
    /// Its modules: the directory lib/modules/RELEASE
    #[arg(long, value_name = "DIR", requires = "kernel_image")]
    modules: Option<PathBuf>,
    /// Fetch kernels again, even those under target/vm/kernels
    #[arg(long)]
    refresh: bool,
    /// Debian archive to fetch from (…/debian), if not that of this machine's apt
    #[arg(long, value_name = "URL", env = "LB_DEBIAN_MIRROR")]
    mirror: Option<String>,
    /// Guests at a time
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..))]
    jobs: u8,
    /// Seconds that a guest may take: the oldest kernels have needed 145 to 235, emulated on two processors
    #[arg(long, value_name = "SECONDS", default_value_t = 480)]
    timeout: u64,
}

/// Tests on every kernel that was asked for.
///
/// # Errors
/// If the payload cannot be built, or any kernel fails or cannot be had.
pub fn run(args: Args) -> Result<()> {
    ensure!(cfg!(target_arch = "x86_64"), "the kernel matrix is of x86_64 kernels: this machine is another");
    ensure_debian_packages(&[
        ("qemu-system-x86", "qemu-system-x86_64"),
        ("xz-utils", "xz"),
        ("binutils", "strip"),
    ])?;
    let dir = workspace().join("target/vm");
    for sub in ["kernels", "payload", "initramfs", "log"] {
        fs::create_dir_all(dir.join(sub)).with_context(|| format!("create {}/{sub}", dir.display()))?;
    }
    let dir = dir.canonicalize()?;
    // Two runs at once would write each other's files.
    let lock = fs::File::create(dir.join(".lock")).context("create the lock file of target/vm")?;
    if lock.try_lock().is_err() {
        eprintln!("waiting for another vm-test to end");
        lock.lock().context("lock target/vm")?;
    }
    let kernels = match (&args.kernel_image, &args.modules) {
        (Some(image), Some(modules)) => {
            vec![(kernel::CUSTOM.into(), Kernel::from_files(image.clone(), modules.clone()))]
        }
        _ => obtain(&args, &dir),
    };
    let started = Instant::now();
    let payload = payload::prepare(&dir.join("payload"))?;
    eprintln!("payload built in {:.1} s", started.elapsed().as_secs_f64());

    let queue = Mutex::new(kernels.into_iter().enumerate().collect::<Vec<_>>().into_iter());
    let rows = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..args.jobs {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().expect("no holder panics").next();
                    let Some((i, (name, kernel))) = next else { break };
                    let row = row(name, kernel, &dir, &payload, Duration::from_secs(args.timeout));
                    rows.lock().expect("no holder panics").push((i, row));
                }
            });
        }
    });
    let mut rows = rows.into_inner().expect("no holder panics");
    rows.sort_by_key(|(i, _)| *i);
    let rows: Vec<Row> = rows.into_iter().map(|(_, row)| row).collect();
    print!("{}", report::table(&rows));
    let failed: Vec<&str> = rows.iter().filter(|r| r.failure.is_some()).map(|r| r.kernel.as_str()).collect();
    ensure!(
        failed.is_empty(),
        "failed on {}; consoles are in {}",
        failed.join(", "),
        dir.join("log").display()
    );
    Ok(())
}

/// Finds each kernel in the cache or fetches it. One that cannot be had is a row of the table like any other.
fn obtain(args: &Args, dir: &Path) -> Vec<(String, Result<Kernel>)> {
    let cache = dir.join("kernels");
    // Opened only if something is missing, so that later runs need no network.
    let mut apt: Option<Result<Apt>> = None;
    let mut fetch = |series: &str| {
        let apt = apt.get_or_insert_with(|| {
            eprintln!("fetching kernels from Debian's archive into {}", cache.display());
            ensure_debian_packages(&[("apt", "apt-get"), ("dpkg", "dpkg")])?;
            Apt::open(&dir.join("apt"), args.mirror.as_deref())
        });
        let apt = apt.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))?;
        Kernel::fetch(&cache, series, apt)
    };
    let mut get = |series: &str| match Kernel::cached(&cache, series) {
        Some(kernel) if !args.refresh => Ok(kernel),
        _ => fetch(series),
    };
    args.kernel.iter().map(|series| (series.clone(), get(series))).collect()
}

fn row(name: String, kernel: Result<Kernel>, dir: &Path, payload: &[File], timeout: Duration) -> Row {
    let started = Instant::now();
    let result = kernel.and_then(|kernel| test(&kernel, dir, payload, timeout));
    let (report, failure) = match result {
        Ok((0, report @ Some(_))) => (report, None),
        Ok((status, report)) => {
            let log = dir.join("log").join(format!("{name}.log"));
            (report, Some(format!("the payload's exit status is {status}; its console: {}", log.display())))
        }
        Err(error) => (None, Some(format!("{error:#}"))),
    };
    Row { kernel: name, took: started.elapsed(), report, failure }
}

fn test(
    kernel: &Kernel,
    dir: &Path,
    payload: &[File],
    timeout: Duration,
) -> Result<(i32, Option<report::Report>)> {
    let name = &kernel.name;
    let initramfs = dir.join("initramfs").join(format!("{name}.cpio"));
    initramfs::write(&initramfs, kernel, payload)?;
    let log = dir.join("log").join(format!("{name}.log"));
    let boot = Boot { image: &kernel.image, initramfs: &initramfs, log: &log, timeout };
    let describe = |outcome: &Outcome| match outcome {
        Outcome::TimedOut => format!("the guest was not done after {} s", timeout.as_secs()),
        _ => "the guest crashed (no exit status)".to_owned(),
    };
    // Emulated guests crash now and then through no fault of theirs: once is forgiven, aloud.
    match boot.run()? {
        Outcome::Exited(status, report) => return Ok((status, report)),
        outcome => eprintln!("{name}: {}: trying once more", describe(&outcome)),
    }
    match boot.run()? {
        Outcome::Exited(status, report) => Ok((status, report)),
        outcome => anyhow::bail!("{}, twice; its console: {}", describe(&outcome), log.display()),
    }
}
