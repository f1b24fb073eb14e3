//! Against real maps and netfilter's real table, in a network namespace of the test's own.

use super::*;
use crate::kernel::netfilter::nft;
use crate::kernel::netfilter::testing::Namespace;
use crate::kernel::testing::Bpffs;
use crate::kernel::writer::MapWriter;
use crate::model::{self, Endpoint, EndpointSet, FrontendAddr, FrontendKind, Protocol, ServicePort};
use crate::store::ObjectName;
use crate::sync::{Diff, Writer as _};
use lb_common::addr::{Ip4, Ip6};
use std::collections::HashMap;
use std::sync::Arc;

const TCP: u8 = 6;

fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

fn connection(proto: u8, client: &str, service: &str, backend: &str, source: &str) -> Connection {
    Connection {
        original: Tuple { src: at(client), dst: at(service), proto },
        reply: Tuple { src: at(backend), dst: at(source), proto },
    }
}

fn serve(protocol: Protocol, addr: &str, backend: &str) -> (FrontendAddr, Arc<model::Frontend>) {
    let set = EndpointSet::Endpoints([Endpoint { addr: at(backend), local: true }].into_iter().collect());
    let service = ServicePort { service: ObjectName::new("default", addr), port: "".into() };
    let frontend = model::Frontend {
        service,
        kind: FrontendKind::ClusterIp,
        internal: set.clone(),
        external: set,
        affinity: None,
        masquerade_always: false,
        sources: None,
        lingering: Arc::default(),
    };
    (FrontendAddr::new(at(addr), protocol), frontend.into())
}

/// A DNS Service and a web Service in both families, and what netfilter translates to them.
fn services() -> Diff {
    let upserts = vec![
        serve(Protocol::Udp, "10.96.0.53:53", "10.42.0.5:5353"),
        serve(Protocol::Udp, "172.18.0.2:30053", "10.42.0.5:5353"),
        serve(Protocol::Tcp, "10.96.0.10:80", "10.42.0.6:8080"),
        serve(Protocol::Udp, "[fd00:96::53]:53", "[fd00:42::5]:5353"),
    ];
    Diff { upserts, deletes: vec![] }
}

fn flows<A: NodeAddr>(family: &Family<A>) -> HashMap<FlowKey<A>, Flow<A>> {
    family.flows.iter().map(Result::unwrap).collect()
}

fn tables(bpffs: &Bpffs) -> Tables {
    Tables::open(&bpffs.pins).expect("maps")
}

#[test]
fn datagrams_stay_with_netfilter_as_long_as_it_knows_them() {
    let (bpffs, _alone) = (Bpffs::with_flows(1024), Namespace::new());
    let conntrack = Conntrack::open().expect("netlink");
    let theirs = [
        connection(UDP, "10.42.0.9:40000", "10.96.0.53:53", "10.42.0.5:5353", "10.42.0.9:40000"),
        connection(UDP, "192.0.2.7:40000", "172.18.0.2:30053", "10.42.0.5:5353", "10.42.0.1:12345"),
        connection(UDP, "[fd00:42::9]:40000", "[fd00:96::53]:53", "[fd00:42::5]:5353", "[fd00:42::9]:40000"),
    ];
    // The client's port is one of the NodePorts: answers would look like requests.
    let masked = connection(UDP, "10.42.0.9:41000", "10.96.9.9:9", "10.42.0.7:9", "172.18.0.2:30053");
    let others = [
        connection(TCP, "10.42.0.9:40000", "10.96.0.10:80", "10.42.0.6:8080", "10.42.0.9:40000"),
        // To an endpoint that is gone; to no Service; not translated.
        connection(UDP, "10.42.0.9:40001", "10.96.0.53:53", "10.42.0.77:5353", "10.42.0.9:40001"),
        connection(UDP, "10.42.0.9:40002", "10.96.9.9:53", "10.42.0.5:5353", "10.42.0.9:40002"),
        connection(UDP, "10.42.0.9:40003", "10.42.0.5:5353", "10.42.0.5:5353", "10.42.0.9:40003"),
    ];
    for connection in theirs.iter().chain([&masked]).chain(&others) {
        conntrack.insert(connection, 100).unwrap_or_else(|e| panic!("{connection:?}: {e}"));
    }
    let guard = Guard::start(&bpffs.pins).expect("maps");
    let mut writer = Beside::new(MapWriter::new(tables(&bpffs), Vec::new(), Vec::new()), guard.clone());
    writer.adopt().expect("nothing yet");
    writer.apply(&services()).expect("write");

    let now = tables(&bpffs);
    let (v4, v6) = (flows(&now.v4), flows(&now.v6));
    assert_eq!((v4.len(), v6.len()), (3, 1), "{v4:?} {v6:?}");
    for connection in &theirs[..2] {
        let flow = v4[&key::<Ip4>(&connection.original)];
        assert_eq!(socket_addr(flow.backend, flow.backend_port), connection.reply.src);
        let dns = frontend(&now.v4, &connection.original).expect("a frontend");
        let slot = now.v4.slot(&SlotKey { set: dns.internal.id, index: 0 }).expect("a slot");
        assert_ne!(slot.backend_id, 0);
        assert_eq!((flow.backend_id, flow.backend_epoch), (slot.backend_id, slot.backend_epoch));
        assert_eq!((flow.side, flow.service), (Side::Foreign as u8, dns.service));
    }
    assert!(v4.contains_key(&key::<Ip4>(&masked.reply)));
    assert!(v6.contains_key(&key::<Ip6>(&theirs[2].original)));
    assert!(nft::has_table(nft::TRACKING).expect("an answer"), "netfilter is to go on");

    // The next agent knows of them, too.
    let mut foreign = Foreign::open(&bpffs.pins).expect("maps");
    assert_eq!((foreign.entered(), foreign.count().expect("a count")), (4, 5));
    conntrack.remove(&theirs[0].original).expect("removed");
    conntrack.remove(&masked.original).expect("removed");
    foreign.tidy().expect("a look");
    let left = flows(&now.v4);
    assert_eq!(left.keys().collect::<Vec<_>>(), [&key::<Ip4>(&theirs[1].original)]);
    assert_eq!(foreign.entered(), 2);
    for connection in theirs[1..].iter().chain(&others) {
        conntrack.remove(&connection.original).expect("removed");
    }
    foreign.tidy().expect("a look");
    assert_eq!(foreign.count().expect("a count"), 0);
    guard.found(0);
    assert!(!nft::has_table(nft::TRACKING).expect("an answer"));
    assert_eq!((flows(&now.v4).len(), flows(&now.v6).len()), (0, 0));
}

#[test]
fn a_flow_that_began_while_its_service_was_written_goes_back_to_netfilter() {
    let (bpffs, _alone) = (Bpffs::with_flows(1024), Namespace::new());
    let conntrack = Conntrack::open().expect("netlink");
    let mut writer = MapWriter::new(tables(&bpffs), Vec::new(), Vec::new());
    writer.adopt().expect("nothing yet");
    writer.apply(&services()).expect("write");
    let theirs = connection(UDP, "192.0.2.7:40000", "172.18.0.2:30053", "10.42.0.5:5353", "192.0.2.7:40000");
    conntrack.insert(&theirs, 100).expect("entered");
    // Our programs saw its second datagram first.
    let mut now = tables(&bpffs);
    let (backend, backend_port) = end::<Ip4>(at("10.42.1.9:5353"));
    let (masq, masq_port) = end::<Ip4>(at("10.42.0.0:11111"));
    let ours = Flow {
        backend,
        backend_port,
        masq,
        masq_port,
        flags: Flow::<Ip4>::DNAT | Flow::<Ip4>::MASQ_DONE,
        ..Flow::straight(&key::<Ip4>(&theirs.original), 1)
    };
    for side in [Side::Front, Side::Forward, Side::Back, Side::Reply] {
        now.v4.flows.insert(ours.key(side), ours.as_side(side), 0).expect("entered");
    }
    let mut foreign = Foreign::open(&bpffs.pins).expect("maps");
    let old = HashSet::from([at("10.96.0.53:53")]);
    foreign.after(&old).expect("a look");
    assert_eq!(flows(&now.v4).len(), 4, "a Service that was there before: the flow is ours");
    let seen = foreign.after(&HashSet::from([theirs.original.dst])).expect("a look");
    assert_eq!(seen, Seen { translated: 1, entered: 1 });
    let left = flows(&now.v4);
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(left[&key::<Ip4>(&theirs.original)].side, Side::Foreign as u8);
}
