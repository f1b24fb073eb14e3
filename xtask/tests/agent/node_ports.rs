//! Where NodePorts and the health checks of Services are answered, while addresses come and go.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use xtask::demo::Cluster;
use xtask::lab::Host;
use xtask::probe::Ask;

use super::health::{PORT, refused, says, shop};
use super::support::{SOON, answered, cluster, eventually, ip};

/// A NodePort of the web service.
const NODE_PORT: u16 = 30080;
const SECOND: [&str; 2] = ["172.18.0.99", "fd00:172:18::99"];

fn at(ip: &str, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(ip.parse()?, port))
}

/// The cluster, whose wire sends what is for the second addresses to n1 even if n1 does not have them (any more).
fn site(name: &str) -> Result<Cluster> {
    let cluster = cluster(name)?;
    for (second, node) in SECOND.into_iter().zip(cluster.lab().node(0).ips()) {
        ip(cluster.lab().wire(), &["route", "add", second, "via", &node.to_string()])?;
    }
    shop(&cluster, "Local", "ready: true")?;
    Ok(cluster)
}

fn serves(client: &Host, to: SocketAddr) -> Result<()> {
    let ask = Ask::tcp(to).timeout(Duration::from_millis(300));
    eventually(SOON, || answered(client, &ask).map(drop))
}

/// Nobody answers, not even a backend.
fn silent(client: &Host, to: SocketAddr) -> Result<()> {
    let ask = Ask::tcp(to).timeout(Duration::from_millis(300));
    eventually(SOON, || {
        let answers = client.ask(&ask)?;
        ensure!(answers.iter().all(|answer| answer.name().is_none()), "{to} is served: {answers:?}");
        Ok(())
    })
}

/// Whether a socket of the node listens there: an address that is gone tells nobody else.
fn listening(node: &Host, at: SocketAddr) -> Result<bool> {
    let file = if at.is_ipv4() { "/proc/thread-self/net/tcp" } else { "/proc/thread-self/net/tcp6" };
    let sockets = node.run_in(|| std::fs::read_to_string(file))??;
    // Words as this machine stores them, which is in network order.
    let octets = match at.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let words = octets.chunks(4).map(|w| format!("{:08X}", u32::from_ne_bytes([w[0], w[1], w[2], w[3]])));
    let local = format!("{}:{:04X}", words.collect::<String>(), at.port());
    // The third word is the other end, the fourth the state: 0A is LISTEN.
    Ok(sockets.lines().any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields.len() > 3 && fields[1] == local && fields[3] == "0A"
    }))
}

#[test]
fn addresses_in_the_ranges_are_followed() -> Result<()> {
    let mut cluster = site("ranges")?;
    // The node's own IPv4 address is in none of them.
    cluster.restart_agent(0, &["--nodeport-addresses=172.18.0.64/26,fd00:172:18::/64"])?;
    let (client, node) = (cluster.lab().client().clone(), cluster.lab().node(0).clone());
    silent(&client, node.at(NODE_PORT)[0])?;
    refused(&client, node.at(PORT)[0])?;
    serves(&client, node.at(NODE_PORT)[1])?;
    eventually(SOON, || says(&client, node.at(PORT)[1], 1))?;
    for (second, prefix) in SECOND.into_iter().zip(["24", "64"]) {
        let (port, check) = (at(second, NODE_PORT)?, at(second, PORT)?);
        silent(&client, port)?;
        let address = format!("{second}/{prefix}");
        for _ in 0..2 {
            ip(
                &node,
                &["address", "add", &address, "dev", "eth0", "nodad"]
                    [..if second.contains(':') { 6 } else { 5 }],
            )?;
            serves(&client, port)?;
            eventually(SOON, || says(&client, check, 1))?;
            ensure!(listening(&node, check)?, "{check} is not found among the node's sockets");
            ip(&node, &["address", "del", &address, "dev", "eth0"])?;
            silent(&client, port)?;
            eventually(SOON, || {
                ensure!(!listening(&node, check)?, "the health check still listens on {check}");
                Ok(())
            })?;
        }
        // Nobody else has noticed.
        serves(&client, node.at(NODE_PORT)[1])?;
        says(&client, node.at(PORT)[1], 1)?;
    }
    Ok(())
}

#[test]
fn the_primary_address_is_the_node_objects() -> Result<()> {
    let mut cluster = site("primary")?;
    let (client, node) = (cluster.lab().client().clone(), cluster.lab().node(0).clone());
    // After the demo's own, so that it counts.
    let object = |cluster: &Cluster, ip: IpAddr| {
        cluster.write(
            "z-node.yaml",
            &format!(
                "apiVersion: v1\nkind: Node\nmetadata: {{ name: n1 }}\nstatus:\n  addresses:\n  \
                 - {{ type: ExternalIP, address: 203.0.113.7 }}\n  - {{ type: InternalIP, address: {ip} }}\n"
            ),
        )
    };
    let second: IpAddr = SECOND[0].parse()?;
    object(&cluster, node.v4().into())?;
    ip(&node, &["address", "add", "172.18.0.99/24", "dev", "eth0"])?;
    cluster.restart_agent(0, &["--nodeport-addresses=primary"])?;
    for to in node.at(NODE_PORT) {
        serves(&client, to)?;
    }
    eventually(SOON, || says(&client, node.at(PORT)[0], 1))?;
    silent(&client, SocketAddr::new(second, NODE_PORT))?;
    refused(&client, SocketAddr::new(second, PORT))?;

    object(&cluster, second)?;
    serves(&client, SocketAddr::new(second, NODE_PORT))?;
    eventually(SOON, || says(&client, SocketAddr::new(second, PORT), 1))?;
    silent(&client, node.at(NODE_PORT)[0])?;
    refused(&client, node.at(PORT)[0])?;
    // The Node object has none of that family.
    serves(&client, node.at(NODE_PORT)[1])?;

    // It is not replaced by another while it is away.
    ip(&node, &["address", "del", "172.18.0.99/24", "dev", "eth0"])?;
    silent(&client, SocketAddr::new(second, NODE_PORT))?;
    silent(&client, node.at(NODE_PORT)[0])?;
    serves(&client, node.at(NODE_PORT)[1])
}
