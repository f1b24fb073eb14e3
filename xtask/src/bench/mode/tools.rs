//! What a run has to compare with, and what it cannot do.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use lb_attach::attach;
use serde::{Deserialize, Serialize};

use super::Mode;
use crate::bench::{iptables, nftables};
use crate::system::{find_program, output};

/// A mode, and what it is made of or why it is not there.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::bench) struct Available {
    pub(in crate::bench) mode: Mode,
    /// What serves it, or why nothing does.
    pub(in crate::bench) by: Result<String, String>,
    /// Whether bridged packets passed netfilter while it was measured, as read from its node: `bridge-nf-call-iptables=1, …`.
    pub(in crate::bench) bridge_netfilter: Option<String>,
}

/// A real kube-proxy.
#[derive(Clone, Debug)]
pub(super) struct KubeProxy {
    pub(super) path: PathBuf,
    /// Major and minor version.
    pub(super) version: (u32, u32),
    /// As it says itself.
    name: String,
}

/// Programs of this run.
#[derive(Clone, Debug)]
pub(in crate::bench) struct Tools {
    pub(super) agent: PathBuf,
    /// What it says of itself.
    agent_help: String,
    kube_proxy: Option<KubeProxy>,
    iptables: String,
    nft: String,
}

impl Tools {
    /// Finds them; `kube_proxy` is where there is one, unless it is found on `PATH`.
    pub(in crate::bench) fn find(agent: &Path, kube_proxy: Option<&Path>) -> Result<Self> {
        let found = kube_proxy.map(Path::to_owned).or_else(|| find_program("kube-proxy"));
        let help = output(Command::new(agent).args(["run", "--help"]))?;
        Ok(Self {
            agent: agent.to_owned(),
            agent_help: help,
            kube_proxy: found.as_deref().map(KubeProxy::at).transpose()?,
            iptables: iptables::prepare()?,
            nft: nftables::prepare()?,
        })
    }

    /// The real kube-proxy for a mode, if there is one that knows it.
    pub(super) fn kube_proxy(&self, mode: Mode) -> Option<&KubeProxy> {
        let since = match mode {
            Mode::Iptables => (1, 20),
            Mode::Nftables => (1, 29),
            _ => return None,
        };
        self.kube_proxy.as_ref().filter(|found| found.version >= since)
    }

    /// All modes, with those that there are not.
    pub(in crate::bench) fn available(&self) -> Vec<Available> {
        Mode::ALL
            .into_iter()
            .map(|mode| Available { mode, by: self.by(mode), bridge_netfilter: None })
            .collect()
    }

    fn by(&self, mode: Mode) -> Result<String, String> {
        let flags = mode.agent_flags().join(" ");
        match mode {
            Mode::Direct => Ok("the endpoints' own addresses, routed and bridged: the limit".into()),
            Mode::Hooks if !attach::has_tcx() => Err("it takes tcx (Linux 6.6)".into()),
            Mode::Hooks => Ok("the same, past programs that do nothing, where ours would be".into()),
            Mode::Ours => Ok("lb-agent".into()),
            Mode::OursSockets | Mode::OursRedirect | Mode::OursXdp => match flags.split_once('=') {
                Some((flag, _)) if !self.agent_help.contains(flag) => {
                    Err(format!("this lb-agent has no {flag}"))
                }
                _ => Ok(format!("lb-agent {flags}")),
            },
            Mode::Iptables | Mode::Nftables => Ok(match (self.kube_proxy(mode), mode) {
                (Some(real), Mode::Iptables) => format!("{}, {}", real.name, self.iptables),
                (Some(real), _) => format!("{}, {}", real.name, self.nft),
                (None, Mode::Iptables) => {
                    format!("the rules that kube-proxy 1.27 and later write, by {}", self.iptables)
                }
                (None, _) => format!("the table that kube-proxy 1.33 writes, by {}", self.nft),
            }),
        }
    }
}

impl KubeProxy {
    fn at(path: &Path) -> Result<Self> {
        let said = output(Command::new(path).arg("--version"))?;
        let version = version(&said).with_context(|| format!("{} says {said:?}", path.display()))?;
        let name = said.trim().replace("Kubernetes", "kube-proxy");
        Ok(Self { path: path.to_owned(), version, name })
    }
}

/// From `Kubernetes v1.20.2`.
fn version(said: &str) -> Option<(u32, u32)> {
    let mut numbers = said.trim().rsplit_once('v')?.1.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools(kube_proxy: Option<(u32, u32)>) -> Tools {
        let real = |version| KubeProxy { path: PathBuf::new(), version, name: "kube-proxy v1".into() };
        Tools {
            agent: PathBuf::new(),
            agent_help: String::new(),
            kube_proxy: kube_proxy.map(real),
            iptables: "iptables v1".into(),
            nft: "nftables v1".into(),
        }
    }

    #[test]
    fn what_is_missing_is_said() {
        let available = tools(None).available();
        assert_eq!(available.len(), Mode::ALL.len());
        // What the kernel has not is another matter.
        let missing = available.iter().filter(|a| a.by.is_err() && a.mode != Mode::Hooks);
        let missing: Vec<_> = missing.map(|a| a.mode).collect();
        assert_eq!(missing, [Mode::OursSockets, Mode::OursRedirect, Mode::OursXdp]);
    }

    #[test]
    fn an_old_kube_proxy_does_what_it_can() {
        assert_eq!(version("Kubernetes v1.20.2\n"), Some((1, 20)));
        assert_eq!(version("Kubernetes v1.33.0-rc.1"), Some((1, 33)));
        assert_eq!(version("something else"), None);
        let old = tools(Some((1, 20)));
        assert!(old.by(Mode::Iptables).unwrap().starts_with("kube-proxy v1"));
        assert!(old.by(Mode::Nftables).unwrap().starts_with("the table"));
        assert!(tools(Some((1, 33))).by(Mode::Nftables).unwrap().starts_with("kube-proxy v1"));
    }
}
