//! What is wired to what, with which addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use anyhow::Result;

use super::host::{Host, Role, write_sysctl};
use super::net::Net;
use super::netns;

/// The cluster's pod networks: /24 and /64 for each node come out of them.
pub const CLUSTER_CIDR: &str = "10.244.0.0/16,fd00:10:244::/48";

/// LoadBalancer addresses (203.0.113.0/25) and external IPs (the upper half): the wire routes both to n1.
pub const EXTERNAL_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 0);

/// The same in IPv6, a /64.
pub const EXTERNAL_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 3, 0, 0, 0, 0, 0);

/// The wire's address on the node LAN: the nodes' default gateway.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 1);

/// The wire's IPv6 address on the node LAN.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 0, 1);

/// MTU of the node LAN.
const MTU: u32 = 1500;
/// MTU of pods and of the IPv4 overlay: what vxlan leaves of 1500.
pub(crate) const POD_MTU: u32 = 1450;
/// MTU of the IPv6 overlay.
const OVERLAY_V6_MTU: u32 = 1430;

/// Most pods that a node can have: its pods' addresses end in 10 and up.
pub(crate) const MAX_PODS: usize = 240;

/// Main addresses of a node, counted from 0.
pub(crate) fn node_addrs(node: usize) -> (Ipv4Addr, Ipv6Addr) {
    (
        Ipv4Addr::new(172, 18, 0, 11 + node as u8),
        Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 0, 0x11 + node as u16),
    )
}

/// Address number `host` of a node's pod network; 0 is the overlay device's own, 1 the bridge's.
pub(crate) fn pod_net_addrs(node: usize, host: u8) -> (Ipv4Addr, Ipv6Addr) {
    let n = node + 1;
    // The last group reads as the IPv4 address's last number does: pod ….10 is …::10.
    let digits = u16::from_str_radix(&host.to_string(), 16).unwrap_or_default();
    (Ipv4Addr::new(10, 244, n as u8, host), Ipv6Addr::new(0xfd00, 0x10, 0x244, n as u16, 0, 0, 0, digits))
}

/// Main addresses of the client or the internet host.
pub(crate) fn outside_addrs(role: Role) -> (Ipv4Addr, Ipv6Addr) {
    match role {
        Role::Client => (Ipv4Addr::new(192, 0, 2, 10), Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x10)),
        _ => (Ipv4Addr::new(198, 51, 100, 10), Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 0x10)),
    }
}

/// The router's address in the network of `addrs`: host number 1.
fn router_of((v4, v6): (Ipv4Addr, Ipv6Addr)) -> (Ipv4Addr, Ipv6Addr) {
    let [a, b, c, _] = v4.octets();
    let [e, f, g, h, ..] = v6.segments();
    (Ipv4Addr::new(a, b, c, 1), Ipv6Addr::new(e, f, g, h, 0, 0, 0, 1))
}

/// A locally administered hardware address; namespaces are apart, so labs may share them.
fn mac(kind: u8, node: usize) -> [u8; 6] {
    [0x0e, 0x1b, 0, 0, kind, node as u8]
}

/// Creates a host's namespace with its settings. Devices come later and take these as their defaults.
pub(crate) fn create_netns(host: &Host) -> Result<()> {
    netns::create(&host.netns_name(), || {
        let forwards = matches!(host.role, Role::Node | Role::Wire);
        let forward = if forwards { "1" } else { "0" };
        for scope in ["all", "default"] {
            write_sysctl(&format!("ipv4.conf.{scope}.rp_filter"), "1")?;
            write_sysctl(&format!("ipv4.conf.{scope}.forwarding"), forward)?;
            write_sysctl(&format!("ipv6.conf.{scope}.forwarding"), forward)?;
            write_sysctl(&format!("ipv6.conf.{scope}.accept_dad"), "0")?;
            write_sysctl(&format!("ipv6.conf.{scope}.accept_ra"), "0")?;
            if host.role == Role::Node {
                // Redirects use up the kernel's ICMP allowance, and refusals then look like time-outs.
                write_sysctl(&format!("ipv4.conf.{scope}.send_redirects"), "0")?;
            }
        }
        // Pings without a raw socket, for any user.
        write_sysctl("ipv4.ping_group_range", "0 2147483647")
    })
}

/// Wires the hosts that every lab has; `hosts` finds one by name.
pub(crate) async fn connect(wire: &Host, nodes: &[Host], outside: &[&Host], pod_mtu: u32) -> Result<()> {
    let w = Net::open(&wire.netns_path())?;
    w.up("lo").await?;
    let lan = w.bridge("lan0", mac(0, 0), MTU).await?;
    w.addr(lan, GATEWAY_V4, 24).await?;
    w.addr(lan, GATEWAY_V6, 64).await?;
    for node in nodes {
        w.veth(&node.name, Some(lan), &node.netns_path(), "eth0", MTU).await?;
    }
    for host in outside {
        let dev = w.veth(&host.name, None, &host.netns_path(), "eth0", MTU).await?;
        let router = router_of((host.v4, host.v6));
        w.addr(dev, router.0, 24).await?;
        w.addr(dev, router.1, 64).await?;
        leaf(&host.netns_path(), (host.v4, host.v6), router).await?;
    }
    if let Some(n1) = nodes.first() {
        w.route(EXTERNAL_V4, 24, n1.v4, None).await?;
        w.route(EXTERNAL_V6, 64, n1.v6, None).await?;
    }
    for (i, host) in nodes.iter().enumerate() {
        node(i, host, nodes, pod_mtu).await?;
    }
    Ok(())
}

/// A host with one device, `eth0`, and one way out.
async fn leaf(ns: &Path, addrs: (Ipv4Addr, Ipv6Addr), router: (Ipv4Addr, Ipv6Addr)) -> Result<Net> {
    let net = Net::open(ns)?;
    net.up("lo").await?;
    net.up("eth0").await?;
    let eth0 = net.index("eth0").await?;
    net.addr(eth0, addrs.0, 24).await?;
    net.addr(eth0, addrs.1, 64).await?;
    net.default_route(router.0).await?;
    net.default_route(router.1).await?;
    Ok(net)
}

/// A node: its bridge for pods and its overlay devices, as flannel lays them out.
async fn node(i: usize, host: &Host, nodes: &[Host], pod_mtu: u32) -> Result<()> {
    let net = leaf(&host.netns_path(), (host.v4, host.v6), (GATEWAY_V4, GATEWAY_V6)).await?;
    let bridge = net.bridge("cni0", mac(1, i), pod_mtu).await?;
    let (v4, v6) = pod_net_addrs(i, 1);
    net.addr(bridge, v4, 24).await?;
    net.addr(bridge, v6, 64).await?;

    let eth0 = net.index("eth0").await?;
    let own = pod_net_addrs(i, 0);
    let vxlan4 = net.vxlan("flannel.1", eth0, host.v4.into(), mac(4, i), POD_MTU).await?;
    net.addr(vxlan4, own.0, 32).await?;
    let vxlan6 = net.vxlan("flannel-v6.1", eth0, host.v6.into(), mac(6, i), OVERLAY_V6_MTU).await?;
    net.addr(vxlan6, own.1, 128).await?;
    for (j, other) in nodes.iter().enumerate().filter(|&(j, _)| j != i) {
        let overlay = pod_net_addrs(j, 0);
        net.overlay_peer(vxlan4, overlay.0.into(), mac(4, j), other.v4.into()).await?;
        net.route(overlay.0, 24, overlay.0, Some(vxlan4)).await?;
        net.overlay_peer(vxlan6, overlay.1.into(), mac(6, j), other.v6.into()).await?;
        net.route(overlay.1, 64, overlay.1, Some(vxlan6)).await?;
    }
    Ok(())
}

/// Name of a pod's device on its node.
pub(crate) fn veth_name(pod: &Host) -> String {
    format!("veth{}", pod.name)
}

/// Plugs a pod into its node's bridge, as the bridge CNI plugin does.
pub(crate) async fn plug_pod(node: &Host, pod: &Host, mtu: u32) -> Result<()> {
    let net = Net::open(&node.netns_path())?;
    let bridge = net.index("cni0").await?;
    let port = net.veth(&veth_name(pod), Some(bridge), &pod.netns_path(), "eth0", mtu).await?;
    net.hairpin(port).await?;
    leaf(&pod.netns_path(), (pod.v4, pod.v6), router_of((pod.v4, pod.v6))).await?;
    Ok(())
}

/// Takes a pod's device away, both ends.
pub(crate) async fn unplug_pod(node: &Host, pod: &Host) -> Result<()> {
    Net::open(&node.netns_path())?.delete(&veth_name(pod)).await
}

/// Whether `ip` belongs to a pod network.
pub fn is_pod_ip(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(a) => a.octets()[..2] == [10, 244],
        IpAddr::V6(a) => a.segments()[..3] == [0xfd00, 0x10, 0x244],
    }
}
