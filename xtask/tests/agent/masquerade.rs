//! Who is masqueraded, by ip-masq-agent's file, while the agent runs.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xtask::demo::Cluster;
use xtask::lab::Host;
use xtask::probe::{Ask, Lines};
use xtask::system;

use super::support::{SOON, cluster, eventually, logged};

/// Long enough for packets of an open connection to have gone by after a change.
const A_WHILE: Duration = Duration::from_millis(300);

/// Lets pods' own addresses find their way back from outside the cluster.
fn route_to_pods(cluster: &Cluster) -> Result<()> {
    system::ensure_debian_packages(&[("iproute2", "ip")])?;
    let (lab, node) = (cluster.lab(), cluster.lab().node(0));
    for (net, via) in [("10.244.1.0/24", IpAddr::V4(node.v4())), ("fd00:10:244:1::/64", node.v6().into())] {
        let status =
            lab.wire().command("ip").args(["route", "add", net, "via", &via.to_string()]).status()?;
        ensure!(status.success(), "ip route add {net}: {status}");
    }
    Ok(())
}

/// A new flow of each transport and family is seen under these addresses.
fn new_flows_are_from(pod: &Host, inet: &Host, sources: [IpAddr; 2]) -> Result<()> {
    eventually(SOON, || {
        for (family, source) in sources.into_iter().enumerate() {
            for ask in [Ask::tcp(inet.at(8080)[family]), Ask::udp(inet.at(5353)[family])] {
                let answers = pod.ask(&ask.timeout(Duration::from_millis(500)))?;
                ensure!(answers[0].source() == Some(source), "{answers:?} should be from {source}");
            }
        }
        Ok(())
    })
}

/// Connections that are open, and the address that the server sees them from.
struct Open(Vec<(Lines, IpAddr)>);

impl Open {
    fn start(pod: &Host, inet: &Host, sources: [IpAddr; 2]) -> Result<Self> {
        let mut open = Vec::new();
        for (family, source) in sources.into_iter().enumerate() {
            for ask in [Ask::tcp(inet.at(8080)[family]), Ask::udp(inet.at(5353)[family])] {
                let ask = ask.keep().count(1_000_000).interval(Duration::from_millis(20));
                open.push((pod.start_asking(&ask)?, source));
            }
        }
        let mut open = Self(open);
        open.stay()?;
        Ok(open)
    }

    /// Every answer up to a while from now names the same source.
    fn stay(&mut self) -> Result<()> {
        let end = Instant::now() + A_WHILE;
        for (answers, source) in &mut self.0 {
            loop {
                let answer = answers.next().context("the client ended")?;
                ensure!(answer.source() == Some(*source), "{answer:?} should be from {source}");
                if Instant::now() > end {
                    break;
                }
            }
        }
        Ok(())
    }
}

/// A metadata server, say: outside of the cluster, and known by a link-local address.
#[test]
fn link_local_destinations_are_masqueraded_to_as_asked() -> Result<()> {
    const SERVER: &str = "169.254.77.10";
    let mut cluster = cluster("linklocal")?;
    route_to_pods(&cluster)?;
    let (node, pod, inet) =
        (cluster.lab().node(0).clone(), cluster.lab().pod(0, 0), cluster.lab().inet().clone());
    for (host, args) in [
        (&inet, &["address", "add", SERVER, "dev", "eth0"][..]),
        (cluster.lab().wire(), &["route", "add", SERVER, "via", &inet.v4().to_string()]),
    ] {
        let status = host.command("ip").args(args).status()?;
        ensure!(status.success(), "ip {args:?}: {status}");
    }
    let ask = Ask::tcp(SocketAddr::new(SERVER.parse()?, 8080)).timeout(Duration::from_millis(500));
    let seen_as = |source: Ipv4Addr| {
        eventually(SOON, || {
            let answers = pod.ask(&ask)?;
            ensure!(answers[0].source() == Some(source.into()), "{answers:?} should be from {source}");
            Ok(())
        })
    };
    let file = node.state_dir().join("ip-masq-agent");
    let flags = ["--ip-masq-agent-config", file.to_str().context("a path in ASCII")?];

    // flannel's rule.
    seen_as(node.v4())?;
    // ip-masq-agent's default, then what its file says.
    cluster.restart_agent(0, &flags)?;
    seen_as(pod.v4())?;
    fs::write(&file, "nonMasqueradeCIDRs: []\nmasqLinkLocal: true\n")?;
    seen_as(node.v4())?;
    fs::write(&file, "nonMasqueradeCIDRs: []\nmasqLinkLocal: false\n")?;
    seen_as(pod.v4())
}

#[test]
fn ip_masq_agents_file_is_followed() -> Result<()> {
    let mut cluster = cluster("masqfile")?;
    route_to_pods(&cluster)?;
    let (node, pod, inet) =
        (cluster.lab().node(0).clone(), cluster.lab().pod(0, 0), cluster.lab().inet().clone());
    let dir = node.state_dir().join("config");
    fs::create_dir(&dir)?;
    let file = dir.join("ip-masq-agent");
    let write = |text: &str| -> Result<()> {
        fs::write(dir.join(".new"), text)?;
        Ok(fs::rename(dir.join(".new"), &file)?)
    };
    let flag = file.to_str().context("a path in ASCII")?;
    let flags = ["--ip-masq-agent-config", flag];
    let exempt = "nonMasqueradeCIDRs: [198.51.100.0/24, 'fd00::/8', '2001:db8:2::/64']\nresyncInterval: 1h\n";

    // No file: private addresses alone are exempt, and the outside is none.
    cluster.restart_agent(0, &flags)?;
    new_flows_are_from(&pod, &inet, node.ips())?;
    let mut masqueraded = Open::start(&pod, &inet, node.ips())?;

    write(exempt)?;
    new_flows_are_from(&pod, &inet, pod.ips())?;
    masqueraded.stay()?;

    write("nonMasqueradeCIDRs: [198.51.100.0/24, nonsense]\n")?;
    logged(&node, &["ip-masq-agent", "nonsense", "is not a CIDR", "stays"])?;
    new_flows_are_from(&pod, &inet, pod.ips())?;
    // Nor does an agent that starts with it forget what held.
    cluster.kill_agent(0);
    cluster.start_agent(0, &flags)?;
    new_flows_are_from(&pod, &inet, pod.ips())?;

    write("nonMasqueradeCIDRs: ['198.51.100.0/24']\n")?;
    new_flows_are_from(&pod, &inet, [pod.v4().into(), node.v6().into()])?;
    fs::remove_file(&file)?;
    new_flows_are_from(&pod, &inet, node.ips())?;
    masqueraded.stay()?;
    Ok(())
}
