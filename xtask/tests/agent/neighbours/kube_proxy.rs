//! kube-proxy's rules for the same Services, there before us, with us and gone after us.

mod rules;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use xtask::demo::{Cluster, vip};
use xtask::lab::{Host, Lab};
use xtask::probe::Ask;
use xtask::system::{ensure_debian_packages, output};

use super::super::support::{SOON, Traffic, agent_exe, answered, dns, eventually, store, web};
use super::everything_works;
use rules::Mode;

/// They are many, and need not be fast.
fn slowly(ask: Ask) -> Ask {
    ask.interval(Duration::from_millis(50))
}

/// How many [`talk`] begins at n1 in each family.
const TALKS: u64 = 2 * 3 + 2 * 8 + DATAGRAMS;
const DATAGRAMS: u64 = 5;

/// Connections of every kind, several so that masquerade ports of all sorts are among them. Each has to stay with its
/// server, and not a datagram of those without connections may be lost.
fn talk(lab: &Lab, traffic: &mut Traffic) -> Result<()> {
    let (pod, client, n1, n2) = (lab.pod(0, 2), lab.client(), lab.node(0), lab.node(1));
    for family in [0, 1] {
        let tcp = |to: [SocketAddr; 2]| slowly(Ask::tcp(to[family]));
        let udp = |to: [SocketAddr; 2]| slowly(Ask::udp(to[family]));
        for to in [web(), store()] {
            traffic.conversation(&pod, &tcp(to))?;
            traffic.conversation(n1, &tcp(to))?;
            traffic.conversation(&lab.pod(0, 0), &tcp(to))?;
        }
        for _ in 0..8 {
            traffic.conversation(client, &tcp(n1.at(30081)))?;
            traffic.conversation(client, &tcp(n1.at(30080)))?;
        }
        traffic.conversation(client, &tcp(n2.at(30081)))?;
        traffic.conversation(&lab.pod(0, 1), &udp(dns()))?;
        // The name server itself: the one that it gets may be it.
        traffic.conversation(&pod, &udp(dns()))?;
        traffic.conversation(client, &udp(n1.at(30053)))?;
        traffic.conversation(n1, &udp(dns()))?;
        traffic.conversation(n1, &udp(dns()).unconnected())?;
    }
    Ok(())
}

#[test]
fn its_rules_do_nothing_to_what_is_ours() -> Result<()> {
    let mut cluster = Cluster::without_agents(Lab::builder("beside").pods(3).build()?, agent_exe()?)?;
    let (pod, node) = (cluster.lab().pod(0, 2), cluster.lab().node(0).clone());
    for node in [0, 1] {
        Mode::Legacy.write(cluster.lab(), cluster.lab().node(node), true)?;
    }
    web().iter().try_for_each(|&to| answered(&pod, &Ask::tcp(to)).map(drop))?;
    ensure!(Mode::Legacy.translated(&node)? == 2, "the rules do not work without us");
    for node in [0, 1] {
        cluster.start_agent(node, &[])?;
    }
    everything_works(&cluster)?;
    ensure!(Mode::Legacy.translated(&node)? == 2, "its rules still translate");
    Ok(())
}

/// The kubelet's chains, and somebody else's, in either kind of iptables.
const OTHERS: &str = "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n\
                      *nat\n:KUBE-KUBELET-CANARY - [0:0]\n:MINE - [0:0]\n-A PREROUTING -j MINE\n\
                      -A MINE -m comment --comment \"mine: -j KUBE-SERVICES\" -j RETURN\nCOMMIT\n\
                      *filter\n:KUBE-FIREWALL - [0:0]\n-A INPUT -j KUBE-FIREWALL\n\
                      -A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP\nCOMMIT\n";

/// All rules of a node but for counters.
fn all_rules(node: &Host) -> Result<Vec<String>> {
    ensure_debian_packages(&[("iptables", "iptables-nft-save"), ("nftables", "nft")])?;
    let mut all = Vec::new();
    for (program, args) in [
        ("iptables-legacy-save", &[][..]),
        ("ip6tables-legacy-save", &[]),
        ("iptables-nft-save", &[]),
        ("ip6tables-nft-save", &[]),
        ("nft", &["--stateless", "list", "ruleset"]),
    ] {
        let rules = output(node.command(program).args(args))?;
        let lines = rules.lines().filter(|line| !line.starts_with('#'));
        // A chain's counters come after its policy.
        all.extend(lines.map(|line| line.split(" [").next().unwrap_or_default().to_owned()));
    }
    Ok(all)
}

fn connections_outlive_it(name: &str, mode: Mode, random_fully: bool) -> Result<()> {
    let mut cluster = Cluster::without_agents(Lab::builder(name).pods(3).build()?, agent_exe()?)?;
    let nodes = [cluster.lab().node(0).clone(), cluster.lab().node(1).clone()];
    let mut before = Vec::new();
    for node in &nodes {
        for v4 in [true, false] {
            node.add_legacy_rules(v4, OTHERS)?;
            node.add_rules(v4, OTHERS)?;
        }
        before.push(all_rules(node)?);
        mode.write(cluster.lab(), node, random_fully)?;
    }
    let mut traffic = Traffic::default();
    talk(cluster.lab(), &mut traffic)?;
    // All but the client's to n2 went by here.
    eventually(SOON, || {
        let count = mode.translated(&nodes[0])?;
        ensure!(count == 2 * TALKS, "{count} connections by its rules");
        Ok(())
    })?;
    for node in [0, 1] {
        cluster.start_agent(node, &[])?;
    }
    std::thread::sleep(Duration::from_millis(200));
    talk(cluster.lab(), &mut traffic)?;
    everything_works(&cluster)?;
    ensure!(mode.translated(&nodes[0])? == 2 * TALKS, "its rules still translate");
    let gone = Instant::now();
    for (node, before) in nodes.iter().zip(before) {
        let said = output(node.command(cluster.agent_exe()).args(["cleanup", "--kube-proxy"]))?;
        let (left, ours) = (all_rules(node)?, "table inet lb-agent");
        ensure!(left.iter().any(|line| line.contains(ours)), "netfilter is not told to go on: {said}");
        let lost: Vec<_> = before.iter().filter(|line| !left.contains(line)).collect();
        ensure!(lost.is_empty(), "{mode:?}: {lost:?} is not there any more: {left:#?}");
        let its = |line: &&String| {
            let names = [
                "KUBE-SVC",
                "KUBE-SERVICES",
                "KUBE-PROXY",
                "KUBE-POSTROUTING",
                "table ip kube-proxy",
                "table ip6 kube-proxy",
            ];
            !before.contains(line) && names.iter().any(|name| line.contains(name))
        };
        let still: Vec<_> = left.iter().filter(its).collect();
        ensure!(still.is_empty(), "{mode:?}: {still:?} is there still");
    }
    everything_works(&cluster)?;
    std::thread::sleep(Duration::from_millis(200));
    traffic.finish(gone + Duration::from_millis(100)).map(drop)
}

#[test]
fn its_connections_outlive_it() -> Result<()> {
    connections_outlive_it("takeover", Mode::Legacy, false)
}

#[test]
fn its_connections_outlive_it_with_random_ports_by_iptables_nft() -> Result<()> {
    connections_outlive_it("takeover-nft", Mode::Nft, true)
}

#[test]
fn its_connections_outlive_it_in_its_nftables_mode() -> Result<()> {
    connections_outlive_it("takeover-nftables", Mode::Nftables, true)
}

/// Takes the agents off, as `manifests` do it at the end.
fn clean_up(cluster: &mut Cluster) -> Result<String> {
    let mut said = String::new();
    for index in [0, 1] {
        cluster.stop_agent(index)?;
        let node = cluster.lab().node(index);
        let mut command = node.command(cluster.agent_exe());
        command.args(["cleanup", "--cni-conf-dir=", "--cni-bin-dir=", "--bpffs"]).arg(node.bpffs_dir());
        said += &output(&mut command)?;
        ensure!(!node.bpffs_dir().join("lb").exists(), "pins are left: {said}");
    }
    Ok(said)
}

/// [`talk`], and what pods send out of the cluster.
fn talk_ours(lab: &Lab, traffic: &mut Traffic) -> Result<()> {
    talk(lab, traffic)?;
    let inet = lab.inet();
    for family in [0, 1] {
        traffic.conversation(&lab.pod(0, 0), &slowly(Ask::tcp(inet.at(8080)[family])))?;
        traffic.conversation(&lab.pod(0, 0), &slowly(Ask::udp(inet.at(5353)[family])))?;
        // Its endpoint is outside the cluster.
        let db = vip("10.96.0.30", "fd00:10:96::30", 5432)[family];
        traffic.conversation(&lab.pod(0, 1), &slowly(Ask::tcp(db)))?;
    }
    Ok(())
}

#[test]
fn back_to_it_and_no_connection_ends() -> Result<()> {
    let lab = Lab::builder("back").pods(3).build()?;
    let mut cluster = Cluster::on(lab, agent_exe()?)?;
    let mut traffic = Traffic::default();
    talk_ours(cluster.lab(), &mut traffic)?;
    std::thread::sleep(Duration::from_millis(200));
    for node in [0, 1] {
        Mode::Legacy.write(cluster.lab(), cluster.lab().node(node), true)?;
    }
    let (pod, client) = (cluster.lab().pod(0, 2), cluster.lab().client().clone());
    for family in [0, 1] {
        traffic.connections(&pod, web()[family]);
        traffic.connections(&client, cluster.lab().node(0).at(30081)[family]);
        traffic.connections(cluster.lab().node(0), store()[family]);
    }
    clean_up(&mut cluster)?;
    let gone = Instant::now();
    ensure!(Mode::Legacy.translated(cluster.lab().node(0))? > 0, "new connections are kube-proxy's");
    std::thread::sleep(Duration::from_millis(500));
    traffic.finish(gone + Duration::from_millis(200)).map(drop)
}

#[test]
fn connections_outlive_us_where_nobody_comes_after() -> Result<()> {
    let lab = Lab::builder("alone").pods(3).build()?;
    let mut cluster = Cluster::on(lab, agent_exe()?)?;
    let mut traffic = Traffic::default();
    talk_ours(cluster.lab(), &mut traffic)?;
    std::thread::sleep(Duration::from_millis(200));
    clean_up(&mut cluster)?;
    let gone = Instant::now();
    let pod = cluster.lab().pod(0, 2);
    let refused = pod.ask(&Ask::tcp(web()[0]).timeout(Duration::from_millis(300)))?;
    ensure!(refused[0].0.is_err(), "somebody still serves: {refused:?}");
    std::thread::sleep(Duration::from_millis(300));
    traffic.finish(gone + Duration::from_millis(200)).map(drop)
}
