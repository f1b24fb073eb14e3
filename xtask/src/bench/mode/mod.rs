//! The ways of serving Services that are compared.

mod evidence;
mod hooks;
mod kube_proxy;
mod proxy;
mod site;
mod tools;

use serde::{Deserialize, Serialize};

use super::topology::Path;

pub(super) use site::{Paid, Site};
pub(super) use tools::{Available, Tools};

/// How a packet finds its endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Mode {
    /// By the endpoint's own address, nothing is translated: the limit.
    Direct,
    /// The same, past programs that do nothing, on both hooks of each device on which ours are: what is left of that limit once
    /// there are programs. (Only those that send packets past hooks can be faster.)
    Hooks,
    /// kube-proxy's iptables mode.
    Iptables,
    /// kube-proxy's nftables mode.
    Nftables,
    /// Our programs on every packet.
    Ours,
    /// Our socket hooks in pods, too.
    OursSockets,
    /// Our programs, established flows redirected to pods and overlays.
    OursRedirect,
    /// Our programs, with XDP on the uplink.
    OursXdp,
}

impl Mode {
    /// All of them, in the order in which they are shown.
    pub(super) const ALL: [Self; 8] = [
        Self::Direct,
        Self::Hooks,
        Self::Iptables,
        Self::Nftables,
        Self::Ours,
        Self::OursSockets,
        Self::OursRedirect,
        Self::OursXdp,
    ];

    /// In a table.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Hooks => "direct, empty hooks",
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
            Self::Ours => "ours",
            Self::OursSockets => "ours, sockets",
            Self::OursRedirect => "ours, redirect",
            Self::OursXdp => "ours, XDP",
        }
    }

    /// For a lab's name and for files.
    pub(super) fn short(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Hooks => "hooks",
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
            Self::Ours => "ours",
            Self::OursSockets => "sockets",
            Self::OursRedirect => "redirect",
            Self::OursXdp => "xdp",
        }
    }

    /// Whether nothing is translated, and nobody serves.
    pub(super) fn is_direct(self) -> bool {
        matches!(self, Self::Direct | Self::Hooks)
    }

    /// Whether it is one of ours.
    pub(super) fn is_ours(self) -> bool {
        matches!(self, Self::Ours | Self::OursSockets | Self::OursRedirect | Self::OursXdp)
    }

    /// Flags that the agent is given besides the usual ones.
    pub(super) fn agent_flags(self) -> &'static [&'static str] {
        match self {
            Self::OursSockets => &["--socket-lb=all"],
            Self::OursRedirect => &["--redirect=all"],
            Self::OursXdp => &["--xdp=native"],
            _ => &[],
        }
    }

    /// Whether it does anything on a way that the mode it derives from does not: sockets are for pods that ask Services,
    /// redirecting is for pods at either end, XDP for what comes by the uplink. What programs cost that do nothing is asked for the
    /// ways for which there are bars beside the direct one.
    pub(super) fn is_for(self, path: Path) -> bool {
        match self {
            Self::Hooks | Self::OursSockets => matches!(path, Path::SameNode | Path::OtherNode),
            Self::OursRedirect => !matches!(path, Path::NodePortThere | Path::Outside),
            Self::OursXdp => path.is_from_outside(),
            _ => true,
        }
    }
}
