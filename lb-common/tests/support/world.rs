//! The maps and helpers, in memory.

use super::frame::Frame;
use lb_common::addr::{Ip4, Ip6, NetPort};
use lb_common::datapath::{
    self, Apart, Context, FlowRef, Flows, Kernel, Packet, Put, PutError, Reason, Tables, Taken, Verdict,
    Wire, apart,
};
use lb_common::maps::{
    Addr, Affinity, AffinityKey, Device, Flow, FlowKey, Fragment, FragmentKey, Frontend, FrontendKey, Held,
    Overlay, Range, Set, Slot, SlotGroup, SlotGroupKey, SlotKey, stance,
};
use std::cell::{Cell, RefCell, UnsafeCell};
use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::ptr::NonNull;

/// Which program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hook {
    Ingress,
    Egress,
}

/// What a program returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// `TC_ACT_UNSPEC`
    Pass,
    /// The same, once the bridge has been asked.
    Bridge,
    /// `TC_ACT_SHOT`
    Drop,
    /// `TC_ACT_REDIRECT`, back to where it came from.
    Reply,
    /// `TC_ACT_REDIRECT`, to the peer of that device.
    Redirect(u32),
    /// `TC_ACT_REDIRECT`, out by that device.
    Route(u32),
}

/// What generic tests have to know of a family.
pub(crate) trait Fam: Wire + Hash + Into<IpAddr> {
    fn from_ip(ip: IpAddr) -> Self;
    fn of(world: &World) -> &Family<Self>;
    fn of_mut(world: &mut World) -> &mut Family<Self>;
}

/// A flow entry: it stays where it is while the table grows, and programs write to it in place.
type Entry<A> = Box<UnsafeCell<Flow<A>>>;

/// One family's tables.
#[derive(Default)]
pub(crate) struct Family<A: 'static> {
    flows: RefCell<HashMap<FlowKey<A>, Entry<A>>>,
    /// How many entries there are of each mark.
    marks: RefCell<HashMap<u32, usize>>,
    /// Entries that were removed while a program runs: RCU keeps them readable.
    removed: RefCell<Vec<Entry<A>>>,
    pub(crate) frontends: HashMap<FrontendKey<A>, Frontend>,
    pub(crate) slots: HashMap<SlotGroupKey, SlotGroup<A>>,
    pub(crate) cidrs: Vec<(A, u8, u32)>,
    /// Tuples that a socket of the node would take.
    pub(crate) sockets: HashSet<FlowKey<A>>,
    /// Connections of sockets in other network namespaces, as their peers send.
    pub(crate) connections: HashSet<(u32, FlowKey<A>)>,
    /// `loadBalancerSourceRanges`: Service, address, prefix length.
    pub(crate) sources: Vec<(u32, A, u8)>,
    pub(crate) cluster_ips: Range<A>,

    /// New flows, one after the other.
    begun: RefCell<Vec<&'static FlowKey<A>>>,
    fragments: RefCell<HashMap<FragmentKey<A>, &'static Fragment>>,
    draft: Entry<A>,
}

impl<A: Fam> Family<A> {
    /// All flow entries.
    pub(crate) fn flows(&self) -> HashMap<FlowKey<A>, Flow<A>> {
        // SAFETY: one thread, and no program runs.
        self.flows.borrow().iter().map(|(key, flow)| (*key, unsafe { *flow.get() })).collect()
    }

    /// Enters a flow entry as user space does.
    pub(crate) fn enter(&self, key: FlowKey<A>, flow: Flow<A>) {
        let old = self.flows.borrow_mut().insert(key, Box::new(UnsafeCell::new(flow)));
        if old.is_none() {
            *self.marks.borrow_mut().entry(key.mark()).or_default() += 1;
        }
        self.removed.borrow_mut().extend(old);
    }

    /// Takes one flow entry away.
    pub(crate) fn lose(&self, key: &FlowKey<A>) {
        let entry = self.flows.borrow_mut().remove(key);
        if entry.is_some() {
            *self.marks.borrow_mut().entry(key.mark()).or_default() -= 1;
        }
        self.removed.borrow_mut().extend(entry);
    }

    /// Whether any entry has that mark, or another of its flow: what a sweep keeps.
    fn is_marked(&self, mark: u32) -> bool {
        let marks = |flow: &Flow<A>| {
            flow.is_ours() && flow.entries().iter().flatten().any(|other| other.mark() == mark)
        };
        self.marks.borrow().get(&mark).is_some_and(|entries| *entries > 0) || self.flows().values().any(marks)
    }
}

/// Everything around a packet.
pub(crate) struct World {
    pub(crate) v4: Family<Ip4>,
    pub(crate) v6: Family<Ip6>,
    pub(crate) devices: HashMap<u32, Device>,
    pub(crate) epochs: HashMap<u32, u32>,
    pub(crate) reserved: HashSet<u16>,
    pub(crate) ports: (u16, u16),
    pub(crate) seed: u32,
    /// Whether packets may be redirected.
    pub(crate) redirects: bool,
    /// Where the present packet is to go.
    redirect: Cell<u32>,
    /// Which device the kernel routes to an address by.
    pub(crate) routes: HashMap<IpAddr, u32>,
    pub(crate) now: Cell<u32>,
    pub(crate) stance: Cell<u32>,
    pub(crate) overlay: Overlay,
    /// Packets that were left to whoever comes next.
    pub(crate) left: Cell<usize>,
    /// Another version's programs, which come next.
    pub(crate) behind: Option<Box<World>>,
    pub(crate) capacity: usize,
    pub(crate) affinity_capacity: usize,
    affinities: RefCell<HashMap<AffinityKey, &'static Affinity>>,
    taken: RefCell<HashMap<u32, u32>>,
    /// How many new flows are remembered.
    pub(crate) remembered: Cell<usize>,
    /// Packets that wait: number, the one before, the frame.
    held: RefCell<Vec<(u32, Vec<u8>)>>,
    /// Packets that were let go: whether in, and the frame.
    pub(crate) released: RefCell<Vec<(bool, Vec<u8>)>>,
    ifindex: Cell<u32>,
    /// The index that programs are told of every device, where the kernel's do not know theirs.
    pub(crate) known_as: Option<u32>,
    counts: RefCell<[u64; Reason::ALL.len()]>,
    sets: u32,
}

impl World {
    pub(crate) fn empty() -> Self {
        Self {
            v4: Family::default(),
            v6: Family::default(),
            devices: HashMap::new(),
            epochs: HashMap::new(),
            reserved: HashSet::new(),
            ports: (10_000, 29_999),
            seed: 0x5eed,
            redirects: false,
            redirect: Cell::new(0),
            routes: HashMap::new(),
            now: Cell::new(100),
            stance: Cell::new(stance::SERVE),
            overlay: Overlay::default(),
            left: Cell::new(0),
            behind: None,
            capacity: usize::MAX,
            affinity_capacity: usize::MAX,
            affinities: RefCell::default(),
            taken: RefCell::default(),
            remembered: Cell::new(2048),
            held: RefCell::default(),
            released: RefCell::default(),
            ifindex: Cell::new(0),
            known_as: None,
            counts: RefCell::default(),
            sets: 0,
        }
    }

    pub(crate) fn counter(&self, reason: Reason) -> u64 {
        self.counts.borrow()[reason as usize]
    }

    /// A set of slots; a backend's number is its UDP liveness entry, zero for none.
    pub(crate) fn set(&mut self, backends: &[(SocketAddr, bool, u32)]) -> Set {
        self.sets += 1;
        let set = Set { id: self.sets, count: backends.len() as u32 };
        for (index, (addr, local, backend_id)) in (0..).zip(backends) {
            let epoch = self.epochs.get(backend_id).copied().unwrap_or(0);
            match addr.ip() {
                IpAddr::V4(_) => self.slot::<Ip4>(set.id, index, *addr, *local, *backend_id, epoch),
                IpAddr::V6(_) => self.slot::<Ip6>(set.id, index, *addr, *local, *backend_id, epoch),
            }
        }
        set
    }

    fn slot<A: Fam>(
        &mut self,
        set: u32,
        index: u32,
        addr: SocketAddr,
        local: bool,
        backend_id: u32,
        epoch: u32,
    ) {
        let slot = Slot {
            addr: A::from_ip(addr.ip()),
            port: NetPort::new(addr.port()),
            flags: if local { Slot::<A>::LOCAL } else { 0 },
            backend_id,
            backend_epoch: epoch,
            pad: 0,
        };
        let (group, place) = SlotKey { set, index }.group();
        A::of_mut(self).slots.entry(group).or_default().slots[place] = slot;
    }

    pub(crate) fn frontend(&mut self, proto: u8, at: SocketAddr, value: Frontend) {
        match at.ip() {
            IpAddr::V4(_) => {
                self.v4.frontends.insert(front_key(proto, at), value);
            }
            IpAddr::V6(_) => {
                self.v6.frontends.insert(front_key(proto, at), value);
            }
        }
    }

    /// Runs a program on a packet, as lb-ebpf's glue does.
    pub(crate) fn run(&self, device: u32, hook: Hook, frame: &mut Frame) -> Action {
        self.ifindex.set(device);
        let Some(ethertype) = frame.bytes.get(12..14).map(|b| u16::from_ne_bytes([b[0], b[1]])) else {
            return Action::Pass;
        };
        let action = if ethertype == Ip4::ETHERTYPE {
            self.family::<Ip4>(hook, frame)
        } else if ethertype == Ip6::ETHERTYPE {
            self.family::<Ip6>(hook, frame)
        } else {
            Action::Pass
        };
        self.v4.removed.borrow_mut().clear();
        self.v6.removed.borrow_mut().clear();
        action
    }

    fn redirected<A: Fam>(&self, frame: &mut Frame) -> Action {
        match self.redirect.get() {
            datapath::ROUTED => match datapath::route::<A, _, _>(frame, self) {
                Ok(0) => Action::Pass,
                Ok(device) => Action::Route(device),
                Err(_) => Action::Drop,
            },
            device if datapath::admitted(self, device) => Action::Redirect(device),
            _ => Action::Pass,
        }
    }

    fn family<A: Fam>(&self, hook: Hook, frame: &mut Frame) -> Action
    where
        Self: Tables<A>,
    {
        self.redirect.set(0);
        let verdict = match hook {
            Hook::Ingress => datapath::ingress::<A, _, _>(frame, self),
            Hook::Egress => datapath::egress::<A, _, _>(frame, self),
        };
        match verdict {
            Verdict::Pass | Verdict::Bridge if self.redirect.get() != 0 => self.redirected::<A>(frame),
            Verdict::Pass => Action::Pass,
            Verdict::Leave => {
                self.left.set(self.left.get() + 1);
                self.behind
                    .as_ref()
                    .map_or(Action::Pass, |behind| behind.run(self.ifindex.get(), hook, frame))
            }
            Verdict::Bridge => Action::Bridge,
            Verdict::Drop(reason) => {
                self.count(reason);
                Action::Drop
            }
            Verdict::Reject(reason) => {
                self.count(reason);
                match datapath::reject::<A, _>(frame) {
                    Ok(()) => Action::Reply,
                    Err(reason) => {
                        self.count(reason);
                        Action::Drop
                    }
                }
            }
        }
    }
}

pub(crate) fn front_key<A: Fam>(proto: u8, at: SocketAddr) -> FrontendKey<A> {
    FrontendKey::new(A::from_ip(at.ip()), NetPort::new(at.port()), proto)
}

impl Context for World {
    fn now(&self) -> u32 {
        self.now.get()
    }

    fn count(&self, reason: Reason) {
        self.counts.borrow_mut()[reason as usize] += 1;
    }

    fn backend_epoch(&self, id: u32) -> u32 {
        self.epochs.get(&id).copied().unwrap_or(0)
    }
}

impl Kernel for World {
    fn stance(&self) -> u32 {
        self.stance.get()
    }

    fn overlay(&self) -> Option<&Overlay> {
        Some(&self.overlay)
    }

    fn hash_seed(&self) -> u32 {
        self.seed
    }

    fn masquerade_ports(&self) -> (u16, u16) {
        self.ports
    }

    fn device(&self) -> Option<&Device> {
        self.devices.get(&self.ifindex.get())
    }

    fn may_masquerade(&self) -> bool {
        // The least that programs may be told.
        self.device().is_some_and(|device| device.flags & Device::MASQUERADE != 0)
    }

    fn device_index(&self) -> u32 {
        self.known_as.unwrap_or(self.ifindex.get())
    }

    fn device_at(&self, index: u32) -> Option<&Device> {
        self.devices.get(&index)
    }

    fn redirects(&self) -> bool {
        self.redirects
    }

    fn redirect(&self, to: u32) {
        self.redirect.set(to);
    }

    fn port_reserved(&self, port: u16) -> bool {
        self.reserved.contains(&port)
    }

    fn note_taken(&self, taken: Taken) {
        self.taken.borrow_mut().insert(taken.place, taken.tag);
    }

    fn was_taken(&self, taken: Taken) -> bool {
        self.taken.borrow().get(&taken.place) == Some(&taken.tag)
    }

    fn affinity(&self, key: &AffinityKey) -> Option<&Affinity> {
        self.affinities.borrow().get(key).copied()
    }

    fn hold<P: Packet>(&self, packet: &mut P, previous: u32) -> Option<u32> {
        let frame: Vec<u8> = (0..).map_while(|at| packet.load(at)).collect();
        if frame.len() > Held::MAX {
            return None;
        }
        let mut held = self.held.borrow_mut();
        held.push((previous, frame));
        u32::try_from(held.len()).ok()
    }

    fn release<P: Packet>(&self, _: &mut P, last: u32, incoming: bool) {
        let mut id = last;
        while id != 0 {
            let (previous, frame) = self.held.borrow_mut()[id as usize - 1].clone();
            self.released.borrow_mut().push((incoming, frame));
            id = previous;
        }
    }

    fn put_affinity(&self, key: &AffinityKey, affinity: &Affinity) -> bool {
        let mut all = self.affinities.borrow_mut();
        if all.len() >= self.affinity_capacity && !all.contains_key(key) {
            return false;
        }
        // A reader may hold the old one; a test's few can be leaked.
        all.insert(*key, Box::leak(Box::new(*affinity)));
        true
    }
}

impl<A: Fam> Flows<A> for World {
    fn flow(&self, key: &FlowKey<A>) -> Option<FlowRef<'_, A>> {
        let flows = A::of(self).flows.borrow();
        let at = NonNull::new(flows.get(key)?.get())?;
        // SAFETY: entries are boxed, and those removed or replaced are kept until the program has ended.
        Some(unsafe { FlowRef::new(at) })
    }

    fn put_flow(&self, key: &FlowKey<A>, flow: &Flow<A>, how: Put) -> Result<(), PutError> {
        let family = A::of(self);
        let (there, entries) = (family.flows.borrow().contains_key(key), family.flows.borrow().len());
        match (there, how) {
            (true, Put::New) => return Err(PutError::Taken),
            (false, _) if entries >= self.capacity => return Err(PutError::Full),
            _ => {}
        }
        family.enter(*key, *flow);
        Ok(())
    }
}

impl<A: Fam> Apart<A> for World {
    fn put_draft(&self, side: u32) -> u32 {
        apart::put_draft::<A, _>(self, side)
    }

    fn free_port(&self) -> u32 {
        apart::free_port::<A, _>(self)
    }

    fn port_of_closed(&self) -> u32 {
        apart::port_of_closed::<A, _>(self)
    }

    fn own_port(&self) -> u32 {
        apart::own_port::<A, _>(self)
    }
}

impl<A: Fam> Tables<A> for World {
    fn draft(&self) -> Option<FlowRef<'_, A>> {
        // SAFETY: boxed, and only one program runs.
        NonNull::new(A::of(self).draft.get()).map(|at| unsafe { FlowRef::new(at) })
    }

    fn may_have_flows(&self, key: &FlowKey<A>) -> bool {
        // As with marks of which none is old: the least that programs may be told.
        A::of(self).is_marked(key.mark())
    }

    fn remember(&self, forward: &FlowKey<A>) {
        A::of(self).begun.borrow_mut().push(Box::leak(Box::new(*forward)));
    }

    fn old_flow(&self, after: u32) -> Option<&FlowKey<A>> {
        let begun = A::of(self).begun.borrow();
        let oldest = begun.len().checked_sub(self.remembered.get())?;
        begun.get(oldest + after as usize).copied()
    }

    fn remove_flow(&self, key: &FlowKey<A>) {
        A::of(self).lose(key);
    }

    fn may_be_served(&self, addr: A) -> bool {
        // The least that programs may be told.
        A::of(self).frontends.keys().any(|key| key.addr == addr)
    }

    fn frontend(&self, key: &FrontendKey<A>) -> Option<&Frontend> {
        A::of(self).frontends.get(key)
    }

    fn slot_group(&self, key: &SlotGroupKey) -> Option<&SlotGroup<A>> {
        A::of(self).slots.get(key)
    }

    fn cidr(&self, addr: A) -> u32 {
        let matches = A::of(self).cidrs.iter().filter(|(net, len, _)| bits(*net, *len) == bits(addr, *len));
        matches.max_by_key(|(_, len, _)| *len).map_or(0, |(_, _, bits)| *bits)
    }

    fn socket_wants(&self, key: &FlowKey<A>) -> bool {
        A::of(self).sockets.contains(key)
    }

    fn connected(&self, key: &FlowKey<A>, netns: u32) -> bool {
        A::of(self).connections.contains(&(netns, *key))
    }

    fn route(&self, _: A, dst: A) -> u32 {
        self.routes.get(&dst.into()).copied().unwrap_or(0)
    }

    fn cluster_ips(&self) -> Option<&Range<A>> {
        Some(&A::of(self).cluster_ips)
    }

    fn source_admitted(&self, service: u32, client: A) -> bool {
        let admits = |(id, net, len): &(u32, A, u8)| *id == service && bits(*net, *len) == bits(client, *len);
        A::of(self).sources.iter().any(admits)
    }

    fn fragment(&self, key: &FragmentKey<A>) -> Option<&Fragment> {
        A::of(self).fragments.borrow().get(key).copied()
    }

    fn put_fragment(&self, key: &FragmentKey<A>, fragment: &Fragment) {
        A::of(self).fragments.borrow_mut().insert(*key, Box::leak(Box::new(*fragment)));
    }
}

/// The first `len` bits.
fn bits<A: Fam>(addr: A, len: u8) -> u128 {
    let (value, width) = match addr.into() {
        IpAddr::V4(ip) => (u128::from(ip.to_bits()), 32),
        IpAddr::V6(ip) => (ip.to_bits(), 128),
    };
    if len == 0 { 0 } else { value >> (width - u32::from(len)) }
}

impl Fam for Ip4 {
    fn from_ip(ip: IpAddr) -> Self {
        let IpAddr::V4(ip) = ip else { panic!("{ip} is not IPv4") };
        ip.into()
    }

    fn of(world: &World) -> &Family<Self> {
        &world.v4
    }

    fn of_mut(world: &mut World) -> &mut Family<Self> {
        &mut world.v4
    }
}

impl Fam for Ip6 {
    fn from_ip(ip: IpAddr) -> Self {
        let IpAddr::V6(ip) = ip else { panic!("{ip} is not IPv6") };
        ip.into()
    }

    fn of(world: &World) -> &Family<Self> {
        &world.v6
    }

    fn of_mut(world: &mut World) -> &mut Family<Self> {
        &mut world.v6
    }
}
