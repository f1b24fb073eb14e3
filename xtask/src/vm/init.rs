//! The guest's first process: sets the system up, runs the payload, hands its result out, switches off.

use super::{MODULE_DIR, PAYLOAD_DIR, REPORT_FILE};
use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::Pid;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::process::Command;

/// Exit status for a guest that could not be set up.
const SETUP_FAILED: i32 = 125;

/// Runs as process 1 and never returns. The host sees no status if this panics, and takes it for the crash it is.
pub(super) fn main() -> ! {
    let status = set_up().and_then(|()| payload()).unwrap_or_else(|error| {
        eprintln!("vm-guest: {error:#}");
        SETUP_FAILED
    });
    if let Err(error) = hand_out(status) {
        eprintln!("vm-guest: {error:#}");
    }
    let _ = nix::sys::termios::tcdrain(std::io::stdout());
    let error = reboot(RebootMode::RB_POWER_OFF);
    panic!("power off: {error:?}");
}

fn set_up() -> Result<()> {
    for (kind, target) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/run"),
        ("tmpfs", "/tmp"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("bpf", "/sys/fs/bpf"),
    ] {
        mount(Some(kind), target, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mount {kind} on {target}"))?;
    }
    let mut modules: Vec<_> = fs::read_dir(MODULE_DIR)?.map(|e| Ok(e?.path())).collect::<Result<_>>()?;
    modules.sort();
    for module in modules {
        nix::kmod::finit_module(&File::open(&module)?, c"", nix::kmod::ModuleInitFlags::empty())
            .with_context(|| format!("load {}", module.display()))?;
    }
    Ok(())
}

/// Runs the payload, and reaps whatever it orphans meanwhile.
fn payload() -> Result<i32> {
    let child = Command::new("/proc/self/exe")
        .arg("vm-guest")
        .env("PATH", PAYLOAD_DIR)
        .env("HOME", "/tmp")
        .env("RUST_BACKTRACE", "1")
        .spawn()
        .context("start the payload")?;
    let pid = Pid::from_raw(child.id().cast_signed());
    loop {
        match wait().context("wait for the payload")? {
            WaitStatus::Exited(p, status) if p == pid => return Ok(status),
            WaitStatus::Signaled(p, signal, _) if p == pid => return Ok(128 + signal as i32),
            _ => {}
        }
    }
}

/// Over the second serial port: the kernel's messages cannot get in between there.
fn hand_out(status: i32) -> Result<()> {
    let mut port =
        OpenOptions::new().write(true).open("/dev/ttyS1").context("open the second serial port")?;
    let report = fs::read_to_string(REPORT_FILE).unwrap_or_default();
    port.write_all(format!("{report}\nexit {status}\n").as_bytes())?;
    nix::sys::termios::tcdrain(&port).context("drain the second serial port")?;
    Ok(())
}
