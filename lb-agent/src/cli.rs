//! The flags of `lb-agent run`. They are kube-proxy's where kube-proxy has them; each can also be set by an
//! environment variable.

mod conntrack;
mod install;

use crate::desired::{self, NodePortAddresses};
use crate::kernel::node_mounts;
use crate::kernel::pins::DEFAULT_BPFFS;
use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args, ValueEnum};
use ipnet::IpNet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use tracing_subscriber::EnvFilter;

pub use conntrack::ConntrackArgs;
pub use install::{CleanupArgs, InstallArgs, OptionalDir};

/// kube-apiserver's default `--service-node-port-range`.
const NODE_PORTS: std::ops::RangeInclusive<u16> = 30000..=32767;

/// The flags of `lb-agent run`.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// Watch the cluster that this kubeconfig file names
    #[arg(long, value_name = "FILE", env = "LB_KUBECONFIG", conflicts_with = "manifests")]
    pub kubeconfig: Option<PathBuf>,

    /// Address of the API server (overrides the kubeconfig's or the pod's): it must be reachable without any Service
    #[arg(long, value_name = "URL", env = "LB_MASTER", conflicts_with = "manifests")]
    pub master: Option<String>,

    /// Serve the Services, EndpointSlices and Node in this directory's YAML and JSON files instead of a cluster's
    #[arg(long, value_name = "DIR", env = "LB_MANIFESTS")]
    pub manifests: Option<PathBuf>,

    /// This node's name [default: the host's name, in lower case]
    #[arg(long, value_name = "NAME", env = "LB_HOSTNAME_OVERRIDE")]
    pub hostname_override: Option<String>,

    /// Where the cluster's pods live, comma-separated, both families
    #[arg(
        long,
        value_name = "CIDRS",
        env = "LB_CLUSTER_CIDR",
        default_value = "",
        hide_default_value = true
    )]
    pub cluster_cidr: CidrList,

    /// Addresses that answer NodePorts: CIDRs (a family without any: all), `primary` or `all` [default: all]
    #[arg(
        long,
        value_name = "CIDRS",
        env = "LB_NODEPORT_ADDRESSES",
        default_value = "",
        hide_default_value = true
    )]
    pub nodeport_addresses: NodePortAddresses,

    /// Masquerade everything that is sent to a ClusterIP
    #[arg(long, env = "LB_MASQUERADE_ALL", default_value_t = false, action = ArgAction::Set, num_args = 0..=1,
          require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub masquerade_all: bool,

    /// Masquerade what pods send out of the cluster
    #[arg(long, env = "LB_MASQUERADE", default_value_t = true, action = ArgAction::Set, num_args = 0..=1,
          require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub masquerade: bool,

    /// Destinations that pods reach with their own address, besides the cluster's
    #[arg(
        long,
        value_name = "CIDRS",
        env = "LB_NON_MASQUERADE_CIDRS",
        default_value = "",
        hide_default_value = true
    )]
    pub non_masquerade_cidrs: CidrList,

    /// ip-masq-agent's configuration file (YAML or JSON, read again when it changes): nonMasqueradeCIDRs, added to
    /// those above, masqLinkLocal, masqLinkLocalIPv6, resyncInterval. Without a file, its defaults
    #[arg(long, value_name = "FILE", env = "LB_IP_MASQ_AGENT_CONFIG")]
    pub ip_masq_agent_config: Option<PathBuf>,

    /// Ports that masqueraded flows leave from
    #[arg(long, value_name = "LO-HI", env = "LB_MASQUERADE_PORTS", default_value = "10000-29999")]
    pub masquerade_ports: PortRange,

    /// Serve `spec.externalIPs`
    #[arg(long, env = "LB_EXTERNAL_IPS", default_value_t = true, action = ArgAction::Set, num_args = 0..=1,
          require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub external_ips: bool,

    /// Translate at the sockets of: the host's processes, all processes, nobody
    #[arg(long, value_name = "WHO", env = "LB_SOCKET_LB", default_value = "host")]
    pub socket_lb: SocketLb,

    /// Have the bridge carry what pods send to endpoints on the same bridge, instead of routing it: auto: where bridged
    /// packets pass iptables' FORWARD chain, too (bridge-nf-call-iptables)
    #[arg(long, value_name = "WHEN", env = "LB_BRIDGE_SHORTCUT", default_value = "auto")]
    pub bridge_shortcut: BridgeShortcut,

    /// Hand the packets of Services' flows that have begun on at once: pods: to pods of this node; all: from pods to overlays
    /// (vxlan), too. They go past routing, bridge and netfilter: NetworkPolicy in FORWARD sees a flow's first packet only
    #[arg(long, value_name = "WHAT", env = "LB_REDIRECT", default_value = "off")]
    pub redirect: Redirect,

    /// Send established flows that only pass through this node on from driver to driver (XDP): off; auto: on uplinks
    /// whose driver can, veths excepted; native: on veths, too; generic: on all, by the kernel in the drivers' place, which
    /// is slower
    #[arg(long, value_name = "WHERE", env = "LB_XDP", default_value = "off")]
    pub xdp: XdpArg,

    /// Uplinks and overlays, as glob patterns [default: all but loopback and pods' devices]
    #[arg(long, value_name = "PATTERNS", env = "LB_DEVICES", default_value = "", hide_default_value = true)]
    pub devices: PatternList,

    /// Host ends of the pods' devices, as glob patterns [default: veths that no address is assigned to]
    #[arg(
        long,
        value_name = "PATTERNS",
        env = "LB_POD_DEVICES",
        default_value = "",
        hide_default_value = true
    )]
    pub pod_devices: PatternList,

    /// Most flows that are remembered, in each family
    #[arg(long, value_name = "N", env = "LB_FLOW_TABLE_MAX", default_value_t = 262_144,
          value_parser = clap::value_parser!(u32).range(1024..=16_777_216))]
    pub flow_table_max: u32,

    /// Where /healthz and /livez answer; empty: nowhere
    #[arg(long, value_name = "IP:PORT", env = "LB_HEALTHZ_BIND_ADDRESS", default_value = "0.0.0.0:10256")]
    pub healthz_bind_address: Listen<10256>,

    /// Where /metrics and /proxyMode answer; empty: nowhere
    #[arg(long, value_name = "IP:PORT", env = "LB_METRICS_BIND_ADDRESS", default_value = "127.0.0.1:10249")]
    pub metrics_bind_address: Listen<10249>,

    /// Where the kubelet finds /livez and /readyz, also while kube-proxy has the ports above; empty: nowhere
    #[arg(
        long,
        value_name = "IP:PORT",
        env = "LB_PROBE_BIND_ADDRESS",
        default_value = "",
        hide_default_value = true
    )]
    pub probe_bind_address: Listen<10266>,

    /// A BPF file system, where programs and maps outlive the agent; mounted if it is not
    #[arg(long, value_name = "DIR", env = "LB_BPFFS", default_value = DEFAULT_BPFFS)]
    pub bpffs: PathBuf,

    /// The node's cgroup (cgroup2), which the socket hooks are attached to [default: found]
    #[arg(long, value_name = "DIR", env = "LB_CGROUP")]
    pub cgroup: Option<PathBuf>,

    /// Keep the CNI plugin in the first network configuration of this directory, whoever rewrites it; empty: do not
    #[arg(long, value_name = "DIR", env = "LB_CNI_CONF_DIR", default_value = "", hide_default_value = true)]
    pub cni_conf_dir: OptionalDir,

    /// Keep the CNI plugin's file in this directory while it is named in a configuration; empty: do not
    #[arg(long, value_name = "DIR", env = "LB_CNI_BIN_DIR", default_value = "", hide_default_value = true)]
    pub cni_bin_dir: OptionalDir,

    /// Log packets that take the slow path (costs time)
    #[arg(long, env = "LB_LOG_PACKETS", default_value_t = false, action = ArgAction::Set, num_args = 0..=1,
          require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub log_packets: bool,

    /// Timeouts of flows. Last, because clap puts under its heading whatever follows.
    #[command(flatten)]
    pub conntrack: ConntrackArgs,
}

/// Where the XDP program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum XdpArg {
    /// Nowhere.
    Off,
    /// On uplinks whose driver runs XDP programs itself, unless they are veths.
    Auto,
    /// On all uplinks whose driver runs XDP programs itself.
    Native,
    /// On all uplinks, by the kernel after the driver.
    Generic,
}

/// Whose sockets are translated at `connect` and `sendmsg`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SocketLb {
    /// Processes in the host's network namespace.
    Host,
    /// Those of pods, too.
    All,
    /// Nobody's: processes of the host do not reach Services.
    Off,
}

/// When pods' packets are bridged to endpoints on the same bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BridgeShortcut {
    /// Where netfilter sees bridged packets as it sees routed ones.
    Auto,
    /// Always.
    On,
    /// Never: they are routed.
    Off,
}

/// Which packets go past the node's own ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Redirect {
    /// None.
    Off,
    /// Those of Services' flows to pods of this node, but for the first.
    Pods,
    /// Those from its pods to overlays, too.
    All,
}

/// Where the objects come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceArgs {
    /// A directory of manifests.
    Manifests(PathBuf),
    /// The API server that a kubeconfig names, maybe at another address.
    Kubeconfig(PathBuf, Option<String>),
    /// The API server of the cluster whose pod we are, maybe at another address.
    InCluster(Option<String>),
    /// An API server that asks no questions.
    Master(String),
}

impl RunArgs {
    /// Where the objects come from.
    ///
    /// # Errors
    /// With the advice to give, if no flag says it and this is not a pod.
    pub fn source(&self) -> Result<SourceArgs, String> {
        self.source_with(std::env::var_os("KUBERNETES_SERVICE_HOST").is_some())
    }

    fn source_with(&self, in_cluster: bool) -> Result<SourceArgs, String> {
        match (&self.manifests, &self.kubeconfig, &self.master) {
            (Some(dir), ..) => Ok(SourceArgs::Manifests(dir.clone())),
            (None, Some(file), master) => Ok(SourceArgs::Kubeconfig(file.clone(), master.clone())),
            (None, None, master) if in_cluster => Ok(SourceArgs::InCluster(master.clone())),
            (None, None, Some(master)) => Ok(SourceArgs::Master(master.clone())),
            (None, None, None) => {
                Err("nothing to serve: give --manifests DIR (a folder of Kubernetes YAML) or \
                 --kubeconfig FILE (a cluster), or run as a pod with a ServiceAccount"
                    .into())
            }
        }
    }

    /// This node's name, as the cluster knows it.
    ///
    /// # Errors
    /// If the host has no usable name.
    pub fn node_name(&self) -> Result<String, String> {
        let name = match &self.hostname_override {
            Some(name) => name.clone(),
            None => nix::unistd::gethostname()
                .map_err(|error| format!("cannot read the host's name ({error}): set --hostname-override"))?
                .to_string_lossy()
                .into_owned(),
        };
        match name.trim().to_lowercase() {
            name if name.is_empty() => Err("the node's name is empty: set --hostname-override".into()),
            name => Ok(name),
        }
    }

    /// The root of the cgroup2 hierarchy.
    ///
    /// # Errors
    /// If none is mounted and no flag names one.
    pub fn cgroup_root(&self) -> Result<PathBuf, String> {
        if let Some(dir) = &self.cgroup {
            return Ok(dir.clone());
        }
        node_mounts::visible_cgroup().map_err(|error| format!("{error:#}"))
    }

    /// The flags that the desired state depends on.
    pub fn desired(&self) -> desired::Config {
        desired::Config {
            node_port_addresses: self.nodeport_addresses.clone(),
            localhost_node_ports: self.socket_lb != SocketLb::Off,
            masquerade_all: self.masquerade_all,
            external_ips: self.external_ips,
        }
    }
}

/// What is logged: `RUST_LOG`, or what a person needs. The API client's own lines only where they are asked for by name: it
/// has one or two for each attempt, and we say it once.
pub fn log_filter(asked: Option<&str>) -> EnvFilter {
    let asked = asked.filter(|asked| !asked.trim().is_empty()).unwrap_or("info");
    let quiet = if asked.contains("kube") { "" } else { ",kube_client=off,kube_runtime=off" };
    EnvFilter::builder().parse_lossy(format!("{asked}{quiet}"))
}

/// A duration as Go writes it: `24h`, `1h0m0s`, `1.5s`.
pub(crate) fn go_duration(text: &str) -> Result<Duration, String> {
    let error = || format!("{text:?} is not a duration like 24h, 90s or 1h30m0s");
    // kube's parser would panic on what does not fit, and on a sign in the middle.
    if text.is_empty() || text.len() > 16 || text.contains(['-', '+']) {
        return Err(error());
    }
    text.parse::<kube::core::Duration>().map(Duration::from).map_err(|_| error())
}

fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty())
}

/// A comma-separated list of address ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CidrList(pub Vec<IpNet>);

impl FromStr for CidrList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = |item: &str| {
            let range = item.parse::<IpNet>();
            range
                .map(|range| range.trunc())
                .map_err(|_| format!("{item:?} is not a CIDR like 10.42.0.0/16 or fd00:42::/48"))
        };
        items(text).map(parse).collect::<Result<_, _>>().map(Self)
    }
}

/// A comma-separated list of glob patterns for device names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PatternList(pub Vec<glob::Pattern>);

impl PatternList {
    /// Whether nothing was asked for.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether any pattern fits.
    pub fn matches(&self, device: &str) -> bool {
        self.0.iter().any(|pattern| pattern.matches(device))
    }
}

impl FromStr for PatternList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = |item: &str| {
            glob::Pattern::new(item).map_err(|error| format!("{item:?} is not a glob pattern: {}", error.msg))
        };
        items(text).map(parse).collect::<Result<_, _>>().map(Self)
    }
}

/// An inclusive range of ports that leaves the NodePorts alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// The first port.
    pub low: u16,
    /// The last port.
    pub high: u16,
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('-').and_then(|(low, high)| {
            Some(Self { low: low.trim().parse().ok()?, high: high.trim().parse().ok()? })
        });
        let Some(range) = parsed else { return Err("not a range of ports like 10000-29999".into()) };
        if range.low > range.high {
            return Err("the first port is larger than the last".into());
        }
        if range.low < 1024 {
            return Err("ports below 1024 belong to the host's services".into());
        }
        if range.low <= *NODE_PORTS.end() && range.high >= *NODE_PORTS.start() {
            return Err("overlaps the NodePorts 30000-32767: replies would be taken for requests".into());
        }
        Ok(range)
    }
}

impl std::fmt::Display for PortRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.low, self.high)
    }
}

/// Where a server listens: an address and port, an address alone with the port `DEFAULT`, or nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listen<const DEFAULT: u16>(pub Option<SocketAddr>);

impl<const DEFAULT: u16> FromStr for Listen<DEFAULT> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            return Ok(Self(None));
        }
        let address = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, DEFAULT));
        let address = address.or_else(|_| text.parse::<SocketAddr>());
        address.map(|address| Self(Some(address))).map_err(|_| format!("not IP:PORT, like 0.0.0.0:{DEFAULT}"))
    }
}

#[cfg(test)]
mod tests;
