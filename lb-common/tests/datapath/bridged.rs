//! Which packets a bridge may carry on.

use crate::support::build::{self, ACK, L4, SYN};
use crate::support::cluster::{CLIENT, Net, UPLINK, cluster, serve, sock};
use crate::support::frame::Frame;
use crate::support::world::{Action, Fam, Hook, World};
use lb_common::addr::{Ip4, Ip6};
use lb_common::maps::{Device, Flow};
use std::net::{IpAddr, SocketAddr};

fn goes(world: &World, device: u32, src: SocketAddr, dst: SocketAddr, l4: L4) -> Action {
    world.run(device, Hook::Ingress, &mut Frame::new(build::packet(src, dst, l4, b"")))
}

fn bridged<A: Fam>(v6: bool) {
    let n = Net::of(v6);
    let at = |ip: IpAddr| sock(ip, 8080);
    let vip = sock(n.vip, 80);
    let mut port = 4000;
    let mut check =
        |device: u32, flags: u32, client: IpAddr, backend: IpAddr, local: bool, expected: bool| {
            let mut world = cluster();
            world.devices.get_mut(&device).expect("a device").flags |= flags;
            serve(&mut world, 6, vip, &[(at(backend), local)]);
            port += 1;
            for l4 in [L4::Tcp(SYN), L4::Tcp(ACK)] {
                let action = goes(&world, device, sock(client, port), vip, l4);
                let expected = if expected { Action::Bridge } else { Action::Pass };
                assert_eq!(action, expected, "{client} → {backend} by {device}, {flags}, {l4:?}");
            }
            let marked = A::of(&world).flows().values().any(|flow| flow.flags & Flow::<A>::BRIDGED != 0);
            assert_eq!(marked, expected);
        };
    let (ours, others) =
        if v6 { (Device::BRIDGED6, Device::BRIDGED4) } else { (Device::BRIDGED4, Device::BRIDGED6) };
    check(CLIENT, ours, n.pod, n.near, true, true);
    check(CLIENT, 0, n.pod, n.near, true, false);
    check(CLIENT, others, n.pod, n.near, true, false);
    check(CLIENT, ours, n.pod, n.far, false, false);
    // Its own packets have to come back by the gateway's address.
    check(CLIENT, ours, n.pod, n.pod, true, false);
    check(UPLINK, 0, n.outside, n.near, true, false);
}

#[test]
fn only_what_the_agent_says() {
    bridged::<Ip4>(false);
    bridged::<Ip6>(true);
}
