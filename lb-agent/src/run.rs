//! `lb-agent run`: puts the parts together.

use crate::cli::{RunArgs, SocketLb, SourceArgs};
use crate::events::Events;
use crate::health;
use crate::install::conf_dir::ConfDir;
use crate::install::keep::Keeper;
use crate::install::plugin::Plugin;
use crate::kernel::destroy;
use crate::kernel::devices::{self, Devices};
use crate::kernel::fill::Fill;
use crate::kernel::foreign::{Beside, Guard};
use crate::kernel::losses::Losses;
use crate::kernel::pins::{Pins, Place};
use crate::kernel::ports;
use crate::kernel::presence::Marks;
use crate::kernel::programs::{self, Features};
use crate::kernel::sockets;
use crate::kernel::sweep::Sweeper;
use crate::kernel::tables::Tables;
use crate::kernel::upgrade;
use crate::kernel::writer::MapWriter;
use crate::masq_config::{ConfigFile, MasqConfig};
use crate::memory;
use crate::metrics::{Collector, Kind, Sample, process};
use crate::source::kube::{Access, Cluster};
use crate::source::{self, Event};
use crate::store::Change;
use crate::sync::{self, Reports};
use anyhow::{Context as _, Result, anyhow};
use ipnet::IpNet;
use lb_common::datapath::Reason;
use lb_common::maps::stance;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{info, warn};

/// Rest after a look at the programs' log: a flood of dropped packets must not keep the agent busy.
const LOG_REST: Duration = Duration::from_millis(100);

/// Runs the agent until it is told to stop. What it put into the kernel stays there.
///
/// # Errors
/// If it cannot start, or cannot go on.
pub async fn run(args: RunArgs) -> Result<()> {
    raise_file_limit();
    let node_name = args.node_name().map_err(|e| anyhow!(e))?;
    // Before anything is changed: an agent that has nothing to serve must not replace one that had.
    let source = Source::open(args.source().map_err(|e| anyhow!(e))?).await?;
    let features = Features::probe()?;
    let pins = Pins::prepare(&args.bpffs)?;
    let _only_one = lock(&pins)?;
    info!("lb-agent {} on node {node_name}: {}", env!("CARGO_PKG_VERSION"), features.describe());

    upgrade::begin(&pins, &args, features)?;
    let result = serve(args, node_name, source, features, pins.clone()).await;
    if result.is_err() {
        upgrade::give_up(&pins, features);
    }
    result
}

/// From when another version's programs, if there were any, have ours in front of them.
async fn serve(
    args: RunArgs,
    node_name: String,
    source: Source,
    features: Features,
    pins: Pins,
) -> Result<()> {
    let mut ebpf = programs::load(&pins, &args, features, Place::Main)?;
    sockets::attach(&mut ebpf, &pins, &args)?;
    if args.socket_lb == SocketLb::Host && programs::netns_cookie() == 0 {
        sockets::learn_netns(&mut Tables::open(&pins)?)
            .context("tell the socket hooks the node's namespace")?;
    }
    if args.log_packets {
        follow_packet_log(&mut ebpf)?;
    }
    let mut tables = Tables::open(&pins)?;
    ports::reserve(&mut tables.ports)?;
    // A cleanup may have begun, and not ended.
    tables.stance.set(0, stance::SERVE, 0).context("serve what begins")?;
    // Others may have filled them.
    Tables::open(&pins)?.complete(&pins)?;
    let (exempt, config_file) = no_masquerade(&args);
    let mut writer = MapWriter::new(Tables::open(&pins)?, args.cluster_cidr.0.clone(), exempt);
    if args.socket_lb != SocketLb::Off
        && let Some(nudge) = destroy::start(&pins)?
    {
        writer.tell_of_gone_backends(nudge);
    }
    let reports = Reports { events: source.events(&node_name), ..Reports::default() };
    let mut sweeper = Sweeper::open(&pins, args.conntrack.timeouts())?;
    let fill = Fill::open(&pins)?;
    writer.tell_of_fill(fill.clone());
    sweeper.tell_of_fill(fill.clone());
    let device_stats = devices::Stats::default();
    measure(&reports, Tables::open(&pins)?, &sweeper, &fill, device_stats.clone());
    tokio::spawn(Losses::new(Tables::open(&pins)?, reports.events.clone())?.run());
    if let Some(samples) = source.samples() {
        reports.metrics.collect(samples);
    }
    report(&args, &node_name, reports.clone());

    let (events, receiver) = mpsc::channel(source::QUEUE);
    if let Some(file) = config_file {
        if !file.is_good() {
            writer.inherit_no_masquerade();
        }
        tokio::spawn(file.run(events.clone()));
    }
    Marks::open(&pins)?.distrust()?;
    programs::pin(&mut ebpf, &pins, features, Place::Main)?;
    let attacher = upgrade::finish(&pins, features)?;
    let xdp = programs::pin_xdp(&mut ebpf, &pins, &args);
    // What is attached and pinned stays; the rest is memory.
    drop(ebpf);
    memory::give_back();
    let writer = Beside::new(writer, Guard::start(&pins)?);
    let devices =
        follow_devices(Devices::new(attacher, xdp, pins, args.clone(), device_stats)?, events.clone());
    keep_plugin(&args)?;
    let source = source.start(node_name, events);
    let sync = tokio::spawn(sync::run(args.desired(), receiver, writer, reports));

    tokio::select! {
        result = devices => result.context("the device manager")?.context("the device manager"),
        result = source => result.context("the source")?.context("the source"),
        result = sync => result.context("the main loop")?.context("the main loop"),
        result = sweeper.run() => result.context("the sweeper"),
        told = told_to_stop() => told,
    }?;
    info!("stopping; what is programmed keeps forwarding");
    Ok(())
}

/// Waits for the signals that tell a process to stop.
///
/// # Errors
/// If they cannot be waited for.
pub async fn told_to_stop() -> Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Keeps the CNI plugin in the network configuration, now that there is something pinned for it to attach.
fn keep_plugin(args: &RunArgs) -> Result<()> {
    if let Some(dir) = args.cni_conf_dir.get() {
        let plugin = args.cni_bin_dir.get().map(|dir| Plugin::new(None, dir)).transpose()?;
        tokio::spawn(Keeper::new(ConfDir::new(dir, &args.bpffs), plugin).run());
    }
    Ok(())
}

/// As many files as we may have: health checks take two sockets for each Service, and the usual soft limit of 1024 is
/// there for programs that call `select`.
fn raise_file_limit() {
    let Ok((now, most)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    if now >= most {
        return;
    }
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, most, most) {
        warn!("cannot raise the limit of open files to {most}: {error}");
    }
}

/// What pods reach with their own address, and the file that will tell if it changes.
fn no_masquerade(args: &RunArgs) -> (Vec<IpNet>, Option<ConfigFile>) {
    let flags = &args.non_masquerade_cidrs.0;
    let Some(path) = &args.ip_masq_agent_config else {
        return (MasqConfig::without_file().ranges(flags), None);
    };
    let mut file = ConfigFile::new(path, flags.clone());
    file.read();
    (file.ranges(), Some(file))
}

/// Passes on what the programs log.
fn follow_packet_log(ebpf: &mut aya::Ebpf) -> Result<()> {
    let logger = aya_log::EbpfLogger::init(ebpf).context("read the programs' log")?;
    // SAFETY: the logger owns its ring, whose file descriptor stays the same and open as long as the logger is there.
    let logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) };
    let mut logger = logger.map_err(io::Error::from).context("wait for the programs' log")?;
    tokio::spawn(async move {
        loop {
            match logger.readable_mut().await {
                Ok(mut ready) => {
                    ready.get_inner_mut().flush();
                    ready.clear_ready();
                }
                Err(error) => {
                    warn!("what the programs log is not read any more: {error}");
                    return;
                }
            }
            tokio::time::sleep(LOG_REST).await;
        }
    });
    Ok(())
}

/// Two agents must not write the same maps: the second waits for the first to go (a rolling update).
fn lock(pins: &Pins) -> Result<File> {
    let dir = File::open(pins.root()).with_context(|| format!("open {}", pins.root().display()))?;
    if dir.try_lock().is_err() {
        info!("another agent is in charge of {}: waiting for it to stop", pins.root().display());
        dir.lock().with_context(|| format!("lock {}", pins.root().display()))?;
    }
    Ok(dir)
}

/// Makes everything known that others ask for, or are to be told.
fn report(args: &RunArgs, node_name: &str, reports: Reports) {
    let Reports { health, metrics, checks, events } = reports;
    if let Some(address) = args.healthz_bind_address.0 {
        tokio::spawn(health::serve("health checks", address, health.handler()));
    }
    if let Some(address) = args.probe_bind_address.0 {
        tokio::spawn(health::serve("the kubelet's probes", address, health.probes()));
    }
    if let Some(address) = args.metrics_bind_address.0 {
        tokio::spawn(health::serve("metrics", address, metrics.handler(&health)));
    }
    events.starting();
    tokio::spawn(checks.run(node_name.into(), health, events));
}

type Task = tokio::task::JoinHandle<Result<()>>;

fn follow_devices(devices: Devices, events: source::Sender) -> Task {
    let (sender, mut addresses) = mpsc::channel(1);
    tokio::spawn(async move {
        while let Some(local) = addresses.recv().await {
            if events.send(Event::Changes(vec![Change::Addresses(local)])).await.is_err() {
                return;
            }
        }
    });
    tokio::spawn(devices.run(sender))
}

/// A source that can be reached as far as can be told from here.
enum Source {
    Manifests(PathBuf),
    Cluster(Cluster),
}

impl Source {
    async fn open(source: SourceArgs) -> Result<Self> {
        let (access, master) = match source {
            SourceArgs::Manifests(dir) => {
                let listed = std::fs::read_dir(&dir);
                listed.with_context(|| format!("read the manifests in {} (--manifests)", dir.display()))?;
                return Ok(Self::Manifests(dir));
            }
            SourceArgs::Kubeconfig(path, master) => (Access::Kubeconfig(path), master),
            SourceArgs::InCluster(master) => (Access::InCluster, master),
            SourceArgs::Master(master) => (Access::Anonymous, Some(master)),
        };
        let cluster = Cluster::open(access, master.as_deref()).await;
        cluster.context("set up access to the API server").map(Self::Cluster)
    }

    /// Where to send Kubernetes Events: without an API server, nowhere.
    fn events(&self, node_name: &str) -> Events {
        match self {
            Self::Manifests(_) => Events::default(),
            Self::Cluster(cluster) => Events::start(cluster.client(), node_name),
        }
    }

    /// How the requests to it go.
    fn samples(&self) -> Option<Collector> {
        match self {
            Self::Manifests(_) => None,
            Self::Cluster(cluster) => {
                let cluster = cluster.clone();
                Some(Box::new(move || cluster.samples()))
            }
        }
    }

    fn start(self, node_name: String, events: source::Sender) -> Task {
        match self {
            Self::Manifests(dir) => {
                info!("serving the manifests in {}", dir.display());
                tokio::spawn(async move {
                    source::manifests::run(&dir, &node_name, events).await.context("read the manifests")
                })
            }
            Self::Cluster(cluster) => {
                info!("watching the API server {}", cluster.url());
                tokio::spawn(async move {
                    source::kube::run(cluster, &node_name, source::kube::Scope::default(), events).await;
                    Ok(())
                })
            }
        }
    }
}

/// Adds all that is measured to the metrics of the main loop.
fn measure(reports: &Reports, tables: Tables, sweeper: &Sweeper, fill: &Fill, devices: devices::Stats) {
    let Reports { metrics, checks, events, .. } = reports.clone();
    metrics.collect(counters(tables));
    metrics.collect(sweeper.samples());
    metrics.collect(fill.samples());
    metrics.collect(Box::new(move || devices.samples()));
    metrics.collect(Box::new(process::samples));
    metrics.collect(Box::new(move || events.samples()));
    metrics.collect(Box::new(move || checks.samples()));
}

/// What the programs count.
fn counters(tables: Tables) -> Collector {
    let tables = Mutex::new(tables);
    Box::new(move || {
        let Ok(tables) = tables.lock() else { return Vec::new() };
        let (drops, events): (Vec<Reason>, Vec<Reason>) = Reason::ALL.iter().partition(|r| r.is_drop());
        let samples = |reasons: Vec<Reason>, name: &'static str, help: &'static str, label: &'static str| {
            reasons
                .into_iter()
                .map(|reason| {
                    let count = tables.counter(reason).unwrap_or(0);
                    Sample::new(name, help, Kind::Counter, count as f64).with(label, reason.name())
                })
                .collect::<Vec<_>>()
        };
        let mut all = samples(drops, "lb_drops_total", "Packets dropped or rejected, by reason", "reason");
        all.extend(samples(
            events,
            "lb_events_total",
            "Things that happened to packets that went on",
            "event",
        ));
        all
    })
}

#[cfg(test)]
mod reference;
