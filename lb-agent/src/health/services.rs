//! `healthCheckNodePort`: load balancers ask there whether this node has endpoints of a Service.
//!
//! The main loop says what is wanted ([`ServiceChecks::set`]), a task keeps the servers that this takes.

use super::server::accept;
use super::{Handler, Health, Reply};
use crate::desired::{NodePortAddresses, node_port_addresses};
use crate::events::Events;
use crate::metrics::Sample;
use crate::store::{LocalAddresses, Node, ObjectName};
use hyper::StatusCode;
use hyper::header::HeaderValue;
use nix::sys::socket::{setsockopt, sockopt::Ipv6V6Only};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tracing::{debug, info, warn};

/// Newer load balancers send a node with more endpoints more connections.
const WEIGHT: &str = "X-Load-Balancing-Endpoint-Weight";
/// Between attempts to have a port that is taken, doubled at each.
const RETRY: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(2);
const BACKLOG: u32 = 128;

/// kube-proxy's reason of the Event that says that a port cannot be had.
const UNAVAILABLE: &str = "FailedToStartServiceHealthcheck";

/// The health checks of Services; clones share them.
#[derive(Clone, Debug, Default)]
pub struct ServiceChecks {
    wanted: Arc<watch::Sender<Wanted>>,
    /// How many ports cannot be had at the moment.
    unavailable: Arc<AtomicUsize>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Wanted {
    addresses: BTreeSet<IpAddr>,
    checks: BTreeMap<ObjectName, Check>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Check {
    port: u16,
    /// Ready ones on this node.
    endpoints: usize,
}

impl ServiceChecks {
    /// From now on these are wanted: Service, port, ready endpoints on this node. Answers are at once of the new
    /// numbers; sockets are opened and closed a moment later.
    pub fn set<'a>(
        &self,
        addresses: BTreeSet<IpAddr>,
        checks: impl Iterator<Item = (&'a ObjectName, u16, usize)>,
    ) {
        let checks = checks.map(|(service, port, endpoints)| (service.clone(), Check { port, endpoints }));
        let new = Wanted { addresses, checks: checks.collect() };
        self.wanted.send_if_modified(|old| {
            let changed = *old != new;
            *old = new;
            changed
        });
    }

    /// Serves them for ever. A port that cannot be had is told once and then waited for.
    pub async fn run(self, node: String, health: Health, events: Events) {
        let mut wanted = self.wanted.subscribe();
        let mut servers = Servers {
            checks: self,
            node,
            health,
            events,
            open: BTreeMap::new(),
            unavailable: HashSet::new(),
        };
        let mut retry = *RETRY.start();
        loop {
            let now = wanted.borrow_and_update().clone();
            let complete = servers.reconcile(&now).await;
            tokio::select! {
                _ = wanted.changed() => retry = *RETRY.start(),
                () = sleep(retry), if !complete => retry = (retry * 2).min(*RETRY.end()),
            }
        }
    }

    /// Ports that cannot be had, for the metrics.
    pub fn samples(&self) -> Vec<Sample> {
        vec![Sample::unserved(UNAVAILABLE, self.unavailable.load(Relaxed))]
    }

    /// Any path gets the same answer.
    fn handler(&self, service: ObjectName, health: Health) -> Handler {
        let wanted = self.wanted.clone();
        Arc::new(move |_| {
            let endpoints = wanted.borrow().checks.get(&service).map_or(0, |check| check.endpoints);
            Some(reply(&service, endpoints, health.is_live()))
        })
    }
}

/// As kube-proxy's, byte for byte. Whether the node is about to leave does not matter here: its `/healthz` says so.
fn reply(service: &ObjectName, endpoints: usize, healthy: bool) -> Reply {
    let (namespace, name) = (service.namespace(), service.name());
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{namespace}\",\n\t\t\"name\": \"{name}\"\n\t}},\n\
         \t\"localEndpoints\": {endpoints},\n\t\"serviceProxyHealthy\": {healthy}\n}}"
    );
    let status = match endpoints > 0 && healthy {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    Reply { header: Some((WEIGHT, HeaderValue::from(endpoints))), ..Reply::json(status, body) }
}

/// Where health checks are answered: where NodePorts are. A family that has them on all addresses gets the wildcard.
pub fn addresses(wanted: &NodePortAddresses, local: &LocalAddresses, node: &Node) -> BTreeSet<IpAddr> {
    let everywhere = |v4: bool| match wanted {
        NodePortAddresses::All => true,
        NodePortAddresses::Primary => false,
        NodePortAddresses::Within(ranges) => {
            let mut family = ranges.iter().filter(|range| range.addr().is_ipv4() == v4).peekable();
            family.peek().is_none() || family.any(|range| range.prefix_len() == 0)
        }
    };
    let wildcards = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    let single = node_port_addresses(wanted, true, local, node);
    let single = single.into_iter().filter(|address| !everywhere(address.is_ipv4()));
    wildcards.into_iter().filter(|wildcard| everywhere(wildcard.is_ipv4())).chain(single).collect()
}

struct Servers {
    checks: ServiceChecks,
    node: String,
    health: Health,
    events: Events,
    open: BTreeMap<SocketAddr, Server>,
    /// Complaints that were made and are not over yet.
    unavailable: HashSet<(ObjectName, u16)>,
}

/// A socket that is served.
struct Server {
    service: ObjectName,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Servers {
    /// Returns whether all that is wanted is there.
    async fn reconcile(&mut self, wanted: &Wanted) -> bool {
        let owners = self.owners(wanted);
        // Closed before others are opened: a port may go from one Service to another.
        let stale = |address: &SocketAddr, server: &mut Server| {
            owners.get(&address.port()) != Some(&server.service) || !wanted.addresses.contains(&address.ip())
        };
        for (address, mut server) in self.open.extract_if(.., stale) {
            debug!("health checks of Service {} are no longer on {address}", server.service);
            server.task.abort();
            let _ = (&mut server.task).await;
        }

        let (mut unavailable, mut complete) = (BTreeMap::new(), true);
        for (service, check) in &wanted.checks {
            let error = match owners.get(&check.port) {
                Some(owner) if owner != service => Some(format!("Service {owner} has it")),
                _ => match self.open(service, check.port, &wanted.addresses) {
                    Ok(()) => continue,
                    Err(error) if is_passing(&error) => None,
                    Err(error) => Some(error.to_string()),
                },
            };
            complete = false;
            unavailable.extend(error.map(|error| ((service.clone(), check.port), error)));
        }
        self.report(&unavailable);
        complete
    }

    /// Who may have which port: who has it already, else the first by name.
    fn owners(&self, wanted: &Wanted) -> BTreeMap<u16, ObjectName> {
        let port = |service: &ObjectName| wanted.checks.get(service).map(|check| check.port);
        let open = self.open.iter().map(|(address, server)| (address.port(), &server.service));
        let kept = open.filter(|(at, service)| port(service) == Some(*at));
        let all = kept.chain(wanted.checks.iter().map(|(service, check)| (check.port, service)));
        let mut owners = BTreeMap::new();
        for (port, service) in all {
            owners.entry(port).or_insert_with(|| service.clone());
        }
        owners
    }

    /// Opens what is missing, as far as that works; returns the first error that is worth telling.
    fn open(&mut self, service: &ObjectName, port: u16, addresses: &BTreeSet<IpAddr>) -> io::Result<()> {
        let mut result = Ok(());
        for address in addresses.iter().map(|ip| SocketAddr::new(*ip, port)) {
            if self.open.contains_key(&address) {
                continue;
            }
            match listen(address) {
                Ok(Some(listener)) => {
                    debug!("health checks of Service {service} are on {address}");
                    let handler = self.checks.handler(service.clone(), self.health.clone());
                    let what = format!("health checks of Service {service}");
                    let task = tokio::spawn(async move { accept(&what, address, listener, handler).await });
                    self.open.insert(address, Server { service: service.clone(), task });
                }
                Ok(None) => {}
                Err(error) if result.as_ref().err().is_none_or(is_passing) => {
                    result = Err(io::Error::new(error.kind(), format!("listen tcp {address}: {error}")));
                }
                Err(_) => {}
            }
        }
        result
    }

    /// Says what is new about ports that cannot be had.
    fn report(&mut self, unavailable: &BTreeMap<(ObjectName, u16), String>) {
        for (service, port) in self.unavailable.extract_if(|key| !unavailable.contains_key(key)) {
            info!("Service {service}: no trouble with health checks on port {port} any more");
        }
        for ((service, port), error) in unavailable {
            if self.unavailable.insert((service.clone(), *port)) {
                warn!("Service {service}: no health checks on port {port}: {error}; trying again");
                // kube-proxy's words.
                let note = format!(
                    "node {} failed to start healthcheck \"{service}\" on port {port}: {error}",
                    self.node
                );
                self.events.warning(service, UNAVAILABLE, "Listen", note);
            }
        }
        self.checks.unavailable.store(unavailable.len(), Relaxed);
    }
}

/// An address that is just going, or one of IPv6 that is not sure yet to be ours alone.
fn is_passing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
}

/// `None` where the kernel does not know the address's family at all.
fn listen(address: SocketAddr) -> io::Result<Option<TcpListener>> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let socket = match socket {
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => return Ok(None),
        socket => socket?,
    };
    // Connections of the agent that we replace may linger.
    socket.set_reuseaddr(true)?;
    if address.is_ipv6() {
        setsockopt(&socket, Ipv6V6Only, &true)?;
    }
    socket.bind(address)?;
    socket.listen(BACKLOG).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_are_kube_proxys() {
        let service = ObjectName::new("shop", "web");
        let answer = reply(&service, 2, true);
        let body = "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}";
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (200, body));
        assert_eq!(answer.content_type, "application/json");
        assert_eq!(answer.header, Some((WEIGHT, HeaderValue::from_static("2"))));
        assert_eq!(reply(&service, 0, true).status, 503);
        let sick = reply(&service, 2, false);
        let body = body.replace("true", "false");
        assert_eq!((sick.status.as_u16(), sick.body), (503, body));
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_told_of_whatever_else_is_wrong() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = taken.local_addr().unwrap().port();
        let mut servers = Servers {
            checks: ServiceChecks::default(),
            node: "n1".into(),
            health: Health::default(),
            events: Events::default(),
            open: BTreeMap::new(),
            unavailable: HashSet::new(),
        };
        // The first of them is nobody's, the last is free.
        let addresses = ["100.64.77.1", "127.0.0.1", "127.0.0.2"].map(|ip| ip.parse().unwrap());
        let checks = [(ObjectName::new("shop", "web"), Check { port, endpoints: 1 })];
        let wanted = Wanted { addresses: addresses.into(), checks: checks.into() };
        let unavailable = |servers: &Servers| servers.checks.samples()[0].value;
        assert!(!servers.reconcile(&wanted).await);
        assert_eq!((servers.open.len(), unavailable(&servers)), (1, 1.0));
        drop(taken);
        assert!(!servers.reconcile(&wanted).await);
        assert_eq!((servers.open.len(), unavailable(&servers)), (2, 0.0), "what is left may come by itself");
        assert!(servers.reconcile(&Wanted::default()).await);
        assert_eq!(servers.open.len(), 0);
    }

    #[test]
    fn they_are_where_node_ports_are() {
        let local = ["192.0.2.1", "2001:db8::1", "192.0.2.2", "127.0.0.1", "fe80::1"];
        let local: LocalAddresses = local.iter().map(|ip| ip.parse::<IpAddr>().unwrap()).collect();
        let on = |wanted: &str| {
            let found = addresses(&wanted.parse().unwrap(), &local, &Node::default());
            found.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(on(""), "0.0.0.0 ::");
        assert_eq!(on("primary"), "192.0.2.1 2001:db8::1");
        assert_eq!(on("192.0.2.2/32"), "192.0.2.2 ::", "a family that is not named is served everywhere");
        assert_eq!(on("0.0.0.0/0,2001:db8::/32"), "0.0.0.0 2001:db8::1");
        assert_eq!(on("127.0.0.0/8,192.0.2.1/32,::1/128"), "127.0.0.1 192.0.2.1 ::1");
        assert_eq!(on("198.51.100.0/24,2001:db8:ffff::/48"), "");
    }
}
