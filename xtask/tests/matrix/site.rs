//! The lab, its servers and its agents.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xtask::agent::{Agent, log_tail};
use xtask::lab::{Host, Lab};
use xtask::probe::{Serve, Server};

use super::cells::{Backend, Client, Front, Service, State};

/// The port of every Service.
pub(crate) const PORT: u16 = 80;

/// The port of servers.
pub(crate) const TARGET: u16 = 8080;

/// What is resolved on n1, whoever asks.
pub(crate) const ON_N1: [Front; 4] =
    [Front::ClusterIp, Front::NodePort(0), Front::LoadBalancer, Front::ExternalIp];

/// Clear of NodePorts and of masqueraded flows.
const FIRST_SOURCE_PORT: u16 = 33_000;

/// How long an agent may take until it is ready.
const PATIENCE: Duration = Duration::from_secs(20);

/// A lab with servers `here`, `there` and `node`, others `here-b` and so on at their next port, and an agent on each
/// node.
pub(crate) struct Site {
    manifests: PathBuf,
    agents: Vec<Agent>,
    _servers: Vec<Server>,
    next_source_port: AtomicU16,
    pub(crate) lab: Lab,
}

impl Site {
    /// Starts everything; `files` are manifests by name.
    pub(crate) fn start(name: &str, files: &[(&str, String)]) -> Result<Self> {
        let site = Self::without_agents(name, files)?;
        site.with_agents()
    }

    /// The lab, with servers and manifests.
    pub(crate) fn without_agents(name: &str, files: &[(&str, String)]) -> Result<Self> {
        let lab = Lab::builder(name).pods(2).build();
        let lab = lab.context("a lab takes root, cgroup2 and network namespaces")?;
        // ClusterIPs from outside: the router sends them to n1, as it does LoadBalancer addresses.
        for (args, via) in [
            (["-4", "10.96.0.0/16"], lab.node(0).ips()[0]),
            (["-6", "fd00:10:96::/48"], lab.node(0).ips()[1]),
        ] {
            let mut ip = lab.wire().command("ip");
            ip.args([args[0], "route", "add", args[1], "via", &via.to_string()]);
            ensure!(ip.status()?.success(), "routing {args:?}");
        }
        let mut servers = Vec::new();
        for (host, name) in [(&lab.pod(0, 0), "here"), (&lab.pod(1, 0), "there"), (lab.node(0), "node")] {
            for (name, port) in [(name.to_owned(), TARGET), (format!("{name}-b"), TARGET + 1)] {
                servers.push(host.serve(&Serve { name, tcp: vec![port], udp: vec![port] })?);
            }
        }
        let manifests = lab.node(0).state_dir().join("manifests");
        fs::create_dir(&manifests)?;
        let site = Self {
            manifests,
            agents: Vec::new(),
            _servers: servers,
            next_source_port: FIRST_SOURCE_PORT.into(),
            lab,
        };
        site.write("nodes.yaml", &documents(&[site.node_object(0), site.node_object(1)]))?;
        files.iter().try_for_each(|(file, text)| site.write(file, text))?;
        Ok(site)
    }

    fn with_agents(mut self) -> Result<Self> {
        let exe = Path::new(env!("CARGO_BIN_EXE_xtask")).with_file_name("lb-agent");
        ensure!(exe.is_file(), "there is no {}: run `cargo build -p lb-agent`", exe.display());
        for node in 0..2 {
            self.agents.push(Agent::start(&exe, self.lab.node(node), &self.manifests, &[])?);
        }
        self.agents.iter_mut().try_for_each(|agent| agent.wait_healthy(PATIENCE))?;
        Ok(self)
    }

    /// Writes a manifest; nobody reads half of it.
    pub(crate) fn write(&self, file: &str, text: &str) -> Result<()> {
        let aside = self.manifests.join(format!(".{file}.tmp"));
        fs::write(&aside, text)?;
        Ok(fs::rename(aside, self.manifests.join(file))?)
    }

    /// Removes a manifest.
    pub(crate) fn remove(&self, file: &str) -> Result<()> {
        Ok(fs::remove_file(self.manifests.join(file))?)
    }

    /// The first source port of the next survey, after `used` more. No port is used again soon: the flows of datagrams
    /// outlive their sockets.
    pub(crate) fn source_port(&self, used: usize) -> u16 {
        let next = usize::from(self.next_source_port.load(Ordering::Relaxed)) + used;
        let next = if next > 55_000 { FIRST_SOURCE_PORT } else { next as u16 };
        self.next_source_port.store(next, Ordering::Relaxed);
        next
    }

    /// What else there is to say of a failure: the agents' drops and last words, and what servers lost by themselves.
    pub(crate) fn words(&self) -> String {
        let mut text = String::new();
        for node in 0..2 {
            let host = self.lab.node(node);
            let drops = host.run_in(drops).unwrap_or_default();
            let _ = writeln!(text, "{} dropped {drops}\n{}", host.name(), log_tail(host));
        }
        for host in [&self.lab.pod(0, 0), &self.lab.pod(1, 0), self.lab.node(0)] {
            let lost = host.run_in(overruns).unwrap_or_default();
            let _ = writeln!(text, "{} had no room for {lost:?} datagrams", host.name());
        }
        text
    }

    fn node_object(&self, node: usize) -> Value {
        let n = node + 1;
        let cidrs = [format!("10.244.{n}.0/24"), format!("fd00:10:244:{n}::/64")];
        let addresses = self.lab.node(node).ips().map(|ip| json!({"type": "InternalIP", "address": ip}));
        json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": self.lab.node(node).name()},
            "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs}, "status": {"addresses": addresses},
        })
    }

    /// Where a client's processes run.
    pub(crate) fn host(&self, client: Client) -> Host {
        match client {
            Client::Pod(node) => self.lab.pod(node, 1),
            Client::Backend => self.lab.pod(0, 0),
            Client::Process(node) => self.lab.node(node).clone(),
            Client::Outside => self.lab.client().clone(),
        }
    }

    /// Where a Service is asked.
    pub(crate) fn destination(&self, front: Front, number: u8, v4: bool) -> SocketAddr {
        let (family, node_port) = (usize::from(!v4), node_port(number));
        match front {
            Front::ClusterIp => SocketAddr::new(cluster_ip(number)[family], PORT),
            Front::LoadBalancer => SocketAddr::new(load_balancer_ip(number)[family], PORT),
            Front::ExternalIp => SocketAddr::new(external_ip(number)[family], PORT),
            Front::NodePort(node) => self.lab.node(node).at(node_port)[family],
            Front::Localhost if v4 => (Ipv4Addr::LOCALHOST, node_port).into(),
            Front::Localhost => (Ipv6Addr::LOCALHOST, node_port).into(),
        }
    }

    /// Every address of a node, as servers may see it.
    pub(crate) fn node_ips(&self, node: usize) -> Vec<IpAddr> {
        let (n, mut ips) = (node as u8 + 1, self.lab.node(node).ips().to_vec());
        for host in [0, 1] {
            ips.push(Ipv4Addr::new(10, 244, n, host).into());
            ips.push(Ipv6Addr::new(0xfd00, 0x10, 0x244, n.into(), 0, 0, 0, host.into()).into());
        }
        ips
    }
}

/// A Service's ClusterIPs.
pub(crate) fn cluster_ip(number: u8) -> [IpAddr; 2] {
    let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x100 + u16::from(number));
    [Ipv4Addr::new(10, 96, 1, number).into(), v6.into()]
}

fn load_balancer_ip(number: u8) -> [IpAddr; 2] {
    let v6 = Ipv6Addr::new(0x2001, 0xdb8, 3, 0, 0, 0, 0, number.into());
    [Ipv4Addr::new(203, 0, 113, number).into(), v6.into()]
}

/// In the upper half of what the wire routes to n1.
fn external_ip(number: u8) -> [IpAddr; 2] {
    load_balancer_ip(128 + number)
}

fn node_port(number: u8) -> u16 {
    30_100 + u16::from(number)
}

/// Documents of one YAML file.
pub(crate) fn documents(objects: &[Value]) -> String {
    objects.iter().map(|object| format!("{object}\n---\n")).collect()
}

/// A Service that can be reached in every way, and its slices. `spec` and `labels` are added.
pub(crate) fn objects(name: &str, number: u8, backends: &[Backend], spec: &Value) -> Vec<Value> {
    let (ips, external) = (cluster_ip(number), external_ip(number));
    let ports = ["TCP", "UDP"].map(|protocol| {
        json!({"name": protocol.to_lowercase(), "protocol": protocol, "port": PORT, "targetPort": TARGET,
               "nodePort": node_port(number)})
    });
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
        "spec": {"type": "LoadBalancer", "clusterIP": ips[0], "clusterIPs": ips, "externalIPs": external,
                 "ipFamilyPolicy": "RequireDualStack", "ports": ports},
        "status": {"loadBalancer": {"ingress": load_balancer_ip(number).map(|ip| json!({"ip": ip}))}},
    });
    merge(&mut service["spec"], spec);
    let mut all = vec![service];
    all.extend([true, false].map(|v4| slice(name, backends, v4)));
    all
}

/// Puts the members of `with` into an object.
pub(crate) fn merge(into: &mut Value, with: &Value) {
    for (key, value) in with.as_object().into_iter().flatten() {
        into[key.as_str()] = value.clone();
    }
}

/// The endpoints of one family.
pub(crate) fn slice(service: &str, backends: &[Backend], v4: bool) -> Value {
    let addresses: BTreeMap<&str, [&str; 2]> = [
        ("here", ["10.244.1.10", "fd00:10:244:1::10"]),
        ("there", ["10.244.2.10", "fd00:10:244:2::10"]),
        ("node", ["172.18.0.11", "fd00:172:18::11"]),
    ]
    .into();
    let endpoints = backends.iter().map(|backend| {
        let (ready, terminating) = (backend.state == State::Ready, backend.state != State::Ready);
        json!({
            "addresses": [addresses[backend.name][usize::from(!v4)]], "nodeName": format!("n{}", backend.node + 1),
            "conditions": {"ready": ready, "serving": backend.state != State::Gone, "terminating": terminating},
        })
    });
    let family = if v4 { "IPv4" } else { "IPv6" };
    let port =
        |protocol: &str| json!({"name": protocol.to_lowercase(), "protocol": protocol, "port": TARGET});
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
        "metadata": {"name": format!("{service}-{}", family.to_lowercase()), "namespace": "default",
                     "labels": {"kubernetes.io/service-name": service}},
        "ports": [port("TCP"), port("UDP")],
        "endpoints": endpoints.collect::<Vec<_>>(),
    })
}

/// The manifests of all Services of the matrix.
pub(crate) fn matrix() -> String {
    let policy = |local| if local { "Local" } else { "Cluster" };
    let all = Service::all().flat_map(|service| {
        let spec = json!({"internalTrafficPolicy": policy(service.internal_local),
                          "externalTrafficPolicy": policy(service.external_local)});
        let number = service.number();
        objects(&format!("s{number}"), number, service.endpoints(), &spec)
    });
    documents(&all.collect::<Vec<_>>())
}

/// The agent's counters of packets dropped that are not zero, asked for where it runs.
fn drops() -> String {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect("127.0.0.1:10249")?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        std::io::read_to_string(stream)
    };
    let text = ask().unwrap_or_default();
    let drops = text.lines().filter_map(|line| line.strip_prefix("lb_drops_total"));
    drops.filter(|line| !line.ends_with(" 0")).collect::<Vec<_>>().join(" ")
}

/// Datagrams that found a full buffer, in both families: the calling thread's namespace.
fn overruns() -> [Option<u64>; 2] {
    let v6 = std::fs::read_to_string("/proc/thread-self/net/snmp6").unwrap_or_default();
    let v6 = v6.lines().find_map(|line| line.strip_prefix("Udp6RcvbufErrors")?.trim().parse().ok());
    let v4 = std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap_or_default();
    let mut udp = v4.lines().filter_map(|line| line.strip_prefix("Udp: ")).map(str::split_whitespace);
    let column = udp.next().and_then(|mut names| names.position(|name| name == "RcvbufErrors"));
    [udp.next().zip(column).and_then(|(mut values, i)| values.nth(i)?.parse().ok()), v6]
}
