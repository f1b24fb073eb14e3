//! Cores and the processor time that is spent on them.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// The last core that this process may use: interrupts like the first.
pub(super) fn last() -> Result<usize> {
    allowed()?.pop().context("no core to run on")
}

/// A core besides `core`, or the same one where there is no other.
pub(super) fn another(core: usize) -> Result<usize> {
    Ok(allowed()?.into_iter().find(|&other| other != core).unwrap_or(core))
}

fn allowed() -> Result<Vec<usize>> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).context("asking for this process's cores")?;
    Ok((0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false)).collect())
}

/// Keeps the calling thread, and what it starts, on one core.
pub(super) fn pin(core: usize) -> Result<()> {
    set(Pid::from_raw(0), core)
}

/// Keeps all threads of a process on one core.
pub(super) fn pin_process(pid: u32, core: usize) -> Result<()> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let tid = task.file_name().to_string_lossy().parse()?;
        set(Pid::from_raw(tid), core)?;
    }
    Ok(())
}

/// Lets a thread run before all others as soon as it has something to do.
pub(super) fn before_others(pid: u32) -> Result<()> {
    let least = libc::sched_param { sched_priority: 1 };
    // SAFETY: the kernel reads the parameters.
    let result = unsafe { libc::sched_setscheduler(pid as i32, libc::SCHED_FIFO, &raw const least) };
    ensure!(result == 0, "thread {pid} before others: {}", std::io::Error::last_os_error());
    Ok(())
}

fn set(task: Pid, core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core).with_context(|| format!("core {core}"))?;
    sched_setaffinity(task, &set).with_context(|| format!("running on core {core} only"))
}

/// Seconds of processor time that a process has had. What the kernel does in softirqs on its way (most of a packet's path,
/// on one core) counts as the process's own, unless the kernel keeps separate accounts.
pub(super) fn seconds_of(pid: u32) -> Result<f64> {
    let clock = clock_getcpuclockid(Pid::from_raw(pid as i32)).context("finding a process's clock")?;
    let time = clock_gettime(clock).context("reading a process's clock")?;
    Ok(std::time::Duration::from(time).as_secs_f64())
}

/// The processor time of one core's softirqs that no process pays for.
#[derive(Clone, Debug)]
pub(super) struct SoftIrqs {
    core: usize,
    /// The thread that takes over when there is too much of it.
    thread: Option<u32>,
    /// Whether the kernel keeps an account of its own for it.
    separate: bool,
}

impl SoftIrqs {
    pub(super) fn of(core: usize) -> Self {
        let name = format!("ksoftirqd/{core}\n");
        let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let mut named =
            pids.filter(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|n| n == name));
        let thread = named.next();
        // There only with CONFIG_IRQ_TIME_ACCOUNTING.
        let separate = fs::exists("/proc/pressure/irq").unwrap_or(false);
        Self { core, thread, separate }
    }

    /// Seconds so far.
    pub(super) fn seconds(&self) -> f64 {
        let thread = self.thread.and_then(|pid| seconds_of(pid).ok()).unwrap_or_default();
        let stat =
            if self.separate { fs::read_to_string("/proc/stat").unwrap_or_default() } else { String::new() };
        thread + softirq(&stat, self.core).unwrap_or_default()
    }
}

/// A core's softirq seconds in `/proc/stat`.
fn softirq(stat: &str, core: usize) -> Option<f64> {
    let line = stat.lines().find_map(|line| line.strip_prefix(&format!("cpu{core} ")))?;
    // user nice system idle iowait irq softirq …, in hundredths.
    Some(line.split_whitespace().nth(6)?.parse::<f64>().ok()? / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn softirq_time_is_the_seventh_number_of_the_core() {
        let stat =
            "cpu  9 9 9 9 9 9 900 0\ncpu0 1 2 3 4 5 6 700 8\ncpu1 1 2 3 4 5 6 50 8\ncpu10 0 0 0 0 0 0 1\n";
        assert_eq!(softirq(stat, 1), Some(0.5));
        assert_eq!(softirq(stat, 10), Some(0.01));
        assert_eq!(softirq("", 0), None);
    }

    #[test]
    fn time_passes_for_those_who_work() {
        let me = std::process::id();
        let start = seconds_of(me).unwrap();
        while seconds_of(me).unwrap() < start + 0.002 {}
    }
}
