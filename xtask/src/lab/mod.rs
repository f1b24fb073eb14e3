//! The lab: two nodes with pods, a client outside and an "internet" host, as network namespaces of this machine.
//!
//! ```text
//!   client 192.0.2.10 ────┐                       ┌──── inet 198.51.100.10
//!                        wire (172.18.0.1, routes, knows no pod or service network)
//!                ┌────────┴────────┐
//!     n1 172.18.0.11 ═ vxlan ═ n2 172.18.0.12
//!       cni0 10.244.1.1          cni0 10.244.2.1
//!       n1p1 .10  n1p2 .11 …     n2p1 .10  n2p2 .11 …          and the same in IPv6
//! ```
//!
//! Labs are independent of each other. A lab goes with the value that stands for it, or with its process.

mod api;
mod capture;
mod cgroup;
mod cli;
mod host;
mod net;
mod netns;
mod offload;
mod owner;
mod rules;
mod topology;

use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};

pub use api::ApiServer;
pub use capture::{Capture, Captured};
pub use cli::{Args, run};
pub use host::{Host, Role};
pub use owner::xtask_exe;
pub use topology::{CLUSTER_CIDR, EXTERNAL_V4, EXTERNAL_V6, GATEWAY_V4, GATEWAY_V6, is_pod_ip};

use offload::Offload;
use owner::Reaper;

/// Nodes of a lab.
const NODES: usize = 2;

/// A running lab; dropping it takes everything down, processes included.
#[derive(Debug)]
pub struct Lab {
    name: String,
    nodes: Vec<Host>,
    wire: Host,
    client: Host,
    inet: Host,
    pods: Mutex<Vec<Vec<Host>>>,
    pod_mtu: u32,
    // Last: the hosts above are only names.
    _guard: Guard,
}

/// How to build a lab.
#[derive(Clone, Debug)]
pub struct Builder {
    name: String,
    pods: usize,
    pod_mtu: u32,
    reaper: bool,
}

impl Builder {
    /// Pods on each node; 3 unless told.
    pub fn pods(mut self, pods: usize) -> Self {
        self.pods = pods;
        self
    }

    /// MTU of pods and bridges. Unless told, 1450 as flannel's CNI sets it; with 1500 even IPv4 packets meet the overlay's
    /// smaller MTU only on their way.
    pub fn pod_mtu(mut self, mtu: u32) -> Self {
        self.pod_mtu = mtu;
        self
    }

    /// Whether a second process sees to it that the lab goes even if this process is killed; on unless told.
    pub fn reaper(mut self, reaper: bool) -> Self {
        self.reaper = reaper;
        self
    }

    /// Builds it; whatever a killed process left behind is removed first.
    pub fn build(self) -> Result<Lab> {
        let name = self.name;
        if name.is_empty() || name.len() > 60 || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
        {
            bail!("{name:?} is no name for a lab: at most 60 letters, digits and dashes");
        }
        owner::reap_dead()?;
        owner::claim(&name)?;
        let mut guard = Guard { lab: name.clone(), reaper: None, armed: true };
        if self.reaper {
            guard.reaper = Some(Reaper::start(&xtask_exe()?, &name)?);
        }

        let host = |host_name: &str, role, node, (v4, v6)| {
            let host = Host {
                lab: name.clone(),
                name: host_name.into(),
                role,
                node,
                v4,
                v6,
                cgroup: cgroup::lab_dir(&name)?.join(host_name),
            };
            create(&host).map(|()| host)
        };
        let nodes: Vec<_> = (0..NODES)
            .map(|i| host(&format!("n{}", i + 1), Role::Node, Some(i), topology::node_addrs(i)))
            .collect::<Result<_>>()?;
        nodes.iter().try_for_each(mount_bpffs)?;
        let wire = host("wire", Role::Wire, None, (GATEWAY_V4, GATEWAY_V6))?;
        let client = host("client", Role::Client, None, topology::outside_addrs(Role::Client))?;
        let inet = host("inet", Role::Inet, None, topology::outside_addrs(Role::Inet))?;
        net::block_on(async || topology::connect(&wire, &nodes, &[&client, &inet], self.pod_mtu).await)?;

        let pods = Mutex::new(vec![Vec::new(); NODES]);
        let lab = Lab { name, nodes, wire, client, inet, pods, pod_mtu: self.pod_mtu, _guard: guard };
        for node in 0..NODES {
            for _ in 0..self.pods {
                lab.add_pod(node)?;
            }
        }
        lab.save()?;
        Ok(lab)
    }
}

impl Lab {
    /// A lab called `prefix` and something that makes the name unique.
    pub fn builder(prefix: &str) -> Builder {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let unique = format!("{prefix}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Self::named(&unique)
    }

    /// A lab of exactly this name; building fails if there is one.
    pub fn named(name: &str) -> Builder {
        Builder { name: name.into(), pods: 3, pod_mtu: topology::POD_MTU, reaper: true }
    }

    /// The lab's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A node, counted from 0 (which is called `n1`).
    pub fn node(&self, node: usize) -> &Host {
        &self.nodes[node]
    }

    /// A pod, both counted from 0: `pod(0, 1)` is `n1p2`.
    ///
    /// # Panics
    /// If there is no such pod.
    pub fn pod(&self, node: usize, pod: usize) -> Host {
        self.lock()[node][pod].clone()
    }

    /// The client outside the cluster.
    pub fn client(&self) -> &Host {
        &self.client
    }

    /// The host that knows no way to pods.
    pub fn inet(&self) -> &Host {
        &self.inet
    }

    /// The router between nodes, client and internet host.
    pub fn wire(&self) -> &Host {
        &self.wire
    }

    /// All hosts: nodes, pods, then the rest.
    pub fn hosts(&self) -> Vec<Host> {
        let rest = [&self.client, &self.inet, &self.wire];
        self.nodes.iter().cloned().chain(self.lock().concat()).chain(rest.into_iter().cloned()).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Vec<Host>>> {
        self.pods.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Starts one more pod on a node: the next free name and addresses.
    pub fn add_pod(&self, node: usize) -> Result<Host> {
        let pod = self.add_unplugged_pod(node)?;
        net::block_on(async || topology::plug_pod(&self.nodes[node], &pod, self.pod_mtu).await)?;
        Ok(pod)
    }

    /// As [`Self::add_pod`], but without any device: a CNI plugin is to make it.
    pub fn add_unplugged_pod(&self, node: usize) -> Result<Host> {
        let mut pods = self.lock();
        let on_node = &self.nodes[node];
        let taken = |n: usize| pods[node].iter().any(|p| p.v4 == pod_addr(node, n).0);
        let Some(n) = (0..topology::MAX_PODS).find(|&n| !taken(n)) else {
            bail!("{} has all its {} pods", on_node.name, topology::MAX_PODS);
        };
        let name = format!("{}p{}", on_node.name, n + 1);
        let (v4, v6) = pod_addr(node, n);
        let cgroup = on_node.cgroup.join(&name);
        let pod = Host { lab: self.name.clone(), name, role: Role::Pod, node: Some(node), v4, v6, cgroup };
        create(&pod)?;
        pods[node].push(pod.clone());
        Ok(pod)
    }

    /// Ends a pod: its processes, its device, its namespace. Its name and addresses are free again.
    pub fn remove_pod(&self, pod: &Host) -> Result<()> {
        let node = pod.node.context("not a pod")?;
        cgroup::destroy(&pod.cgroup)?;
        net::block_on(async || topology::unplug_pod(&self.nodes[node], pod).await)?;
        self.remove_unplugged_pod(pod)
    }

    /// Ends a pod that has no device any more.
    pub fn remove_unplugged_pod(&self, pod: &Host) -> Result<()> {
        let node = pod.node.context("not a pod")?;
        cgroup::destroy(&pod.cgroup)?;
        netns::delete(&pod.netns_name());
        fs::remove_dir_all(pod.state_dir())?;
        self.lock()[node].retain(|p| p != pod);
        Ok(())
    }

    /// Makes the way to the nodes one for XDP, which veths are not by themselves: see [`Self::like_wires`].
    pub fn for_xdp(&self) -> Result<()> {
        self.like_wires(true)
    }

    /// Whether what arrives at the nodes has whole checksums, as from a wire, and the other ends of their devices take
    /// packets that come from a driver.
    pub fn like_wires(&self, yes: bool) -> Result<()> {
        self.wire.run_in(|| {
            self.nodes.iter().try_for_each(|node| {
                offload::set(&node.name, Offload::SentChecksums, !yes)?;
                offload::set(&node.name, Offload::Gro, yes)
            })
        })?
    }

    /// Name of a pod's device on its node.
    pub fn veth_of(&self, pod: &Host) -> String {
        topology::veth_name(pod)
    }

    /// Writes a network sysctl on a host: `lab.sysctl(node, "ipv4.ip_forward", "0")`.
    pub fn sysctl(&self, host: &Host, key: &str, value: &str) -> Result<()> {
        host.sysctl(key, value)
    }

    /// The lab stays when this value and this process end; `cargo xtask lab down` removes it.
    pub fn keep(mut self) -> Result<()> {
        owner::make_persistent(&self.name)?;
        self._guard.armed = false;
        Ok(())
    }

    /// Writes down what there is, for `lab exec` and `lab list`.
    fn save(&self) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.hosts())?;
        Ok(fs::write(owner::lab_dir(&self.name).join("lab.json"), text)?)
    }
}

fn pod_addr(node: usize, pod: usize) -> (std::net::Ipv4Addr, std::net::Ipv6Addr) {
    topology::pod_net_addrs(node, 10 + pod as u8)
}

/// Directory, cgroup and namespace of a host, in this order: teardown goes by the directories.
fn create(host: &Host) -> Result<()> {
    fs::create_dir(host.state_dir()).with_context(|| format!("creating {}", host.state_dir().display()))?;
    cgroup::create(&host.cgroup)?;
    topology::create_netns(host)
}

fn mount_bpffs(node: &Host) -> Result<()> {
    let dir = node.bpffs_dir();
    fs::create_dir(&dir)?;
    mount(Some("bpf"), &dir, Some("bpf"), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("mounting bpffs at {}", dir.display()))
}

/// Takes the lab down when it goes, also when building it fails half way.
#[derive(Debug)]
struct Guard {
    lab: String,
    reaper: Option<Reaper>,
    armed: bool,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.armed
            && let Err(e) = owner::teardown(&self.lab)
        {
            eprintln!("taking down lab {}: {e:#}", self.lab);
        }
        if let Some(reaper) = self.reaper.take() {
            reaper.finish();
        }
    }
}
