//! The pinned maps, typed. The writer and the inspector use the same ones.

use super::pins::Pins;
use super::presence::Marks;
use super::served::{Masquerading, Served};
use super::syscall;
use anyhow::{Context as _, Result};
use aya::Pod;
use aya::maps::lpm_trie::LpmTrie;
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray};
use lb_common::addr::{Ip4, Ip6, NetPort};
use lb_common::datapath::Reason;
use lb_common::maps::{
    Addr, Affinity, AffinityKey, Device, Flow, FlowKey, Frontend, FrontendKey, Overlay, Range, ServiceName,
    Slot, SlotGroup, SlotGroupKey, SlotKey, SourceKey,
};
use std::hash::Hash;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;

/// The tables of one family.
pub struct Family<A: NodeAddr> {
    /// What the programs remember of flows.
    pub flows: HashMap<MapData, FlowKey<A>, Flow<A>>,
    /// The same map again: aya's typed maps do not show theirs.
    flow_map: MapData,
    /// Of both families' flows.
    marks: Marks,
    /// What is served; to be entered by [`Family::serve`].
    pub frontends: HashMap<MapData, FrontendKey<A>, Frontend>,
    /// The same map again, as for the flows.
    frontend_map: MapData,
    /// Of the frontends' addresses.
    pub(super) served: Served,
    /// The backends of each set, see [`Family::slot`].
    pub slots: HashMap<MapData, SlotGroupKey, SlotGroup<A>>,
    /// Address ranges, bits of [`lb_common::maps::cidr`].
    pub cidrs: LpmTrie<MapData, A, u32>,
    /// Clients that load balancer addresses admit.
    pub sources: LpmTrie<MapData, SourceKey<A>, u32>,
    /// The range of all ClusterIPs.
    pub cluster_ips: Array<MapData, Range<A>>,
}

/// All tables.
pub struct Tables {
    /// IPv4.
    pub v4: Family<Ip4>,
    /// IPv6.
    pub v6: Family<Ip6>,
    /// What clients were sent to last (`sessionAffinity: ClientIP`).
    pub affinity: HashMap<MapData, AffinityKey, Affinity>,
    /// The same map again, as for the flows.
    affinity_map: MapData,
    /// Epochs of UDP backends.
    pub epochs: Array<MapData, u32>,
    /// Devices by index.
    pub devices: HashMap<MapData, u32, Device>,
    /// Ports not to masquerade to, a bit each.
    pub ports: Array<MapData, u64>,
    /// Counters by [`Reason`].
    pub counters: PerCpuArray<MapData, u64>,
    /// Names of Service ports by id.
    pub names: HashMap<MapData, u32, ServiceName>,
    /// See [`super::sockets::learn_netns`].
    pub netns: Array<MapData, u64>,
    /// One of [`lb_common::maps::stance`].
    pub stance: Array<MapData, u32>,
}

impl Tables {
    /// Opens the pinned maps.
    ///
    /// # Errors
    /// If they are not there (no agent ran yet) or not readable.
    pub fn open(pins: &Pins) -> Result<Self> {
        Ok(Self {
            v4: Family::open(pins, '4')?,
            v6: Family::open(pins, '6')?,
            affinity: hash(pins, "LB_AFFINITY")?,
            affinity_map: open(pins, "LB_AFFINITY")?,
            epochs: array(pins, "LB_EPOCH")?,
            devices: hash(pins, "LB_DEVICE")?,
            ports: array(pins, "LB_PORTS")?,
            counters: PerCpuArray::try_from(Map::PerCpuArray(open(pins, "LB_COUNT")?))?,
            names: hash(pins, "LB_NAME")?,
            netns: array(pins, "LB_NETNS")?,
            stance: array(pins, "LB_STANCE")?,
        })
    }

    /// Has the programs find all frontends that are there, however they came there, and need not look for others.
    ///
    /// # Errors
    /// If the maps cannot be read or written.
    pub fn renew_served(&mut self) -> Result<()> {
        self.v4.renew_served()?;
        self.v6.renew_served()
    }

    /// Before programs come that go by what is said beside the tables: says it of all that is in them.
    ///
    /// # Errors
    /// If the maps cannot be read or written.
    pub fn complete(&mut self, pins: &Pins) -> Result<()> {
        self.renew_served()?;
        let mut masquerading = Masquerading::open(pins)?;
        let devices: Vec<_> =
            self.devices.iter().collect::<Result<_, _>>().context("read the device table")?;
        devices.into_iter().try_for_each(|(index, device)| masquerading.add(index, &device))
    }

    /// A counter, summed up over all CPUs.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn counter(&self, reason: Reason) -> Result<u64> {
        let values = self.counters.get(&(reason as u32), 0).context("read the counters")?;
        Ok(values.iter().sum())
    }
}

impl Tables {
    /// Calls `each` with every affinity.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn for_each_affinity(&self, mut each: impl FnMut(&AffinityKey, &Affinity)) -> Result<()> {
        let each = |key: &AffinityKey, value: &Affinity| {
            each(key, value);
            Ok(())
        };
        syscall::for_each(self.affinity_map.fd().as_fd(), each).context("read the affinities")
    }
}

impl<A: NodeAddr> Family<A> {
    fn open(pins: &Pins, suffix: char) -> Result<Self> {
        let name = |table: &str| format!("{table}{suffix}");
        Ok(Self {
            flows: hash(pins, &name("LB_FLOW"))?,
            flow_map: open(pins, &name("LB_FLOW"))?,
            marks: Marks::open(pins)?,
            frontends: hash(pins, &name("LB_FRONT"))?,
            frontend_map: open(pins, &name("LB_FRONT"))?,
            served: Served::new(pins, name("LB_SERVED")),
            slots: hash(pins, &name("LB_SLOT"))?,
            cidrs: LpmTrie::try_from(Map::LpmTrie(open(pins, &name("LB_CIDR"))?))?,
            sources: LpmTrie::try_from(Map::LpmTrie(open(pins, &name("LB_SOURCE"))?))?,
            cluster_ips: array(pins, &name("LB_RANGE"))?,
        })
    }
}

impl<A: NodeAddr> Family<A> {
    /// Enters a flow entry, so that the programs find it. `flags` are those of `bpf_map_update_elem`.
    ///
    /// # Errors
    /// If it is not taken.
    pub fn enter(&mut self, key: FlowKey<A>, flow: Flow<A>, flags: u64) -> Result<()> {
        self.marks.mark(&key)?;
        Ok(self.flows.insert(key, flow, flags)?)
    }

    /// Enters a frontend, so that the programs find it. Only one of a map's tables may be used for that.
    ///
    /// # Errors
    /// If it is not taken.
    pub fn serve(&mut self, key: FrontendKey<A>, frontend: Frontend) -> Result<()> {
        self.served.add(key.addr)?;
        Ok(self.frontends.insert(key, frontend, 0)?)
    }

    /// See [`Tables::renew_served`].
    ///
    /// # Errors
    /// If the maps cannot be read or written.
    pub fn renew_served(&mut self) -> Result<()> {
        let frontends = self.all_frontends()?;
        self.served.renew(frontends.iter().map(|(key, _)| key.addr))
    }

    /// What is served.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn all_frontends(&self) -> Result<Vec<(FrontendKey<A>, Frontend)>> {
        let mut all = Vec::new();
        syscall::for_each(self.frontend_map.fd().as_fd(), |key: &FrontendKey<A>, frontend: &Frontend| {
            all.push((*key, *frontend));
            Ok(())
        })
        .context("read the frontends")?;
        Ok(all)
    }

    /// Calls `each` with every flow entry.
    ///
    /// # Errors
    /// If the map cannot be read, or `each` fails.
    pub fn for_each_flow(&self, each: impl FnMut(&FlowKey<A>, &Flow<A>) -> io::Result<()>) -> Result<()> {
        syscall::for_each(self.flow_map.fd().as_fd(), each).context("read the flow table")
    }

    /// A backend of a set.
    ///
    /// # Errors
    /// If it is not there, or the map cannot be read.
    pub fn slot(&self, key: &SlotKey) -> Result<Slot<A>, MapError> {
        let (group, place) = key.group();
        Ok(self.slots.get(&group, 0)?.slots[place])
    }
}

/// Where the programs find what carries overlays' packets.
///
/// # Errors
/// If it is not there.
pub fn overlay(pins: &Pins) -> Result<Array<MapData, Overlay>> {
    array(pins, "LB_OVERLAY")
}

/// A pinned array.
pub(super) fn array<V: Pod>(pins: &Pins, name: &str) -> Result<Array<MapData, V>> {
    Array::try_from(Map::Array(open(pins, name)?)).with_context(|| format!("the pinned map {name}"))
}

/// A pinned map, of which nothing is known.
pub(super) fn open(pins: &Pins, name: &str) -> Result<MapData> {
    let path = pins.map(name);
    MapData::from_pin(&path).with_context(|| format!("open the pinned map {}", path.display()))
}

fn hash<K: Pod, V: Pod>(pins: &Pins, name: &str) -> Result<HashMap<MapData, K, V>> {
    HashMap::try_from(Map::HashMap(open(pins, name)?)).with_context(|| format!("the pinned map {name}"))
}

/// What user space has to know of a family besides [`Addr`].
pub trait NodeAddr: Addr + Pod + Hash + Into<IpAddr> {
    /// The address, if it is of this family.
    fn from_ip(ip: IpAddr) -> Option<Self>;
    /// This family's tables.
    fn tables(tables: &mut Tables) -> &mut Family<Self>;
}

impl NodeAddr for Ip4 {
    fn from_ip(ip: IpAddr) -> Option<Self> {
        match ip {
            IpAddr::V4(ip) => Some(ip.into()),
            IpAddr::V6(_) => None,
        }
    }

    fn tables(tables: &mut Tables) -> &mut Family<Self> {
        &mut tables.v4
    }
}

impl NodeAddr for Ip6 {
    fn from_ip(ip: IpAddr) -> Option<Self> {
        match ip {
            IpAddr::V4(_) => None,
            IpAddr::V6(ip) => Some(ip.into()),
        }
    }

    fn tables(tables: &mut Tables) -> &mut Family<Self> {
        &mut tables.v6
    }
}

/// Address and port as people write them.
pub fn socket_addr<A: NodeAddr>(addr: A, port: NetPort) -> SocketAddr {
    SocketAddr::new(addr.into(), port.get())
}
