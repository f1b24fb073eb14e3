//! The rules that kube-proxy's iptables mode writes (as of Kubernetes 1.27: a single rule of KUBE-SERVICES for each
//! ClusterIP, the leanest form that it has had), loaded by `iptables-legacy-restore`, the fastest of its flavours; and
//! flannel's masquerade beside them.

use std::fmt::Write as _;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};

use super::family::IpFamily;
use super::services::{Cluster, Service};
use crate::lab::Host;
use crate::system::{ensure_debian_packages, find_program};

/// Makes sure that the tool is there; its version.
pub(super) fn prepare() -> Result<String> {
    const RESTORE: &str = "iptables-legacy-restore";
    ensure_debian_packages(&[("iptables", RESTORE)])?;
    let path = find_program(RESTORE).with_context(|| format!("no {RESTORE}"))?;
    let version = crate::system::output(std::process::Command::new(path).arg("--version"))?;
    Ok(version.trim().to_owned())
}

/// Replaces the rules of a node, counted from 0, by those for a cluster.
pub(super) fn load(node: &Host, number: usize, cluster: &Cluster) -> Result<()> {
    node.replace_legacy_rules(cluster.family == IpFamily::V4, &rules(cluster, number))
}

/// Gives one Service other endpoints, as kube-proxy does since 1.28: only its chains are written.
pub(super) fn update(node: &Host, service: &Service) -> Result<()> {
    let mut rules = String::from("*nat\n");
    declare(&mut rules, service);
    service_rules(&mut rules, service);
    rules.push_str("COMMIT\n");
    node.add_legacy_rules(service.vip.is_ipv4(), &rules)
}

/// Removes all rules.
pub(super) fn clear(node: &Host) -> Result<()> {
    IpFamily::ALL.into_iter().try_for_each(|family| {
        node.replace_legacy_rules(family == IpFamily::V4, "*nat\nCOMMIT\n*filter\nCOMMIT\n")
    })
}

/// flannel's masquerade alone, for whoever writes the rest.
pub(super) fn load_masquerade(node: &Host, number: usize, family: IpFamily) -> Result<()> {
    let mut rules = String::from("*nat\n:FLANNEL-POSTRTG - [0:0]\n");
    masquerade(&mut rules, number, family);
    rules.push_str("COMMIT\n");
    node.add_legacy_rules(family == IpFamily::V4, &rules)
}

/// The input of `iptables-restore`.
pub(super) fn rules(cluster: &Cluster, node: usize) -> String {
    // Localhost's rule is IPv4's only.
    let of_family = |line: &&str| cluster.family == IpFamily::V4 || !line.contains("127.0.0.0");
    let mut out: String = FILTER.lines().filter(of_family).map(|line| format!("{line}\n")).collect();
    out.push_str(NAT_CHAINS);
    out.push_str(":FLANNEL-POSTRTG - [0:0]\n");
    cluster.all.iter().for_each(|s| declare(&mut out, s));
    // kube-proxy puts its own first, whenever it starts.
    out.push_str(NAT_RULES);
    masquerade(&mut out, node, cluster.family);
    for s in &cluster.all {
        dispatch_rules(&mut out, s);
        service_rules(&mut out, s);
    }
    out.push_str(NAT_LAST);
    out
}

fn declare(out: &mut String, s: &Service) {
    let _ = writeln!(out, ":{} - [0:0]", service_chain(s));
    if s.node_port.is_some() {
        let _ = writeln!(out, ":{} - [0:0]", external_chain(s));
    }
    for e in &s.endpoints {
        let _ = writeln!(out, ":{} - [0:0]", endpoint_chain(s, e));
    }
}

/// From the chains that every packet passes to the Service's own.
fn dispatch_rules(out: &mut String, s: &Service) {
    let name = s.port_name();
    let _ = writeln!(
        out,
        "-A KUBE-SERVICES -m comment --comment \"{name} cluster IP\" {} -j {}",
        to_vip(s),
        service_chain(s)
    );
    if let Some(port) = s.node_port {
        let protocol = s.transport.name();
        let _ = writeln!(
            out,
            "-A KUBE-NODEPORTS -m comment --comment {name} -m {protocol} -p {protocol} --dport {port} -j {}",
            external_chain(s)
        );
    }
}

fn to_vip(s: &Service) -> String {
    let protocol = s.transport.name();
    format!("-m {protocol} -p {protocol} -d {} --dport {}", host(s.vip.ip()), s.vip.port())
}

fn host(ip: IpAddr) -> String {
    format!("{ip}/{}", IpFamily::of(ip).bits())
}

fn service_rules(out: &mut String, s: &Service) {
    let (chain, name, protocol) = (service_chain(s), s.port_name(), s.transport.name());
    let cluster = IpFamily::of(s.vip.ip()).cluster_cidr();
    if s.node_port.is_some() {
        let external = external_chain(s);
        let _ = writeln!(
            out,
            "-A {external} -m comment --comment \"masquerade traffic for {name} external destinations\" -j KUBE-MARK-MASQ"
        );
        let _ = writeln!(out, "-A {external} -j {chain}");
    }
    let _ = writeln!(
        out,
        "-A {chain} -m comment --comment \"{name} cluster IP\" {} ! -s {cluster} -j KUBE-MARK-MASQ",
        to_vip(s)
    );
    for (i, e) in s.endpoints.iter().enumerate() {
        let to = endpoint_chain(s, e);
        let left = s.endpoints.len() - i;
        let choice = match left {
            1 => String::new(),
            _ => format!("-m statistic --mode random --probability {:.10} ", 1.0 / left as f64),
        };
        let _ = writeln!(out, "-A {chain} -m comment --comment \"{name} -> {e}\" {choice}-j {to}");
        let _ = writeln!(out, "-A {to} -m comment --comment {name} -s {} -j KUBE-MARK-MASQ", host(e.ip()));
        let _ = writeln!(
            out,
            "-A {to} -m comment --comment {name} -m {protocol} -p {protocol} -j DNAT --to-destination {e}"
        );
    }
}

/// flannel's, as of 0.20.
fn masquerade(out: &mut String, node: usize, family: IpFamily) {
    let (cluster, multicast, comment) =
        (family.cluster_cidr(), family.multicast(), "-m comment --comment \"flanneld masq\"");
    let (net, prefix) = family.pod_cidr(node);
    let own = format!("{net}/{prefix}");
    let _ = write!(
        out,
        "-A POSTROUTING {comment} -j FLANNEL-POSTRTG\n\
         -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {comment} -j RETURN\n\
         -A FLANNEL-POSTRTG -s {own} -d {cluster} {comment} -j RETURN\n\
         -A FLANNEL-POSTRTG -s {cluster} -d {own} {comment} -j RETURN\n\
         -A FLANNEL-POSTRTG ! -s {cluster} -d {own} {comment} -j RETURN\n\
         -A FLANNEL-POSTRTG -s {cluster} ! -d {multicast} {comment} -j MASQUERADE --random-fully\n\
         -A FLANNEL-POSTRTG ! -s {cluster} -d {cluster} {comment} -j MASQUERADE --random-fully\n"
    );
}

/// kube-proxy takes sixteen characters of a hash, too.
fn hashed(what: impl std::hash::Hash) -> String {
    format!("{:016X}", BuildHasherDefault::<DefaultHasher>::default().hash_one(what))
}

fn service_chain(s: &Service) -> String {
    format!("KUBE-SVC-{}", hashed(&s.name))
}

fn external_chain(s: &Service) -> String {
    format!("KUBE-EXT-{}", hashed(&s.name))
}

fn endpoint_chain(s: &Service, e: &SocketAddr) -> String {
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
mod tests;
