//! The rules that kube-proxy's iptables mode writes (as of Kubernetes 1.27: a single rule of KUBE-SERVICES for each
//! ClusterIP, the leanest form that it has had), loaded by `iptables-legacy-restore`, the fastest of its flavours.

use std::fmt::Write as _;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::io::Write as _;
use std::net::SocketAddrV4;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use super::services::{Service, Services};
use crate::lab::Host;
use crate::system::{ensure_debian_packages, find_program};

const RESTORE: &str = "iptables-legacy-restore";
/// The IPv4 half of the lab's `--cluster-cidr`.
const CLUSTER_CIDR: &str = "10.244.0.0/16";

/// Makes sure that the tool is there; its version.
pub(super) fn prepare() -> Result<String> {
    ensure_debian_packages(&[("iptables", RESTORE)])?;
    let version = crate::system::output(program()?.arg("--version"))?;
    Ok(version.trim().to_owned())
}

fn program() -> Result<std::process::Command> {
    Ok(std::process::Command::new(find_program(RESTORE).with_context(|| format!("no {RESTORE}"))?))
}

/// Replaces a node's rules by those for `services`.
pub(super) fn load(node: &Host, services: &Services) -> Result<()> {
    let mut restore = node.command(program()?.get_program());
    let mut child = restore.stdin(Stdio::piped()).spawn().with_context(|| format!("starting {RESTORE}"))?;
    let rules = rules(services);
    child.stdin.take().context("no pipe")?.write_all(rules.as_bytes())?;
    ensure!(child.wait()?.success(), "{RESTORE} refused the rules");
    Ok(())
}

/// The input of `iptables-restore`.
fn rules(services: &Services) -> String {
    let mut out = String::from(FILTER);
    out.push_str(NAT_CHAINS);
    for s in &services.all {
        let _ = writeln!(out, ":{} - [0:0]", service_chain(s));
        for e in &s.endpoints {
            let _ = writeln!(out, ":{} - [0:0]", endpoint_chain(s, e));
        }
    }
    out.push_str(NAT_RULES);
    for s in &services.all {
        nat_rules(&mut out, s);
    }
    out.push_str(NAT_LAST);
    out
}

fn nat_rules(out: &mut String, s: &Service) {
    let (chain, name) = (service_chain(s), format!("default/{}:http", s.name));
    let vip = format!("-m tcp -p tcp -d {}/32 --dport {}", s.vip.ip(), s.vip.port());
    let _ = writeln!(out, "-A KUBE-SERVICES -m comment --comment \"{name} cluster IP\" {vip} -j {chain}");
    let _ = writeln!(
        out,
        "-A {chain} -m comment --comment \"{name} cluster IP\" {vip} ! -s {CLUSTER_CIDR} -j KUBE-MARK-MASQ"
    );
    for (i, e) in s.endpoints.iter().enumerate() {
        let to = endpoint_chain(s, e);
        let left = s.endpoints.len() - i;
        let choice = match left {
            1 => String::new(),
            _ => format!("-m statistic --mode random --probability {:.10} ", 1.0 / left as f64),
        };
        let _ = writeln!(out, "-A {chain} -m comment --comment \"{name} -> {e}\" {choice}-j {to}");
        let _ = writeln!(out, "-A {to} -m comment --comment {name} -s {}/32 -j KUBE-MARK-MASQ", e.ip());
        let _ =
            writeln!(out, "-A {to} -m comment --comment {name} -m tcp -p tcp -j DNAT --to-destination {e}");
    }
}

/// kube-proxy takes sixteen characters of a hash, too.
fn hashed(what: impl std::hash::Hash) -> String {
    format!("{:016X}", BuildHasherDefault::<DefaultHasher>::default().hash_one(what))
}

fn service_chain(s: &Service) -> String {
    format!("KUBE-SVC-{}", hashed(&s.name))
}

fn endpoint_chain(s: &Service, e: &SocketAddrV4) -> String {
    format!("KUBE-SEP-{}", hashed((&s.name, e)))
}

/// The filter table as kube-proxy begins it, IPv4: all of it but the rules of Services without endpoints.
pub const FILTER: &str = "\
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming localnet connections\" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
";

/// The nat table: the chains that there are without any Service.
pub const NAT_CHAINS: &str = "\
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SERVICES - [0:0]
";

/// Their rules, which come after all chains' names.
pub const NAT_RULES: &str = "\
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully
";

/// The last rule of `KUBE-SERVICES`, and the table's end.
pub const NAT_LAST: &str = "\
-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
COMMIT
";

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn endpoints_are_chosen_evenly_and_chains_are_declared() {
        let text = rules(&Services::new(2, Ipv4Addr::new(10, 244, 1, 11)));
        // 1/10, then 1/9 of the rest, … : 0.1 each; the last takes what is left.
        assert_eq!(text.matches("--probability 0.1000000000 ").count(), 2);
        assert_eq!(text.matches("--probability 0.5000000000 ").count(), 2);
        assert_eq!(text.matches("-j DNAT").count(), 20);
        for line in text.lines().filter(|l| l.starts_with("-A KUBE-S")) {
            let chain = line.split(' ').nth(1).unwrap();
            assert!(text.contains(&format!("\n:{chain} - ")), "{chain} is not declared");
        }
    }
}
