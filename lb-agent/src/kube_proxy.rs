//! `lb-agent cleanup --kube-proxy`: takes kube-proxy's rules away once it is stopped, and nobody else's.
//!
//! - `rules`: what of an `iptables-save` is kube-proxy's. - `tools`: the node's iptables programs. - `running`: whether
//!   it still runs.

mod rules;
mod running;
mod tools;

use crate::kernel::netfilter::conntrack::Conntrack;
use crate::kernel::netfilter::nft;
use crate::kernel::node_mounts;
use anyhow::{Context as _, Result, bail};
use netlink_packet_netfilter::NetfilterProtoFamily;
use tools::Tool;
use tracing::{info, warn};

/// The tables of its nftables mode.
const TABLES: [(NetfilterProtoFamily, &str); 2] =
    [(NetfilterProtoFamily::IPv4, "kube-proxy"), (NetfilterProtoFamily::IPv6, "kube-proxy")];

/// The device of its ipvs mode.
const IPVS_DEVICE: &str = "kube-ipvs0";

/// Removes kube-proxy's rules. Connections that they have translated go on.
///
/// # Errors
/// If kube-proxy still runs (unless `force`), or something cannot be looked for or removed. All else is removed then.
pub fn remove_rules(force: bool) -> Result<()> {
    if let Some(who) = running::find() {
        if !force {
            bail!(
                "kube-proxy still runs here ({who}) and would write its rules again: stop it first, or --force"
            );
        }
        warn!("kube-proxy still runs here ({who}) and may write its rules again");
    }
    keep_connections()?;
    let (mut found, mut failed) = (false, Vec::new());
    for table in TABLES {
        match nft::delete_table(table) {
            Ok(true) => {
                info!("removed the nftables table {} of {:?}", table.1, table.0);
                found = true;
            }
            Ok(false) => {}
            Err(error) => failed.push(format!("the nftables table {} of {:?}: {error}", table.1, table.0)),
        }
    }
    node_mounts::on_node(|| {
        for tool in Tool::ALL {
            match remove_with(tool) {
                Ok(removed) => found |= removed,
                Err(error) => failed.push(format!("{tool}: {error:#}")),
            }
        }
        Ok(())
    })?;
    if nix::net::if_::if_nametoindex(IPVS_DEVICE).is_ok() {
        failed.push(format!(
            "{IPVS_DEVICE} is there: what kube-proxy's ipvs mode leaves behind is for `kube-proxy --cleanup` to remove \
             (connections through IPVS end with it, so drain the node first)"
        ));
    }
    if !failed.is_empty() {
        bail!("not all of kube-proxy's rules could be removed: {}", failed.join("; "));
    }
    info!("{}", if found { "kube-proxy's rules are gone" } else { "there are no rules of kube-proxy's" });
    Ok(())
}

/// Connections that were translated must go on, also where kube-proxy's rules are the only ones that make the kernel track
/// connections at all.
fn keep_connections() -> Result<()> {
    let mut translated = 0;
    let listed = Conntrack::open().and_then(|conntrack| {
        conntrack.for_each(|connection| translated += usize::from(connection.has_other_destination()))
    });
    match listed {
        Ok(()) if translated > 0 => {
            nft::keep_tracking().with_context(|| {
                format!(
                    "{translated} connections may be translated by kube-proxy's rules, and would hang without: no table of \
                     ours (inet lb-agent) can be written to have netfilter go on with them"
                )
            })?;
            info!(
                "{translated} connections are translated by netfilter, and go on: the nftables table inet lb-agent sees to \
                 that (the agent removes it when they have ended)"
            );
        }
        Ok(()) => {}
        Err(error) => info!("netfilter's connections cannot be listed ({error}): there are none, then"),
    }
    Ok(())
}

/// Whether there was anything to remove.
fn remove_with(tool: Tool) -> Result<bool> {
    let mut removed = false;
    for table in tool.tables()? {
        let saved = tool.save(&table)?;
        if let Some(script) = rules::without_kube_proxy(&saved) {
            tool.restore(&script).with_context(|| format!("remove kube-proxy's rules from {table}"))?;
            info!("{tool}: removed kube-proxy's rules from {table}");
            removed = true;
        }
    }
    Ok(removed)
}
