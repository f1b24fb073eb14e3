//! NetworkPolicy as kube-router does it in k3s: chains for each pod in FORWARD, by the pod's own address.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use xtask::demo::Cluster;
use xtask::lab::Host;
use xtask::probe::{Ask, Failure, failures};

use super::super::support::{SOON, answered, cluster, eventually, store, unlimited_errors, web};

/// Who may send to a pod, or be sent to by it; everything else is refused.
struct Policy<'a> {
    pod: &'a Host,
    /// TCP port of the pod, or of the others.
    port: u16,
    from: Vec<IpAddr>,
    to: Vec<IpAddr>,
    /// Whether connections are tracked, as kube-router does; it takes the bridge's packets, too.
    tracked: bool,
}

impl Policy<'_> {
    /// The rules for one family, in the order in which kube-router has them in the end.
    fn rules(&self, v4: bool) -> String {
        let pod = self.pod.ips()[usize::from(!v4)];
        let firewall = format!("KUBE-POD-FW-{}", self.pod.name());
        let policy = format!("KUBE-NWPLCY-{}", self.pod.name());
        let ingress = self.to.is_empty();
        let end = if ingress { "-d" } else { "-s" };
        let mut out = format!("*filter\n:{firewall} - [0:0]\n:{policy} - [0:0]\n");
        let mut rule = |text: String| {
            let _ = writeln!(out, "-A {text}");
        };
        for chain in ["FORWARD", "OUTPUT", "INPUT"] {
            rule(format!(
                "{chain} {end} {pod} -m comment --comment \"rule to jump to POD name\" -j {firewall}"
            ));
        }
        rule(format!("FORWARD -m physdev --physdev-is-bridged {end} {pod} -j {firewall}"));
        if self.tracked {
            rule(format!("{firewall} -m conntrack --ctstate INVALID -j DROP"));
            rule(format!("{firewall} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"));
        }
        if !v4 {
            for kind in ["neighbour-solicitation", "neighbour-advertisement"] {
                rule(format!("{firewall} -p ipv6-icmp --icmpv6-type {kind} -j ACCEPT"));
            }
        }
        if ingress {
            rule(format!("{firewall} -m addrtype --src-type LOCAL -d {pod} -j ACCEPT"));
        }
        rule(format!("{firewall} -m comment --comment \"run through nw policy\" -j {policy}"));
        rule(format!("{firewall} -m mark ! --mark 0x10000/0x10000 -j REJECT"));
        rule(format!("{firewall} -j MARK --set-mark 0/0x10000"));
        rule(format!("{firewall} -j MARK --set-mark 0x20000/0x20000"));
        let admitted = |rule: &mut dyn FnMut(String), ip: &IpAddr, end: &str| {
            let what = format!("{policy} {end} {ip} -p tcp --dport {}", self.port);
            rule(format!("{what} -j MARK --set-xmark 0x10000/0x10000"));
            rule(format!("{what} -m mark --mark 0x10000/0x10000 -j RETURN"));
        };
        self.from.iter().filter(|ip| ip.is_ipv4() == v4).for_each(|ip| admitted(&mut rule, ip, "-s"));
        self.to.iter().filter(|ip| ip.is_ipv4() == v4).for_each(|ip| admitted(&mut rule, ip, "-d"));
        out + "COMMIT\n"
    }

    fn enforce(&self, node: &Host) -> Result<()> {
        [true, false].iter().try_for_each(|&v4| node.add_rules(v4, &self.rules(v4)))
    }
}

/// A packet that the rules reject is answered by the node, about the backend; the client is told of the Service.
fn refused(from: &Host, to: SocketAddr) -> Result<()> {
    let answers = from.ask(&Ask::tcp(to).count(2).timeout(Duration::from_secs(4)))?;
    let failed = failures(&answers);
    ensure!(failed.get(&Failure::Refused) == Some(&2), "{} → {to}: {answers:?}", from.name());
    Ok(())
}

fn ips(hosts: &[&Host]) -> Vec<IpAddr> {
    hosts.iter().flat_map(|host| host.ips()).collect()
}

fn bridge_tables(cluster: &Cluster, on: bool) -> Result<()> {
    let value = if on { "1" } else { "0" };
    for node in [cluster.lab().node(0), cluster.lab().node(1)] {
        node.sysctl("bridge.bridge-nf-call-iptables", value)?;
        node.sysctl("bridge.bridge-nf-call-ip6tables", value)?;
    }
    Ok(())
}

/// The web service admits one pod, which may talk to nobody else; the store admits a client from outside and a pod.
fn policies(name: &str, bridged: bool) -> Result<()> {
    let mut cluster = cluster(name)?;
    bridge_tables(&cluster, bridged)?;
    // They would notice within a second.
    [0, 1].into_iter().try_for_each(|node| cluster.restart_agent(node, &[]))?;
    let lab = cluster.lab();
    unlimited_errors(lab)?;
    let (admitted, other, third) = (lab.pod(0, 2), lab.add_pod(0)?, lab.pod(1, 1));
    eventually(SOON, || web().iter().try_for_each(|&to| answered(&other, &Ask::tcp(to)).map(drop)))?;
    let (backends, shop) = ([lab.pod(0, 0), lab.pod(0, 1), lab.pod(1, 0)], lab.pod(1, 2));
    for (pod, node) in backends.iter().zip([0, 0, 1]) {
        let from = ips(&[&admitted]);
        Policy { pod, port: 8080, from, to: vec![], tracked: bridged }.enforce(lab.node(node))?;
    }
    let from = ips(&[lab.client(), &third]);
    Policy { pod: &shop, port: 8080, from, to: vec![], tracked: bridged }.enforce(lab.node(1))?;
    let to = ips(&backends.each_ref());
    Policy { pod: &admitted, port: 8080, from: vec![], to, tracked: bridged }.enforce(lab.node(0))?;

    let (mut good, mut bad) = (vec![], vec![]);
    for family in [0, 1] {
        let (web, store) = (web()[family], store()[family]);
        let mut names = answered(&admitted, &Ask::tcp(web).count(40))?;
        names.sort_unstable();
        names.dedup();
        ensure!(names == ["web-1", "web-2", "web-3"], "{names:?}");
        bad.extend([(&other, web), (&third, web)]);
        good.push((&third, store));
        // The one is not admitted; the other's own policy does not let it.
        bad.extend([(&other, store), (&admitted, store), (&admitted, lab.inet().at(8080)[family])]);
        // From outside, with its own address.
        good.push((lab.client(), lab.node(1).at(30081)[family]));
        bad.push((lab.inet(), lab.node(1).at(30081)[family]));
        // Without us, it is the same.
        bad.push((&other, shop.at(8080)[family]));
    }
    for (from, to) in good {
        answered(from, &Ask::tcp(to).count(3))?;
    }
    // All at once: an error that meets a socket inside `connect` counts only when the SYN is sent again.
    std::thread::scope(|scope| {
        let all: Vec<_> = bad.iter().map(|(from, to)| scope.spawn(|| refused(from, *to))).collect();
        all.into_iter()
            .try_for_each(|one| one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

#[test]
fn with_bridge_tables() -> Result<()> {
    policies("policy", true)
}

#[test]
fn without_bridge_tables() -> Result<()> {
    policies("policy-nobr", false)
}

/// On the node that a client comes to, its packets are those of the client to the pod.
#[test]
fn a_node_port_is_filtered_before_masquerade() -> Result<()> {
    let cluster = cluster("policy-np")?;
    let lab = cluster.lab();
    let (client, inet, shop) = (lab.client(), lab.inet(), lab.pod(1, 2));
    for (v4, family) in [(true, 0), (false, 1)] {
        let (source, pod) = (client.ips()[family], shop.ips()[family]);
        let to = Ask::tcp(lab.node(0).at(30081)[family]).timeout(Duration::from_millis(300));
        answered(inet, &to)?;
        answered(client, &to)?;
        lab.node(0).add_rules(
            v4,
            &format!("*filter\n-A FORWARD ! -s {source} -d {pod} -p tcp --dport 8080 -j DROP\nCOMMIT\n"),
        )?;
        answered(client, &to.clone().count(3))?;
        let answers = inet.ask(&to.clone().count(2))?;
        ensure!(failures(&answers).get(&Failure::Timeout) == Some(&2), "{answers:?}");
    }
    Ok(())
}

/// The second node's refusal passes both translations, and the router's reverse path filter.
#[test]
fn the_second_node_refuses_a_client() -> Result<()> {
    let cluster = cluster("policy-far")?;
    let lab = cluster.lab();
    unlimited_errors(lab)?;
    let shop = lab.pod(1, 2);
    let from = ips(&[lab.node(1)]);
    Policy { pod: &shop, port: 8080, from, to: vec![], tracked: true }.enforce(lab.node(1))?;
    lab.node(0).at(30081).iter().try_for_each(|&to| refused(lab.client(), to))
}
