//! kube-proxy's rules for the demo's Services, in each of its modes.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use xtask::bench::iptables::{FILTER, NAT_CHAINS, NAT_LAST, NAT_RULES};
use xtask::demo::vip;
use xtask::lab::{Host, Lab};
use xtask::system::{ensure_debian_packages, find_program, output};

use super::super::pod_networks;
use crate::support::{dns, store, web};

/// How it writes its rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// By `iptables-legacy`.
    Legacy,
    /// By `iptables-nft`.
    Nft,
    /// As nftables of its own.
    Nftables,
}

/// A Service port of one family.
struct Port {
    name: &'static str,
    protocol: &'static str,
    cluster: SocketAddr,
    node_port: Option<u16>,
    external: Vec<IpAddr>,
    endpoints: Vec<SocketAddr>,
}

/// The demo's manifests, as kube-proxy understands them.
fn ports(lab: &Lab, family: usize) -> Vec<Port> {
    let pod = |node, pod, port| lab.pod(node, pod).at(port)[family];
    let port = |name, protocol, cluster: [SocketAddr; 2], node_port, endpoints| Port {
        name,
        protocol,
        cluster: cluster[family],
        node_port,
        external: vec![],
        endpoints,
    };
    let (external, balancer) =
        (vip("203.0.113.130", "2001:db8:3::130", 80), vip("203.0.113.10", "2001:db8:3::10", 80));
    let names = || vec![pod(0, 2, 5353), pod(1, 1, 5353)];
    let (db, empty) = (vip("10.96.0.30", "fd00:10:96::30", 5432), vip("10.96.0.99", "fd00:10:96::99", 80));
    vec![
        Port {
            external: vec![external[family].ip(), balancer[family].ip()],
            ..port("WEB", "tcp", web(), Some(30080), vec![pod(0, 0, 8080), pod(0, 1, 8080), pod(1, 0, 8080)])
        },
        port("DNS", "udp", dns(), Some(30053), names()),
        port("DNSTCP", "tcp", dns(), Some(30053), names()),
        port("STORE", "tcp", store(), Some(30081), vec![pod(1, 2, 8080)]),
        port("DB", "tcp", db, None, vec![lab.inet().at(5432)[family]]),
        port("EMPTY", "tcp", empty, Some(30099), vec![]),
        port("EMPTYUDP", "udp", empty, Some(30099), vec![]),
    ]
}

impl Mode {
    /// Writes the whole rule set of a node.
    pub(super) fn write(self, lab: &Lab, node: &Host, random_fully: bool) -> Result<()> {
        if self == Self::Nftables {
            return nft(node, &format!("{}{}", nftables(lab, 0), nftables(lab, 1)));
        }
        for family in [0, 1] {
            let rules = iptables(lab, family);
            let rules = if random_fully { rules } else { rules.replace(" --random-fully", "") };
            match self {
                Self::Legacy => node.add_legacy_rules(family == 0, &rules)?,
                _ => node.add_rules(family == 0, &rules)?,
            }
        }
        Ok(())
    }

    /// Packets that its rules have given a backend: the first of each connection.
    pub(super) fn translated(self, node: &Host) -> Result<u64> {
        let mut sum = 0;
        for (program, args) in match self {
            Self::Legacy => [
                ("iptables-legacy-save", ["-c", "-t", "nat"]),
                ("ip6tables-legacy-save", ["-c", "-t", "nat"]),
            ],
            Self::Nft => {
                [("iptables-nft-save", ["-c", "-t", "nat"]), ("ip6tables-nft-save", ["-c", "-t", "nat"])]
            }
            Self::Nftables => [("nft", ["list", "tables", "ip"]), ("nft", ["list", "tables", "ip6"])],
        } {
            ensure_debian_packages(&[("iptables", "iptables-nft-save"), ("nftables", "nft")])?;
            let list = match self {
                Self::Nftables => {
                    output(node.command(program).args(["list", "table", args[2], "kube-proxy"]))?
                }
                _ => output(node.command(program).args(args))?,
            };
            for line in list.lines() {
                let count = match self {
                    Self::Nftables => {
                        line.split("counter packets ").nth(1).filter(|_| line.contains("dnat to"))
                    }
                    _ => line.strip_prefix('[').filter(|_| line.contains("-j DNAT")),
                };
                let digits = count.map(|count| count.split([' ', ':']).next().unwrap_or_default());
                sum += digits.map_or(Ok(0), str::parse)?;
            }
        }
        Ok(sum)
    }
}

/// For `nft -f`.
fn nft(node: &Host, script: &str) -> Result<()> {
    ensure_debian_packages(&[("nftables", "nft")])?;
    let path = find_program("nft").context("no nft")?;
    let mut child =
        node.command(path).args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("no pipe")?.write_all(script.as_bytes())?;
    let out = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "nft on {} refused: {said}\n{script}", node.name());
    Ok(())
}

/// For `iptables-restore`.
fn iptables(lab: &Lab, family: usize) -> String {
    let (cluster, ..) = &pod_networks(0)[family];
    let (mut filter, mut chains, mut nat) = (String::new(), String::new(), String::new());
    for Port { name, protocol, cluster: vip, node_port, external, endpoints } in ports(lab, family) {
        let to = |ip: &IpAddr| format!("-d {ip} -p {protocol} -m {protocol} --dport {}", vip.port());
        if endpoints.is_empty() {
            let _ = writeln!(filter, "-A KUBE-SERVICES {} -j REJECT", to(&vip.ip()));
            let local = "-m addrtype --dst-type LOCAL";
            let port = node_port.map(|port| format!("-p {protocol} -m {protocol} --dport {port}"));
            port.map(|port| writeln!(filter, "-A KUBE-EXTERNAL-SERVICES {local} {port} -j REJECT"));
            continue;
        }
        for chain in ["SVC", "EXT"] {
            let _ = writeln!(chains, ":KUBE-{chain}-{name} - [0:0]");
        }
        let _ = writeln!(nat, "-A KUBE-SERVICES {} -j KUBE-SVC-{name}", to(&vip.ip()));
        for ip in &external {
            let _ = writeln!(nat, "-A KUBE-SERVICES {} -j KUBE-EXT-{name}", to(ip));
        }
        if let Some(port) = node_port {
            let _ = writeln!(
                nat,
                "-A KUBE-NODEPORTS -p {protocol} -m {protocol} --dport {port} -j KUBE-EXT-{name}"
            );
        }
        let _ = writeln!(
            nat,
            "-A KUBE-EXT-{name} -m comment --comment \"masquerade traffic for external destinations\" -j KUBE-MARK-MASQ\n\
             -A KUBE-EXT-{name} -j KUBE-SVC-{name}\n\
             -A KUBE-SVC-{name} ! -s {cluster} {} -j KUBE-MARK-MASQ",
            to(&vip.ip())
        );
        for (i, endpoint) in endpoints.iter().enumerate() {
            let probability = 1.0 / (endpoints.len() - i) as f64;
            let _ = writeln!(chains, ":KUBE-SEP-{name}{i} - [0:0]");
            let _ = writeln!(
                nat,
                "-A KUBE-SVC-{name} -m statistic --mode random --probability {probability:.10} -j KUBE-SEP-{name}{i}\n\
                 -A KUBE-SEP-{name}{i} -s {} -j KUBE-MARK-MASQ\n\
                 -A KUBE-SEP-{name}{i} -p {protocol} -m {protocol} -j DNAT --to-destination {endpoint}",
                endpoint.ip()
            );
        }
    }
    // The kubelet's chain is the kubelet's.
    let begin = FILTER.trim_end_matches("COMMIT\n").lines().filter(|line| !line.contains("KUBE-FIREWALL"));
    let begin: String = begin.map(|line| format!("{line}\n")).collect();
    format!("{begin}{filter}COMMIT\n{NAT_CHAINS}{chains}{NAT_RULES}{nat}{NAT_LAST}")
}

/// For `nft -f`.
fn nftables(lab: &Lab, family: usize) -> String {
    let (ip, (cluster, ..)) = (["ip", "ip6"][family], &pod_networks(0)[family]);
    let (mut chains, mut services, mut node_ports, mut refused) =
        (String::new(), String::new(), String::new(), String::new());
    for Port { name, protocol, cluster: vip, node_port, external, endpoints } in ports(lab, family) {
        let to = |addr: &IpAddr| format!("{ip} daddr {addr} {protocol} dport {}", vip.port());
        if endpoints.is_empty() {
            let _ = writeln!(refused, "    {} reject", to(&vip.ip()));
            node_port
                .map(|port| writeln!(refused, "    fib daddr type local {protocol} dport {port} reject"));
            continue;
        }
        let _ = writeln!(services, "    {} goto service-{name}", to(&vip.ip()));
        for addr in &external {
            let _ = writeln!(services, "    {} goto external-{name}", to(addr));
        }
        node_port.map(|port| writeln!(node_ports, "    {protocol} dport {port} goto external-{name}"));
        let choices: Vec<_> =
            (0..endpoints.len()).map(|i| format!("{i} : goto endpoint-{name}{i}")).collect();
        for (i, endpoint) in endpoints.iter().enumerate() {
            let _ = writeln!(
                chains,
                "  chain endpoint-{name}{i} {{\n    {ip} saddr {} jump mark-for-masquerade\n    \
                 meta l4proto {protocol} counter dnat to {endpoint}\n  }}",
                endpoint.ip()
            );
        }
        let _ = writeln!(
            chains,
            "  chain service-{name} {{\n    {} {ip} saddr != {cluster} jump mark-for-masquerade\n    \
             numgen random mod {} vmap {{ {} }}\n  }}\n  \
             chain external-{name} {{\n    jump mark-for-masquerade\n    goto service-{name}\n  }}",
            to(&vip.ip()),
            endpoints.len(),
            choices.join(", ")
        );
    }
    let hooks: String = [("prerouting", -100), ("output", -100)]
        .map(|(hook, priority)| {
            format!(
                "  chain nat-{hook} {{\n    type nat hook {hook} priority {priority};\n    jump services\n    \
                 fib daddr type local jump nodeports\n  }}\n"
            )
        })
        .concat();
    let filters: String = ["input", "forward", "output"]
        .map(|hook| {
            format!(
                "  chain filter-{hook} {{\n    type filter hook {hook} priority 0;\n    \
                 ct state new jump no-endpoints\n  }}\n"
            )
        })
        .concat();
    format!(
        "table {ip} kube-proxy {{\n  chain mark-for-masquerade {{\n    meta mark set meta mark | 0x4000\n  }}\n{chains}  \
         chain services {{\n{services}  }}\n  chain nodeports {{\n{node_ports}  }}\n  \
         chain no-endpoints {{\n{refused}  }}\n{hooks}{filters}  \
         chain nat-postrouting {{\n    type nat hook postrouting priority 100;\n    \
         meta mark & 0x4000 == 0 return\n    meta mark set meta mark & 0xffffbfff\n    masquerade fully-random\n  }}\n}}\n"
    )
}
