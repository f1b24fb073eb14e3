//! The agent's own process, under the names that all exporters have for it.

use super::Kind::{Counter, Gauge};
use super::Sample;
use procfs::process::{LimitValue, Process};
use procfs::{ProcResult, WithCurrentSystemInfo as _};

/// What it takes now; nothing where `/proc` is not to be read.
pub fn samples() -> Vec<Sample> {
    let version = Sample::new("lb_build_info", "Always 1: which lb-agent this is", Gauge, 1.0)
        .with("version", env!("CARGO_PKG_VERSION"));
    let mut samples = vec![version];
    samples.extend(read().unwrap_or_default());
    samples
}

fn read() -> ProcResult<Vec<Sample>> {
    let process = Process::myself()?;
    let (stat, limits) = (process.stat()?, process.limits()?);
    let ticks = procfs::ticks_per_second() as f64;
    let limit = |value| match value {
        LimitValue::Value(value) => value as f64,
        LimitValue::Unlimited => -1.0,
    };
    let started = procfs::boot_time_secs()? as f64 + stat.starttime as f64 / ticks;
    let resident = stat.rss_bytes().get() as f64;
    Ok(vec![
        Sample::new(
            "process_cpu_seconds_total",
            "Processor time of the agent",
            Counter,
            (stat.utime + stat.stime) as f64 / ticks,
        ),
        Sample::new("process_resident_memory_bytes", "Memory of the agent", Gauge, resident),
        Sample::new("process_virtual_memory_bytes", "Address space of the agent", Gauge, stat.vsize as f64),
        Sample::new("process_open_fds", "Open files of the agent", Gauge, process.fd_count()? as f64),
        Sample::new(
            "process_max_fds",
            "Most open files of the agent, -1 for any number",
            Gauge,
            limit(limits.max_open_files.soft_limit),
        ),
        Sample::new("process_start_time_seconds", "When the agent was started", Gauge, started),
    ])
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_process_is_alive() {
        let samples = super::samples();
        let value = |name: &str| samples.iter().find(|sample| sample.name == name).expect(name).value;
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().expect("a time").as_secs_f64();
        let started = value("process_start_time_seconds");
        assert!(started <= now + 1.0 && now - started < 3600.0, "{started} and {now}");
        assert!(value("process_resident_memory_bytes") > 1e6);
        assert!(value("process_virtual_memory_bytes") > value("process_resident_memory_bytes"));
        assert!(value("process_open_fds") >= 3.0 && value("process_max_fds") >= value("process_open_fds"));
    }
}
