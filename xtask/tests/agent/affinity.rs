//! `sessionAffinity: ClientIP`: a client stays with one of three endpoints.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::thread::ScopedJoinHandle;

use anyhow::{Context, Result, ensure};
use xtask::demo::Cluster;
use xtask::lab::Host;
use xtask::probe::{Ask, Server, Transport};
use xtask::system;

use super::support::{SOON, answered, cluster, eventually};

/// The servers' port.
const TARGET: u16 = 7070;

/// How many Services there are: by chance, a client that moves would choose the same endpoint again for all of them
/// once in 60,000 times.
const SERVICES: u16 = 10;

/// The pods that serve: two on n1, one on n2.
const SERVERS: [(usize, usize); 3] = [(0, 0), (0, 1), (1, 0)];

struct Site {
    cluster: Cluster,
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
        let site = Self { _servers: servers.into_iter().collect::<Result<_>>()?, cluster };
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
        let all: String = (0..SERVICES).map(|number| manifest(number, timeout, &pods)).collect();
        self.cluster.write("sticky.yaml", &all)
    }

    fn cluster_ip(&self, number: u16, family: usize) -> SocketAddr {
        let text = [format!("10.96.8.{number}:80"), format!("[fd00:10:96::8:{number}]:80")];
        parsed(&text[family])
    }

    /// Every frontend of a Service that packets come to by way of n1.
    fn frontends(&self, number: u16, family: usize) -> Vec<SocketAddr> {
        let balancer = [format!("203.0.113.2{number}:80"), format!("[2001:db8:3::2{number}]:80")];
        let external = [format!("203.0.113.15{number}:80"), format!("[2001:db8:3::15{number}]:80")];
        let node_port = self.cluster.lab().node(0).at(30_180 + number)[family];
        vec![self.cluster_ip(number, family), node_port, parsed(&balancer[family]), parsed(&external[family])]
    }

    /// A pod on each node, the outside client, a process of the node; pods on n2 and all others apart.
    fn clients(&self) -> [Host; 4] {
        let lab = self.cluster.lab();
        [lab.pod(0, 2), lab.pod(1, 2), lab.client().clone(), lab.node(0).clone()]
    }
}

fn parsed(text: &str) -> SocketAddr {
    text.parse().unwrap_or(SocketAddr::from(([0; 4], 0)))
}

fn manifest(number: u16, timeout: u32, pods: &[Host]) -> String {
    let node_port = 30_180 + number;
    let mut yaml = format!(
        r#"apiVersion: v1
kind: Service
metadata: {{ name: sticky{number}, namespace: default }}
spec:
  type: LoadBalancer
  clusterIP: 10.96.8.{number}
  clusterIPs: [10.96.8.{number}, "fd00:10:96::8:{number}"]
  externalIPs: [203.0.113.15{number}, "2001:db8:3::15{number}"]
  sessionAffinity: ClientIP
  sessionAffinityConfig: {{ clientIP: {{ timeoutSeconds: {timeout} }} }}
  ports:
    - {{ name: tcp, protocol: TCP, port: 80, targetPort: {TARGET}, nodePort: {node_port} }}
    - {{ name: udp, protocol: UDP, port: 80, targetPort: {TARGET}, nodePort: {node_port} }}
status: {{ loadBalancer: {{ ingress: [{{ ip: 203.0.113.2{number} }}, {{ ip: "2001:db8:3::2{number}" }}] }} }}
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

#[test]
fn a_client_stays_with_one_of_three_endpoints() -> Result<()> {
    all_stay(&Site::start("stay", 3600)?)
}
