//! What these tests share.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use xtask::agent::log_path;
use xtask::demo::{Cluster, vip};
use xtask::lab::{Host, Lab};
use xtask::probe::{Ask, Bulk, Churn, Direction, failures};
use xtask::system::ensure_debian_packages;

/// How long a change may take until packets see it, on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(2);

/// `lb-agent` from the directory that `xtask` was built into.
pub(crate) fn agent_exe() -> Result<PathBuf> {
    let exe = Path::new(env!("CARGO_BIN_EXE_xtask")).with_file_name("lb-agent");
    ensure!(exe.is_file(), "there is no {}: run `cargo build -p lb-agent`", exe.display());
    Ok(exe)
}

/// The demo's applications, with agents, in a lab of their own.
pub(crate) fn cluster(name: &str) -> Result<Cluster> {
    let lab = Lab::builder(name).pods(3).build();
    Cluster::on(lab.context("a lab takes root, cgroup2 and network namespaces")?, agent_exe()?)
}

/// The web service: `web-1` and `web-2` on n1, `web-3` on n2.
pub(crate) fn web() -> [SocketAddr; 2] {
    vip("10.96.0.10", "fd00:10:96::10", 80)
}

/// The file store, whose one backend is on n2.
pub(crate) fn store() -> [SocketAddr; 2] {
    vip("10.96.0.20", "fd00:10:96::20", 80)
}

/// The name server: `dns-1` on n1, `dns-2` on n2.
pub(crate) fn dns() -> [SocketAddr; 2] {
    vip("10.96.0.53", "fd00:10:96::53", 53)
}

/// Repeats `check` until it succeeds, or returns its last error.
pub(crate) fn eventually(patience: Duration, mut check: impl FnMut() -> Result<()>) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        match check() {
            Err(e) if Instant::now() > deadline => return Err(e.context(format!("even after {patience:?}"))),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
            Ok(()) => return Ok(()),
        }
    }
}

/// Asks so often; all must be answered, and the names are returned.
pub(crate) fn answered(from: &Host, ask: &Ask) -> Result<Vec<String>> {
    let answers = from.ask(ask)?;
    let failed = failures(&answers);
    ensure!(failed.is_empty(), "{} → {}: {failed:?}", from.name(), ask.to);
    Ok(answers.iter().filter_map(|a| a.name().map(String::from)).collect())
}

/// Runs Debian's `ip` on a host.
pub(crate) fn ip(host: &Host, args: &[&str]) -> Result<()> {
    ensure_debian_packages(&[("iproute2", "ip")])?;
    let status = host.command("ip").args(args).status()?;
    ensure!(status.success(), "ip {args:?} on {}: {status}", host.name());
    Ok(())
}

/// A value of a node's `/metrics`.
pub(crate) fn metric(node: &Host, sample: &str) -> Result<f64> {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect("127.0.0.1:10249")?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text).map(|_| text)
    };
    let text = node.run_in(ask)??;
    let value = text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    value.with_context(|| format!("no {sample} in\n{text}"))?.parse().context("a number")
}

/// Lets every host of a lab send as many ICMP errors as there are to send.
pub(crate) fn unlimited_errors(lab: &Lab) -> Result<()> {
    for host in lab.hosts() {
        host.sysctl("ipv4.icmp_ratelimit", "0")?;
        host.sysctl("ipv6.icmp.ratelimit", "0")?;
    }
    Ok(())
}

/// What a node's agent has logged.
pub(crate) fn log(node: &Host) -> String {
    std::fs::read_to_string(log_path(node)).unwrap_or_default()
}

/// Waits for words in a node's log; everything that it holds is part of the error.
pub(crate) fn logged(node: &Host, words: &[&str]) -> Result<()> {
    eventually(SOON, || {
        let log = log(node);
        let found = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
        ensure!(found, "no line with {words:?} in the log of {}:\n{log}", node.name());
        Ok(())
    })
}

/// A Service with a ClusterIP and one TCP port 80, and a slice of endpoints for it, as YAML. All of one family.
pub(crate) fn service(name: &str, ip: &str, endpoints: &[SocketAddr]) -> String {
    let mut yaml = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: default }}\n\
         spec:\n  clusterIP: \"{ip}\"\n  ports: [{{ protocol: TCP, port: 80 }}]\n---\n"
    );
    yaml += &slice(name, &format!("{name}-1"), endpoints);
    yaml
}

/// A slice of endpoints for a Service's only, unnamed port.
pub(crate) fn slice(service: &str, name: &str, endpoints: &[SocketAddr]) -> String {
    named_slice(service, name, "", endpoints)
}

/// As [`slice`], for the port of that name.
pub(crate) fn named_slice(service: &str, name: &str, port_name: &str, endpoints: &[SocketAddr]) -> String {
    let (family, port) = match endpoints.first() {
        Some(at) if at.is_ipv6() => ("IPv6", at.port()),
        Some(at) => ("IPv4", at.port()),
        None => ("IPv4", 8080),
    };
    let mut yaml = format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}\n  namespace: default\n  \
         labels: {{ kubernetes.io/service-name: {service} }}\naddressType: {family}\n\
         ports: [{{ name: \"{port_name}\", protocol: TCP, port: {port} }}]\nendpoints:\n"
    );
    for at in endpoints {
        let _ = writeln!(yaml, "  - {{ addresses: [\"{}\"] }}", at.ip());
    }
    yaml
}

/// Traffic in the background that must not suffer from what happens meanwhile.
#[derive(Default)]
pub(crate) struct Traffic {
    stop: Arc<AtomicBool>,
    workers: Vec<(String, JoinHandle<Result<Vec<Span>>>)>,
}

/// A piece of work that succeeded, from when to when.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span(pub(crate) Instant, pub(crate) Instant);

impl Traffic {
    fn work(&mut self, what: String, mut piece: impl FnMut() -> Result<()> + Send + 'static) {
        let stop = self.stop.clone();
        let worker = std::thread::spawn(move || {
            let mut done = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let start = Instant::now();
                piece()?;
                done.push(Span(start, Instant::now()));
            }
            Ok(done)
        });
        self.workers.push((what, worker));
    }

    /// New connections, one after the other; one that takes as long as a retransmitted SYN counts as failed.
    pub(crate) fn connections(&mut self, from: &Host, to: SocketAddr) {
        let (from, what) = (from.clone(), format!("connections {} → {to}", from.name()));
        self.work(what, move || {
            let churn = Churn { timeout: Duration::from_millis(900), ..Churn::new(to, 100, 1) };
            let report = from.churn(&churn)?;
            ensure!(report.ok == 100, "{report:?}");
            Ok(())
        });
    }

    /// New connections, a few hundred a second; one that takes as long as a retransmitted SYN counts as failed.
    pub(crate) fn new_connections(&mut self, from: &Host, to: SocketAddr) -> Result<()> {
        let ask = Ask::tcp(to).timeout(Duration::from_millis(900)).count(1_000_000);
        let mut answers = from.start_asking(&ask.interval(Duration::from_millis(2)))?;
        self.work(format!("new connections {} → {to}", from.name()), move || {
            let answer = answers.next().context("the client ended")?;
            answer.0.map(drop).map_err(|e| anyhow::anyhow!("not answered: {e}"))
        });
        Ok(())
    }

    /// Streams of so many bytes, one after the other.
    pub(crate) fn streams(&mut self, from: &Host, to: SocketAddr, bytes: u64, direction: Direction) {
        let (from, what) = (from.clone(), format!("streams {} → {to} {direction:?}", from.name()));
        self.work(what, move || {
            let report = from.bulk(&Bulk::new(to, bytes, direction))?;
            ensure!(report.ok, "{report:?}");
            Ok(())
        });
    }

    /// Requests over one socket, all of which have to be answered by the same server. Over UDP every single packet
    /// counts. Without an interval of its own, it asks every two milliseconds.
    pub(crate) fn conversation(&mut self, from: &Host, ask: &Ask) -> Result<()> {
        let what = format!("conversation {} → {}", from.name(), ask.to);
        let interval = if ask.interval.is_zero() { Duration::from_millis(2) } else { ask.interval };
        let ask = ask.clone().keep().count(1_000_000).interval(interval);
        let (mut answers, mut server) = (from.start_asking(&ask)?, None);
        self.work(what, move || {
            let answer = answers.next().context("the client ended")?;
            let name = answer.0.map_err(|e| anyhow::anyhow!("not answered: {e}"))?.name;
            let first = server.get_or_insert_with(|| name.clone());
            ensure!(*first == name, "{first} answered, and then {name}");
            Ok(())
        });
        Ok(())
    }

    /// Ends all of it. Every piece must have succeeded, and everybody must have done something after `last`.
    pub(crate) fn finish(mut self, last: Instant) -> Result<Vec<(String, Vec<Span>)>> {
        self.stop.store(true, Ordering::Relaxed);
        let (mut all, mut wrong) = (Vec::new(), String::new());
        for (what, worker) in self.workers.drain(..) {
            match worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)) {
                Ok(done) if done.iter().any(|span| span.1 > last) => all.push((what, done)),
                Ok(done) => drop(writeln!(wrong, "{what}: only {} pieces, none at the end", done.len())),
                Err(e) => drop(writeln!(wrong, "{what}: {e:#}")),
            }
        }
        if wrong.is_empty() { Ok(all) } else { bail!("{wrong}") }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
