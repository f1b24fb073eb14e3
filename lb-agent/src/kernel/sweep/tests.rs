//! Against real maps, in a BPF file system of the test's own.

use super::*;
use crate::kernel::testing::Bpffs;
use lb_common::addr::{Ip4, Ip6, NetPort};
use lb_common::maps::{Addr, Flow, Presence, Side};
use std::collections::BTreeSet;

const SEEN: u8 = Flow::<Ip4>::SEEN;
const FIN: u8 = Flow::<Ip4>::FIN;
const RST: u8 = Flow::<Ip4>::RST;
const DNAT: u8 = Flow::<Ip4>::DNAT;
const MASQ: u8 = Flow::<Ip4>::MASQ_DONE;
const NOW: u32 = 1_000_000;
/// Room for so many entries.
const LIMIT: u32 = 4096;

/// A sweeper of tables that nobody else sees.
struct Site {
    bpffs: Bpffs,
    sweeper: Sweeper,
}

impl Site {
    fn new() -> Self {
        let bpffs = Bpffs::with_flows(LIMIT);
        let sweeper = Sweeper::open(&bpffs.pins, Timeouts::default()).expect("a sweeper");
        Self { bpffs, sweeper }
    }

    fn v4(&mut self) -> &mut Family<Ip4> {
        &mut self.sweeper.tables.v4
    }

    /// Client ports of the flows of which anything is left.
    fn left(&self) -> BTreeSet<u16> {
        let mut ports = BTreeSet::new();
        let each = |_: &_, flow: &Flow<Ip4>| {
            ports.insert(flow.client_port.get());
            Ok(())
        };
        self.sweeper.read.v4.for_each_flow(each).expect("read the flows");
        ports
    }
}

/// The programs have counted so much on each CPU.
fn count(site: &Site, reason: Reason, n: u64) {
    let cpus = aya::util::nr_cpus().expect("the number of CPUs");
    let values = aya::maps::PerCpuValues::try_from(vec![n; cpus]).expect("a value for each");
    let pin = aya::maps::MapData::from_pin(site.bpffs.pins.map("LB_COUNT")).expect("the counters");
    let mut counters =
        aya::maps::PerCpuArray::<_, u64>::try_from(aya::maps::Map::PerCpuArray(pin)).expect("counters");
    counters.set(reason as u32, values, 0).expect("count");
}

/// A flow through a Service, or one that is only masqueraded.
fn flow<A: Addr>(proto: u8, port: u16, flags: u8) -> Flow<A> {
    let (client_port, masq_port) = (NetPort::new(port), NetPort::new(10_000 + port));
    let (vip_port, backend_port) =
        (NetPort::new(53), NetPort::new(if flags & DNAT == 0 { 53 } else { 5353 }));
    let alias_port = client_port;
    Flow { proto, client_port, alias_port, masq_port, vip_port, backend_port, flags, ..Flow::default() }
}

/// Enters what the programs would, with what they saw of both ends, so long ago.
fn put<A: NodeAddr>(family: &mut Family<A>, flow: &Flow<A>, (client, server): (u8, u8), age: u32) {
    let sides: &[_] = match (flow.flags & DNAT != 0, flow.flags & MASQ != 0) {
        (true, true) => &[Side::Front, Side::Forward, Side::Back, Side::Reply],
        (true, false) => &[Side::Front, Side::Forward, Side::Reply],
        _ => &[Side::Forward, Side::Back],
    };
    for side in sides {
        let state = if matches!(side, Side::Front | Side::Forward) { client } else { server };
        let entry = Flow { state, last_seen: NOW - age, ..flow.as_side(*side) };
        family.flows.insert(flow.key(*side), entry, 0).expect("room");
    }
}

#[test]
fn flows_end_when_neither_end_has_spoken_for_their_time() {
    let mut site = Site::new();
    let t = Timeouts::default();
    let cases = [
        (6, (0, 0), t.tcp_syn_sent),
        (6, (SEEN, SEEN), t.tcp_established),
        (6, (SEEN | FIN, SEEN), t.tcp_close_wait),
        (6, (SEEN | FIN, SEEN | FIN), t.tcp_time_wait),
        (6, (SEEN, SEEN | RST), t.tcp_close),
        (17, (0, SEEN), t.udp),
        (17, (SEEN, SEEN), t.udp_stream),
        (1, (0, SEEN), t.icmp),
    ];
    let mut alive = BTreeSet::new();
    for (port, flags) in [DNAT, DNAT | MASQ, MASQ].into_iter().zip([1, 101, 201]).map(|(f, p)| (p, f)) {
        for ((proto, seen, timeout), port) in cases.into_iter().zip(port..) {
            put(site.v4(), &flow(proto, port, flags), seen, timeout);
            alive.insert(port);
            put(site.v4(), &flow(proto, port + 50, flags), seen, timeout + 1);
        }
    }
    site.sweeper.sweep(NOW, None).expect("sweep");
    assert_eq!(site.left(), alive);
    // An age of one end alone means nothing.
    let once = flow(17, 999, DNAT);
    put(site.v4(), &once, (0, SEEN), 1000);
    let front = Flow { last_seen: NOW, state: SEEN, ..once.as_side(Side::Front) };
    site.v4().flows.insert(once.key(Side::Front), front, 0).expect("room");
    site.sweeper.sweep(NOW, None).expect("sweep");
    assert!(site.left().contains(&999));
}

#[test]
fn what_another_flow_has_taken_over_stays_and_lost_halves_come_back() {
    let mut site = Site::new();
    let (old, new) = (
        flow::<Ip4>(17, 7, DNAT),
        Flow {
            vip: "10.9.9.9".parse::<std::net::Ipv4Addr>().expect("an address").into(),
            ..flow(17, 7, DNAT)
        },
    );
    put(site.v4(), &old, (0, 0), 1000);
    // The same client port to another Service of the same backend: two of the entries are its now.
    put(site.v4(), &new, (SEEN, SEEN), 0);
    let masqueraded = flow::<Ip4>(6, 8, MASQ);
    put(site.v4(), &masqueraded, (SEEN, SEEN), 1000);
    let back = masqueraded.key(Side::Back);
    site.v4().flows.remove(&back).expect("it is there");
    site.sweeper.sweep(NOW, None).expect("sweep");
    let v4 = &site.sweeper.tables.v4.flows;
    assert!(v4.get(&old.key(Side::Front), 0).is_err(), "the old flow's own entry is gone");
    for side in [Side::Front, Side::Forward, Side::Reply] {
        assert!(v4.get(&new.key(side), 0).is_ok_and(|entry| entry.same_origin(&new)), "{side:?}");
    }
    let mended = v4.get(&back, 0).expect("it was made again");
    assert!(
        mended.state & SEEN != 0,
        "an established connection must not look like one that nobody answered"
    );
}

/// Fills the table with flows of which so many ports were seen from 1000 on.
fn flood(site: &mut Site, flows: u32, seen: (u8, u8), age: u32) {
    for port in 0..flows {
        put(site.v4(), &flow(17, 1000 + port as u16, DNAT), seen, age);
    }
}

/// Connections that must survive, and one that need not if it comes to that.
fn guests(site: &mut Site) -> BTreeSet<u16> {
    put(site.v4(), &flow(6, 1, DNAT), (SEEN, SEEN), 80_000);
    put(site.v4(), &flow(6, 2, MASQ), (SEEN, SEEN), 80_000);
    put(site.v4(), &flow(17, 3, DNAT | MASQ), (SEEN, SEEN), 100);
    put(site.v4(), &flow(6, 4, DNAT), (SEEN | FIN, SEEN), 100);
    // Young.
    put(site.v4(), &flow(17, 5, DNAT), (0, 0), 1);
    (1..=5).collect()
}

#[test]
fn a_flood_that_nobody_answers_goes_first() {
    let mut site = Site::new();
    let guests = guests(&mut site);
    flood(&mut site, LIMIT / 4, (0, 0), PATIENT + 1);
    site.sweeper.sweep(NOW, Some(PATIENT)).expect("sweep");
    assert_eq!(site.left(), guests);
    assert_eq!(site.sweeper.stats.unanswered.load(Relaxed), u64::from(LIMIT / 4));
    assert_eq!(site.sweeper.stats.over.load(Relaxed), 0);
}

#[test]
fn a_flood_that_is_answered_goes_with_what_is_closing() {
    let mut site = Site::new();
    let mut guests = guests(&mut site);
    flood(&mut site, LIMIT / 4, (0, SEEN), PATIENT + 1);
    site.sweeper.sweep(NOW, Some(PATIENT)).expect("sweep");
    guests.remove(&4);
    assert_eq!(site.left(), guests);
    assert_eq!(site.sweeper.stats.over.load(Relaxed), u64::from(LIMIT / 4) + 1);
}

#[test]
fn nobody_goes_early_who_is_young_or_alive_or_while_there_is_room() {
    for (flows, seen, age) in
        [(LIMIT / 4, (0, 0), PATIENT), (LIMIT / 4, (SEEN, SEEN), 100), (LIMIT / 8, (0, 0), 20)]
    {
        let mut site = Site::new();
        flood(&mut site, flows, seen, age);
        site.sweeper.sweep(NOW, Some(PATIENT)).expect("sweep");
        assert_eq!(site.left().len(), flows as usize, "{seen:?} {age}");
        // Whoever is only too young will not be for long.
        let full = u64::from(flows * 3) >= u64::from(LIMIT / 4 * 3);
        let again = full && age == PATIENT;
        assert_eq!(site.sweeper.fill(&site.sweeper.counted) >= site.sweeper.alarm, again, "{seen:?} {age}");
    }
}

#[test]
fn one_family_full_costs_the_other_nothing() {
    let mut site = Site::new();
    flood(&mut site, LIMIT / 4, (0, 0), 20);
    let other = flow::<Ip6>(17, 1, DNAT);
    put(&mut site.sweeper.tables.v6, &other, (0, 0), 20);
    site.sweeper.sweep(NOW, Some(PATIENT)).expect("sweep");
    assert!(site.left().is_empty());
    assert!(site.sweeper.tables.v6.flows.get(&other.key(Side::Front), 0).is_ok());
}

#[test]
fn a_look_sweeps_when_the_table_fills_up_and_rests_when_it_cannot_help() {
    let mut site = Site::new();
    site.sweeper.look().expect("the first look sweeps, to know what is there");
    let idle = site.sweeper.rounds;
    site.sweeper.look().expect("look");
    assert_eq!(site.sweeper.rounds, idle, "nothing new: ten seconds of rest");
    // As many flows as fill three quarters, if each has four entries.
    count(&site, Reason::NewFlow, u64::from(LIMIT / 4));
    std::thread::sleep(Duration::from_millis(50));
    site.sweeper.look().expect("look");
    assert_eq!(site.sweeper.rounds, idle + 1, "it may be nearly full");
    count(&site, Reason::FlowTableFull, 1);
    std::thread::sleep(Duration::from_millis(50));
    site.sweeper.look().expect("look");
    assert_eq!(site.sweeper.rounds, idle + 2, "somebody was refused");
}

#[test]
fn empty_tables_are_gone_through_less_often_until_something_is_entered() {
    let mut site = Site::new();
    let look = |site: &mut Site| {
        site.sweeper.last = Instant::now().checked_sub(EVERY_QUIET).expect("up for a minute");
        site.sweeper.not_before = site.sweeper.last;
        site.sweeper.look().expect("look");
    };
    let every = |site: &Site| site.sweeper.every(&Counted::read(&site.sweeper.tables).expect("the counters"));
    for _ in 0..ALL_MARK {
        assert_eq!(every(&site), SOON, "until the marks count");
        look(&mut site);
    }
    assert_eq!(every(&site), EVERY_QUIET);
    for (reason, n) in [(Reason::NewFlow, 1), (Reason::Repaired, 1), (Reason::NewFlow, 2)] {
        count(&site, reason, n);
        assert_eq!(every(&site), EVERY, "{reason:?}");
        look(&mut site);
        assert_eq!(every(&site), EVERY_QUIET, "it has left already");
    }
    let young = Flow { last_seen: monotonic_seconds(), ..flow::<Ip4>(6, 7, DNAT).as_side(Side::Forward) };
    site.v4().flows.insert(young.key(Side::Forward), young, 0).expect("room");
    look(&mut site);
    assert_eq!(every(&site), EVERY, "there is a flow");
}

#[test]
fn a_straight_flow_keeps_the_entry_that_it_is_found_by() {
    let mut site = Site::new();
    let service = flow::<Ip4>(6, 7, DNAT);
    // Sent to the backend itself, with the same tuple.
    let alias_port = NetPort::new(20_000);
    let straight = Flow { vip: service.backend, vip_port: service.backend_port, alias_port, ..service };
    put(site.v4(), &service, (SEEN, SEEN), 1_000_000);
    put(site.v4(), &straight, (SEEN, SEEN), 0);
    site.sweeper.sweep(NOW, None).expect("sweep");
    let is_there = |site: &Site, flow: &Flow<Ip4>, side| {
        site.sweeper.tables.v4.flows.get(&flow.key(side), 0).is_ok_and(|entry| entry.same_origin(flow))
    };
    assert!(is_there(&site, &service, Side::Forward));
    assert!(!is_there(&site, &service, Side::Front) && !is_there(&site, &service, Side::Reply));
    // Both are over.
    put(site.v4(), &straight, (SEEN, SEEN), 1_000_000);
    for _ in 0..2 {
        site.sweeper.sweep(NOW, None).expect("sweep");
    }
    assert_eq!(site.left(), BTreeSet::new());
}

/// What the programs are told about the pair of addresses of a flow.
fn may_be(site: &Site, flow: &Flow<Ip4>, side: Side) -> bool {
    let array = |name| aya::maps::MapData::from_pin(site.bpffs.pins.map(name)).map(aya::maps::Map::Array);
    let marks = aya::maps::Array::<_, u32>::try_from(array("LB_MARK").expect("the marks")).expect("marks");
    let presence = array("LB_PRESENCE").expect("which marks count");
    let presence = aya::maps::Array::<_, Presence>::try_from(presence).expect("which marks count");
    let mark = marks.get(&flow.key(side).mark(), 0).expect("a mark");
    presence.get(&0, 0).expect("which marks count").may_be(mark)
}

#[test]
fn the_programs_need_not_look_up_what_no_sweep_has_met() {
    let mut site = Site::new();
    let addr = |last| std::net::Ipv4Addr::new(10, 0, 0, last).into();
    let between = |client, backend| Flow::<Ip4> {
        client: addr(client),
        vip: addr(200),
        backend: addr(backend),
        masq: addr(201),
        ..flow(6, 7, DNAT | MASQ)
    };
    let (there, gone, never) = (between(1, 2), between(3, 4), between(5, 6));
    let sides = [Side::Front, Side::Forward, Side::Back, Side::Reply];
    site.sweeper.marks.distrust().expect("a new agent's programs come");
    put(site.v4(), &there, (SEEN, SEEN), 0);
    for _ in 1..ALL_MARK {
        site.sweeper.sweep(NOW, None).expect("sweep");
        assert!(may_be(&site, &never, Side::Forward), "there may be programs that do not mark");
    }
    // The programs' own come by `Family::enter`'s rule.
    for side in sides {
        let entry = Flow { state: SEEN, last_seen: NOW, ..gone.as_side(side) };
        site.v4().enter(gone.key(side), entry, 0).expect("room");
    }
    for _ in 0..4 {
        site.sweeper.sweep(NOW, None).expect("sweep");
        for side in sides {
            assert!(may_be(&site, &there, side) && may_be(&site, &gone, side), "{side:?}");
        }
        assert!(!may_be(&site, &never, Side::Forward));
    }
    for side in sides {
        site.v4().flows.remove(&gone.key(side)).expect("it was there");
    }
    // Its marks still count in the two rounds after the last one that met it.
    for round in 1..=4 {
        site.sweeper.sweep(NOW, None).expect("sweep");
        assert_eq!(may_be(&site, &gone, Side::Forward), round < 2, "{round}");
        assert!(may_be(&site, &there, Side::Reply));
    }
    site.sweeper.marks.distrust().expect("another agent comes");
    assert!(may_be(&site, &never, Side::Forward));
}
