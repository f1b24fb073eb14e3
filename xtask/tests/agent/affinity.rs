//! `sessionAffinity: ClientIP`: a client stays with one of three endpoints.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xtask::demo::Cluster;
use xtask::lab::Host;
use xtask::probe::{Ask, Question, Server, Survey, Transport};
use xtask::system;

use super::support::{SOON, answered, cluster, eventually};

/// The servers' port.
const TARGET: u16 = 7070;

/// How many Services there are: by chance, a client that moves would choose the same endpoint again for all of them
/// once in 60,000 times.
const SERVICES: u16 = 10;

/// Source ports that the kernel chooses for nobody, and that no server has.
const FIRST_PORT: u16 = 1_100;

/// One more, without affinity.
const FREE: u16 = SERVICES;

/// The pods that serve: two on n1, one on n2.
const SERVERS: [(usize, usize); 3] = [(0, 0), (0, 1), (1, 0)];

struct Site {
    cluster: Cluster,
    next_port: AtomicU16,
    _servers: Vec<Server>,
}

impl Site {
    /// Services with that timeout, in seconds.
    fn start(name: &str, timeout: u32) -> Result<Self> {
        system::ensure_debian_packages(&[("iproute2", "ip")])?;
        let cluster = cluster(name)?;
        let lab = cluster.lab();
        for (family, net, via) in [
            ("-4", "10.96.0.0/16", lab.node(0).ips()[0].to_string()),
            ("-6", "fd00:10:96::/48", lab.node(0).ips()[1].to_string()),
        ] {
            let mut ip = lab.wire().command("ip");
            ensure!(ip.args([family, "route", "add", net, "via", &via]).status()?.success(), "routing {net}");
        }
        let servers = SERVERS.map(|(node, pod)| lab.pod(node, pod).serve_ports(&[TARGET], &[TARGET]));
        let next_port = FIRST_PORT.into();
        let site = Self { next_port, _servers: servers.into_iter().collect::<Result<_>>()?, cluster };
        site.write(timeout, &[])?;
        for to in [0, 1].map(|family| site.cluster_ip(SERVICES - 1, family)) {
            for node in [0, 1] {
                let pod = site.cluster.lab().pod(node, 2);
                eventually(SOON, || answered(&pod, &Ask::tcp(to)).map(drop))?;
            }
        }
        Ok(site)
    }

    /// Writes all Services, without the endpoints of these pods.
    fn write(&self, timeout: u32, gone: &[&str]) -> Result<()> {
        let pods = SERVERS.map(|(node, pod)| self.cluster.lab().pod(node, pod));
        let pods: Vec<_> = pods.into_iter().filter(|pod| !gone.contains(&pod.name())).collect();
        let all: String = (0..=FREE).map(|number| manifest(number, timeout, &pods)).collect();
        self.cluster.write("sticky.yaml", &all)
    }

    fn cluster_ip(&self, number: u16, family: usize) -> SocketAddr {
        let text = [format!("10.96.8.{number}:80"), format!("[fd00:10:96::8:{number}]:80")];
        parsed(&text[family])
    }

    /// Every frontend of a Service that packets come to by way of n1.
    fn frontends(&self, number: u16, family: usize) -> Vec<SocketAddr> {
        let node_port = self.cluster.lab().node(0).at(30_180 + number)[family];
        let outside = [20, 150].map(|first| {
            let last = first + number;
            parsed(&[format!("203.0.113.{last}:80"), format!("[2001:db8:3::{last}]:80")][family])
        });
        [[self.cluster_ip(number, family), node_port], outside].concat()
    }

    /// A pod on each node, the outside client, a process of n1.
    fn clients(&self) -> [Host; 4] {
        let lab = self.cluster.lab();
        [lab.pod(0, 2), lab.pod(1, 2), lab.client().clone(), lab.node(0).clone()]
    }
}

fn parsed(text: &str) -> SocketAddr {
    text.parse().unwrap_or(SocketAddr::from(([0; 4], 0)))
}

fn manifest(number: u16, timeout: u32, pods: &[Host]) -> String {
    let (node_port, balancer, external) = (30_180 + number, 20 + number, 150 + number);
    let affinity = if number == FREE { "None" } else { "ClientIP" };
    let mut yaml = format!(
        r#"apiVersion: v1
kind: Service
metadata: {{ name: sticky{number}, namespace: default }}
spec:
  type: LoadBalancer
  clusterIP: 10.96.8.{number}
  clusterIPs: [10.96.8.{number}, "fd00:10:96::8:{number}"]
  externalIPs: [203.0.113.{external}, "2001:db8:3::{external}"]
  sessionAffinity: {affinity}
  sessionAffinityConfig: {{ clientIP: {{ timeoutSeconds: {timeout} }} }}
  ports:
    - {{ name: tcp, protocol: TCP, port: 80, targetPort: {TARGET}, nodePort: {node_port} }}
    - {{ name: udp, protocol: UDP, port: 80, targetPort: {TARGET}, nodePort: {node_port} }}
status: {{ loadBalancer: {{ ingress: [{{ ip: 203.0.113.{balancer} }}, {{ ip: "2001:db8:3::{balancer}" }}] }} }}
---
"#
    );
    for (i, family) in ["IPv4", "IPv6"].into_iter().enumerate() {
        let _ = write!(
            yaml,
            r#"apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: sticky{number}-{}
  namespace: default
  labels: {{ kubernetes.io/service-name: sticky{number} }}
addressType: {family}
ports:
  - {{ name: tcp, protocol: TCP, port: {TARGET} }}
  - {{ name: udp, protocol: UDP, port: {TARGET} }}
endpoints:
"#,
            family.to_lowercase()
        );
        for pod in pods {
            let _ =
                writeln!(yaml, "  - {{ addresses: [\"{}\"], nodeName: {} }}", pod.ips()[i], &pod.name()[..2]);
        }
        yaml += "---\n";
    }
    yaml
}

/// Over which, in which family.
const WAYS: [(Transport, usize); 4] =
    [(Transport::Tcp, 0), (Transport::Tcp, 1), (Transport::Udp, 0), (Transport::Udp, 1)];

fn ask((transport, _): (Transport, usize), to: SocketAddr) -> Ask {
    Ask { transport, ..Ask::tcp(to) }
}

/// All work for all at the same time.
fn at_once<T: Send, R: Send>(all: Vec<T>, work: impl Fn(T) -> Result<R> + Sync) -> Result<Vec<R>> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = all.into_iter().map(|one| scope.spawn(move || work(one))).collect();
        let join = |thread: ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    })
}

/// The one that answers all.
fn the_one(names: &[String], what: impl Fn() -> String) -> Result<String> {
    let first = names.first().with_context(&what)?;
    ensure!(names.iter().all(|name| name == first), "{}: {names:?}", what());
    Ok(first.clone())
}

/// Everybody stays with one endpoint, whichever way they come.
fn all_stay(site: &Site) -> Result<()> {
    let clients: Vec<_> = site.clients().into_iter().flat_map(|c| WAYS.map(|way| (c.clone(), way))).collect();
    at_once(clients, |(client, way)| {
        let what = || format!("{} {way:?}", client.name());
        let mut names = answered(&client, &ask(way, site.cluster_ip(0, way.1)).count(30))?;
        // n2's agent has no part in what comes to n1.
        if client != site.cluster.lab().pod(1, 2) {
            for to in site.frontends(0, way.1) {
                names.extend(answered(&client, &ask(way, to).count(5))?);
            }
        }
        the_one(&names, what)
    })?;
    Ok(())
}

/// Who answers each client at each Service, in each way: all of them asked once, from new ports.
fn choices(site: &Site) -> Result<Vec<String>> {
    let questions: Vec<_> = WAYS
        .into_iter()
        .flat_map(|way| (0..SERVICES).map(move |number| (way, number)))
        .map(|((transport, family), number)| Question {
            transport,
            unconnected: false,
            to: site.cluster_ip(number, family),
            timeout: Duration::from_secs(2),
            least: 1,
            most: 1,
            until: Vec::new(),
        })
        .collect();
    let first_port = site.next_port.fetch_add(questions.len() as u16, Ordering::Relaxed);
    let survey = Survey { workers: 4, first_port };
    let all = at_once(site.clients().into(), |client| {
        let tallies = client.survey(&survey, &questions)?;
        let name = |(tally, question): (xtask::probe::Tally, &Question)| {
            let what = || format!("{} → {}: {tally:?}", client.name(), question.to);
            Ok(tally.answers.first().with_context(what)?.0.clone())
        };
        tallies.into_iter().zip(&questions).map(name).collect::<Result<Vec<_>>>()
    })?;
    Ok(all.concat())
}

#[test]
fn affinity_outlives_agents_and_ends_with_the_endpoint() -> Result<()> {
    let mut site = Site::start("stay", 3600)?;
    all_stay(&site)?;
    let before = choices(&site)?;
    site.cluster.kill_agent(0);
    ensure!(choices(&site)? == before, "without an agent");
    site.cluster.start_agent(0, &[])?;
    ensure!(choices(&site)? == before, "with a new agent");

    let gone = "n1p2";
    site.write(3600, &[gone])?;
    let mut after = Vec::new();
    eventually(SOON, || {
        after = choices(&site)?;
        ensure!(!after.iter().any(|name| name == gone), "{gone} still answers");
        Ok(())
    })?;
    let had_others = |(before, _): &(&String, &String)| *before != gone;
    ensure!(before.iter().zip(&after).filter(had_others).all(|(before, after)| before == after));
    // What comes back is for others.
    site.write(3600, &[])?;
    let pod = site.cluster.lab().pod(0, 2);
    eventually(SOON, || {
        let names = answered(&pod, &Ask::tcp(site.cluster_ip(FREE, 0)).count(20))?;
        ensure!(names.iter().any(|name| name == gone), "{names:?}");
        Ok(())
    })?;
    ensure!(choices(&site)? == after, "an endpoint has come back");

    // Pods' own addresses count also where their sockets are served.
    for node in [0, 1] {
        site.cluster.restart_agent(node, &["--socket-lb=all"])?;
    }
    ensure!(choices(&site)? == after, "with sockets of pods served");
    all_stay(&site)
}

/// Longer than that nobody is remembered: whole seconds are counted.
const TIMEOUT: Duration = Duration::from_secs(2);
const FORGOTTEN: Duration = Duration::from_millis(3100);

#[test]
fn affinity_ends_some_time_after_the_last_new_connection() -> Result<()> {
    let site = Site::start("expire", TIMEOUT.as_secs() as u32)?;
    let (start, mut since, mut asked) = (Instant::now(), Instant::now(), Instant::now());
    let mut known = choices(&site)?;
    while since.elapsed() < FORGOTTEN + Duration::from_millis(400) {
        ensure!(start.elapsed() < Duration::from_secs(60), "the machine is too busy to ask often enough");
        let (last, now) = (std::mem::replace(&mut asked, Instant::now()), choices(&site)?);
        if last.elapsed() > TIMEOUT {
            // That took too long to say anything.
            since = asked;
        } else {
            ensure!(now == known, "somebody has moved, though not long after the last connection");
        }
        known = now;
        std::thread::sleep(Duration::from_millis(200));
    }
    let mut moved = vec![false; site.clients().len() * WAYS.len()];
    for _ in 0..3 {
        std::thread::sleep(FORGOTTEN);
        let now = choices(&site)?;
        let ways = known.chunks(SERVICES.into()).zip(now.chunks(SERVICES.into()));
        moved.iter_mut().zip(ways).for_each(|(moved, (before, now))| *moved |= before != now);
        if moved.iter().all(|&moved| moved) {
            return Ok(());
        }
        known = now;
    }
    anyhow::bail!("by client and way, who has moved: {moved:?}")
}
