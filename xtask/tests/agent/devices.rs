//! Devices and addresses that come and go while the agent runs, and while it does not.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::TryStreamExt as _;
use xtask::demo::Cluster;
use xtask::lab::Host;
use xtask::probe::{Ask, Ping};

use super::restart::maps_dir;
use super::support::{SOON, answered, cluster, eventually, ip, log, named_slice, web};

/// What a new pod may have to wait for the agent, programs' start and a busy machine included.
const A_SECOND: Duration = Duration::from_secs(1);

fn links(node: &Host) -> Result<BTreeSet<String>> {
    let dir = node.bpffs_dir().join("lb/links");
    let entries = std::fs::read_dir(dir)?;
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// As a client and as a backend.
fn served(cluster: &Cluster, pod: &Host) -> Result<()> {
    let lab = cluster.lab();
    let short = |ask: Ask| ask.timeout(Duration::from_millis(200));
    for family in [0, 1] {
        eventually(A_SECOND, || answered(pod, &short(Ask::tcp(web()[family]))).map(drop))?;
        let outside = lab.inet().at(8080)[family];
        eventually(A_SECOND, || answered(pod, &short(Ask::tcp(outside))).map(drop))?;
        ensure!(pod.ping(&Ping::new(outside.ip()))?[0].0.is_ok(), "ping is masqueraded");
    }
    let _server = pod.serve_ports(&[8080], &[])?;
    let more: Vec<String> = pod
        .at(8080)
        .iter()
        .map(|at| {
            let name = format!("more-{}", if at.is_ipv4() { "v4" } else { "v6" });
            named_slice("web", &name, "http", &[*at])
        })
        .collect();
    cluster.write("more.yaml", &more.join("---\n"))?;
    for to in [web(), lab.node(0).at(30080)].concat() {
        let from = if web().contains(&to) { lab.pod(0, 2) } else { lab.client().clone() };
        eventually(SOON, || {
            let names = answered(&from, &Ask::tcp(to).count(20))?;
            ensure!(names.iter().any(|name| name == pod.name()), "{to}: {names:?}");
            Ok(())
        })?;
    }
    // Removed as an endpoint before its server ends.
    std::fs::remove_file(cluster.manifests().join("more.yaml"))?;
    eventually(SOON, || {
        let names = answered(&lab.pod(0, 2), &Ask::tcp(web()[0]).count(40))?;
        ensure!(!names.iter().any(|name| name == pod.name()), "{names:?}");
        Ok(())
    })
}

#[test]
fn new_pods_are_served_and_gone_ones_leave_nothing() -> Result<()> {
    let mut cluster = cluster("pods")?;
    let before = links(cluster.lab().node(0))?;
    let pod = cluster.lab().add_pod(0)?;
    served(&cluster, &pod)?;
    ensure!(links(cluster.lab().node(0))?.len() > before.len(), "links are pinned by device");
    cluster.lab().remove_pod(&pod)?;
    eventually(SOON, || {
        let now = links(cluster.lab().node(0))?;
        ensure!(now == before, "left behind: {:?}", now.difference(&before));
        Ok(())
    })?;
    // One goes and one comes while no agent looks.
    let pod = cluster.lab().add_pod(0)?;
    eventually(SOON, || {
        ensure!(links(cluster.lab().node(0))?.len() > before.len(), "the pod is not served");
        Ok(())
    })?;
    cluster.kill_agent(0);
    cluster.lab().remove_pod(&pod)?;
    let pod = cluster.lab().add_pod(0)?;
    cluster.start_agent(0, &[])?;
    served(&cluster, &pod)?;
    cluster.lab().remove_pod(&pod)?;
    eventually(SOON, || {
        let now = links(cluster.lab().node(0))?;
        ensure!(now == before, "left behind: {:?}", now.difference(&before));
        Ok(())
    })
}

/// Adds an address to a device of a host.
fn add_address(host: &Host, device: &'static str, ip: IpAddr, prefix: u8) -> Result<()> {
    host.run_in(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            tokio::spawn(connection);
            let link = handle.link().get().match_name(device).execute().try_next().await?;
            let index = link.context("no such device")?.header.index;
            handle.address().add(index, ip, prefix).execute().await.context("adding an address")
        })
    })?
}

/// What the programs are not told only makes them slower: the rest goes on, and it is said once.
#[test]
fn new_addresses_count_though_the_overlays_port_cannot_be_told() -> Result<()> {
    let cluster = cluster("untold")?;
    let (node, client) = (cluster.lab().node(0), cluster.lab().client());
    std::fs::remove_file(maps_dir(node).join("LB_OVERLAY"))?;
    for overlay in ["flannel.1", "flannel-v6.1"] {
        ip(node, &["link", "delete", overlay])?;
    }
    for new in ["172.18.0.111", "172.18.0.112"] {
        let new: IpAddr = new.parse()?;
        add_address(node, "eth0", new, 24)?;
        // Two of three endpoints are on the node.
        let ask = Ask::tcp(SocketAddr::new(new, 30080)).timeout(Duration::from_millis(500));
        eventually(Duration::from_secs(4), || answered(client, &ask).map(drop))?;
    }
    let said = log(node).matches("tell the programs of the overlays").count();
    ensure!(said == 1, "said {said} times:\n{}", log(node));
    Ok(())
}

#[test]
fn new_addresses_answer_node_ports() -> Result<()> {
    let cluster = cluster("address")?;
    let (node, client) = (cluster.lab().node(0), cluster.lab().client());
    for (ip, prefix) in [("172.18.0.111", 24), ("fd00:172:18::111", 64)] {
        let ip: IpAddr = ip.parse()?;
        add_address(node, "eth0", ip, prefix)?;
        let to = SocketAddr::new(ip, 30080);
        let ask = Ask::tcp(to).timeout(Duration::from_millis(500));
        eventually(Duration::from_secs(4), || answered(client, &ask).map(drop))?;
        answered(client, &ask.count(20))?;
        answered(client, &Ask::udp(SocketAddr::new(ip, 30053)).count(5))?;
        // The address before it is still one.
        answered(client, &Ask::tcp(node.at(30080)[usize::from(ip.is_ipv6())]))?;
    }
    Ok(())
}
