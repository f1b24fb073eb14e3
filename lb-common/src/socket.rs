//! The logic of the cgroup socket hooks: a host process that connects to a Service is connected to a backend.
//!
//! No packet is rewritten. What the process may ask about its peer (`getpeername`, the source of a datagram) is
//! translated back from a table of sockets.

use crate::addr::NetPort;
use crate::affinity::{find, remember, scale};
use crate::datapath::Reason;
use crate::maps::{
    Addr, Affinity, AffinityKey, Frontend, FrontendKey, Range, Set, Slot, SlotGroup, SlotGroupKey, SlotKey,
    SocketKey, SocketPeer,
};

/// A socket and the peer address that is being used.
pub trait Socket<A> {
    /// The peer.
    fn peer(&self) -> (A, NetPort);
    /// Replaces the peer.
    fn set_peer(&mut self, addr: A, port: NetPort);
    /// IP protocol.
    fn protocol(&self) -> u8;
    /// The kernel's name for the socket.
    fn cookie(&self) -> u64;
}

/// The maps and helpers of one family.
pub trait SocketTables<A: Addr> {
    /// Looks a frontend up.
    fn frontend(&self, key: &FrontendKey<A>) -> Option<&Frontend>;
    /// Looks a group of slots up.
    fn slot_group(&self, key: &SlotGroupKey) -> Option<&SlotGroup<A>>;
    /// Looks a slot up.
    #[inline(always)]
    fn slot(&self, key: &SlotKey) -> Option<&Slot<A>> {
        let (group, place) = key.group();
        self.slot_group(&group)?.slots.get(place)
    }
    /// The present epoch of a liveness entry.
    fn backend_epoch(&self, id: u32) -> u32;
    /// Looks a socket's peer up.
    fn socket(&self, key: &SocketKey) -> Option<&SocketPeer>;
    /// Remembers a socket's peer. Best effort: the table is an LRU one.
    fn put_socket(&self, key: &SocketKey, peer: &SocketPeer);
    /// The range of all ClusterIPs.
    fn cluster_ips(&self) -> Option<&Range<A>>;
    /// What a client was sent to last.
    fn affinity(&self, key: &AffinityKey) -> Option<&Affinity>;
    /// Remembers it, if there is room.
    fn put_affinity(&self, key: &AffinityKey, affinity: &Affinity);
    /// Whether the socket is one of the node's own processes, not a pod's.
    fn is_node(&self) -> bool;
    /// Seconds of the monotonic clock.
    fn now(&self) -> u32;
    /// Any number.
    fn random(&self) -> u32;
    /// Adds one to a counter.
    fn count(&self, reason: Reason);
}

/// What becomes of the system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It goes on, to whatever the peer is now.
    Allow,
    /// It fails as if the peer had refused (`ECONNREFUSED`).
    Refuse,
    /// It fails as if nobody had answered, without the wait: `ETIMEDOUT` from `connect`; a datagram fails as one that
    /// netfilter drops, with `EPERM`.
    Drop,
}

/// The table's two directions.
const TO_VIP: u8 = 0;
const TO_BACKEND: u8 = 1;

/// `connect`, and `sendto`/`sendmsg` with an address.
///
/// The datagrams that one socket sends to one Service go to one backend, as those of one port would through
/// conntrack, until it is gone.
#[inline(always)]
pub fn to_service<A: Addr, S: Socket<A>, K: SocketTables<A>>(
    socket: &mut S,
    kernel: &K,
    sticky: bool,
) -> Decision {
    let (vip, vip_port) = socket.peer();
    let proto = socket.protocol();
    let front = FrontendKey::new(vip, vip_port, proto);
    let Some(frontend) = kernel.frontend(&front) else { return other_port(kernel, vip, proto) };
    if frontend.affinity != 0 || frontend.flags & Frontend::SOURCE_RANGES != 0 {
        if !kernel.is_node() {
            // Both go by the client's address, which a pod's packet will show; the socket may have none yet.
            return Decision::Allow;
        }
        if frontend.flags & Frontend::NODE_OUTSIDE_RANGES != 0 && frontend.internal.count != 0 {
            kernel.count(Reason::SourceRange);
            return Decision::Drop;
        }
    }
    let cookie = socket.cookie();
    let there =
        SocketKey { cookie, addr: vip.mapped(), port: vip_port, proto, direction: TO_BACKEND, pad: 0 };
    if sticky
        && let Some(known) = kernel.socket(&there)
        && (known.backend_id == 0 || kernel.backend_epoch(known.backend_id) == known.backend_epoch)
        && let Some(addr) = A::from_mapped(known.addr)
    {
        socket.set_peer(addr, known.port);
        return Decision::Allow;
    }
    if frontend.internal.count == 0 {
        let drop = frontend.flags & Frontend::INTERNAL_DROP != 0;
        kernel.count(if drop { Reason::NoLocalEndpoint } else { Reason::NoEndpoint });
        return if drop { Decision::Drop } else { Decision::Refuse };
    }
    let slot = match pick(kernel, frontend) {
        Some(slot) => slot,
        // The frontend was flipped to a new set, and the old one removed, between our two look-ups.
        None => match kernel.frontend(&front).and_then(|frontend| any(kernel, frontend.internal)) {
            Some(slot) => slot,
            None => {
                kernel.count(Reason::SlotMissing);
                return Decision::Refuse;
            }
        },
    };
    let (addr, port) = (slot.addr, slot.port);
    let mut peer = SocketPeer {
        addr: vip.mapped(),
        port: vip_port,
        pad: 0,
        backend_id: slot.backend_id,
        backend_epoch: slot.backend_epoch,
        pad2: 0,
    };
    let back = SocketKey { cookie, addr: addr.mapped(), port, proto, direction: TO_VIP, pad: 0 };
    kernel.put_socket(&back, &peer);
    if sticky {
        (peer.addr, peer.port) = (addr.mapped(), port);
        kernel.put_socket(&there, &peer);
    }
    socket.set_peer(addr, port);
    Decision::Allow
}

/// Not to a frontend. A ClusterIP's other ports refuse: its address is nobody's.
#[inline(always)]
fn other_port<A: Addr, K: SocketTables<A>>(kernel: &K, addr: A, proto: u8) -> Decision {
    if matches!(proto, 6 | 17)
        && kernel.cluster_ips().is_some_and(|range| addr.is_in(range))
        && kernel
            .frontend(&FrontendKey::address(addr))
            .is_some_and(|frontend| frontend.flags & Frontend::REJECT_OTHER_PORTS != 0)
    {
        kernel.count(Reason::NoSuchPort);
        return Decision::Refuse;
    }
    Decision::Allow
}

#[inline(always)]
fn pick<'k, A: Addr, K: SocketTables<A>>(kernel: &'k K, frontend: &Frontend) -> Option<&'k Slot<A>> {
    if frontend.affinity == 0 {
        return any(kernel, frontend.internal);
    }
    // The node's processes are one client in each family. What it used last is written down at most once a second: processes that
    // connect all the time would otherwise write it all the time.
    let key = AffinityKey { client: A::default().mapped(), service: frontend.service, pad: 0 };
    let now = kernel.now();
    let known = kernel.affinity(&key);
    if let Some(known) = known
        && let Some(index) = place(kernel, known, frontend.internal, now, frontend.affinity)
    {
        let slot = kernel.slot(&SlotKey { set: frontend.internal.id, index })?;
        if known.last_used != now || known.index != index {
            kernel.put_affinity(&key, &remember(slot, index, now, frontend.affinity));
        }
        return Some(slot);
    }
    let index = scale(kernel.random(), frontend.internal.count);
    let slot = kernel.slot(&SlotKey { set: frontend.internal.id, index })?;
    kernel.put_affinity(&key, &remember(slot, index, now, frontend.affinity));
    Some(slot)
}

#[inline(always)]
fn place<A: Addr, K: SocketTables<A>>(
    kernel: &K,
    known: &Affinity,
    set: Set,
    now: u32,
    timeout: u32,
) -> Option<u32> {
    if !known.holds(now, timeout) {
        return None;
    }
    find(known, set, |key| kernel.slot_group(&key))
}

/// Any slot of a set.
#[inline(always)]
fn any<A: Addr, K: SocketTables<A>>(kernel: &K, set: Set) -> Option<&Slot<A>> {
    kernel.slot(&SlotKey { set: set.id, index: scale(kernel.random(), set.count) })
}

/// `getpeername`, and the source of a received datagram: the process sees what it asked for.
#[inline(always)]
pub fn from_backend<A: Addr, S: Socket<A>, K: SocketTables<A>>(socket: &mut S, kernel: &K) {
    let (addr, port) = socket.peer();
    let (cookie, proto) = (socket.cookie(), socket.protocol());
    let key = SocketKey { cookie, addr: addr.mapped(), port, proto, direction: TO_VIP, pad: 0 };
    if let Some(peer) = kernel.socket(&key)
        && let Some(vip) = A::from_mapped(peer.addr)
    {
        socket.set_peer(vip, peer.port);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Ip4;
    use core::cell::{Cell, RefCell};
    use std::boxed::Box;
    use std::collections::HashMap;
    use std::vec::Vec;

    struct FakeSocket {
        peer: (Ip4, NetPort),
        proto: u8,
    }

    impl Socket<Ip4> for FakeSocket {
        fn peer(&self) -> (Ip4, NetPort) {
            self.peer
        }
        fn set_peer(&mut self, addr: Ip4, port: NetPort) {
            self.peer = (addr, port);
        }
        fn protocol(&self) -> u8 {
            self.proto
        }
        fn cookie(&self) -> u64 {
            7
        }
    }

    #[derive(Default)]
    struct Fake {
        frontends: HashMap<FrontendKey<Ip4>, Frontend>,
        slots: HashMap<SlotGroupKey, SlotGroup<Ip4>>,
        epochs: HashMap<u32, u32>,
        sockets: RefCell<HashMap<SocketKey, &'static SocketPeer>>,
        counts: RefCell<Vec<Reason>>,
        random: RefCell<u32>,
        cluster_ips: Range<Ip4>,
        affinities: RefCell<HashMap<AffinityKey, &'static Affinity>>,
        now: Cell<u32>,
        pod: bool,
    }

    impl SocketTables<Ip4> for Fake {
        fn frontend(&self, key: &FrontendKey<Ip4>) -> Option<&Frontend> {
            self.frontends.get(key)
        }
        fn slot_group(&self, key: &SlotGroupKey) -> Option<&SlotGroup<Ip4>> {
            self.slots.get(key)
        }
        fn backend_epoch(&self, id: u32) -> u32 {
            self.epochs.get(&id).copied().unwrap_or(0)
        }
        fn socket(&self, key: &SocketKey) -> Option<&SocketPeer> {
            self.sockets.borrow().get(key).copied()
        }
        fn put_socket(&self, key: &SocketKey, peer: &SocketPeer) {
            self.sockets.borrow_mut().insert(*key, Box::leak(Box::new(*peer)));
        }
        fn cluster_ips(&self) -> Option<&Range<Ip4>> {
            Some(&self.cluster_ips)
        }
        fn affinity(&self, key: &AffinityKey) -> Option<&Affinity> {
            self.affinities.borrow().get(key).copied()
        }
        fn put_affinity(&self, key: &AffinityKey, affinity: &Affinity) {
            self.affinities.borrow_mut().insert(*key, Box::leak(Box::new(*affinity)));
        }
        fn is_node(&self) -> bool {
            !self.pod
        }
        fn now(&self) -> u32 {
            self.now.get()
        }
        fn random(&self) -> u32 {
            let mut state = self.random.borrow_mut();
            *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *state
        }
        fn count(&self, reason: Reason) {
            self.counts.borrow_mut().push(reason);
        }
    }

    impl Fake {
        fn set_slot(&mut self, key: SlotKey, slot: Slot<Ip4>) {
            let (group, place) = key.group();
            self.slots.entry(group).or_default().slots[place] = slot;
        }
    }

    fn ip(text: &str) -> Ip4 {
        text.parse::<core::net::Ipv4Addr>().unwrap().into()
    }

    fn service(backends: u32) -> Fake {
        let mut fake = Fake::default();
        let set = Set { id: 3, count: backends };
        for index in 0..backends {
            let slot = Slot {
                addr: ip(&std::format!("10.244.1.{}", index + 10)),
                port: NetPort::new(5353),
                backend_id: index + 1,
                ..Slot::default()
            };
            fake.set_slot(SlotKey { set: 3, index }, slot);
        }
        let frontend = Frontend { internal: set, ..Frontend::default() };
        for proto in [6, 17] {
            fake.frontends.insert(FrontendKey::new(ip("10.96.0.53"), NetPort::new(53), proto), frontend);
        }
        fake
    }

    fn asking(proto: u8) -> FakeSocket {
        FakeSocket { peer: (ip("10.96.0.53"), NetPort::new(53)), proto }
    }

    #[test]
    fn a_connected_socket_is_told_the_address_that_it_asked_for() {
        let kernel = service(3);
        let mut socket = asking(6);
        assert_eq!(to_service(&mut socket, &kernel, false), Decision::Allow);
        assert_eq!(socket.peer.1, NetPort::new(5353));
        from_backend(&mut socket, &kernel);
        assert_eq!(socket.peer, (ip("10.96.0.53"), NetPort::new(53)));
    }

    #[test]
    fn datagrams_of_one_socket_stay_with_one_backend_until_it_is_gone() {
        let mut kernel = service(3);
        let send = |kernel: &Fake| {
            let mut socket = asking(17);
            assert_eq!(to_service(&mut socket, kernel, true), Decision::Allow);
            socket.peer.0
        };
        let first = send(&kernel);
        assert!((0..50).all(|_| send(&kernel) == first));
        let slots = kernel.slots[&SlotGroupKey { set: 3, group: 0 }].slots;
        let (index, slot) = (0..3).zip(slots).find(|(_, s)| s.addr == first).unwrap();
        kernel.epochs.insert(slot.backend_id, 1);
        kernel.set_slot(SlotKey { set: 3, index }, slots[(index as usize + 1) % 3]);
        assert_ne!(send(&kernel), first);
    }

    /// Changes the Service's frontends.
    fn change(fake: &mut Fake, change: impl Fn(&mut Frontend)) {
        fake.frontends.values_mut().for_each(change);
    }

    fn sent_to(kernel: &Fake, proto: u8) -> Ip4 {
        let mut socket = asking(proto);
        assert_eq!(to_service(&mut socket, kernel, false), Decision::Allow);
        socket.peer.0
    }

    #[test]
    fn the_node_s_processes_are_one_client_to_a_service_with_affinity() {
        let mut kernel = service(10);
        assert_ne!((0..50).map(|_| sent_to(&kernel, 6)).collect::<std::collections::HashSet<_>>().len(), 1);
        change(&mut kernel, |frontend| (frontend.affinity, frontend.service) = (30, 5));
        let first = sent_to(&kernel, 6);
        for _ in 0..20 {
            kernel.now.set(kernel.now.get() + 30);
            assert_eq!(sent_to(&kernel, 6), first, "each connection begins the time anew");
        }
        // Another set, in which it is elsewhere.
        for index in 0..10 {
            let slot = *kernel.slot(&SlotKey { set: 3, index }).unwrap();
            kernel.set_slot(SlotKey { set: 4, index: index + 3 }, slot);
        }
        for (index, host) in (0..).zip([1, 2, 3]) {
            let slot = Slot { addr: ip(&std::format!("10.244.1.{host}")), ..Slot::default() };
            kernel.set_slot(SlotKey { set: 4, index }, slot);
        }
        change(&mut kernel, |frontend| frontend.internal = Set { id: 4, count: 13 });
        assert_eq!(sent_to(&kernel, 6), first);
        // A set without it.
        let all = (0..10).map(|index| *kernel.slot(&SlotKey { set: 3, index }).unwrap());
        let left: Vec<_> = all.filter(|slot| slot.addr != first).collect();
        for (index, slot) in (0..).zip(left) {
            kernel.set_slot(SlotKey { set: 5, index }, slot);
        }
        change(&mut kernel, |frontend| frontend.internal = Set { id: 5, count: 9 });
        let second = sent_to(&kernel, 6);
        assert_ne!(second, first);
        assert!((0..20).all(|_| sent_to(&kernel, 6) == second));
        let moved = (0..20).any(|_| {
            kernel.now.set(kernel.now.get() + 31);
            sent_to(&kernel, 6) != second
        });
        assert!(moved, "after a while a client may be sent elsewhere");
    }

    #[test]
    fn source_ranges_hold_for_the_node_and_are_left_to_the_packets_of_pods() {
        let mut kernel = service(3);
        change(&mut kernel, |frontend| frontend.flags = Frontend::SOURCE_RANGES);
        sent_to(&kernel, 6);
        change(&mut kernel, |frontend| {
            frontend.flags = Frontend::SOURCE_RANGES | Frontend::NODE_OUTSIDE_RANGES;
        });
        for sticky in [false, true] {
            assert_eq!(to_service(&mut asking(17), &kernel, sticky), Decision::Drop);
        }
        assert_eq!(*kernel.counts.borrow(), [Reason::SourceRange; 2]);
        // Without endpoints nobody is kept out of anything: refused.
        change(&mut kernel, |frontend| frontend.internal = Set { id: 0, count: 0 });
        assert_eq!(to_service(&mut asking(6), &kernel, false), Decision::Refuse);
        let mut kernel = Fake { pod: true, ..service(3) };
        for (affinity, flags) in [(1, 0), (0, Frontend::SOURCE_RANGES)] {
            change(&mut kernel, |frontend| (frontend.affinity, frontend.flags) = (affinity, flags));
            assert_eq!(sent_to(&kernel, 6), ip("10.96.0.53"));
        }
    }

    #[test]
    fn a_cluster_ip_s_other_ports_refuse() {
        let mut kernel = service(3);
        let address = FrontendKey::address(ip("10.96.0.53"));
        kernel.cluster_ips = Range { first: ip("10.96.0.0"), mask: ip("255.255.0.0") };
        let ask = |kernel: &Fake, addr, proto| {
            let mut socket = FakeSocket { peer: (ip(addr), NetPort::new(54)), proto };
            to_service(&mut socket, kernel, false)
        };
        assert_eq!(ask(&kernel, "10.96.0.53", 6), Decision::Allow, "an address that has no entry");
        kernel.frontends.insert(address, Frontend { flags: Frontend::ADDRESS, ..Frontend::default() });
        assert_eq!(ask(&kernel, "10.96.0.53", 6), Decision::Allow, "one that is the node's, say");
        let flags = Frontend::ADDRESS | Frontend::REJECT_OTHER_PORTS;
        kernel.frontends.insert(address, Frontend { flags, ..Frontend::default() });
        assert_eq!([6, 17].map(|proto| ask(&kernel, "10.96.0.53", proto)), [Decision::Refuse; 2]);
        assert_eq!(*kernel.counts.borrow(), [Reason::NoSuchPort; 2]);
        assert_eq!(ask(&kernel, "10.96.0.54", 6), Decision::Allow);
        assert_eq!(ask(&kernel, "10.96.0.53", 132), Decision::Allow, "neither TCP nor UDP");
        sent_to(&kernel, 6);
    }

    #[test]
    fn a_local_policy_without_endpoint_drops() {
        let mut kernel = service(0);
        change(&mut kernel, |frontend| frontend.flags = Frontend::INTERNAL_DROP);
        assert_eq!(to_service(&mut asking(6), &kernel, false), Decision::Drop);
        assert_eq!(*kernel.counts.borrow(), [Reason::NoLocalEndpoint]);
    }

    #[test]
    fn without_endpoints_it_is_refused_and_other_addresses_are_left_alone() {
        let kernel = service(0);
        assert_eq!(to_service(&mut asking(6), &kernel, false), Decision::Refuse);
        assert_eq!(*kernel.counts.borrow(), [Reason::NoEndpoint]);
        let mut other = FakeSocket { peer: (ip("192.0.2.1"), NetPort::new(53)), proto: 17 };
        assert_eq!(to_service(&mut other, &kernel, true), Decision::Allow);
        assert_eq!(other.peer, (ip("192.0.2.1"), NetPort::new(53)));
    }
}
