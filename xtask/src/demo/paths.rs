//! The paths of the design, in both families.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::check::{Action, Check, Expect, Seen};
use super::cluster::{Cluster, vip};
use crate::lab::Host;
use crate::probe::{Ask, Bulk, Direction, Ping};

/// One way through the load balancer.
#[derive(Clone, Debug)]
pub struct Path {
    /// From where to where.
    pub title: &'static str,
    /// Which rewrites happen on it.
    pub how: &'static str,
    /// The observations.
    pub checks: Vec<Check>,
}

const WEB: &[&str] = &["web-1", "web-2", "web-3"];
const DNS: &[&str] = &["dns-1", "dns-2"];
/// Those of them that run on n1.
const HERE: &[&str] = &["web-1", "web-2", "dns-1"];
/// Requests where the spread matters.
const MANY: usize = 60;
/// Requests where one would do.
const FEW: usize = 3;

fn ask(from: &Host, ask: Ask, expect: Expect) -> Check {
    Check { from: from.clone(), label: "", action: Action::Ask(ask), expect }
}

fn own(host: &Host, to: SocketAddr) -> IpAddr {
    host.ips()[usize::from(to.is_ipv6())]
}

/// All paths, seen from n1.
pub fn paths(cluster: &Cluster) -> Vec<Path> {
    let lab = cluster.lab();
    let (pod, here, client, node) = (&lab.pod(0, 2), &lab.pod(0, 0), lab.client(), lab.node(0));
    let node_ips = |to: SocketAddr| cluster.node_ips(to.is_ipv4());

    let web = vip("10.96.0.10", "fd00:10:96::10", 80);
    let dns = vip("10.96.0.53", "fd00:10:96::53", 53);
    let db = vip("10.96.0.30", "fd00:10:96::30", 5432);
    let empty = vip("10.96.0.99", "fd00:10:96::99", 80);
    let balancer = vip("203.0.113.10", "2001:db8:3::10", 80);
    let external = vip("203.0.113.130", "2001:db8:3::130", 80);
    let outside = lab.inet();

    let kept = |from: &Host, to| Seen::Client(own(from, to));
    let split = |to| Seen::ClientAt(own(client, to), HERE, node_ips(to));
    let from_client = |transport: fn(SocketAddr) -> Ask, names, label| {
        move |to| Check { label, ..ask(client, transport(to).count(MANY), Expect::Answers(names, split(to))) }
    };
    let refused = |from, request: Ask| ask(from, request.count(FEW), Expect::Refused);

    let mut paths = Vec::new();
    let mut path = |title, how, checks: Vec<Check>| paths.push(Path { title, how, checks });

    path(
        "pod → ClusterIP",
        "The pod's own device turns the Service's address into a backend's, on this node or the other, and back.",
        web.map(|to| ask(pod, Ask::tcp(to).count(MANY), Expect::Answers(WEB, kept(pod, to))))
            .into_iter()
            .chain(dns.map(|to| {
                let client = &lab.pod(0, 1);
                ask(client, Ask::udp(to).count(MANY), Expect::Answers(DNS, kept(client, to)))
            }))
            .collect(),
    );
    path(
        "outside → NodePort, LoadBalancer and external IP",
        "Backends on n1 see the client itself. For those on n2 the request takes n1's address, so that the answer \
         comes back the same way.",
        node.at(30080)
            .map(from_client(Ask::tcp, WEB, "NodePort"))
            .into_iter()
            .chain(node.at(30053).map(from_client(Ask::udp, DNS, "NodePort")))
            .chain(balancer.map(from_client(Ask::tcp, WEB, "LoadBalancer")))
            .chain(external.map(from_client(Ask::tcp, WEB, "external IP")))
            .collect(),
    );
    path(
        "outside → NodePort → overlay, in bulk",
        "The backend is on n2, behind a smaller MTU: this stalls unless ICMP's \"too big\" is translated back.",
        node.at(30081)
            .into_iter()
            .flat_map(|to| [("upload", to, Direction::Up), ("download", to, Direction::Down)])
            .map(|(label, to, direction)| Check {
                from: client.clone(),
                label,
                action: Action::Bulk(Bulk::new(to, 20_000_000, direction)),
                expect: Expect::Intact,
            })
            .collect(),
    );
    path(
        "pod → outside, masqueraded",
        "Nobody outside knows the way to a pod: what leaves takes the node's address and a port of its own.",
        outside
            .at(8080)
            .map(|to| {
                ask(
                    pod,
                    Ask::tcp(to).count(FEW),
                    Expect::Answers(&["outside"], Seen::Node(vec![own(node, to)])),
                )
            })
            .into_iter()
            .chain(outside.at(5353).map(|to| {
                ask(
                    pod,
                    Ask::udp(to).count(FEW),
                    Expect::Answers(&["outside"], Seen::Node(vec![own(node, to)])),
                )
            }))
            .chain(outside.ips().map(|to| Check {
                from: pod.clone(),
                label: "",
                action: Action::Ping(Ping::new(to).count(3)),
                expect: Expect::Intact,
            }))
            .collect(),
    );
    path(
        "pod → ClusterIP → itself (hairpin)",
        "web-1 asks web. When it is its own backend, it sees the gateway; its own address would be no answer's source.",
        web.map(|to| {
            let gateway = cluster.node_ips(to.is_ipv4())[1];
            ask(
                here,
                Ask::tcp(to).count(MANY),
                Expect::Answers(WEB, Seen::GatewayAt(own(here, to), "web-1", gateway)),
            )
        })
        .into_iter()
        .collect(),
    );
    path(
        "host process → ClusterIP and NodePort",
        "No packet is rewritten: the socket is connected to a backend to begin with, and does not notice.",
        web.map(|to| Check {
            label: "ClusterIP",
            ..ask(node, Ask::tcp(to).count(MANY), Expect::Answers(WEB, Seen::Node(node_ips(to))))
        })
        .into_iter()
        .chain(dns.into_iter().flat_map(|to| {
            [Ask::udp(to), Ask::udp(to).unconnected()].map(|request| Check {
                label: "ClusterIP",
                ..ask(node, request.count(MANY), Expect::Answers(DNS, Seen::Node(node_ips(to))))
            })
        }))
        .chain(node.at(30080).map(|to| Check {
            label: "NodePort",
            ..ask(node, Ask::tcp(to).count(MANY), Expect::Answers(WEB, Seen::Node(node_ips(to))))
        }))
        .collect(),
    );
    path(
        "pod → ClusterIP → backend outside the cluster",
        "Both at once: the pod's device puts in the backend, the node's device the node's address.",
        db.map(|to| {
            ask(pod, Ask::tcp(to).count(FEW), Expect::Answers(&["outside"], Seen::Node(vec![own(node, to)])))
        })
        .into_iter()
        .collect(),
    );
    path(
        "a Service without endpoints",
        "Refused at once, by TCP reset or ICMP, for everybody.",
        empty
            .into_iter()
            .flat_map(|to| [refused(pod, Ask::tcp(to)), refused(pod, Ask::udp(to))])
            .chain(
                node.at(30099)
                    .into_iter()
                    .flat_map(|to| [refused(client, Ask::tcp(to)), refused(client, Ask::udp(to))]),
            )
            .chain(empty.map(|to| refused(node, Ask::tcp(to).timeout(Duration::from_secs(2)))))
            .collect(),
    );
    paths
}
