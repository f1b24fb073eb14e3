//! The plugin in the lists that clusters have, with the plugins of Debian, and with traffic.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xtask::cni::{Attached, Network};
use xtask::demo::{Cluster, vip};
use xtask::lab::Host;
use xtask::probe::{Ask, Server};
use xtask::system::ensure_debian_packages;

use super::super::inspect;
use super::super::support::{SOON, Traffic, answered, cluster, eventually, service, store};
use super::{all_served, bridge, ipam, ips, network, ours, state_dir};

fn portmap() -> Value {
    json!({ "type": "portmap", "capabilities": { "portMappings": true } })
}

/// As k3s has it, and flannel's plugin calls the bridge plugin for it.
fn flannel(node: &Host) -> Result<Network> {
    let mut delegate = bridge(node);
    delegate["forceAddress"] = true.into();
    // Which makes the default routes by itself.
    delegate["isDefaultGateway"] = true.into();
    delegate["ipam"]["routes"] = json!([]);
    let bandwidth = json!({ "type": "bandwidth", "capabilities": { "bandwidth": true } });
    network(node, "cbr0", "1.0.0", &[delegate, portmap(), bandwidth, ours(node)], None)
}

fn before_portmap(node: &Host) -> Result<Network> {
    network(node, "early", "0.4.0", &[bridge(node), ours(node), portmap()], None)
}

/// As kind writes it.
fn kindnet(node: &Host) -> Result<Network> {
    let ptp = json!({ "type": "ptp", "ipMasq": false, "mtu": 1450, "ipam": ipam(node),
                      "capabilities": { "ips": true } });
    network(node, "kindnet", "0.4.0", &[ptp, portmap(), ours(node)], None)
}

/// Calico's own plugin is not to be had here. This one does what it does for a pod: a veth without an address on the
/// host, which answers for a gateway that nobody has, and a result that names no interface of the pod.
fn calico(node: &Host, pod: &Host) -> Result<Network> {
    ensure_debian_packages(&[("iproute2", "ip")])?;
    let (dev, v4, v6) = (format!("cali{}", pod.name()), pod.v4(), pod.v6());
    let result = json!({ "cniVersion": "0.3.1", "interfaces": [{ "name": dev }], "ips": [
        { "version": "4", "address": format!("{v4}/32") }, { "version": "6", "address": format!("{v6}/128") },
    ] });
    let script = format!(
        "#!/bin/sh\nset -e\ncat >/dev/null\nns=${{CNI_NETNS##*/}}\nif [ $CNI_COMMAND = ADD ]; then\n\
         ip link add {dev} mtu 1450 type veth peer name eth0 mtu 1450 netns $ns\n\
         ip link set {dev} up\nip -n $ns link set lo up\nip -n $ns link set eth0 up\n\
         echo 1 >/proc/sys/net/ipv4/conf/{dev}/proxy_arp\n\
         ip -n $ns addr add {v4}/32 dev eth0\nip -n $ns route add 169.254.1.1 dev eth0 scope link\n\
         ip -n $ns route add default via 169.254.1.1\nip route add {v4}/32 dev {dev}\n\
         gw=$(ip -6 -o addr show dev {dev} scope link | sed 's/.*inet6 //;s,/.*,,')\n\
         ip -n $ns addr add {v6}/128 dev eth0 nodad\nip -n $ns route add default via $gw dev eth0\n\
         ip route add {v6}/128 dev {dev}\necho '{result}'\n\
         elif [ $CNI_COMMAND = DEL ]; then ip link del {dev} 2>/dev/null || true\nfi\n"
    );
    let dir: PathBuf = node.state_dir().join("plugins");
    fs::create_dir_all(&dir)?;
    let exe = dir.join("calico");
    fs::write(&exe, script)?;
    fs::set_permissions(&exe, fs::Permissions::from_mode(0o755))?;
    let calico = json!({ "type": "calico", "ipam": { "type": "calico-ipam" }, "policy": { "type": "k8s" } });
    let portmap = json!({ "type": "portmap", "snat": true, "capabilities": { "portMappings": true } });
    network(node, "k8s-pod-network", "0.3.1", &[calico, portmap, ours(node)], Some(&dir))
}

/// A pod that a chain will make, the Service that it is the only backend of, and a port of the node for it.
struct Pod {
    host: Host,
    service: [SocketAddr; 2],
    host_port: u16,
}

impl Pod {
    fn new(cluster: &Cluster, number: u8) -> Result<Self> {
        let host = cluster.lab().add_unplugged_pod(0)?;
        let service = vip(&format!("10.96.7.{number}"), &format!("fd00:10:96::7:{number}"), 80);
        Ok(Self { host, service, host_port: 8080 + u16::from(number) })
    }

    fn manifest(&self) -> String {
        let of_family = |family: usize| {
            let ip = self.service[family].ip().to_string();
            service(&format!("{}-{family}", self.host.name()), &ip, &[self.host.at(8080)[family]])
        };
        [of_family(0), of_family(1)].join("---\n")
    }

    fn capabilities(&self) -> Value {
        let mut capabilities = ips(&self.host);
        capabilities["portMappings"] =
            json!([{ "hostPort": self.host_port, "containerPort": 8080, "protocol": "tcp" }]);
        capabilities
    }

    /// As a client from its first packet on, as a backend, as its own backend, and at its port of the node.
    fn is_served(&self, cluster: &Cluster) -> Result<Server> {
        let lab = cluster.lab();
        let once = |from: &Host, to: SocketAddr, name: &str| -> Result<()> {
            for ask in [Ask::tcp(to), Ask::tcp(to).keep().count(3)] {
                let names = answered(from, &ask)?;
                ensure!(names.iter().all(|n| n == name), "{} → {to}: {names:?}, not {name}", from.name());
            }
            Ok(())
        };
        for family in [0, 1] {
            // Its backend is on the other node: to the pods on the bridge here, this one need not be a neighbour.
            once(&self.host, store()[family], "store")?;
        }
        let server = self.host.serve_ports(&[8080], &[])?;
        for family in [0, 1] {
            once(&lab.pod(1, 0), self.service[family], self.host.name())?;
            once(&self.host, self.service[family], self.host.name())?;
            once(lab.client(), lab.node(0).at(self.host_port)[family], self.host.name())?;
        }
        Ok(server)
    }
}

/// Everything that is kept of a pod, gone.
fn nothing_left(node: &Host, attached: &[String]) -> Result<()> {
    let links = fs::read_dir(super::pins(node).join("links"))?;
    let links: Vec<_> = links.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let tc: Vec<_> = links.iter().filter(|name| name.starts_with("tc-")).collect();
    ensure!(tc.len() == attached.len(), "links of devices that are gone: {tc:?}, before {attached:?}");
    let records = fs::read_dir(state_dir(node).join("pods"))?.count();
    ensure!(records == 0, "{records} records are left");
    Ok(())
}

fn tc_links(node: &Host) -> Result<Vec<String>> {
    let links = fs::read_dir(super::pins(node).join("links"))?;
    let names = links.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names.filter(|name| name.starts_with("tc-")).collect())
}

#[test]
fn pods_of_every_chain_are_served_while_no_agent_runs() -> Result<()> {
    let mut cluster = cluster("chains")?;
    let node = cluster.lab().node(0).clone();
    let pods: Vec<Pod> = (1..=4).map(|number| Pod::new(&cluster, number)).collect::<Result<_>>()?;
    let chains = [flannel(&node)?, before_portmap(&node)?, kindnet(&node)?, calico(&node, &pods[3].host)?];
    let manifests: Vec<String> = pods.iter().map(Pod::manifest).collect();
    cluster.write("pods.yaml", &manifests.join("---\n"))?;
    for at in [0, 1] {
        eventually(SOON, || {
            let services = inspect::json(cluster.lab().node(at), &["services", pods[3].host.name()])?;
            ensure!(services.as_array().is_some_and(|all| all.len() == 2), "not written yet: {services}");
            Ok(())
        })?;
    }
    let before = tc_links(&node)?;

    cluster.kill_agent(0);
    let mut running: Vec<(Attached, Server)> = Vec::new();
    for (chain, pod) in chains.iter().zip(&pods) {
        let what = || format!("{}", chain.list);
        let attached = chain.add(&pod.host, &pod.capabilities()).with_context(what)?;
        all_served(&node).with_context(what)?;
        let server = pod.is_served(&cluster).with_context(what)?;
        running.push((attached, server));
    }
    // Calico's list has a version without CHECK. Debian's portmap fails its own where a pod has both families.
    let check = || {
        chains.iter().zip(&pods).zip(&running).take(3).try_for_each(|((chain, pod), (attached, _))| {
            let ours = ours(&node);
            chain.call(&ours, "CHECK", &pod.host, &chain.config(&ours, attached)).map(drop)
        })
    };
    check()?;
    let mut traffic = Traffic::default();
    for pod in &pods {
        traffic.conversation(&pod.host, &Ask::tcp(store()[0]))?;
        traffic.conversation(&cluster.lab().pod(1, 0), &Ask::tcp(pod.service[1]))?;
    }
    cluster.start_agent(0, &[])?;
    all_served(&node)?;
    check()?;
    traffic.finish(Instant::now())?;

    // Two go while an agent runs and two while none does.
    for (at, ((chain, pod), (attached, server))) in chains.iter().zip(&pods).zip(running).enumerate() {
        if at == 2 {
            cluster.kill_agent(0);
        }
        drop(server);
        chain.del(&pod.host, &attached)?;
        cluster.lab().remove_unplugged_pod(&pod.host)?;
        // Again, as runtimes do, for a pod that is no more.
        chain.del(&pod.host, &attached)?;
    }
    eventually(SOON, || nothing_left(&node, &before))
}
