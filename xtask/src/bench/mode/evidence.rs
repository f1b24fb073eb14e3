//! Whether a mode did what its name says.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use lb_common::datapath::Reason;

use super::Mode;
use crate::bench::maps;
use crate::bench::topology::Path;
use crate::lab::Host;

/// What the first node has counted so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counts {
    /// Connections that netfilter tracks.
    tracked: u64,
    /// Flows that our programs have entered.
    flows: u64,
}

impl Counts {
    pub(super) fn of(node: &Host, mode: Mode) -> Result<Self> {
        let read = || std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count");
        let tracked = match node.run_in(read)? {
            Ok(text) => text.trim().parse()?,
            // No connection tracking in this kernel, or none yet.
            Err(_) => 0,
        };
        let flows = if mode.is_ours() { maps::counted(node, Reason::NewFlow)? } else { 0 };
        Ok(Self { tracked, flows })
    }
}

/// Whom the server takes for its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// The one who asked.
    Client,
    /// The node, which has put an address of its own in place.
    Node,
}

/// What has to be true of a mode on a way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Expected {
    seen: Seen,
    /// Whether netfilter tracks connections.
    tracked: bool,
    /// Whether our programs enter flows.
    flows: bool,
}

fn expected(mode: Mode, path: Path) -> Expected {
    let masqueraded = match path {
        Path::SameNode | Path::OtherNode => false,
        // kube-proxy masquerades whatever is external traffic to it; we only what could not come back otherwise.
        Path::NodePortHere => matches!(mode, Mode::Iptables | Mode::Nftables),
        Path::NodePortThere | Path::Outside => !mode.is_direct(),
    };
    Expected {
        seen: if masqueraded { Seen::Node } else { Seen::Client },
        tracked: matches!(mode, Mode::Iptables | Mode::Nftables),
        // The sockets of pods are connected to the endpoint itself.
        flows: mode.is_ours() && !(mode == Mode::OursSockets && mode.is_for(path)),
    }
}

/// Holds what was counted before and after some connections, and whom the server saw, against what should be. `fresh`: the
/// client has made few connections so far.
pub(super) fn check(
    (mode, path, fresh): (Mode, Path, bool),
    (before, after, connections): (Counts, Counts, u64),
    (seen, client): (IpAddr, IpAddr),
) -> Result<()> {
    let (expected, what) = (expected(mode, path), format!("{}, {}", mode.name(), path.name()));
    let void = "the comparison is void";
    let whom = if seen == client { Seen::Client } else { Seen::Node };
    ensure!(whom == expected.seen, "{what}: the server sees {seen}, not {:?}: {void}", expected.seen);
    let tracked = after.tracked > 0;
    ensure!(tracked == expected.tracked, "{what}: {} connections are tracked: {void}", after.tracked);
    let flows = after.flows - before.flows;
    // A client that has used all its ports comes back with one whose flow is remembered: then no flow is new. And others on
    // the node have their flows, too.
    let enough = if expected.flows { flows >= connections || !fresh } else { flows < connections / 10 };
    ensure!(enough, "{what}: {flows} flows were entered for {connections} connections: {void}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Counts = Counts { tracked: 0, flows: 0 };
    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 10));
    const NODE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(172, 18, 0, 11));

    #[test]
    fn sockets_enter_no_flows_and_packets_do() {
        let flows = Counts { tracked: 0, flows: 1000 };
        let check =
            |mode, after| check((mode, Path::SameNode, true), (NOTHING, after, 1000), (CLIENT, CLIENT));
        assert!(check(Mode::Ours, flows).is_ok());
        assert!(check(Mode::Ours, NOTHING).is_err());
        assert!(check(Mode::OursSockets, NOTHING).is_ok());
        assert!(check(Mode::OursSockets, flows).is_err());
        assert!(check(Mode::Direct, NOTHING).is_ok());
        assert!(check(Mode::Iptables, NOTHING).is_err());
        assert!(check(Mode::Iptables, Counts { tracked: 1, flows: 0 }).is_ok());
        let late =
            super::check((Mode::Ours, Path::SameNode, false), (NOTHING, NOTHING, 1000), (CLIENT, CLIENT));
        assert!(late.is_ok(), "its ports have been used before");
    }

    #[test]
    fn who_is_seen_tells_whether_addresses_were_translated() {
        let tracked = Counts { tracked: 9, flows: 0 };
        let check = |mode, path, after, seen| check((mode, path, true), (NOTHING, after, 50), (seen, CLIENT));
        assert!(check(Mode::Direct, Path::Outside, NOTHING, CLIENT).is_ok());
        assert!(check(Mode::Direct, Path::Outside, NOTHING, NODE).is_err());
        assert!(check(Mode::Nftables, Path::NodePortHere, tracked, NODE).is_ok());
        assert!(check(Mode::Nftables, Path::NodePortHere, tracked, CLIENT).is_err());
        let flows = Counts { tracked: 0, flows: 50 };
        assert!(check(Mode::Ours, Path::NodePortHere, flows, CLIENT).is_ok());
        assert!(check(Mode::Ours, Path::NodePortThere, flows, NODE).is_ok());
        assert!(check(Mode::Ours, Path::NodePortThere, flows, CLIENT).is_err());
    }
}
