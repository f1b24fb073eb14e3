//! Netfilter rules on a host, as those write them who live on the same nodes as we do.

use std::io::Write as _;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use super::Host;
use crate::system::{ensure_debian_packages, find_program};

impl Host {
    /// Has `iptables-restore`, for IPv4 or IPv6, read `rules` on top of what is there: only a chain that is declared in
    /// them is emptied first. Debian's ordinary flavour of it, which writes nftables.
    pub fn add_rules(&self, v4: bool, rules: &str) -> Result<()> {
        let program = if v4 { "iptables-restore" } else { "ip6tables-restore" };
        self.restore(program, &["--noflush"], rules)
    }

    /// As [`Self::add_rules`], with the flavour that kube-proxy has used for most of its life.
    pub fn add_legacy_rules(&self, v4: bool, rules: &str) -> Result<()> {
        let program = if v4 { "iptables-legacy-restore" } else { "ip6tables-legacy-restore" };
        self.restore(program, &["--noflush"], rules)
    }

    /// As [`Self::add_legacy_rules`], instead of all that was in the tables named.
    pub fn replace_legacy_rules(&self, v4: bool, rules: &str) -> Result<()> {
        let program = if v4 { "iptables-legacy-restore" } else { "ip6tables-legacy-restore" };
        self.restore(program, &[], rules)
    }

    fn restore(&self, program: &str, args: &[&str], rules: &str) -> Result<()> {
        ensure_debian_packages(&[("iptables", program)])?;
        let path = find_program(program).with_context(|| format!("no {program}"))?;
        let mut command = self.command(path);
        // The rules are the namespace's, but the lock would be the machine's: nobody else's writing need be waited for.
        command.env("XTABLES_LOCKFILE", self.state_dir().join("xtables.lock"));
        let mut child = command.args(args).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("no pipe")?.write_all(rules.as_bytes())?;
        let out = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(out.status.success(), "{program} on {} refused: {said}\n{}", self.name(), beginning(rules));
        Ok(())
    }
}

/// As much of rules as somebody may want to read: of a large cluster there are a million lines.
fn beginning(rules: &str) -> &str {
    const MOST: usize = 4000;
    rules.get(..MOST).unwrap_or(rules)
}
