//! Flows that would be one and the same behind the Service: one port of the client to several addresses of one backend.

use std::net::{SocketAddr, UdpSocket};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xtask::demo::Cluster;
use xtask::lab::Host;
use xtask::probe::{Answer, Ask, Failure, Lines};

use super::support::{SOON, answered, cluster, eventually};

/// The server's port.
const TARGET: u16 = 7070;

/// Two Services with one and the same backend, and it.
struct Site {
    cluster: Cluster,
    _server: xtask::probe::Server,
    backend: [SocketAddr; 2],
}

impl Site {
    /// The backend runs in n1p3 or n2p3.
    fn start(name: &str, node: usize) -> Result<Self> {
        let cluster = cluster(name)?;
        let pod = cluster.lab().pod(node, 2);
        let server = pod.serve_ports(&[TARGET], &[TARGET])?;
        for number in [1, 2] {
            cluster.write(&format!("twin{number}.yaml"), &twin(number, &pod))?;
        }
        let site = Self { cluster, _server: server, backend: pod.at(TARGET) };
        for to in [site.cluster_ip(1), site.cluster_ip(2)].concat() {
            eventually(SOON, || answered(&site.pod(), &Ask::tcp(to)).map(drop))?;
        }
        Ok(site)
    }

    fn pod(&self) -> Host {
        self.cluster.lab().pod(0, 0)
    }

    fn cluster_ip(&self, number: u16) -> [SocketAddr; 2] {
        [format!("10.96.7.{number}:80"), format!("[fd00:10:96::7:{number}]:80")].map(parsed)
    }

    fn load_balancer(&self, number: u16) -> [SocketAddr; 2] {
        [format!("203.0.113.7{number}:80"), format!("[2001:db8:3::7{number}]:80")].map(parsed)
    }

    fn node_port(&self, number: u16) -> [SocketAddr; 2] {
        self.cluster.lab().node(0).at(30_170 + number)
    }
}

fn parsed(text: String) -> SocketAddr {
    text.parse().unwrap_or(SocketAddr::from(([0; 4], 0)))
}

fn twin(number: u16, pod: &Host) -> String {
    let node_port = 30_170 + number;
    let ports: Vec<_> = ["TCP", "UDP"]
        .map(|proto| {
            format!(
                "{{ name: {}, protocol: {proto}, port: 80, targetPort: {TARGET}, nodePort: {node_port} }}",
                proto.to_lowercase()
            )
        })
        .into();
    let mut yaml = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: twin{number}, namespace: default }}\nspec:\n  \
         type: LoadBalancer\n  clusterIP: 10.96.7.{number}\n  \
         clusterIPs: [10.96.7.{number}, \"fd00:10:96::7:{number}\"]\n  ports: [{}]\n\
         status: {{ loadBalancer: {{ ingress: [{{ ip: 203.0.113.7{number} }}, {{ ip: \"2001:db8:3::7{number}\" }}] }} }}\n",
        ports.join(", ")
    );
    for (family, ip) in ["IPv4", "IPv6"].into_iter().zip(pod.ips()) {
        yaml += &format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: twin{number}-{}\n  \
             namespace: default\n  labels: {{ kubernetes.io/service-name: twin{number} }}\naddressType: {family}\n\
             ports:\n  - {{ name: tcp, protocol: TCP, port: {TARGET} }}\n  \
             - {{ name: udp, protocol: UDP, port: {TARGET} }}\n\
             endpoints: [{{ addresses: [\"{ip}\"], nodeName: {} }}]\n",
            family.to_lowercase(),
            &pod.name()[..2],
        );
    }
    yaml
}

/// Opens a conversation from that port, as soon as the kernel gives it out again.
fn open(from: &Host, ask: &Ask) -> Result<Lines> {
    let (start, what) = (Instant::now(), || format!("{} → {}", from.name(), ask.to));
    loop {
        let mut lines = from.start_asking(ask)?;
        match lines.next().with_context(what)? {
            Answer(Ok(reply)) => {
                ensure!(reply.from == ask.to, "{}: {} answered", what(), reply.from);
                return Ok(lines);
            }
            // The end of an earlier connection, which the kernel remembers for a second.
            Answer(Err(Failure::Taken)) if start.elapsed() < 2 * SOON => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Answer(Err(e)) => anyhow::bail!("{}: {e}", what()),
        }
    }
}

/// The two, in turn, and the source port.
type Pair = (Ask, Ask, u16);

/// All pairs at the same time: most of it is waiting for ports that may be used again.
fn all_work(from: &Host, pairs: Vec<Pair>) -> Result<()> {
    from.sysctl("ipv4.tcp_tw_reuse", "1")?;
    std::thread::scope(|scope| {
        let both = |(one, other, port)| scope.spawn(move || both_work(from, one, other, port));
        let threads: Vec<_> = pairs.into_iter().map(both).collect();
        let join = |thread: ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().try_for_each(join)
    })
}

/// Opens one after the other from the same source port, and asks them in turn. When both have ended, does it again.
fn both_work(from: &Host, one: Ask, other: Ask, port: u16) -> Result<()> {
    for time in ["the first time", "again"] {
        let prepare = |ask: &Ask| {
            let ask = ask.clone().source_port(port).keep().count(11);
            ask.interval(Duration::from_millis(10)).timeout(Duration::from_millis(900))
        };
        let asks = [prepare(&one), prepare(&other)];
        let what = || format!("{} → {}, then {}, from port {port}, {time}", from.name(), one.to, other.to);
        let open = |ask| open(from, ask).with_context(what);
        let mut talks = [open(&asks[0])?, open(&asks[1])?];
        for round in 0..10 {
            for (talk, to) in talks.iter_mut().zip([one.to, other.to]) {
                let answer = talk.next().with_context(what)?;
                let reply =
                    answer.0.map_err(|e| anyhow::anyhow!("{}: {to} in round {round}: {e}", what()))?;
                ensure!(reply.from == to, "{}: {} answered what was sent to {to}", what(), reply.from);
            }
        }
        // Both end by themselves: connections are closed as they should be.
        for talk in talks {
            ensure!(talk.count() == 0, "{}: more answers than requests", what());
        }
    }
    Ok(())
}

fn from_a_pod(name: &str, backend_on: usize) -> Result<()> {
    let (site, mut pairs) = (Site::start(name, backend_on)?, Vec::new());
    for family in [0, 1] {
        let (one, other) = (site.cluster_ip(1)[family], site.cluster_ip(2)[family]);
        let straight = site.backend[family];
        pairs.extend([
            (Ask::tcp(one), Ask::tcp(other), 40_000),
            (Ask::tcp(one), Ask::tcp(straight), 40_001),
            (Ask::tcp(straight), Ask::tcp(one), 40_002),
            (Ask::udp(one), Ask::udp(other), 40_003),
            (Ask::udp(one), Ask::udp(straight), 40_004),
        ]);
    }
    all_work(&site.pod(), pairs)
}

#[test]
fn one_port_of_a_pod_to_a_backend_here() -> Result<()> {
    from_a_pod("colhere", 0)
}

#[test]
fn one_port_of_a_pod_to_a_backend_there() -> Result<()> {
    from_a_pod("colthere", 1)
}

fn from_outside(name: &str, backend_on: usize) -> Result<()> {
    let (site, mut pairs) = (Site::start(name, backend_on)?, Vec::new());
    for family in [0, 1] {
        let (node, other) = (site.node_port(1)[family], site.node_port(2)[family]);
        let balancer = site.load_balancer(1)[family];
        pairs.extend([
            (Ask::tcp(node), Ask::tcp(balancer), 40_000),
            (Ask::tcp(node), Ask::tcp(other), 40_001),
            (Ask::udp(node), Ask::udp(balancer), 40_002),
            (Ask::udp(node), Ask::udp(other), 40_003),
        ]);
    }
    all_work(site.cluster.lab().client(), pairs)
}

#[test]
fn one_port_from_outside_to_a_backend_here() -> Result<()> {
    from_outside("outhere", 0)
}

#[test]
fn one_port_from_outside_to_a_backend_there() -> Result<()> {
    from_outside("outthere", 1)
}

/// One unconnected socket: each answer comes from the address that was asked.
#[test]
fn one_socket_talks_to_all_of_a_backends_addresses() -> Result<()> {
    for backend_on in [0, 1] {
        let site = Site::start("colsock", backend_on)?;
        for family in [0, 1] {
            let all = [site.cluster_ip(1), site.backend, site.cluster_ip(2)].map(|to| to[family]);
            let any = ["0.0.0.0:40005", "[::]:40005"][family];
            site.pod().run_in(|| {
                let socket = UdpSocket::bind(any)?;
                socket.set_read_timeout(Some(Duration::from_secs(1)))?;
                for to in [all, all, all].concat() {
                    socket.send_to(b"hello", to)?;
                    let (_, from) =
                        socket.recv_from(&mut [0; 4096]).with_context(|| format!("no answer from {to}"))?;
                    ensure!(from == to, "{from} answered what was sent to {to}");
                }
                Ok(())
            })??;
        }
    }
    Ok(())
}
