//! The table that kube-proxy's nftables mode writes (as of Kubernetes 1.33): one look-up in a map leads a packet to its
//! Service's chain, another to its endpoint's. And flannel's masquerade beside it, as its nftables flavour has it.

use std::fmt::Write as _;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use super::family::IpFamily;
use super::services::{Cluster, Service};
use crate::lab::Host;
use crate::system::{ensure_debian_packages, find_program, output};

/// Services in a transaction. kube-proxy writes all of them in one, which takes several times as long, since the kernel's
/// work grows faster than the transaction; what is loaded is the same.
const PIECE: usize = 500;

/// Makes sure that the tool is there; its version.
pub(super) fn prepare() -> Result<String> {
    ensure_debian_packages(&[("nftables", "nft")])?;
    let path = find_program("nft").context("no nft")?;
    Ok(output(std::process::Command::new(path).arg("--version"))?.trim().to_owned())
}

/// Gives a node without rules those for a cluster.
pub(super) fn load(node: &Host, number: usize, cluster: &Cluster) -> Result<()> {
    run(node, &base(cluster.family, cluster.family.pick(node.ips())))?;
    for services in cluster.all.chunks(PIECE) {
        run(node, &services_rules(cluster.family, services))?;
    }
    run(node, &hooks(cluster.family))?;
    run(node, &masquerade(number, cluster.family))
}

/// flannel's masquerade alone, for whoever writes the rest.
pub(super) fn load_masquerade(node: &Host, number: usize, family: IpFamily) -> Result<()> {
    run(node, &masquerade(number, family))
}

/// Gives one Service other endpoints: only its own chains are written.
pub(super) fn update(node: &Host, service: &Service) -> Result<()> {
    run(node, &chains(&table(IpFamily::of(service.vip.ip())), service))
}

/// Removes all rules.
pub(super) fn clear(node: &Host) -> Result<()> {
    run(node, "flush ruleset\n")
}

fn run(node: &Host, commands: &str) -> Result<()> {
    let nft = find_program("nft").context("no nft")?;
    let mut child =
        node.command(nft).args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("no pipe")?.write_all(commands.as_bytes())?;
    let out = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&out.stderr);
    // It shows the line that it means.
    let said: String = said.lines().take(10).collect::<Vec<_>>().join("\n");
    ensure!(out.status.success(), "nft on {} refused: {said}", node.name());
    Ok(())
}

fn ip(family: IpFamily) -> &'static str {
    match family {
        IpFamily::V4 => "ip",
        IpFamily::V6 => "ip6",
    }
}

fn table(family: IpFamily) -> String {
    format!("{} kube-proxy", ip(family))
}

/// Sets, maps and the chains that there are without any Service.
pub(super) fn base(family: IpFamily, node: IpAddr) -> String {
    let (ip, table) = (ip(family), table(family));
    let address = if family == IpFamily::V4 { "ipv4_addr" } else { "ipv6_addr" };
    let to = format!("{ip} daddr . meta l4proto . th dport");
    let ports = "meta l4proto . th dport";
    let mut out = format!("add table {table} {{ comment \"rules for kube-proxy\" ; }}\n");
    let by_address = format!("{address} . inet_proto . inet_service : verdict");
    let by_port = "inet_proto . inet_service : verdict";
    let _ =
        writeln!(out, "add set {table} cluster-ips {{ type {address} ; comment \"Active ClusterIPs\" ; }}");
    // NodePorts are answered on the primary address, unless kube-proxy is told otherwise.
    let _ = writeln!(
        out,
        "add set {table} nodeport-ips {{ type {address} ; comment \"IPs that accept NodePort traffic\" ; }}\n\
         add element {table} nodeport-ips {{ {node} }}"
    );
    for (map, of, comment) in [
        ("service-ips", &*by_address, "ClusterIP, ExternalIP and LoadBalancer IP traffic"),
        ("service-nodeports", by_port, "NodePort traffic"),
        ("no-endpoint-services", &by_address, "vmap to drop or reject packets to services with no endpoints"),
        (
            "no-endpoint-nodeports",
            by_port,
            "vmap to drop or reject packets to service nodeports with no endpoints",
        ),
        ("firewall-ips", &by_address, "destinations that are subject to LoadBalancerSourceRanges"),
    ] {
        let _ = writeln!(out, "add map {table} {map} {{ type {of} ; comment \"{comment}\" ; }}");
    }
    let service_cidr = family.service_cidr();
    for (chain, rules) in [
        ("mark-for-masquerade", vec!["mark set mark or 0x4000".to_owned()]),
        ("reject-chain", vec!["reject".into()]),
        ("firewall-check", vec![format!("{to} vmap @firewall-ips")]),
        ("service-endpoints-check", vec![format!("{to} vmap @no-endpoint-services")]),
        (
            "nodeport-endpoints-check",
            vec![format!("{ip} daddr @nodeport-ips {ports} vmap @no-endpoint-nodeports")],
        ),
        (
            "cluster-ips-check",
            vec![
                format!(
                    "{ip} daddr @cluster-ips reject comment \"Reject traffic to invalid ports of ClusterIPs\""
                ),
                format!(
                    "{ip} daddr {{ {service_cidr} }} drop comment \"Drop traffic to unallocated ClusterIPs\""
                ),
            ],
        ),
        (
            "masquerading",
            vec![
                "mark and 0x4000 == 0 return".into(),
                "mark set mark xor 0x4000".into(),
                "masquerade fully-random".into(),
            ],
        ),
        (
            "services",
            vec![
                format!("{to} vmap @service-ips"),
                format!("{ip} daddr @nodeport-ips {ports} vmap @service-nodeports"),
            ],
        ),
    ] {
        let _ = writeln!(out, "add chain {table} {chain}");
        for rule in rules {
            let _ = writeln!(out, "add rule {table} {chain} {rule}");
        }
    }
    out
}

/// The chains that packets come by. Last, so that nothing is checked from them while the rest grows.
pub(super) fn hooks(family: IpFamily) -> String {
    let (table, mut out) = (table(family), String::new());
    for (chain, of, hook, priority, jumps) in [
        ("filter-prerouting", "filter", "prerouting", -110, &["firewall-check"][..]),
        ("filter-input", "filter", "input", -110, &["nodeport-endpoints-check", "service-endpoints-check"]),
        ("filter-forward", "filter", "forward", -110, &["service-endpoints-check", "cluster-ips-check"]),
        ("filter-output", "filter", "output", -110, &["service-endpoints-check", "firewall-check"]),
        ("filter-output-post-dnat", "filter", "output", -90, &["cluster-ips-check"]),
        ("nat-prerouting", "nat", "prerouting", -100, &["services"]),
        ("nat-output", "nat", "output", -100, &["services"]),
        ("nat-postrouting", "nat", "postrouting", 100, &["masquerading"]),
    ] {
        let _ = writeln!(out, "add chain {table} {chain} {{ type {of} hook {hook} priority {priority} ; }}");
        let when = if of == "filter" { "ct state new " } else { "" };
        for jump in jumps {
            let _ = writeln!(out, "add rule {table} {chain} {when}jump {jump}");
        }
    }
    out
}

fn services_rules(family: IpFamily, services: &[Service]) -> String {
    let (table, mut out) = (table(family), String::new());
    for s in services {
        out += &chains(&table, s);
    }
    let (mut ips, mut vips, mut ports) = (Vec::new(), Vec::new(), Vec::new());
    for s in services {
        let (protocol, comment) = (s.transport.name(), format!("comment \"{}\"", s.port_name()));
        ips.push(s.vip.ip().to_string());
        let to = format!("{} . {protocol} . {} {comment}", s.vip.ip(), s.vip.port());
        vips.push(format!("{to} : goto service-{}", base_name(s)));
        if let Some(port) = s.node_port {
            ports.push(format!("{protocol} . {port} {comment} : goto external-{}", base_name(s)));
        }
    }
    for (set, elements) in [("cluster-ips", ips), ("service-ips", vips), ("service-nodeports", ports)] {
        if !elements.is_empty() {
            let _ = writeln!(out, "add element {table} {set} {{ {} }}", elements.join(", "));
        }
    }
    out
}

/// A Service's own chains, emptied where they are there already.
fn chains(table: &str, s: &Service) -> String {
    let family = IpFamily::of(s.vip.ip());
    let (ip, cluster, protocol) = (ip(family), family.cluster_cidr(), s.transport.name());
    let mut out = String::new();
    let mut begin = |chain: &str| {
        let _ = writeln!(out, "add chain {table} {chain}\nflush chain {table} {chain}");
    };
    let (service, external) = (format!("service-{}", base_name(s)), format!("external-{}", base_name(s)));
    let endpoints: Vec<_> = s.endpoints.iter().map(|e| format!("endpoint-{}", endpoint_name(s, e))).collect();
    begin(&service);
    if s.node_port.is_some() {
        begin(&external);
    }
    endpoints.iter().for_each(|chain| begin(chain));
    let _ = writeln!(
        out,
        "add rule {table} {service} {ip} daddr {} {protocol} dport {} {ip} saddr != {cluster} jump mark-for-masquerade",
        s.vip.ip(),
        s.vip.port()
    );
    let choices: Vec<_> =
        endpoints.iter().enumerate().map(|(i, chain)| format!("{i} : goto {chain}")).collect();
    let _ = writeln!(
        out,
        "add rule {table} {service} numgen random mod {} vmap {{ {} }}",
        choices.len(),
        choices.join(" , ")
    );
    if s.node_port.is_some() {
        let _ = writeln!(out, "add rule {table} {external} jump mark-for-masquerade");
        let _ = writeln!(out, "add rule {table} {external} goto {service}");
    }
    for (chain, e) in endpoints.iter().zip(&s.endpoints) {
        let _ = writeln!(out, "add rule {table} {chain} {ip} saddr {} jump mark-for-masquerade", e.ip());
        let _ = writeln!(out, "add rule {table} {chain} meta l4proto {protocol} dnat to {e}");
    }
    out
}

/// Of flannel's nftables flavour.
fn masquerade(node: usize, family: IpFamily) -> String {
    let (ip, cluster, multicast) = (ip(family), family.cluster_cidr(), family.multicast());
    let (net, prefix) = family.pod_cidr(node);
    let (table, own) = (format!("{ip} flannel-{}", family.name().to_lowercase()), format!("{net}/{prefix}"));
    let mut out = format!(
        "add table {table}\nadd chain {table} postrtg {{ type nat hook postrouting priority srcnat ; }}\n"
    );
    for rule in [
        "meta mark 0x4000 return".to_owned(),
        format!("{ip} saddr {own} {ip} daddr {cluster} return"),
        format!("{ip} saddr {cluster} {ip} daddr {own} return"),
        format!("{ip} saddr != {cluster} {ip} daddr {own} return"),
        format!("{ip} saddr {cluster} {ip} daddr != {multicast} masquerade fully-random"),
        format!("{ip} saddr != {cluster} {ip} daddr {cluster} masquerade fully-random"),
    ] {
        let _ = writeln!(out, "add rule {table} postrtg {rule}");
    }
    out
}

/// kube-proxy puts eight characters of a hash before the name, too.
fn hashed(name: &str) -> String {
    let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(name) as u32;
    format!("{hash:08X}-{name}")
}

fn base_name(s: &Service) -> String {
    hashed(&format!("default/{}/{}/http", s.name, s.transport.name()))
}

fn endpoint_name(s: &Service, e: &SocketAddr) -> String {
    let ip = e.ip().to_string().replace(':', ".");
    hashed(&format!("default/{}/{}/http__{ip}/{}", s.name, s.transport.name(), e.port()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::load::Transport;
    use crate::bench::services::{Kind, Where};
    use nix::sched::{CloneFlags, unshare};

    #[test]
    fn every_chain_that_is_gone_to_is_there_first() {
        let kind = Kind { at: Where::There, transport: Transport::Udp };
        for family in IpFamily::ALL {
            let cluster = Cluster::new(family, 2, &[kind]);
            let text =
                base(family, family.endpoint(0, 0)) + &services_rules(family, &cluster.all) + &hooks(family);
            let table = table(family);
            for go in ["goto ", "jump "] {
                for (at, _) in text.match_indices(go) {
                    let chain = text[at + go.len()..].split([' ', ',', '\n']).next().unwrap();
                    let known = text[..at].contains(&format!("add chain {table} {chain}\n"));
                    assert!(known, "{chain} is not there");
                }
            }
            assert_eq!(text.matches(" dnat to ").count(), 20);
            assert_eq!(text.matches(" . udp . 80 comment").count(), 1);
        }
    }

    #[test]
    fn the_kernel_takes_it() -> Result<()> {
        prepare()?;
        let kind = Kind { at: Where::Here, transport: Transport::Tcp };
        let load = || -> Result<()> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            for family in IpFamily::ALL {
                let cluster = Cluster::new(family, 3, &[kind]);
                let all = [
                    base(family, family.endpoint(0, 0)),
                    services_rules(family, &cluster.all),
                    hooks(family),
                    masquerade(0, family),
                ];
                // Twice the same chains: as an update writes them.
                let again = chains(&table(family), &cluster.all[0]);
                let mut nft = std::process::Command::new(find_program("nft").context("no nft")?);
                let mut child = nft.args(["-f", "-"]).stdin(Stdio::piped()).spawn()?;
                child.stdin.take().context("no pipe")?.write_all((all.concat() + &again).as_bytes())?;
                ensure!(child.wait()?.success(), "refused");
            }
            let nft = find_program("nft").context("no nft")?;
            let listed = output(std::process::Command::new(nft).args(["list", "ruleset"]))?;
            ensure!(listed.matches("\tchain endpoint-").count() == 60, "{listed}");
            Ok(())
        };
        std::thread::scope(|s| s.spawn(load).join().unwrap())
    }
}
