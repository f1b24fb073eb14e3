//! The node's iptables programs: both flavours, both families. They know how their rules are laid out, and take the lock
//! that others who use them wait for.

use crate::kernel::netfilter::nft;
use anyhow::{Context as _, Result, anyhow, bail};
use netlink_packet_netfilter::NetfilterProtoFamily;
use std::fmt;
use std::fs;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Tables that kube-proxy writes to.
const TABLES: [&str; 3] = ["nat", "filter", "mangle"];

/// Where programs are, on most nodes and on those of k3s, which brings its own.
const DIRS: [&str; 8] = [
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
    "/bin/aux",
    "/var/lib/rancher/k3s/data/current/bin/aux",
];

/// Seconds to wait for others who use iptables at the moment.
const WAIT: &str = "30";

/// One flavour of iptables for one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tool {
    v4: bool,
    /// Rules of the kernel's older kind, not nftables.
    legacy: bool,
}

impl Tool {
    pub(super) const ALL: [Self; 4] = [
        Self { v4: true, legacy: true },
        Self { v4: false, legacy: true },
        Self { v4: true, legacy: false },
        Self { v4: false, legacy: false },
    ];

    /// Tables that there are, of those that kube-proxy writes to. (A program that asks for one that is not there makes it.)
    pub(super) fn tables(self) -> Result<Vec<String>> {
        let there = if self.legacy { self.legacy_tables()? } else { self.nft_tables()? };
        Ok(TABLES.iter().filter(|table| there.iter().any(|t| t == *table)).map(|t| (*t).to_owned()).collect())
    }

    fn legacy_tables(self) -> Result<Vec<String>> {
        let path = if self.v4 { "/proc/self/net/ip_tables_names" } else { "/proc/self/net/ip6_tables_names" };
        match fs::read_to_string(path) {
            Ok(names) => Ok(names.lines().map(str::to_owned).collect()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error).with_context(|| format!("read {path}")),
        }
    }

    fn nft_tables(self) -> Result<Vec<String>> {
        let family = if self.v4 { NetfilterProtoFamily::IPv4 } else { NetfilterProtoFamily::IPv6 };
        let all = nft::tables_if_any().context("list the nftables tables")?;
        Ok(all.into_iter().filter(|(f, _)| *f == family).map(|(_, name)| name).collect())
    }

    /// Its rules in a table.
    pub(super) fn save(self, table: &str) -> Result<String> {
        let program = self.find("save")?;
        let out = Command::new(&program).args(["-t", table]).output();
        let out = out.with_context(|| format!("run {}", program.display()))?;
        if !out.status.success() {
            bail!("{} -t {table}: {}", program.display(), said(&out.stderr));
        }
        String::from_utf8(out.stdout).with_context(|| format!("what {} says", program.display()))
    }

    /// Changes rules, all or none of each table.
    pub(super) fn restore(self, script: &str) -> Result<()> {
        let program = self.find("restore")?;
        let mut child = Command::new(&program)
            .args(["--noflush", "--wait", WAIT])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("run {}", program.display()))?;
        let written = child.stdin.take().context("no pipe")?.write_all(script.as_bytes());
        let out = child.wait_with_output()?;
        if !out.status.success() {
            bail!("{}: {}", program.display(), said(&out.stderr));
        }
        written.with_context(|| format!("write to {}", program.display()))
    }

    fn find(self, action: &str) -> Result<PathBuf> {
        let family = if self.v4 { "iptables" } else { "ip6tables" };
        let flavour = if self.legacy { "legacy" } else { "nft" };
        let places = |name: String| DIRS.iter().map(move |dir| Path::new(dir).join(&name));
        let found = places(format!("{family}-{flavour}-{action}")).find(|path| path.is_file());
        // The plain name is either flavour's.
        found.or_else(|| places(format!("{family}-{action}")).find(|path| self.is(path))).ok_or_else(|| {
            anyhow!(
                "there are rules of this kind, and the node has no {family}-{flavour}-{action} to look at them with: install \
                 iptables on the node, or run `kube-proxy --cleanup` from kube-proxy's image"
            )
        })
    }

    /// Whether a program is of this flavour, as far as it says: `iptables-save v1.8.9 (nf_tables)`.
    fn is(self, program: &Path) -> bool {
        if !program.is_file() {
            return false;
        }
        let Ok(out) = Command::new(program).arg("--version").output() else { return false };
        String::from_utf8_lossy(&out.stdout).contains("nf_tables") != self.legacy
    }
}

impl fmt::Display for Tool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flavour = if self.legacy { "legacy" } else { "nft" };
        write!(f, "{}-{flavour}", if self.v4 { "iptables" } else { "ip6tables" })
    }
}

fn said(stderr: &[u8]) -> String {
    String::from_utf8_lossy(stderr).trim().to_owned()
}
