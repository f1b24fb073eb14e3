//! Against real maps, in a BPF file system of the test's own.

mod failures;
mod served;

use super::MapWriter;
use crate::kernel::fill::Fill;
use crate::kernel::tables::{Family, NodeAddr, Tables};
use crate::kernel::testing::Bpffs;
use crate::model::{
    Endpoint, EndpointSet, Frontend, FrontendAddr, FrontendKind, Protocol, ServicePort, Sources,
};
use crate::store::ObjectName;
use crate::sync::{Diff, Writer as _};
use aya::maps::MapData;
use aya::maps::lpm_trie::LpmTrie;
use lb_common::addr::{Ip4, Ip6, NetPort};
use lb_common::maps::{
    self, Addr as _, FrontendKey, SLOT_GROUP, ServiceName, Set, Slot, SlotGroup, SlotGroupKey, SlotKey,
};
use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

impl Bpffs {
    fn tables(&self) -> Tables {
        Tables::open(&self.pins).expect("the pinned maps")
    }

    /// An agent that has just started.
    fn writer(&self) -> (MapWriter, BTreeSet<FrontendAddr>) {
        let mut writer = MapWriter::new(self.tables(), Vec::new(), Vec::new());
        writer.tell_of_fill(Fill::open(&self.pins).expect("the pinned maps"));
        let adopted = writer.adopt().expect("adopt").into_iter().collect();
        counts_are_right(&writer);
        (writer, adopted)
    }

    fn state(&self) -> State {
        State::of(&self.tables())
    }
}

/// All that the writer writes.
#[derive(Debug, PartialEq)]
struct State {
    front4: HashMap<FrontendKey<Ip4>, maps::Frontend>,
    front6: HashMap<FrontendKey<Ip6>, maps::Frontend>,
    slot4: HashMap<SlotKey, Slot<Ip4>>,
    slot6: HashMap<SlotKey, Slot<Ip6>>,
    sources: BTreeSet<(u32, String)>,
    ranges: (maps::Range<Ip4>, maps::Range<Ip6>),
    names: HashMap<u32, ServiceName>,
    epochs: Vec<u32>,
}

impl State {
    fn of(tables: &Tables) -> Self {
        Self {
            front4: tables.v4.frontends.iter().map(Result::unwrap).collect(),
            front6: tables.v6.frontends.iter().map(Result::unwrap).collect(),
            slot4: slots(&tables.v4),
            slot6: slots(&tables.v6),
            sources: sources(&tables.v4.sources).chain(sources(&tables.v6.sources)).collect(),
            ranges: (tables.v4.cluster_ips.get(&0, 0).unwrap(), tables.v6.cluster_ips.get(&0, 0).unwrap()),
            names: tables.names.iter().map(Result::unwrap).collect(),
            epochs: (0..64).map(|id| tables.epochs.get(&id, 0).expect("an epoch")).collect(),
        }
    }
}

/// Those that mean something, and no group without any.
fn slots<A: NodeAddr>(family: &Family<A>) -> HashMap<SlotKey, Slot<A>> {
    let groups = family.slots.iter().map(Result::unwrap);
    groups
        .flat_map(|(key, group)| {
            let used = group.slots.into_iter().take_while(|slot| slot.port.get() != 0);
            let used: Vec<_> = (key.group * SLOT_GROUP as u32..).zip(used).collect();
            assert!(!used.is_empty(), "{key:?} is empty");
            used.into_iter().map(move |(index, slot)| (SlotKey { set: key.set, index }, slot))
        })
        .collect()
}

fn sources<A: NodeAddr>(
    map: &LpmTrie<MapData, maps::SourceKey<A>, u32>,
) -> impl Iterator<Item = (u32, String)> {
    map.iter().map(Result::unwrap).map(|(key, _)| {
        let source = key.data();
        let ip: std::net::IpAddr = { source.addr }.into();
        (source.service, format!("{ip}/{}", key.prefix_len() - 32))
    })
}

fn at(addr: &str, protocol: Protocol) -> FrontendAddr {
    FrontendAddr::new(addr.parse().expect("an address"), protocol)
}

fn endpoints(addrs: &[&str]) -> EndpointSet {
    let list =
        addrs.iter().map(|a| Endpoint { addr: a.parse().expect("an address"), local: a.contains(".0.") });
    EndpointSet::Endpoints(list.collect())
}

fn service(name: &str) -> ServicePort {
    ServicePort { service: ObjectName::new("default", name), port: "http".into() }
}

fn frontend(name: &str, set: EndpointSet) -> Frontend {
    Frontend {
        service: service(name),
        kind: FrontendKind::ClusterIp,
        internal: set.clone(),
        external: set,
        affinity: Some(Duration::from_secs(10_800)),
        masquerade_always: false,
        sources: None,
        lingering: Arc::default(),
    }
}

/// What the writer says of the maps' fill is what is in them.
fn counts_are_right(writer: &MapWriter) {
    let (tables, fill) = (&writer.tables, writer.fill.as_ref().expect("somebody to tell"));
    let expected = [
        ("LB_FRONT4", tables.v4.frontends.keys().count()),
        ("LB_FRONT6", tables.v6.frontends.keys().count()),
        ("LB_SLOT4", tables.v4.slots.keys().count()),
        ("LB_SLOT6", tables.v6.slots.keys().count()),
        ("LB_SOURCE4", tables.v4.sources.keys().count()),
        ("LB_SOURCE6", tables.v6.sources.keys().count()),
        ("LB_CIDR4", tables.v4.cidrs.keys().count()),
        ("LB_CIDR6", tables.v6.cidrs.keys().count()),
        ("LB_NAME", tables.names.keys().count()),
    ];
    assert_eq!(expected.map(|(name, _)| (name, fill.get(name))), expected);
    served::all_are_known(tables);
}

fn put(writer: &mut MapWriter, at: FrontendAddr, frontend: Frontend) {
    writer.apply(&Diff { upserts: vec![(at, frontend.into())], deletes: vec![] }).expect("write");
    counts_are_right(writer);
}

fn delete(writer: &mut MapWriter, at: FrontendAddr) {
    writer.apply(&Diff { upserts: vec![], deletes: vec![at] }).expect("delete");
    counts_are_right(writer);
}

#[test]
fn what_is_written() {
    let bpffs = Bpffs::new();
    let (mut writer, adopted) = bpffs.writer();
    assert!(adopted.is_empty());
    let (tcp, udp) = (at("10.96.0.10:80", Protocol::Tcp), at("[fd00:96::a]:53", Protocol::Udp));
    put(&mut writer, tcp, frontend("web", endpoints(&["10.42.0.5:8080", "10.42.1.7:8080"])));
    let mixed = Frontend {
        internal: endpoints(&["[fd00:42::5]:53"]),
        external: EndpointSet::Drop,
        masquerade_always: true,
        affinity: None,
        kind: FrontendKind::NodePort,
        ..frontend("dns", EndpointSet::Reject)
    };
    put(&mut writer, udp, mixed);
    let state = bpffs.state();
    let (key, web) = state.front4.iter().find(|(key, _)| key.proto != 0).expect("a frontend");
    assert_eq!(
        *key,
        FrontendKey::new(Ip4::from(std::net::Ipv4Addr::new(10, 96, 0, 10)), NetPort::new(80), 6)
    );
    assert_eq!((web.internal, web.internal.count), (web.external, 2));
    assert_eq!((web.affinity, web.flags, web.kind), (10_800, 0, 1));
    let slot = |index| state.slot4[&SlotKey { set: web.internal.id, index }];
    let expect = |ip: [u8; 4], flags| Slot {
        addr: Ip4::from(std::net::Ipv4Addr::from(ip)),
        port: NetPort::new(8080),
        flags,
        ..Slot::default()
    };
    assert_eq!((slot(0), slot(1)), (expect([10, 42, 0, 5], Slot::<Ip4>::LOCAL), expect([10, 42, 1, 7], 0)));
    let (key, dns) = state.front6.iter().find(|(key, _)| key.proto != 0).expect("a frontend");
    assert_eq!((key.port.get(), key.proto), (53, 17));
    assert_eq!((dns.internal.count, dns.external), (1, Set::default()));
    assert_eq!(dns.flags, maps::Frontend::EXTERNAL_DROP | maps::Frontend::MASQUERADE_ALWAYS);
    assert_eq!((dns.affinity, dns.kind), (0, 2));
    assert_ne!(
        state.slot6[&SlotKey { set: dns.internal.id, index: 0 }].backend_id,
        0,
        "UDP has a liveness entry"
    );
    assert_eq!(super::names::read(&state.names[&web.service]), service("web"));
    assert_eq!(super::names::read(&state.names[&dns.service]), service("dns"));
    assert_eq!((state.slot4.len(), state.slot6.len(), state.names.len()), (2, 1, 2));
    delete(&mut writer, tcp);
    delete(&mut writer, udp);
    let state = bpffs.state();
    assert_eq!((state.front4.len(), state.front6.len(), state.slot4.len(), state.slot6.len()), (0, 0, 0, 0));
    assert!(state.names.is_empty(), "names are released");
}

#[test]
fn source_ranges_come_and_go_with_their_service() {
    let bpffs = Bpffs::new();
    let (mut writer, _) = bpffs.writer();
    let (vip, other) = (at("203.0.113.1:80", Protocol::Tcp), at("10.96.0.10:80", Protocol::Tcp));
    let balancer = |ranges: &[&str], node| Frontend {
        kind: FrontendKind::LoadBalancer,
        sources: Some(Arc::new(Sources {
            ranges: ranges.iter().map(|r| r.parse().expect("a range")).collect(),
            node,
        })),
        ..frontend("web", endpoints(&["10.42.0.5:8080"]))
    };
    put(&mut writer, other, frontend("web", endpoints(&["10.42.0.5:8080"])));
    put(&mut writer, vip, balancer(&["192.0.2.0/24", "198.51.100.7/32"], true));
    let state = bpffs.state();
    let key = FrontendKey::new(Ip4::from(std::net::Ipv4Addr::new(203, 0, 113, 1)), NetPort::new(80), 6);
    let value = state.front4[&key];
    assert_eq!(value.flags, maps::Frontend::SOURCE_RANGES);
    let written = |ranges: &[&str]| ranges.iter().map(|r| (value.service, (*r).to_owned())).collect();
    assert_eq!(state.sources, written(&["192.0.2.0/24", "198.51.100.7/32"]));
    // Other ranges: a restart in between knows which have to go.
    drop(writer);
    let (mut writer, _) = bpffs.writer();
    put(&mut writer, vip, balancer(&["192.0.2.0/24", "192.0.2.0/25"], false));
    let state = bpffs.state();
    let flags = maps::Frontend::SOURCE_RANGES | maps::Frontend::NODE_OUTSIDE_RANGES;
    assert_eq!(state.front4[&key].flags, flags);
    assert_eq!(state.sources, written(&["192.0.2.0/24", "192.0.2.0/25"]));
    // None, and then no Service at all.
    put(&mut writer, vip, Frontend { sources: None, ..balancer(&[], true) });
    assert_eq!(bpffs.state().front4[&key].flags, 0);
    delete(&mut writer, vip);
    delete(&mut writer, other);
    assert_eq!(bpffs.state().sources, BTreeSet::new());
}

#[test]
fn a_cluster_ip_is_known_as_such_as_long_as_it_has_a_port() {
    let bpffs = Bpffs::new();
    let (mut writer, _) = bpffs.writer();
    let ip = |last| Ip4::from(std::net::Ipv4Addr::new(10, 96, 0, last));
    let known = |last| bpffs.state().front4.contains_key(&FrontendKey::address(ip(last)));
    let ports = ["10.96.0.10:80", "10.96.0.10:81", "10.96.0.77:80"].map(|a| at(a, Protocol::Tcp));
    let set = || endpoints(&["10.42.0.5:8080"]);
    put(
        &mut writer,
        at("192.0.2.1:30080", Protocol::Tcp),
        Frontend { kind: FrontendKind::NodePort, ..frontend("web", set()) },
    );
    assert!(
        !bpffs
            .state()
            .front4
            .contains_key(&FrontendKey::address(std::net::Ipv4Addr::new(192, 0, 2, 1).into()))
    );
    for port in ports {
        put(&mut writer, port, frontend("web", set()));
    }
    let (range, _) = bpffs.state().ranges;
    assert!(ip(10).is_in(&range) && ip(77).is_in(&range) && !ip(200).is_in(&range), "{range:?}");
    delete(&mut writer, ports[0]);
    put(&mut writer, ports[1], frontend("web", EndpointSet::Reject));
    drop(writer);
    let (mut writer, adopted) = bpffs.writer();
    assert!(known(10) && known(77));
    assert_eq!(adopted.len(), 3, "the addresses as such are no frontends");
    delete(&mut writer, ports[1]);
    assert!(!known(10) && known(77));
    // Killed before it was removed.
    drop(writer);
    let mut tables = bpffs.tables();
    let flags = maps::Frontend::ADDRESS | maps::Frontend::REJECT_OTHER_PORTS;
    let left = maps::Frontend { flags, ..maps::Frontend::default() };
    tables.v4.frontends.insert(FrontendKey::address(ip(99)), left, 0).expect("an entry");
    let _ = bpffs.writer();
    assert!(!known(99) && known(77));
}

#[test]
fn an_endpoint_that_still_serves_keeps_its_flows() {
    let bpffs = Bpffs::new();
    let (mut writer, _) = bpffs.writer();
    let dns = at("10.96.0.10:53", Protocol::Udp);
    let epochs = || bpffs.state().epochs.iter().sum::<u32>();
    let lingering = |set: &[&str], lingering: &[&str]| Frontend {
        lingering: lingering.iter().map(|a| a.parse().expect("an address")).collect(),
        ..frontend("dns", endpoints(set))
    };
    put(&mut writer, dns, lingering(&["10.42.0.5:53", "10.42.0.6:53"], &[]));
    let slots = bpffs.state().slot4;
    let six = *slots
        .values()
        .find(|slot| slot.addr == Ip4::from(std::net::Ipv4Addr::new(10, 42, 0, 6)))
        .expect("it");
    let value = *bpffs.state().front4.values().find(|f| f.internal.count > 0).expect("it");
    put(&mut writer, dns, lingering(&["10.42.0.5:53"], &["10.42.0.6:53"]));
    assert_eq!(epochs(), 0, "it terminates, but it still serves");
    // A flow that goes there, and another agent.
    let flow = maps::Flow {
        backend: six.addr,
        backend_port: six.port,
        backend_id: six.backend_id,
        backend_epoch: six.backend_epoch,
        service: value.service,
        ..maps::Flow::default()
    };
    bpffs.tables().v4.flows.insert(flow.key(maps::Side::Front), flow, 0).expect("a flow");
    drop(writer);
    let (mut writer, _) = bpffs.writer();
    put(&mut writer, dns, lingering(&["10.42.0.5:53", "10.42.0.7:53"], &["10.42.0.6:53"]));
    assert_eq!(epochs(), 0);
    let seven = bpffs
        .state()
        .slot4
        .values()
        .find(|slot| slot.addr == Ip4::from(std::net::Ipv4Addr::new(10, 42, 0, 7)))
        .copied();
    assert_ne!(seven.expect("it").backend_id, six.backend_id, "its number is not another's");
    put(&mut writer, dns, lingering(&["10.42.0.5:53", "10.42.0.7:53"], &[]));
    assert_eq!((epochs(), bpffs.state().epochs[six.backend_id as usize]), (1, 1));
    // It comes back while it lingers: nothing happens to its flows.
    put(&mut writer, dns, lingering(&["10.42.0.7:53"], &["10.42.0.5:53"]));
    put(&mut writer, dns, lingering(&["10.42.0.5:53", "10.42.0.7:53"], &[]));
    assert_eq!(epochs(), 1);
    // An agent that finds it gone ends its flows.
    put(&mut writer, dns, lingering(&["10.42.0.7:53"], &["10.42.0.5:53"]));
    let five = slots
        .values()
        .find(|slot| slot.addr == Ip4::from(std::net::Ipv4Addr::new(10, 42, 0, 5)))
        .copied()
        .expect("it");
    let flow = maps::Flow {
        backend: five.addr,
        backend_id: five.backend_id,
        backend_epoch: five.backend_epoch,
        client_port: NetPort::new(9),
        ..flow
    };
    bpffs.tables().v4.flows.insert(flow.key(maps::Side::Front), flow, 0).expect("a flow");
    drop(writer);
    let (mut writer, _) = bpffs.writer();
    put(&mut writer, dns, lingering(&["10.42.0.7:53"], &[]));
    assert_eq!(bpffs.state().epochs[five.backend_id as usize], five.backend_epoch + 1);
    delete(&mut writer, dns);
    drop(writer);
    // Gone for good: a flow of an old epoch makes nobody believe that it is alive.
    let before = epochs();
    let _ = bpffs.writer();
    assert_eq!(epochs(), before);
}

#[test]
fn an_address_refuses_other_ports_only_when_its_own_are_there() {
    let bpffs = Bpffs::new();
    let (mut writer, _) = bpffs.writer();
    let ips: Vec<_> = (0..250).map(|last| std::net::Ipv4Addr::new(10, 96, 0, last)).collect();
    let ports = |ip: &std::net::Ipv4Addr| {
        [Protocol::Tcp, Protocol::Udp].map(|protocol| at(&format!("{ip}:53"), protocol))
    };
    let dns = |at| (at, Arc::new(frontend("dns", endpoints(&["10.42.0.5:53"]))));
    let upserts = ips.iter().flat_map(ports).map(dns).collect();
    let (tables, watching) = (bpffs.tables(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let is_there = |key| tables.v4.frontends.get(&key, 0).is_ok();
            let (first, last) = (ips[0], ips[ips.len() - 1]);
            let start = Instant::now();
            watching.store(true, Relaxed);
            while !is_there(FrontendKey::address(first.into()))
                && !is_there(FrontendKey::address(last.into()))
            {
                assert!(start.elapsed() < Duration::from_secs(20), "no address is written");
            }
            for &ip in &ips {
                for proto in [6, 17] {
                    let port = FrontendKey::new(ip.into(), NetPort::new(53), proto);
                    assert!(is_there(port), "{ip} may refuse its port of protocol {proto}");
                }
            }
        });
        while !watching.load(Relaxed) {
            std::thread::yield_now();
        }
        writer.apply(&Diff { upserts, ..Diff::default() }).expect("write");
        reader.join().expect("no port was refused");
    });
    counts_are_right(&writer);
}

#[test]
fn a_frontend_never_points_to_a_missing_slot() {
    let bpffs = Bpffs::new();
    let (mut writer, _) = bpffs.writer();
    let web = at("10.96.0.10:80", Protocol::Tcp);
    let many = |n: usize| {
        let list = (0..n).map(|i| {
            let ip = std::net::Ipv4Addr::new(10, 42, (i / 250) as u8, (i % 250) as u8);
            Endpoint { addr: SocketAddr::new(ip.into(), 8080), local: true }
        });
        frontend("web", EndpointSet::Endpoints(list.collect()))
    };
    put(&mut writer, web, many(3));
    let (done, changes) = (AtomicBool::new(false), AtomicU64::new(0));
    let tables = bpffs.tables();
    let looks = std::thread::scope(|scope| {
        // What a program does: the frontend, a slot, and if that is gone both once more.
        let reader = scope.spawn(|| {
            let key = *bpffs.state().front4.keys().find(|key| key.proto != 0).expect("the frontend");
            let (mut looks, mut last) = (0u64, 0);
            while !done.load(Relaxed) {
                let value = tables.v4.frontends.get(&key, 0).expect("it is always there");
                let set = value.internal;
                assert_eq!(set, value.external);
                for index in 0..set.count {
                    if tables.v4.slot(&SlotKey { set: set.id, index }).is_err() {
                        let now = tables.v4.frontends.get(&key, 0).expect("it is always there").internal;
                        assert_ne!(now, set, "slot {index} of the frontend's present set {set:?} is missing");
                        break;
                    }
                    looks += 1;
                }
                changes.fetch_add(u64::from(last != set.id), Relaxed);
                last = set.id;
            }
            looks
        });
        let start = Instant::now();
        let mut round = 0;
        // Until the reader has had its share of the processor.
        while changes.load(Relaxed) < 500
            && start.elapsed() < Duration::from_secs(20)
            && !reader.is_finished()
        {
            put(&mut writer, web, many(1 + round * 7 % 40));
            round += 1;
        }
        done.store(true, Relaxed);
        reader.join().expect("the reader saw no missing slot")
    });
    let changes = changes.into_inner();
    assert!(changes >= 100, "the reader saw {changes} changes and {looks} slots: too few to tell");
    let state = bpffs.state();
    let set = state
        .front4
        .values()
        .find(|f| f.flags & maps::Frontend::ADDRESS == 0)
        .expect("the frontend")
        .internal;
    assert!(state.slot4.keys().all(|k| k.set == set.id), "former sets are removed");
    assert_eq!(state.slot4.len(), set.count as usize);
}

#[test]
fn a_set_s_id_is_never_used_again() {
    let bpffs = Bpffs::new();
    let web = at("10.96.0.10:80", Protocol::Tcp);
    let mut seen = BTreeSet::new();
    for restart in 0..3 {
        let (mut writer, _) = bpffs.writer();
        for backend in ["10.42.0.5:1", "10.42.0.6:1", "10.42.0.5:1"] {
            put(&mut writer, web, frontend("web", endpoints(&[backend])));
            let id = bpffs
                .state()
                .front4
                .values()
                .find(|f| f.flags & maps::Frontend::ADDRESS == 0)
                .expect("the frontend")
                .internal
                .id;
            let known = restart > 0 && backend == "10.42.0.5:1" && seen.last() == Some(&id);
            assert!(seen.insert(id) || known, "{id} once more for {backend} after {restart} restarts");
        }
    }
}

#[test]
fn frontends_of_one_service_port_share_a_set() {
    let bpffs = Bpffs::new();
    let (mut writer, _) = bpffs.writer();
    let places = ["10.96.0.10:80", "192.168.0.1:30080", "192.168.0.2:30080"].map(|a| at(a, Protocol::Tcp));
    for place in places {
        put(&mut writer, place, frontend("web", endpoints(&["10.42.0.5:8080", "10.42.1.7:8080"])));
    }
    assert_eq!(bpffs.state().slot4.len(), 2);
    delete(&mut writer, places[0]);
    delete(&mut writer, places[1]);
    let state = bpffs.state();
    assert_eq!((state.slot4.len(), state.names.len()), (2, 1), "the last one still uses it");
    delete(&mut writer, places[2]);
    let state = bpffs.state();
    assert_eq!((state.slot4.len(), state.names.len()), (0, 0));
}

#[test]
fn the_same_again_writes_nothing() {
    let bpffs = Bpffs::new();
    let diff = Diff {
        upserts: vec![
            (
                at("10.96.0.10:80", Protocol::Tcp),
                frontend("web", endpoints(&["10.42.0.5:8080", "10.42.1.7:8080"])).into(),
            ),
            (
                at("10.96.0.10:53", Protocol::Udp),
                frontend("dns", endpoints(&["10.42.0.5:53", "10.42.1.7:53"])).into(),
            ),
            (at("[fd00:96::a]:53", Protocol::Udp), frontend("dns", endpoints(&["[fd00:42::5]:53"])).into()),
            (at("10.96.0.11:80", Protocol::Tcp), frontend("none", EndpointSet::Reject).into()),
            (at("10.96.0.12:80", Protocol::Tcp), frontend("none", EndpointSet::Drop).into()),
        ],
        deletes: vec![],
    };
    let (mut writer, _) = bpffs.writer();
    writer.apply(&diff).expect("write");
    let first = bpffs.state();
    writer.apply(&diff).expect("write again");
    assert_eq!(bpffs.state(), first);
    drop(writer);
    // An agent that was killed and started again, twice.
    for _ in 0..2 {
        let (mut writer, adopted) = bpffs.writer();
        assert_eq!(adopted, diff.upserts.iter().map(|(at, _)| *at).collect());
        assert_eq!(bpffs.state(), first, "adopting writes nothing");
        writer.apply(&diff).expect("write after a restart");
        assert_eq!(bpffs.state(), first, "the same ids, the same epochs");
    }
    // And it still knows what to delete.
    let (mut writer, adopted) = bpffs.writer();
    writer.apply(&Diff { upserts: vec![], deletes: adopted.into_iter().collect() }).expect("delete");
    let state = bpffs.state();
    assert_eq!((state.slot4.len(), state.slot6.len(), state.names.len()), (0, 0, 0));
}

#[test]
fn sets_that_a_killed_agent_left_behind_are_removed() {
    let bpffs = Bpffs::new();
    let web = at("10.96.0.10:80", Protocol::Tcp);
    let (mut writer, _) = bpffs.writer();
    put(&mut writer, web, frontend("web", endpoints(&["10.42.0.5:8080"])));
    drop(writer);
    let before = bpffs.state();
    let used = before
        .front4
        .values()
        .find(|f| f.flags & maps::Frontend::ADDRESS == 0)
        .expect("the frontend")
        .internal
        .id;
    // Killed before the frontend was flipped; two UDP backends among them.
    let mut tables = bpffs.tables();
    let mut left = SlotGroup::<Ip4>::default();
    for (index, slot) in (0..3).zip(&mut left.slots) {
        *slot = Slot { port: NetPort::new(53), backend_id: index, ..Slot::default() };
    }
    tables.v4.slots.insert(SlotGroupKey { set: used + 5, group: 0 }, left, 0).expect("slots");
    let (mut writer, _) = bpffs.writer();
    let after = bpffs.state();
    assert_eq!(after.slot4, before.slot4);
    // Flows may have been entered from them: an epoch is not met again.
    assert_eq!(after.epochs[..4], [0, 1, 1, 0]);
    put(&mut writer, web, frontend("web", endpoints(&["10.42.0.6:8080"])));
    let id = bpffs
        .state()
        .front4
        .values()
        .find(|f| f.flags & maps::Frontend::ADDRESS == 0)
        .expect("the frontend")
        .internal
        .id;
    assert!(id > used + 5, "the id of a removed set is not used again");
}

#[test]
fn a_set_that_was_half_removed_is_removed_wholly() {
    let bpffs = Bpffs::new();
    // Killed after the frontend was flipped, while the old set's slots were deleted.
    let mut tables = bpffs.tables();
    for group in 2..5 {
        let slots = [Slot { port: NetPort::new(80), ..Slot::<Ip4>::default() }; SLOT_GROUP];
        tables.v4.slots.insert(SlotGroupKey { set: 7, group }, SlotGroup { slots }, 0).expect("slots");
    }
    let _ = bpffs.writer();
    assert_eq!(bpffs.state().slot4, HashMap::new());
}

#[test]
fn an_epoch_is_raised_when_a_udp_backend_leaves_and_at_no_other_time() {
    let bpffs = Bpffs::new();
    let (dns, other) = (at("10.96.0.10:53", Protocol::Udp), at("192.168.0.1:30053", Protocol::Udp));
    let tcp = at("10.96.0.10:53", Protocol::Tcp);
    let (mut writer, _) = bpffs.writer();
    let liveness = |addr: &str| {
        let addr: SocketAddr = addr.parse().expect("an address");
        let state = bpffs.state();
        let mut found = state
            .slot4
            .values()
            .filter(|s| SocketAddr::new(s.addr.into(), s.port.get()) == addr && s.backend_id != 0);
        let slot = *found.next().expect("a slot of that backend");
        assert!(found.all(|s| (s.backend_id, s.backend_epoch) == (slot.backend_id, slot.backend_epoch)));
        (slot.backend_id, slot.backend_epoch, state.epochs[slot.backend_id as usize])
    };
    let sum = || bpffs.state().epochs.iter().sum::<u32>();
    put(&mut writer, dns, frontend("dns", endpoints(&["10.42.0.5:53", "10.42.0.6:53"])));
    put(&mut writer, other, frontend("dns", endpoints(&["10.42.0.5:53", "10.42.0.6:53"])));
    put(&mut writer, tcp, frontend("dns-tcp", endpoints(&["10.42.0.5:53", "10.42.0.6:53"])));
    let (five, six) = (liveness("10.42.0.5:53"), liveness("10.42.0.6:53"));
    assert_ne!(five.0, six.0);
    // One comes: nobody leaves.
    put(&mut writer, dns, frontend("dns", endpoints(&["10.42.0.5:53", "10.42.0.6:53", "10.42.0.7:53"])));
    assert_eq!((liveness("10.42.0.5:53"), liveness("10.42.0.6:53"), sum()), (five, six, 0));
    // One leaves one frontend, and is still behind the other.
    put(&mut writer, dns, frontend("dns", endpoints(&["10.42.0.6:53", "10.42.0.7:53"])));
    assert_eq!((liveness("10.42.0.5:53"), sum()), (five, 0));
    // It leaves that too.
    put(&mut writer, other, frontend("dns", endpoints(&["10.42.0.6:53", "10.42.0.7:53"])));
    assert_eq!(
        (bpffs.state().epochs[five.0 as usize], sum(), liveness("10.42.0.6:53")),
        (five.1 + 1, 1, six)
    );
    // A TCP backend has none.
    put(&mut writer, tcp, frontend("dns-tcp", endpoints(&["10.42.0.6:53"])));
    delete(&mut writer, tcp);
    assert_eq!(sum(), 1);
    // A restart in between flushes nothing.
    drop(writer);
    let (mut writer, _) = bpffs.writer();
    assert_eq!((sum(), liveness("10.42.0.6:53")), (1, six));
    // It comes back: its old flows' epoch is not met again.
    put(&mut writer, dns, frontend("dns", endpoints(&["10.42.0.5:53", "10.42.0.6:53", "10.42.0.7:53"])));
    let back = liveness("10.42.0.5:53");
    assert_eq!(back.1, back.2, "it is alive");
    assert_ne!((back.0, back.1), (five.0, five.1));
    assert_eq!(sum(), 1);
    // No endpoint left: all leave.
    put(&mut writer, dns, frontend("dns", EndpointSet::Reject));
    put(&mut writer, other, frontend("dns", EndpointSet::Drop));
    assert_eq!(sum(), 4);
}
