//! Links, addresses, routes and neighbours of a namespace, over netlink.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use futures::TryStreamExt;
use rtnetlink::packet_route::address::AddressHeaderFlags;
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkMessage};
use rtnetlink::packet_route::neighbour::NeighbourFlags;
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkUnspec, LinkVeth, LinkVxlan, RouteMessageBuilder};

use super::netns;

/// A netlink connection into one namespace.
pub(crate) struct Net {
    handle: Handle,
    at: String,
}

/// Runs `f` on a thread with a runtime of its own: labs are built from tests that may have a runtime already.
pub(crate) fn block_on<T: Send>(f: impl AsyncFnOnce() -> Result<T> + Send) -> Result<T> {
    netns::on_thread(|| {
        tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async { f().await })
    })
}

impl Net {
    /// Connects to the namespace at `path`. Leaves the calling thread inside: only under [`block_on`].
    pub(crate) fn open(path: &Path) -> Result<Self> {
        netns::enter(path)?;
        let (connection, handle, _) = rtnetlink::new_connection().context("opening a netlink socket")?;
        tokio::spawn(connection);
        Ok(Self { handle, at: path.display().to_string() })
    }

    /// Index of a device.
    pub(crate) async fn index(&self, dev: &str) -> Result<u32> {
        let mut links = self.handle.link().get().match_name(dev).execute();
        let link = links.try_next().await.with_context(|| format!("looking up {dev} in {}", self.at))?;
        Ok(link.ok_or_else(|| anyhow!("no device {dev} in {}", self.at))?.header.index)
    }

    async fn add(&self, what: &str, link: LinkMessage) -> Result<u32> {
        let request = self.handle.link().add(link).execute().await;
        request.with_context(|| format!("creating {what} in {}", self.at))?;
        self.index(what).await
    }

    /// Brings a device up.
    pub(crate) async fn up(&self, dev: &str) -> Result<()> {
        let message = LinkUnspec::new_with_name(dev).up().build();
        self.handle.link().set(message).execute().await.with_context(|| format!("{dev} up in {}", self.at))
    }

    /// A bridge, up. The hardware address is fixed: left to itself it follows the ports as they come and go.
    pub(crate) async fn bridge(&self, name: &str, mac: [u8; 6], mtu: u32) -> Result<u32> {
        self.add(name, LinkBridge::new(name).address(mac.to_vec()).mtu(mtu).up().build()).await
    }

    /// A pair of devices: `name` here (up, a port of bridge `master` if given), `peer` in the namespace at
    /// `peer_ns` (still down: the kernel refuses to bring it up before it has its other half).
    pub(crate) async fn veth(
        &self,
        name: &str,
        master: Option<u32>,
        peer_ns: &Path,
        peer: &str,
        mtu: u32,
    ) -> Result<u32> {
        let ns = File::open(peer_ns).with_context(|| format!("opening {}", peer_ns.display()))?;
        let other = LinkUnspec::new_with_name(peer).setns_by_fd(ns.as_raw_fd()).mtu(mtu).build();
        let mut link =
            LinkVeth::new(name, peer).set_info_data(InfoData::Veth(InfoVeth::Peer(other))).mtu(mtu).up();
        if let Some(bridge) = master {
            link = link.controller(bridge);
        }
        self.add(name, link.build()).await
    }

    /// Lets a bridge port send frames back where they came from, as CNI's `hairpinMode` does.
    pub(crate) async fn hairpin(&self, port: u32) -> Result<()> {
        let message = LinkBridgePort::new(port).hairpin(true).build();
        self.handle.link().set_port(message).execute().await.context("setting hairpin mode")
    }

    /// A vxlan device as flannel makes it, up.
    pub(crate) async fn vxlan(
        &self,
        name: &str,
        dev: u32,
        local: IpAddr,
        mac: [u8; 6],
        mtu: u32,
    ) -> Result<u32> {
        let link = LinkVxlan::new(name, 1).dev(dev).port(8472).learning(false);
        let link = match local {
            IpAddr::V4(a) => link.local(a),
            IpAddr::V6(a) => link.local6(a),
        };
        self.add(name, link.address(mac.to_vec()).mtu(mtu).up().build()).await
    }

    /// An address, usable at once.
    pub(crate) async fn addr(&self, dev: u32, addr: impl Into<IpAddr>, prefix: u8) -> Result<()> {
        let addr = addr.into();
        let mut request = self.handle.address().add(dev, addr, prefix);
        if addr.is_ipv6() {
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        request.execute().await.with_context(|| format!("adding address {addr}/{prefix} in {}", self.at))
    }

    /// A route by way of a gateway; `onlink`: the gateway is taken to be on that device.
    pub(crate) async fn route(
        &self,
        to: impl Into<IpAddr>,
        prefix: u8,
        via: impl Into<IpAddr>,
        onlink: Option<u32>,
    ) -> Result<()> {
        let (to, via) = (to.into(), via.into());
        let mut route = RouteMessageBuilder::<IpAddr>::new().destination_prefix(to, prefix)?.gateway(via)?;
        if let Some(dev) = onlink {
            route = route.output_interface(dev).onlink();
        }
        let request = self.handle.route().add(route.build()).execute().await;
        request.with_context(|| format!("adding route {to}/{prefix} via {via} in {}", self.at))
    }

    /// A default route for the family of `via`.
    pub(crate) async fn default_route(&self, via: impl Into<IpAddr>) -> Result<()> {
        let via = via.into();
        let any: IpAddr = match via {
            IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
        };
        self.route(any, 0, via, None).await
    }

    /// What flannel writes for another node: a permanent neighbour for its overlay address, and the node's own
    /// address behind that hardware address.
    pub(crate) async fn overlay_peer(
        &self,
        dev: u32,
        overlay: IpAddr,
        mac: [u8; 6],
        node: IpAddr,
    ) -> Result<()> {
        let neighbours = self.handle.neighbours();
        neighbours
            .add(dev, overlay)
            .link_layer_address(&mac)
            .execute()
            .await
            .context("adding a neighbour")?;
        let fdb = neighbours.add_bridge(dev, &mac).destination(node).flags(NeighbourFlags::Own);
        fdb.execute().await.context("adding a forwarding entry")
    }

    /// Deletes a device.
    pub(crate) async fn delete(&self, dev: &str) -> Result<()> {
        let index = self.index(dev).await?;
        self.handle
            .link()
            .del(index)
            .execute()
            .await
            .with_context(|| format!("deleting {dev} in {}", self.at))
    }
}
