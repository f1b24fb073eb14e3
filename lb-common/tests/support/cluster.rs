//! A small cluster seen from one of its nodes, in both families.

use super::world::{Fam, World};
use lb_common::addr::{Ip4, Ip6};
use lb_common::maps::{Device, Frontend, Set, cidr};
use std::net::{IpAddr, SocketAddr};

/// Devices.
pub(crate) const CLIENT: u32 = 2;
pub(crate) const BACKEND: u32 = 3;
pub(crate) const UPLINK: u32 = 4;
pub(crate) const OVERLAY: u32 = 5;

/// Addresses of one family.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Net {
    pub(crate) pod: IpAddr,
    pub(crate) near: IpAddr,
    pub(crate) far: IpAddr,
    pub(crate) vip: IpAddr,
    pub(crate) node: IpAddr,
    pub(crate) overlay: IpAddr,
    pub(crate) gateway: IpAddr,
    pub(crate) outside: IpAddr,
    pub(crate) internet: IpAddr,
    pub(crate) router: IpAddr,
}

impl Net {
    pub(crate) fn of(v6: bool) -> Self {
        let at = |v4: &str, v6_: &str| if v6 { v6_ } else { v4 }.parse().expect("an address");
        Self {
            pod: at("10.42.0.5", "fd00:42::5"),
            near: at("10.42.0.6", "fd00:42::6"),
            far: at("10.42.1.7", "fd00:42:0:1::7"),
            vip: at("10.96.0.10", "fd00:96::a"),
            node: at("192.168.7.1", "fd00:7::1"),
            overlay: at("10.42.0.0", "fd00:42::"),
            gateway: at("10.42.0.1", "fd00:42::1"),
            outside: at("192.168.7.100", "fd00:7::64"),
            internet: at("203.0.113.5", "2001:db8::5"),
            router: at("198.51.100.1", "2001:db8:51::1"),
        }
    }
}

pub(crate) const BOTH: [bool; 2] = [false, true];

pub(crate) fn sock(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

/// Devices and address ranges; no Services.
pub(crate) fn cluster() -> World {
    let mut world = World::empty();
    let (v4, v6) = (Net::of(false), Net::of(true));
    let device = |flags, a: IpAddr, b: IpAddr| Device {
        flags,
        masq4: Ip4::from_ip(a),
        masq6: Ip6::from_ip(b),
        ..Device::default()
    };
    for pod in [CLIENT, BACKEND] {
        world.devices.insert(pod, device(Device::POD, v4.gateway, v6.gateway));
    }
    world.devices.insert(UPLINK, device(Device::MASQUERADE, v4.node, v6.node));
    world.devices.insert(OVERLAY, device(Device::MASQUERADE, v4.overlay, v6.overlay));
    let ip = |s: &str| -> IpAddr { s.parse().expect("an address") };
    world.v4.cidrs.push((Ip4::from_ip(ip("10.42.0.0")), 16, cidr::CLUSTER));
    world.v4.cidrs.push((Ip4::from_ip(ip("198.51.100.0")), 24, cidr::NO_MASQUERADE));
    world.v4.cidrs.push((Ip4::from_ip(ip("169.254.0.0")), 16, cidr::NO_MASQUERADE));
    world.v6.cidrs.push((Ip6::from_ip(ip("fe80::")), 10, cidr::NO_MASQUERADE));
    world.v6.cidrs.push((Ip6::from_ip(ip("fd00:42::")), 32, cidr::CLUSTER));
    world.v6.cidrs.push((Ip6::from_ip(ip("2001:db8:51::")), 48, cidr::NO_MASQUERADE));
    world
}

/// The same endpoints for everybody.
pub(crate) fn serve(world: &mut World, proto: u8, at: SocketAddr, backends: &[(SocketAddr, bool)]) {
    let set = backends_of(world, backends);
    world.frontend(proto, at, Frontend { internal: set, external: set, service: 1, ..Default::default() });
}

pub(crate) fn backends_of(world: &mut World, backends: &[(SocketAddr, bool)]) -> Set {
    let backends: Vec<_> = backends.iter().map(|(addr, local)| (*addr, *local, 0)).collect();
    world.set(&backends)
}
