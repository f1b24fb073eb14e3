//! Netfilter takes any port to masquerade to, also one that a flow of ours has to the same server.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xtask::demo::Cluster;
use xtask::lab::Host;
use xtask::probe::{Ask, Lines, Transport};

use super::super::support::cluster;

/// Every transport and family, to the host outside.
fn asks(cluster: &Cluster) -> Vec<Ask> {
    let inet = cluster.lab().inet();
    let (tcp, udp) = (inet.at(8080).map(Ask::tcp), inet.at(5353).map(Ask::udp));
    tcp.into_iter().chain(udp).map(|ask| ask.timeout(Duration::from_millis(700))).collect()
}

/// A rule like flannel's, but for one pod, and the port is not left to chance.
fn masquerade_to(node: &Host, pod: &Host, ask: &Ask, port: u16) -> Result<()> {
    let v4 = ask.to.is_ipv4();
    let [four, six] = pod.ips();
    let source = if v4 { four } else { six };
    let protocol = if ask.transport == Transport::Tcp { "tcp" } else { "udp" };
    let (to, service) = (ask.to.ip(), ask.to.port());
    node.add_rules(
        v4,
        &format!(
            "*nat\n-A POSTROUTING -s {source} -d {to} -p {protocol} --dport {service} \
             -j MASQUERADE --to-ports {port}\nCOMMIT\n"
        ),
    )
}

/// A conversation, and the source that the server sees.
struct Talk(Lines, SocketAddr);

impl Talk {
    fn start(pod: &Host, ask: &Ask) -> Result<Self> {
        let ask = ask.clone().keep().count(1_000_000).interval(Duration::from_millis(20));
        let mut lines = pod.start_asking(&ask)?;
        let seen = Self::next(&mut lines).with_context(|| format!("{} → {}", pod.name(), ask.to))?;
        Ok(Self(lines, seen))
    }

    fn next(lines: &mut Lines) -> Result<SocketAddr> {
        let answer = lines.next().context("the client ended")?;
        answer.0.map_err(|e| anyhow::anyhow!("{e}"))?.peer.context("no source")
    }

    /// It goes on, and under the same address. (What was answered before now is in the pipe still.)
    fn goes_on(&mut self) -> Result<()> {
        for _ in 0..50 {
            let seen = Self::next(&mut self.0)?;
            ensure!(seen == self.1, "the server saw {}, and now {seen}", self.1);
        }
        Ok(())
    }
}

#[test]
fn netfilter_takes_a_port_of_ours() -> Result<()> {
    let cluster = cluster("shared-ours")?;
    let (node, ours, theirs) = (cluster.lab().node(0), cluster.lab().pod(0, 1), cluster.lab().pod(0, 2));
    let mut talks = Vec::new();
    for ask in asks(&cluster) {
        let first = Talk::start(&ours, &ask)?;
        masquerade_to(node, &theirs, &ask, first.1.port())?;
        let second = Talk::start(&theirs, &ask)?;
        ensure!(first.1.ip() == second.1.ip() && first.1 != second.1, "both from {}", first.1);
        talks.extend([first, second]);
    }
    talks.iter_mut().try_for_each(Talk::goes_on)
}

#[test]
fn we_take_no_port_of_netfilters() -> Result<()> {
    let mut cluster = cluster("shared-theirs")?;
    cluster.restart_agent(0, &["--masquerade-ports=20000-20001"])?;
    let (node, ours, theirs) = (cluster.lab().node(0), cluster.lab().pod(0, 1), cluster.lab().pod(0, 2));
    let mut talks = Vec::new();
    for ask in asks(&cluster) {
        masquerade_to(node, &theirs, &ask, 20_000)?;
        let first = Talk::start(&theirs, &ask)?;
        ensure!(first.1.port() == 20_000, "from {}", first.1);
        let second = Talk::start(&ours, &ask)?;
        ensure!(second.1.port() == 20_001, "from {}", second.1);
        let third = cluster.lab().pod(0, 0).ask(&ask)?;
        ensure!(third[0].failure().is_some(), "there is no third port: {third:?}");
        talks.extend([first, second]);
    }
    talks.iter_mut().try_for_each(Talk::goes_on)
}
