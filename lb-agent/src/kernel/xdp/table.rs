//! What the XDP program has to know of devices, made up from what the kernel says of them.

use crate::kernel::sweep::monotonic_seconds;
use anyhow::{Context as _, Result};
use lb_attach::snapshot::Link;
use lb_attach::vxlan::Vxlan;
use lb_common::addr::{Ip6, Mac, NetPort};
use lb_common::maps::XdpDevice;
use std::fs;
use std::net::IpAddr;

/// An uplink with the program on it, and how packets can leave by it.
pub(super) struct Uplink<'a> {
    pub(super) link: &'a Link,
    pub(super) ways: u32,
}

/// The node's settings that packets show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Settings {
    /// Local ports, first and last.
    pub(super) ports: (u16, u16),
    pub(super) ttl: u8,
    /// Seconds of the monotonic clock.
    pub(super) now: u32,
}

impl Settings {
    pub(super) fn of_the_node() -> Result<Self> {
        let read = |name: &str| {
            let path = format!("/proc/sys/net/ipv4/{name}");
            fs::read_to_string(&path).with_context(|| format!("read {path}"))
        };
        let (ports, ttl) = (read("ip_local_port_range")?, read("ip_default_ttl")?);
        let mut ports = ports.split_whitespace().map(str::parse);
        let (Some(Ok(first)), Some(Ok(last))) = (ports.next(), ports.next()) else {
            anyhow::bail!("ip_local_port_range is not two ports");
        };
        let ttl = ttl.trim().parse().context("ip_default_ttl")?;
        Ok(Self { ports: (first, last), ttl, now: monotonic_seconds() })
    }
}

/// The entries of all devices, and what is to be said of those that have none.
pub(super) fn entries<'a>(
    uplinks: &[Uplink<'a>],
    overlays: &[&'a Link],
    settings: &Settings,
) -> (Vec<XdpDevice>, Vec<(&'a Link, String)>) {
    let (mut entries, mut troubles) = (Vec::new(), Vec::new());
    let mut put = |link: &'a Link, entry: XdpDevice, troubles: &mut Vec<(&'a Link, String)>| {
        let place = XdpDevice::place(entry.index);
        if entries.iter().any(|other: &XdpDevice| XdpDevice::place(other.index) == place) {
            let why =
                format!("off: its index, {}, has its place in the table taken by another's", entry.index);
            troubles.push((link, why));
            return false;
        }
        entries.push(entry);
        true
    };
    for Uplink { link, ways } in uplinks {
        let entry = XdpDevice { index: link.index, flags: *ways, mac: mac(link), ..XdpDevice::default() };
        put(link, entry, &mut troubles);
    }
    let mut used = Vec::new();
    // Without an uplink, nothing would look.
    for link in overlays.iter().filter(|_| !uplinks.is_empty()) {
        match overlay(link, settings) {
            Ok(entry) => {
                if put(link, entry, &mut troubles) {
                    used.push(entry);
                    troubles.push((link, "packets for it are wrapped, and its packets unwrapped".into()));
                }
            }
            Err(why) => troubles.push((link, format!("off: {why}"))),
        }
    }
    for entry in entries.iter_mut().filter(|entry| entry.flags & XdpDevice::OVERLAY == 0) {
        // One of each family. A second one's packets are for the kernel to tell apart.
        let arriving = |v4: bool| {
            let mut all = used.iter().filter(|overlay| is_v4(overlay.local) == v4);
            all.find(|overlay| overlay.link == 0 || overlay.link == entry.index)
                .map_or(0, |overlay| overlay.index)
        };
        (entry.overlay4, entry.overlay6) = (arriving(true), arriving(false));
    }
    (entries, troubles)
}

fn overlay(link: &Link, settings: &Settings) -> Result<XdpDevice, &'static str> {
    let Some(vxlan) = &link.vxlan else { return Err("not a vxlan device") };
    let Vxlan { vni, port, local, checksum, special, .. } = vxlan;
    let Some(local) = local else { return Err("a vxlan device without an address of its own (local)") };
    if *special {
        return Err("a vxlan device with settings that only the kernel can follow (learning, external, …)");
    }
    if !link.up {
        return Err("it is down");
    }
    let (first, ports) = match vxlan.source_ports {
        Some((first, end)) => (first, end.saturating_sub(first)),
        None => (settings.ports.0, settings.ports.1.saturating_sub(settings.ports.0)),
    };
    Ok(XdpDevice {
        index: link.index,
        flags: XdpDevice::OVERLAY | if *checksum { XdpDevice::CHECKSUM } else { 0 },
        mac: mac(link),
        port: NetPort::new(*port),
        vni: (vni << 8).to_be(),
        until: settings.now.wrapping_add(XdpDevice::FRESH),
        link: vxlan.link,
        first_port: first,
        ports: ports.max(1),
        local: mapped(*local),
        ttl: if vxlan.ttl == 0 { settings.ttl } else { vxlan.ttl },
        ..XdpDevice::default()
    })
}

fn mac(link: &Link) -> Mac {
    <[u8; 6]>::try_from(link.mac.as_slice()).map(Mac::from).unwrap_or_default()
}

/// An address of either family in the form of tables that both share.
pub(super) fn mapped(ip: IpAddr) -> Ip6 {
    match ip {
        IpAddr::V4(ip) => Ip6::mapped(ip.into()),
        IpAddr::V6(ip) => ip.into(),
    }
}

fn is_v4(ip: Ip6) -> bool {
    ip.unmapped().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: Settings = Settings { ports: (32768, 60999), ttl: 64, now: 1000 };

    fn eth(index: u32) -> Link {
        Link {
            index,
            name: format!("eth{index}"),
            mac: vec![2, 0, 0, 0, 0, index as u8],
            up: true,
            ..Link::default()
        }
    }

    fn flannel(index: u32, local: &str, link: u32) -> Link {
        let vxlan = Vxlan {
            vni: 1,
            port: 8472,
            source_ports: None,
            local: local.parse().ok(),
            link,
            ttl: 0,
            checksum: true,
            special: false,
        };
        Link { kind: Some("vxlan".into()), vxlan: Some(vxlan), ..eth(index) }
    }

    fn of(uplinks: &[Link], overlays: &[Link]) -> (Vec<XdpDevice>, Vec<(u32, String)>) {
        let uplinks: Vec<_> = uplinks.iter().map(|link| Uplink { link, ways: XdpDevice::TX }).collect();
        let (entries, troubles) = entries(&uplinks, &overlays.iter().collect::<Vec<_>>(), &SETTINGS);
        let troubles = troubles.into_iter().filter(|(_, what)| what.starts_with("off"));
        (entries, troubles.map(|(link, what)| (link.index, what)).collect())
    }

    #[test]
    fn one_uplink_and_flannels_two_overlays() {
        let overlays = [flannel(3, "192.168.7.1", 2), flannel(4, "fd00::1", 2)];
        let (entries, troubles) = of(&[eth(2)], &overlays);
        assert_eq!(troubles, []);
        let uplink = XdpDevice {
            index: 2,
            flags: XdpDevice::TX,
            mac: [2, 0, 0, 0, 0, 2].into(),
            overlay4: 3,
            overlay6: 4,
            ..Default::default()
        };
        let over_v4 = XdpDevice {
            index: 3,
            flags: XdpDevice::OVERLAY | XdpDevice::CHECKSUM,
            mac: [2, 0, 0, 0, 0, 3].into(),
            port: NetPort::new(8472),
            vni: 0x100u32.to_be(),
            until: 1120,
            link: 2,
            first_port: 32768,
            ports: 28231,
            local: mapped([192, 168, 7, 1].into()),
            ttl: 64,
            ..Default::default()
        };
        let local = mapped("fd00::1".parse().expect("an address"));
        let over_v6 = XdpDevice { index: 4, mac: [2, 0, 0, 0, 0, 4].into(), local, ..over_v4 };
        assert_eq!(entries, [uplink, over_v4, over_v6]);
    }

    #[test]
    fn what_has_no_entry_and_why() {
        let mut learns = flannel(4, "192.168.7.1", 2);
        learns.vxlan.as_mut().expect("a vxlan device").special = true;
        let down = Link { up: false, ..flannel(5, "192.168.7.1", 2) };
        let geneve = Link { kind: Some("geneve".into()), ..eth(6) };
        let unbound = flannel(7, "nobody", 2);
        let second = flannel(2 + XdpDevice::PLACES, "192.168.7.1", 2);
        let (entries, troubles) = of(&[eth(2)], &[learns, down, geneve, unbound, second]);
        assert_eq!(entries.iter().map(|entry| entry.index).collect::<Vec<_>>(), [2]);
        let words = ["settings", "down", "not a vxlan", "local", "taken"];
        let indexes = [4, 5, 6, 7, 2 + XdpDevice::PLACES];
        assert_eq!(troubles.len(), words.len());
        for ((index, what), (expected, word)) in troubles.iter().zip(indexes.iter().zip(words)) {
            assert!(index == expected && what.contains(word), "{index} {what}");
        }
        assert_eq!(of(&[], &[flannel(3, "192.168.7.1", 0)]), (vec![], vec![]));
    }

    #[test]
    fn overlays_come_in_where_they_may() {
        let (entries, _) = of(&[eth(2), eth(8)], &[flannel(3, "192.168.7.1", 8), flannel(4, "fd00::1", 0)]);
        let arriving: Vec<_> = entries.iter().map(|entry| (entry.overlay4, entry.overlay6)).collect();
        assert_eq!(arriving, [(0, 4), (3, 4), (0, 0), (0, 0)]);
    }
}
