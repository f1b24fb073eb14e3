//! The flags of `lb-agent install` and `lb-agent cleanup`.

use crate::kernel::pins::DEFAULT_BPFFS;
use clap::Args;
use lb_attach::records::DEFAULT_STATE_DIR;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// Where runtimes look for CNI plugins unless told otherwise.
pub(super) const CNI_BIN_DIR: &str = "/opt/cni/bin";
/// Where runtimes look for network configurations unless told otherwise.
pub(super) const CNI_CONF_DIR: &str = "/etc/cni/net.d";

/// The flags of `lb-agent install`.
#[derive(Args, Clone, Debug)]
pub struct InstallArgs {
    /// Where the container runtime looks for CNI plugins; empty: install none
    #[arg(long, value_name = "DIR", env = "LB_CNI_BIN_DIR", default_value = CNI_BIN_DIR)]
    pub cni_bin_dir: OptionalDir,

    /// Where the container runtime looks for network configurations; empty: change none
    #[arg(long, value_name = "DIR", env = "LB_CNI_CONF_DIR", default_value = CNI_CONF_DIR)]
    pub cni_conf_dir: OptionalDir,

    /// The plugin to install [default: lb-cni beside this program]
    #[arg(long, value_name = "FILE", env = "LB_CNI_PLUGIN")]
    pub cni_plugin: Option<PathBuf>,

    /// Where the node is to have a BPF file system; mounted there (in the mount namespace of process 1) if it is not
    #[arg(long, value_name = "DIR", env = "LB_BPFFS", default_value = DEFAULT_BPFFS)]
    pub bpffs: PathBuf,

    /// Where the node's own cgroup is to be seen, for the agent's --cgroup; a bind mount of it [default: nowhere]
    #[arg(long, value_name = "DIR", env = "LB_CGROUP")]
    pub cgroup: Option<PathBuf>,

    /// Leave a network configuration that cannot be changed to the agent, which goes on trying
    #[arg(long, env = "LB_LATER")]
    pub later: bool,
}

/// The flags of `lb-agent cleanup`.
#[derive(Args, Clone, Debug)]
pub struct CleanupArgs {
    /// Remove kube-proxy's rules (iptables of both kinds, nftables) instead, and nothing of the agent's: to be run once
    /// kube-proxy is stopped and the agent serves
    #[arg(long)]
    pub kube_proxy: bool,

    /// Remove kube-proxy's rules even if it seems to run still
    #[arg(long, requires = "kube_proxy")]
    pub force: bool,

    /// Where the container runtime looks for CNI plugins; empty: remove none
    #[arg(long, value_name = "DIR", env = "LB_CNI_BIN_DIR", default_value = CNI_BIN_DIR)]
    pub cni_bin_dir: OptionalDir,

    /// Where the container runtime looks for network configurations; empty: change none
    #[arg(long, value_name = "DIR", env = "LB_CNI_CONF_DIR", default_value = CNI_CONF_DIR)]
    pub cni_conf_dir: OptionalDir,

    /// Leave the plugin where it is: CRI-O and podman call it once more when pods end that were started with it
    #[arg(long, env = "LB_KEEP_PLUGIN")]
    pub keep_plugin: bool,

    /// Time between the change of the network configuration and all that follows: runtimes notice the change at once, but
    /// pods may be half started by the former one
    #[arg(long, value_name = "TIME", env = "LB_GRACE", default_value = "5s", value_parser = super::go_duration)]
    pub grace: Duration,

    /// Wait so long at most for connections to end while new ones are left to the host (to kube-proxy, say). Those that are
    /// left then are handed over to netfilter, and go on
    #[arg(long, value_name = "TIME", env = "LB_DRAIN", default_value = "0s", num_args = 0..=1, require_equals = true,
          default_missing_value = "5m", value_parser = super::go_duration)]
    pub drain: Duration,

    /// The BPF file system that the agent was given; unmounted if nothing else is in it (but for /sys/fs/bpf)
    #[arg(long, value_name = "DIR", env = "LB_BPFFS", default_value = DEFAULT_BPFFS)]
    pub bpffs: PathBuf,

    /// Where the plugin has written down pods (its `stateDir`)
    #[arg(long, value_name = "DIR", env = "LB_STATE_DIR", default_value = DEFAULT_STATE_DIR)]
    pub state_dir: PathBuf,

    /// Where `install` made the node's own cgroup visible; unmounted
    #[arg(long, value_name = "DIR", env = "LB_CGROUP")]
    pub cgroup: Option<PathBuf>,
}

/// A directory, or none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OptionalDir(Option<PathBuf>);

impl OptionalDir {
    /// The directory, if there is one.
    pub fn get(&self) -> Option<&Path> {
        self.0.as_deref()
    }
}

impl FromStr for OptionalDir {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self((!text.is_empty()).then(|| text.into())))
    }
}
