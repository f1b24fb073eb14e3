//! Devices, routes and neighbours of the kernel's that are as `support::driver::XdpNode` says.

use crate::support::cluster::{BOTH, Net};
use crate::support::xdp_node::{Network, OWN, PEER, PORT, ROUTER, VNI, VTEP};
use nix::sched::{CloneFlags, unshare};
use rtnetlink::packet_route::address::AddressHeaderFlags;
use rtnetlink::{Handle, LinkUnspec, LinkVeth, LinkVxlan, RouteMessageBuilder};
use std::fs;
use std::net::IpAddr;

/// In a network namespace of this thread's own.
pub(crate) struct Devices {
    /// Index of the uplink, a veth.
    pub(crate) uplink: u32,
    /// Index of the overlay, zero where there is none.
    pub(crate) overlay: u32,
}

impl Devices {
    pub(crate) fn new(network: Network) -> Self {
        unshare(CloneFlags::CLONE_NEWNET)
            .expect("the program tests make network namespaces: run them as root");
        for (name, value) in [
            ("ipv4/conf/all/forwarding", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            ("ipv6/conf/default/forwarding", "1"),
            ("ipv6/conf/default/accept_dad", "0"),
        ] {
            fs::write(format!("/proc/sys/net/{name}"), value).expect("set a sysctl");
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().expect("a runtime");
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().expect("netlink");
            tokio::spawn(connection);
            make(&handle, network).await
        })
    }
}

async fn make(handle: &Handle, network: Network) -> Devices {
    let link = |link| async { handle.link().add(link).execute().await.expect("make a device") };
    link(LinkVeth::new("up0", "up1").address(OWN.to_vec()).up().build()).await;
    handle.link().set(LinkUnspec::new_with_name("up1").up().build()).execute().await.expect("the other end");
    let uplink = index(handle, "up0").await;
    for v6 in BOTH {
        address(handle, uplink, Net::of(v6).node, if v6 { 64 } else { 24 }).await;
    }
    let overlay = match network {
        Network::Routed => 0,
        Network::Vxlan { v6, .. } => {
            let vxlan = LinkVxlan::new("vx0", VNI).dev(uplink).port(PORT).learning(false);
            let vxlan = match Net::of(v6).node {
                IpAddr::V4(ip) => vxlan.local(ip),
                IpAddr::V6(ip) => vxlan.local6(ip),
            };
            link(vxlan.address(VTEP.to_vec()).mtu(1430).up().build()).await;
            index(handle, "vx0").await
        }
    };
    for v6 in BOTH {
        let n = Net::of(v6);
        let gateway: IpAddr = if v6 { "fd00:7::fe" } else { "192.168.7.254" }.parse().expect("an address");
        for on_link in [gateway, n.outside] {
            neighbour(handle, uplink, on_link, ROUTER).await;
        }
        for far in [n.internet, n.router] {
            route(handle, far, gateway, uplink).await;
        }
        if overlay == 0 {
            route(handle, n.far, gateway, uplink).await;
        } else {
            address(handle, overlay, n.overlay, if v6 { 128 } else { 32 }).await;
            let end: IpAddr = if v6 { "fd00:42:0:1::" } else { "10.42.1.0" }.parse().expect("an address");
            neighbour(handle, overlay, end, PEER).await;
            route(handle, n.far, end, overlay).await;
        }
    }
    Devices { uplink, overlay }
}

async fn index(handle: &Handle, name: &str) -> u32 {
    use futures::TryStreamExt as _;
    let found = handle.link().get().match_name(name).execute().try_next().await;
    found.expect("look a device up").expect("the device").header.index
}

async fn address(handle: &Handle, device: u32, ip: IpAddr, prefix: u8) {
    let mut request = handle.address().add(device, ip, prefix);
    if ip.is_ipv6() {
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
    }
    request.execute().await.expect("add an address");
}

async fn neighbour(handle: &Handle, device: u32, ip: IpAddr, mac: [u8; 6]) {
    handle.neighbours().add(device, ip).link_layer_address(&mac).execute().await.expect("add a neighbour");
}

async fn route(handle: &Handle, to: IpAddr, via: IpAddr, device: u32) {
    let prefix = if to.is_ipv6() { 128 } else { 32 };
    let route = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(to, prefix)
        .and_then(|route| route.gateway(via))
        .expect("one family")
        .output_interface(device)
        .onlink();
    handle.route().add(route.build()).execute().await.expect("add a route");
}
