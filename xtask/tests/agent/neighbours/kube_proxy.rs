//! kube-proxy's rules for the same Services, there before us, with us and gone after us.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use xtask::bench::iptables::{FILTER, NAT_CHAINS, NAT_LAST, NAT_RULES};
use xtask::demo::{Cluster, vip};
use xtask::lab::{Host, Lab};
use xtask::probe::{Ask, Lines, failures};
use xtask::system::{ensure_debian_packages, output};

use super::super::support::{SOON, Traffic, agent_exe, answered, dns, eventually, store, web};
use super::{everything_works, pod_networks, track};

/// A Service port of one family.
struct Port {
    name: &'static str,
    protocol: &'static str,
    cluster: SocketAddr,
    node_port: Option<u16>,
    external: Vec<IpAddr>,
    endpoints: Vec<SocketAddr>,
}

/// The demo's manifests, as kube-proxy understands them.
fn ports(lab: &Lab, family: usize) -> Vec<Port> {
    let pod = |node, pod, port| lab.pod(node, pod).at(port)[family];
    let port = |name, protocol, cluster: [SocketAddr; 2], node_port, endpoints| Port {
        name,
        protocol,
        cluster: cluster[family],
        node_port,
        external: vec![],
        endpoints,
    };
    let (external, balancer) =
        (vip("203.0.113.130", "2001:db8:3::130", 80), vip("203.0.113.10", "2001:db8:3::10", 80));
    let names = || vec![pod(0, 2, 5353), pod(1, 1, 5353)];
    let (db, empty) = (vip("10.96.0.30", "fd00:10:96::30", 5432), vip("10.96.0.99", "fd00:10:96::99", 80));
    vec![
        Port {
            external: vec![external[family].ip(), balancer[family].ip()],
            ..port("WEB", "tcp", web(), Some(30080), vec![pod(0, 0, 8080), pod(0, 1, 8080), pod(1, 0, 8080)])
        },
        port("DNS", "udp", dns(), Some(30053), names()),
        port("DNSTCP", "tcp", dns(), Some(30053), names()),
        port("STORE", "tcp", store(), Some(30081), vec![pod(1, 2, 8080)]),
        port("DB", "tcp", db, None, vec![lab.inet().at(5432)[family]]),
        port("EMPTY", "tcp", empty, Some(30099), vec![]),
        port("EMPTYUDP", "udp", empty, Some(30099), vec![]),
    ]
}

/// The whole rule set of a node.
fn rules(lab: &Lab, family: usize) -> String {
    let (cluster, ..) = &pod_networks(0)[family];
    let (mut filter, mut chains, mut nat) = (String::new(), String::new(), String::new());
    for Port { name, protocol, cluster: vip, node_port, external, endpoints } in ports(lab, family) {
        let to = |ip: &IpAddr| format!("-d {ip} -p {protocol} -m {protocol} --dport {}", vip.port());
        if endpoints.is_empty() {
            let _ = writeln!(filter, "-A KUBE-SERVICES {} -j REJECT", to(&vip.ip()));
            let local = "-m addrtype --dst-type LOCAL";
            let port = node_port.map(|port| format!("-p {protocol} -m {protocol} --dport {port}"));
            port.map(|port| writeln!(filter, "-A KUBE-EXTERNAL-SERVICES {local} {port} -j REJECT"));
            continue;
        }
        for chain in ["SVC", "EXT"] {
            let _ = writeln!(chains, ":KUBE-{chain}-{name} - [0:0]");
        }
        let _ = writeln!(nat, "-A KUBE-SERVICES {} -j KUBE-SVC-{name}", to(&vip.ip()));
        for ip in &external {
            let _ = writeln!(nat, "-A KUBE-SERVICES {} -j KUBE-EXT-{name}", to(ip));
        }
        if let Some(port) = node_port {
            let _ = writeln!(
                nat,
                "-A KUBE-NODEPORTS -p {protocol} -m {protocol} --dport {port} -j KUBE-EXT-{name}"
            );
        }
        let _ = writeln!(
            nat,
            "-A KUBE-EXT-{name} -m comment --comment \"masquerade traffic for external destinations\" -j KUBE-MARK-MASQ\n\
             -A KUBE-EXT-{name} -j KUBE-SVC-{name}\n\
             -A KUBE-SVC-{name} ! -s {cluster} {} -j KUBE-MARK-MASQ",
            to(&vip.ip())
        );
        for (i, endpoint) in endpoints.iter().enumerate() {
            let probability = 1.0 / (endpoints.len() - i) as f64;
            let _ = writeln!(chains, ":KUBE-SEP-{name}{i} - [0:0]");
            let _ = writeln!(
                nat,
                "-A KUBE-SVC-{name} -m statistic --mode random --probability {probability:.10} -j KUBE-SEP-{name}{i}\n\
                 -A KUBE-SEP-{name}{i} -s {} -j KUBE-MARK-MASQ\n\
                 -A KUBE-SEP-{name}{i} -p {protocol} -m {protocol} -j DNAT --to-destination {endpoint}",
                endpoint.ip()
            );
        }
    }
    // Localhost's rule is IPv4's only.
    let begin =
        FILTER.trim_end_matches("COMMIT\n").lines().filter(|l| family == 0 || !l.contains("127.0.0.0"));
    let begin: String = begin.map(|line| format!("{line}\n")).collect();
    format!("{begin}{filter}COMMIT\n{NAT_CHAINS}{chains}{NAT_RULES}{nat}{NAT_LAST}")
}

fn each_node(lab: &Lab, rules: impl Fn(usize) -> String) -> Result<()> {
    for node in [lab.node(0), lab.node(1)] {
        for family in [0, 1] {
            node.replace_legacy_rules(family == 0, &rules(family))?;
        }
    }
    Ok(())
}

/// Packets that its rules have given a backend: the first of each connection.
fn translated(node: &Host) -> Result<u64> {
    let mut sum = 0;
    for program in ["iptables-legacy-save", "ip6tables-legacy-save"] {
        ensure_debian_packages(&[("iptables", program)])?;
        let rules = output(node.command(program).args(["-c", "-t", "nat"]))?;
        for line in rules.lines().filter(|line| line.contains("-j DNAT")) {
            let packets = line.trim_start_matches('[').split(':').next().unwrap_or_default();
            sum += packets.parse::<u64>()?;
        }
    }
    Ok(sum)
}

/// They are many, and need not be fast.
fn slowly(to: SocketAddr) -> Ask {
    Ask::tcp(to).interval(Duration::from_millis(50))
}

/// How many [`talk`] begins in each family.
const TALKS: u64 = 2 * 3 + 2 * 8 + 1;

/// Connections of every kind, several so that masquerade ports of all sorts are among them.
fn talk(lab: &Lab, traffic: &mut Traffic) -> Result<()> {
    let (pod, client, n1, n2) = (lab.pod(0, 2), lab.client(), lab.node(0), lab.node(1));
    for family in [0, 1] {
        for to in [web()[family], store()[family]] {
            traffic.conversation(&pod, &slowly(to))?;
            traffic.conversation(n1, &slowly(to))?;
            traffic.conversation(&lab.pod(0, 0), &slowly(to))?;
        }
        for _ in 0..8 {
            traffic.conversation(client, &slowly(n1.at(30081)[family]))?;
            traffic.conversation(client, &slowly(n1.at(30080)[family]))?;
        }
        traffic.conversation(client, &slowly(n2.at(30081)[family]))?;
    }
    Ok(())
}

/// Datagrams, each of which has to be answered, by whomever.
fn datagrams(lab: &Lab) -> Result<Vec<Lines>> {
    let mut all = Vec::new();
    for family in [0, 1] {
        for (from, to) in [(&lab.pod(0, 1), dns()[family]), (lab.client(), lab.node(0).at(30053)[family])] {
            let ask = Ask::udp(to).keep().count(400).interval(Duration::from_millis(3));
            all.push(from.start_asking(&ask)?);
        }
    }
    Ok(all)
}

#[test]
fn its_rules_do_nothing_to_what_is_ours() -> Result<()> {
    let mut cluster = Cluster::without_agents(Lab::builder("beside").pods(3).build()?, agent_exe()?)?;
    each_node(cluster.lab(), |family| rules(cluster.lab(), family))?;
    let (pod, node) = (cluster.lab().pod(0, 2), cluster.lab().node(0).clone());
    web().iter().try_for_each(|&to| answered(&pod, &Ask::tcp(to)).map(drop))?;
    ensure!(translated(&node)? == 2, "the rules do not work without us");
    for node in [0, 1] {
        cluster.start_agent(node, &[])?;
    }
    everything_works(&cluster)?;
    ensure!(translated(&node)? == 2, "its rules still translate");
    Ok(())
}

fn connections_outlive_it(name: &str, random_fully: bool) -> Result<()> {
    let mut cluster = Cluster::without_agents(Lab::builder(name).pods(3).build()?, agent_exe()?)?;
    track(&cluster)?;
    let random = if random_fully { " --random-fully" } else { "" };
    each_node(cluster.lab(), |family| rules(cluster.lab(), family).replace(" --random-fully", random))?;
    let node = cluster.lab().node(0).clone();
    let mut traffic = Traffic::default();
    talk(cluster.lab(), &mut traffic)?;
    let datagrams = datagrams(cluster.lab())?;
    // Of those that it has translated here: all but the client's to n2, and two of datagrams.
    eventually(SOON, || {
        let count = translated(&node)?;
        ensure!(count == 2 * (TALKS - 1 + 2), "{count} connections by its rules");
        Ok(())
    })?;
    let before = translated(&node)?;
    for node in [0, 1] {
        cluster.start_agent(node, &[])?;
    }
    for lines in datagrams {
        let answers: Vec<_> = lines.collect();
        ensure!(answers.len() == 400 && failures(&answers).is_empty(), "{:?}", failures(&answers));
    }
    talk(cluster.lab(), &mut traffic)?;
    everything_works(&cluster)?;
    ensure!(translated(&node)? == before, "its rules still translate");
    each_node(cluster.lab(), |_| "*nat\nCOMMIT\n*filter\nCOMMIT\n".into())?;
    everything_works(&cluster)?;
    traffic.finish(Instant::now()).map(drop)
}

#[test]
fn its_connections_outlive_it() -> Result<()> {
    connections_outlive_it("takeover", false)
}

#[test]
fn its_connections_outlive_it_with_random_ports() -> Result<()> {
    connections_outlive_it("takeover-random", true)
}
