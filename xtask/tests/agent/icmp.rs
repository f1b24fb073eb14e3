//! ICMP errors on their way to the socket that they are for: it has to know the packet that they quote.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use xtask::demo::{Cluster, vip};
use xtask::lab::{Host, is_pod_ip};
use xtask::probe::{Ask, Bulk, Direction, Failure, Hop, IcmpError, Trace, Transport};

use super::hostile::set_mtu;
use super::support::{SOON, answered, cluster, eventually, store, unlimited_errors};

/// Node port of [`open`].
const OPEN_NODE_PORT: u16 = 30070;
/// Node port of [`closed`].
const CLOSED_NODE_PORT: u16 = 30071;
/// Nobody listens on this port.
const CLOSED: u16 = 5999;

/// A Service for TCP and UDP whose only backend is `dns-2` on n2.
fn open() -> [SocketAddr; 2] {
    vip("10.96.0.70", "fd00:10:96::70", 53)
}

/// A UDP Service whose only backend is a pod on n2 that does not listen.
fn closed() -> [SocketAddr; 2] {
    vip("10.96.0.71", "fd00:10:96::71", 53)
}

fn manifest(name: &str, at: [SocketAddr; 2], node_port: u16, pod: &Host, target: u16) -> String {
    let [v4, v6] = at.map(|a| a.ip());
    let mut yaml = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: default }}\nspec:\n  type: NodePort\n  \
         clusterIP: {v4}\n  clusterIPs: [{v4}, \"{v6}\"]\n  ports:\n    \
         - {{ name: u, protocol: UDP, port: 53, nodePort: {node_port} }}\n    \
         - {{ name: t, protocol: TCP, port: 53, nodePort: {node_port} }}\n"
    );
    for (family, ip) in ["IPv4", "IPv6"].into_iter().zip(pod.ips()) {
        yaml += &format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}-{}\n  \
             namespace: default\n  labels: {{ kubernetes.io/service-name: {name} }}\naddressType: {family}\nports:\n  \
             - {{ name: u, protocol: UDP, port: {target} }}\n  - {{ name: t, protocol: TCP, port: {target} }}\n\
             endpoints: [{{ addresses: [\"{ip}\"], nodeName: n2 }}]\n",
            family.to_lowercase()
        );
    }
    yaml
}

/// A lab with both Services, whose hosts send as many ICMP errors as there are to send.
fn talkative(name: &str) -> Result<Cluster> {
    let cluster = cluster(name)?;
    let lab = cluster.lab();
    unlimited_errors(lab)?;
    let pod = lab.pod(1, 1);
    cluster.write("open.yaml", &manifest("open", open(), OPEN_NODE_PORT, &pod, 5353))?;
    cluster.write("closed.yaml", &manifest("closed", closed(), CLOSED_NODE_PORT, &pod, CLOSED))?;
    let [n1, n2] = [0, 1].map(|node| lab.node(node));
    for (from, to) in [(&lab.pod(0, 2), open()), (lab.client(), n1.at(OPEN_NODE_PORT))]
        .into_iter()
        .chain([(lab.client(), n2.at(OPEN_NODE_PORT))])
    {
        for to in to {
            let ask = Ask::udp(to).timeout(Duration::from_millis(200));
            eventually(SOON, || answered(from, &ask).map(drop))?;
        }
    }
    Ok(cluster)
}

/// The errors' types and codes, which the families number differently.
fn time_exceeded(to: SocketAddr) -> (u8, u8) {
    if to.is_ipv4() { (11, 0) } else { (3, 0) }
}

fn port_unreachable(to: SocketAddr) -> (u8, u8) {
    if to.is_ipv4() { (3, 3) } else { (1, 4) }
}

fn too_big(to: SocketAddr) -> (u8, u8) {
    if to.is_ipv4() { (3, 4) } else { (2, 0) }
}

fn error(hop: &Hop, to: SocketAddr, (kind, code): (u8, u8)) -> Result<&IcmpError> {
    match hop {
        Hop::Icmp(e) if (e.kind, e.code, e.about) == (kind, code, to) => Ok(e),
        _ => anyhow::bail!("{hop:?}, should be an error {kind}/{code} about {to}"),
    }
}

/// The addresses of a node that its own errors may come from.
fn own(node: &Host, ip: IpAddr) -> bool {
    let number = u16::from(node.name() == "n2") + 1;
    let pod_net = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => u16::from(ip.octets()[2]),
        IpAddr::V6(ip) => ip.segments()[3],
    };
    node.ips().contains(&ip) || is_pod_ip(ip) && pod_net(ip) == number
}

/// Every router on the way tells, whatever the transport, and then the server answers.
fn traceroute(cluster: &Cluster, from: &Host, to: SocketAddr, routers: &[&Host]) -> Result<()> {
    for transport in [Transport::Udp, Transport::Tcp] {
        let hops = from.trace(&Trace::new(transport, to).hops(6))?;
        let told = || -> Result<()> {
            ensure!(hops.len() == routers.len() + 1 && hops.last() == Some(&Hop::Answered), "not the way");
            for (hop, router) in hops.iter().zip(routers) {
                let from = error(hop, to, time_exceeded(to))?.from;
                let wire = router.name() == "wire" && !is_pod_ip(from) && !own(cluster.lab().node(0), from);
                // A router behind the translation may also speak as who was asked, as with netfilter.
                ensure!(wire || own(router, from) || from == to.ip(), "{from} is not {}'s", router.name());
            }
            Ok(())
        };
        told().map_err(|e| e.context(format!("{} → {transport:?} {to}: {hops:#?}", from.name())))?;
    }
    Ok(())
}

#[test]
fn traceroute_from_a_pod_shows_both_nodes() -> Result<()> {
    let cluster = talkative("trace")?;
    let lab = cluster.lab();
    let (pod, n1, n2) = (lab.pod(0, 2), lab.node(0), lab.node(1));
    for family in [0, 1] {
        traceroute(&cluster, &pod, open()[family], &[n1, n2])?;
        // Plain masquerade: the second router quotes the node.
        let outside = lab.inet().ips()[family];
        for (transport, port) in [(Transport::Udp, 5353), (Transport::Tcp, 8080)] {
            let to = SocketAddr::new(outside, port);
            let hops = pod.trace(&Trace::new(transport, to).hops(6))?;
            ensure!(hops.len() == 3 && hops[2] == Hop::Answered, "{to}: {hops:#?}");
            for hop in &hops[..2] {
                error(hop, to, time_exceeded(to))?;
            }
        }
    }
    Ok(())
}

#[test]
fn traceroute_from_outside_shows_router_and_nodes() -> Result<()> {
    let cluster = talkative("trace-in")?;
    let lab = cluster.lab();
    let (client, wire, n1, n2) = (lab.client(), lab.wire(), lab.node(0), lab.node(1));
    for family in [0, 1] {
        traceroute(&cluster, client, n2.at(OPEN_NODE_PORT)[family], &[wire, n2])?;
        traceroute(&cluster, client, n1.at(OPEN_NODE_PORT)[family], &[wire, n1, n2])?;
    }
    Ok(())
}

#[test]
fn a_closed_port_behind_a_service_refuses() -> Result<()> {
    let cluster = talkative("closed")?;
    let lab = cluster.lab();
    let (pod, client, n1, n2) = (lab.pod(0, 2), lab.client(), lab.node(0), lab.node(1));
    for family in [0, 1] {
        for (from, to) in [
            (&pod, closed()[family]),
            // On the backend's own node.
            (&lab.pod(1, 0), closed()[family]),
            // Translated at both ends, and at one.
            (client, n1.at(CLOSED_NODE_PORT)[family]),
            (client, n2.at(CLOSED_NODE_PORT)[family]),
            (&pod, lab.inet().at(CLOSED)[family]),
        ] {
            let what = format!("{} → {to}", from.name());
            // As soon as the Service is known; until then nothing answers, or the node itself refuses its own port.
            eventually(SOON, || {
                let hops = from.trace(&Trace::new(Transport::Udp, to))?;
                let [hop] = &hops[..] else { anyhow::bail!("{what}: {hops:?}") };
                let told = error(hop, to, port_unreachable(to))?;
                ensure!(told.from == to.ip(), "{what}: {} tells, not whom it asked", told.from);
                Ok(())
            })?;
            refused(from, to)?;
        }
        // The socket is connected to the backend itself.
        refused(n1, closed()[family])?;
    }
    Ok(())
}

fn refused(from: &Host, to: SocketAddr) -> Result<()> {
    let answers = from.ask(&Ask::udp(to).count(3))?;
    let all = answers.len() == 3 && answers.iter().all(|a| a.failure() == Some(&Failure::Refused));
    ensure!(all, "{} → {to}: {answers:?}", from.name());
    Ok(())
}

/// A datagram that is too big for the way is told so, with the way's MTU; the next is too big for the socket already,
/// and what fits is answered.
fn datagrams_learn(from: &Host, to: SocketAddr, mtu: u32) -> Result<()> {
    let headers = if to.is_ipv4() { 28 } else { 48 };
    let send =
        |times, size: u32| from.trace(&Trace::new(Transport::Udp, to).unfragmented(times, size as usize));
    // Nothing is learnt yet, and no smaller MTU than this one is met.
    let hops = send(2, mtu + 1 - headers)?;
    let [first, second] = &hops[..] else { anyhow::bail!("{} → {to}: {hops:?}", from.name()) };
    let told = error(first, to, too_big(to)).map_err(|e| e.context(from.name().to_owned()))?;
    ensure!(told.mtu == mtu, "{} → {to}: {told:?}, should be {mtu}", from.name());
    ensure!(*second == Hop::Failed(Failure::TooBig), "{} → {to}: {second:?}", from.name());
    let fits = send(1, mtu - headers)?;
    ensure!(fits == [Hop::Answered], "{} → {to}: {fits:?}", from.name());
    Ok(())
}

fn intact(from: &Host, to: SocketAddr, direction: Direction) -> Result<()> {
    let report = from.bulk(&Bulk::new(to, 5_000_000, direction))?;
    ensure!(report.ok, "{} → {to} {direction:?}: {report:?}", from.name());
    Ok(())
}

#[test]
fn datagrams_learn_of_the_overlays_mtu() -> Result<()> {
    let cluster = talkative("overlay")?;
    let lab = cluster.lab();
    for (to, mtu) in lab.node(0).at(OPEN_NODE_PORT).into_iter().zip([1450, 1430]) {
        datagrams_learn(lab.client(), to, mtu)?;
    }
    // IPv4 pods have the overlay's MTU themselves.
    datagrams_learn(&lab.pod(0, 2), open()[1], 1430)
}

/// The errors about what the backends send pass one translation on the node that the client came to, and two on the
/// way to the other; those about what the client sends pass none.
#[test]
fn a_smaller_link_in_front_of_a_node_port() -> Result<()> {
    let cluster = talkative("front")?;
    let lab = cluster.lab();
    set_mtu(lab.wire(), "client", 1300)?;
    set_mtu(lab.wire(), "lan0", 1300)?;
    for family in [0, 1] {
        for node in [lab.node(0), lab.node(1)] {
            intact(lab.client(), node.at(30081)[family], Direction::Down)?;
            datagrams_learn(lab.client(), node.at(OPEN_NODE_PORT)[family], 1300)?;
            intact(lab.client(), node.at(30081)[family], Direction::Up)?;
        }
    }
    Ok(())
}

/// The link is behind the second node: its error passes both translations.
fn smaller_link_behind(name: &str, family: usize) -> Result<()> {
    let cluster = talkative(name)?;
    let lab = cluster.lab();
    set_mtu(lab.node(1), "cni0", 1300)?;
    for from in [lab.client(), lab.inet()] {
        for node in [lab.node(0), lab.node(1)] {
            if from.name() == "client" {
                datagrams_learn(from, node.at(OPEN_NODE_PORT)[family], 1300)?;
            } else {
                intact(from, node.at(30081)[family], Direction::Up)?;
            }
        }
    }
    datagrams_learn(&lab.pod(0, 2), open()[family], 1300)?;
    intact(&lab.pod(0, 0), store()[family], Direction::Up)
}

#[test]
fn a_smaller_link_behind_a_node_port_v4() -> Result<()> {
    smaller_link_behind("behind4", 0)
}

#[test]
fn a_smaller_link_behind_a_node_port_v6() -> Result<()> {
    smaller_link_behind("behind6", 1)
}
