//! A machine of the lab: a network namespace, a cgroup and a directory.

use std::ffi::{CString, OsStr};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use super::net::{self, Net};
use super::offload::{self, Offload};
use super::{netns, owner};

/// What a host is in the lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A Kubernetes node.
    Node,
    /// A pod on a node.
    Pod,
    /// The machine that nodes, client and internet host are wired to; it routes between them.
    Wire,
    /// A client outside the cluster.
    Client,
    /// A host that pods reach only when they are masqueraded.
    Inet,
}

/// A machine of the lab. Cheap to clone; it does not keep the lab alive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    pub(crate) lab: String,
    pub(crate) name: String,
    pub(crate) role: Role,
    /// Position of the node that it is or runs on.
    pub(crate) node: Option<usize>,
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
    pub(crate) cgroup: PathBuf,
}

impl Host {
    /// Its name within the lab: `n1`, `n1p2`, `client`, …
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Its main IPv4 address: a node's on the LAN, a pod's own.
    pub fn v4(&self) -> Ipv4Addr {
        self.v4
    }

    /// Its main IPv6 address.
    pub fn v6(&self) -> Ipv6Addr {
        self.v6
    }

    /// Its main addresses, IPv4 first.
    pub fn ips(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// A port at its main addresses, IPv4 first.
    pub fn at(&self, port: u16) -> [SocketAddr; 2] {
        self.ips().map(|ip| SocketAddr::new(ip, port))
    }

    /// Name of its network namespace, as `ip netns exec` wants it.
    pub fn netns_name(&self) -> String {
        format!("{}-{}", self.lab, self.name)
    }

    /// Path of its network namespace.
    pub fn netns_path(&self) -> PathBuf {
        netns::path(&self.netns_name())
    }

    /// Its cgroup2 directory; a pod's lies inside its node's.
    pub fn cgroup_dir(&self) -> &Path {
        &self.cgroup
    }

    /// A directory for its files (logs, manifests), removed with the lab.
    pub fn state_dir(&self) -> PathBuf {
        owner::lab_dir(&self.lab).join(&self.name)
    }

    /// A node's own bpffs.
    pub fn bpffs_dir(&self) -> PathBuf {
        self.state_dir().join("bpf")
    }

    /// A command that will run on this host: in its network namespace and its cgroup. It is killed with the lab.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let c_path = |p: &Path| CString::new(p.as_os_str().as_bytes());
        let paths = (c_path(&self.netns_path()), c_path(&self.cgroup.join("cgroup.procs")));
        let (Ok(ns), Ok(procs)) = paths else { unreachable!("lab names have no zero bytes") };
        let join = move || {
            let procs = open(procs.as_c_str(), OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
            nix::unistd::write(procs.as_fd(), b"0")?;
            let ns = open(ns.as_c_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
            Ok(setns(ns.as_fd(), CloneFlags::CLONE_NEWNET)?)
        };
        // SAFETY: only async-signal-safe system calls on strings made before the fork.
        unsafe { command.pre_exec(join) };
        command
    }

    /// Runs `f` on a fresh thread in this host's network namespace; sockets made there stay there. The cgroup is
    /// still this process's own: where socket hooks matter, use [`Self::command`].
    pub fn run_in<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        netns::run_in(&self.netns_path(), f)
    }

    /// Adds addresses to a device.
    pub fn add_addresses(&self, dev: &str, addresses: &[IpAddr], prefix: u8) -> Result<()> {
        net::block_on(async || {
            let net = Net::open(&self.netns_path())?;
            let index = net.index(dev).await?;
            for &address in addresses {
                net.addr(index, address, prefix).await?;
            }
            Ok(())
        })
    }

    /// Adds a route by way of a gateway, which is taken to be on `dev` if that is given.
    pub fn add_route(&self, (to, prefix): (IpAddr, u8), via: IpAddr, dev: Option<&str>) -> Result<()> {
        net::block_on(async || {
            let net = Net::open(&self.netns_path())?;
            let onlink = match dev {
                Some(dev) => Some(net.index(dev).await?),
                None => None,
            };
            net.route(to, prefix, via, onlink).await
        })
    }

    /// Whether a device makes one packet of several that arrive (GRO), for which a veth has a place where drivers can put
    /// packets.
    pub(crate) fn gather(&self, dev: &str, on: bool) -> Result<()> {
        self.run_in(|| offload::set(dev, Offload::Gro, on))?
    }

    /// Writes a network sysctl, named as for `sysctl(8)` without the leading `net.`: `ipv4.ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.run_in(|| write_sysctl(key, value))?
    }

    /// Reads a network sysctl, named as for [`Self::sysctl`].
    pub fn read_sysctl(&self, key: &str) -> Result<String> {
        let path = sysctl_path(key);
        let text = self.run_in(|| fs::read_to_string(&path))?.with_context(|| format!("reading {path}"))?;
        Ok(text.trim().to_owned())
    }
}

/// Writes a network sysctl of the calling thread's namespace.
pub(crate) fn write_sysctl(key: &str, value: &str) -> Result<()> {
    let path = sysctl_path(key);
    fs::write(&path, value).with_context(|| format!("writing {value:?} to {path}"))
}

fn sysctl_path(key: &str) -> String {
    format!("/proc/sys/net/{}", key.replace('.', "/"))
}
