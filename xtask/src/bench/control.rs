//! Changes: how soon packets see them, and what a process takes that follows them.

use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lb_stand_in::Api;

use super::cores;
use super::load::{Client, Transport, Watching};
use super::maps;
use super::mode::Site;
use super::plan::Depth;
use super::results::{Changes, Process, Results};
use super::services::{Cluster, Kind, Service, Where, counted};
use super::stats::{Quantiles, quantile};

/// Changes of other Services a second.
const CHURN: u32 = 100;
/// How long a change may take, with the slowest of all.
const PATIENCE: Duration = Duration::from_secs(120);

/// Percent of a core that each site's process takes while nothing goes on. Before any traffic: the flows of the last minutes
/// would be swept meanwhile.
pub(super) fn idle(sites: &[Site], depth: Depth) -> Result<Vec<Option<f64>>> {
    let seconds =
        || sites.iter().map(|site| site.pid().map(cores::seconds_of).transpose()).collect::<Result<Vec<_>>>();
    // What follows a start is over.
    std::thread::sleep(depth.idle() / 4);
    let (start, before) = (Instant::now(), seconds()?);
    std::thread::sleep(depth.idle());
    let (took, after) = (start.elapsed().as_secs_f64(), seconds()?);
    let share = |(before, after): (Option<f64>, Option<f64>)| Some(100.0 * (after? - before?) / took);
    Ok(before.into_iter().zip(after).map(share).collect())
}

/// Measures one site, whose process took so much when it was idle; nothing where nobody serves.
pub(super) fn measure(
    site: &mut Site,
    cluster: &Cluster,
    depth: Depth,
    core: usize,
    idle: Option<f64>,
    results: &mut Results,
) -> Result<()> {
    if site.mode.is_direct() {
        return Ok(());
    }
    let (mode, services) = (site.mode, cluster.all.len());
    let service = cluster.measured(Kind { at: Where::Here, transport: Transport::Tcp }, 0);
    let service = service.context("no Service to change")?;
    if let Some(pid) = site.pid() {
        // The client keeps the other one busy.
        cores::pin_process(pid, cores::another(core)?)?;
    }
    let mut record = |churn: u32, by_api: bool, times: Vec<f64>| {
        let at = |q| quantile(&times, q);
        let milliseconds = Quantiles { p50: at(0.5), p90: at(0.9), p99: at(0.99) };
        if times.is_empty() {
            let limit = depth.changes().1;
            results.omitted.push(format!(
                "{}, {}: no change was seen in {limit:?}",
                mode.name(),
                counted(services)
            ));
            return;
        }
        results.changes.push(Changes { services, mode, churn, samples: times.len(), milliseconds, by_api });
    };
    record(0, site.api().is_some(), changes(site, service, depth)?);
    let (Some(pid), Some(api)) = (site.pid(), site.api()) else { return Ok(()) };
    let others: Vec<_> = cluster.all.iter().filter(|s| s.name != service.name).cloned().collect();
    let mut busy = None;
    if !others.is_empty() {
        let churn = Churn::start(api.api().clone(), others);
        let (start, before) = (Instant::now(), cores::seconds_of(pid)?);
        record(CHURN, true, changes(site, service, depth)?);
        // At least that long, whatever the changes took.
        std::thread::sleep(depth.idle().saturating_sub(start.elapsed()));
        busy = Some(100.0 * (cores::seconds_of(pid)? - before) / start.elapsed().as_secs_f64());
        churn.stop();
    }
    let maps = mode.is_ours().then(|| maps::memory(site.lab().node(0))).transpose()?;
    let maps = maps.map(|bytes| bytes as f64 / 1e6);
    let resident = resident(pid)? as f64 / 1e6;
    let idle = idle.unwrap_or_default();
    results.processes.push(Process { services, mode, resident, maps, idle, churn: busy });
    Ok(())
}

/// Bytes.
fn resident(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kilobytes * 1024)
}

/// Milliseconds from a change until a connection goes the new way, over and over.
fn changes(site: &mut Site, service: &Service, depth: Depth) -> Result<Vec<f64>> {
    let (samples, limit) = depth.changes();
    let all = service.endpoints.clone();
    let [one, other, third, ..] = all[..] else { bail!("{} has too few endpoints", service.name) };
    let (client, updater) = site.parts();
    // The third first: when it answers alone, no earlier change is still to come.
    for endpoint in [third, one] {
        updater.update(service, &[endpoint])?;
        settled(client, service.vip, endpoint)?;
    }
    let mut times = Vec::new();
    // The one that answers first is a change, too.
    let mut watching = client.watch(service.vip, samples + 1, limit)?;
    let mut now = watching.next()?.map(|_| one);
    while let Some(before) = now.filter(|_| times.len() < samples) {
        // Not in step with anything.
        std::thread::sleep(Duration::from_micros(2000 + 700 * (times.len() as u64 % 7)));
        let next = if before == one { other } else { one };
        let begin = Watching::now()?;
        updater.update(service, &[next])?;
        now = watching.next()?.map(|(at, ends)| {
            times.push(at.saturating_sub(begin).as_secs_f64() * 1e3);
            SocketAddr::new(ends.server, next.port())
        });
        ensure!(now.is_none_or(|now| now == next), "{now:?} answers instead of {next}");
    }
    while watching.next()?.is_some() {}
    updater.update(service, &all)?;
    Ok(times)
}

/// Waits until an endpoint is the only one that answers.
fn settled(client: &mut Client, to: SocketAddr, endpoint: SocketAddr) -> Result<()> {
    let (deadline, mut in_a_row) = (Instant::now() + PATIENCE, 0);
    while in_a_row < 30 {
        ensure!(Instant::now() < deadline, "others than {endpoint} answer after {PATIENCE:?}");
        in_a_row = if client.who(to)?.server == endpoint.ip() { in_a_row + 1 } else { 0 };
    }
    Ok(())
}

/// Changes of other Services, evenly spread over time.
struct Churn {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<()>,
}

impl Churn {
    /// Of at least one Service.
    fn start(api: Arc<Api>, services: Vec<Service>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let start = Instant::now();
            for n in 0_u32.. {
                let mut service = services[n as usize % services.len()].clone();
                // One endpoint goes and comes.
                if (n as usize / services.len()).is_multiple_of(2) {
                    service.endpoints.pop();
                }
                api.apply(service.slice());
                let next = start + Duration::from_secs(1) * n / CHURN;
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        Self { stop, thread }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
    }
}
