//! Flows that would be one and the same behind the Service: one port of the client to several addresses of one backend.

use std::net::{SocketAddr, UdpSocket};
use std::sync::LazyLock;
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xtask::demo::Cluster;
use xtask::lab::Host;
use xtask::probe::{Answer, Ask, Failure, Lines, Server};

use super::support::{SOON, answered, cluster, eventually};

/// The server's port.
const TARGET: u16 = 7070;

/// On each node a pod that is the backend of two Services.
struct Site {
    cluster: Cluster,
    _servers: Vec<Server>,
}

/// Never dropped: the lab's reaper takes it down when the tests have ended.
static SITE: LazyLock<Result<Site>> = LazyLock::new(Site::start);

impl Site {
    fn start() -> Result<Self> {
        let cluster = cluster("collide")?;
        let pods = [0, 1].map(|node| cluster.lab().pod(node, 2));
        let servers = pods.iter().map(|pod| pod.serve_ports(&[TARGET], &[TARGET])).collect::<Result<_>>()?;
        for number in [1, 2, 3, 4] {
            let backend = &pods[usize::from(number > 2)];
            cluster.write(&format!("twin{number}.yaml"), &twin(number, backend))?;
        }
        let site = Self { cluster, _servers: servers };
        for to in [1, 2, 3, 4].map(|number| site.cluster_ip(number)).concat() {
            eventually(SOON, || answered(&site.pod(), &Ask::tcp(to)).map(drop))?;
        }
        Ok(site)
    }

    fn shared() -> Result<&'static Self> {
        SITE.as_ref().map_err(|e| anyhow::anyhow!("{e:#}"))
    }

    /// The Services of the pod here, and of the pod there, by number; and the pod, at its port.
    fn backends(&self) -> [(u16, u16, [SocketAddr; 2]); 2] {
        let at = |node| self.cluster.lab().pod(node, 2).at(TARGET);
        [(1, 2, at(0)), (3, 4, at(1))]
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

#[test]
fn one_port_of_a_pod_to_one_backend() -> Result<()> {
    let (site, mut pairs) = (Site::shared()?, Vec::new());
    for ((one, other, backend), first) in site.backends().into_iter().zip([40_000, 40_010]) {
        for family in [0, 1] {
            let (one, other) = (site.cluster_ip(one)[family], site.cluster_ip(other)[family]);
            let straight = backend[family];
            pairs.extend([
                (Ask::tcp(one), Ask::tcp(other), first),
                (Ask::tcp(one), Ask::tcp(straight), first + 1),
                (Ask::tcp(straight), Ask::tcp(one), first + 2),
                (Ask::udp(one), Ask::udp(other), first + 3),
                (Ask::udp(one), Ask::udp(straight), first + 4),
            ]);
        }
    }
    all_work(&site.pod(), pairs)
}

#[test]
fn one_port_from_outside_to_one_backend() -> Result<()> {
    let (site, mut pairs) = (Site::shared()?, Vec::new());
    for ((one, other, _), first) in site.backends().into_iter().zip([40_000, 40_010]) {
        for family in [0, 1] {
            let (node, other) = (site.node_port(one)[family], site.node_port(other)[family]);
            let balancer = site.load_balancer(one)[family];
            pairs.extend([
                (Ask::tcp(node), Ask::tcp(balancer), first),
                (Ask::tcp(node), Ask::tcp(other), first + 1),
                (Ask::udp(node), Ask::udp(balancer), first + 2),
                (Ask::udp(node), Ask::udp(other), first + 3),
            ]);
        }
    }
    all_work(site.cluster.lab().client(), pairs)
}

/// One unconnected socket: each answer comes from the address that was asked.
#[test]
fn one_socket_talks_to_all_of_a_backends_addresses() -> Result<()> {
    let site = Site::shared()?;
    for (one, other, backend) in site.backends() {
        for (family, any) in ["0.0.0.0:0", "[::]:0"].into_iter().enumerate() {
            let all = [site.cluster_ip(one), backend, site.cluster_ip(other)].map(|to| to[family]);
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
