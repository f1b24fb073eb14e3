//! No room, and agents that were killed at the wrong moment.

use super::*;

fn upserts(list: Vec<(FrontendAddr, Frontend)>) -> Diff {
    let upserts = list.into_iter().map(|(at, frontend)| (at, frontend.into())).collect();
    Diff { upserts, deletes: vec![] }
}

fn many(port: u16, count: u8) -> EndpointSet {
    let list: Vec<_> = (1..=count).map(|n| format!("10.42.1.{n}:{port}")).collect();
    endpoints(&list.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn what_does_not_fit_leaves_nothing_and_stops_nobody() {
    // Twelve endpoints take three entries.
    let bpffs = Bpffs::sized(&[("LB_SLOT4", 5)]);
    let (mut writer, _) = bpffs.writer();
    let [a, b, c] = ["10.96.0.1:53", "10.96.0.2:53", "10.96.0.3:53"].map(|ip| at(ip, Protocol::Udp));
    put(&mut writer, a, frontend("a", many(1, 12)));
    let before = bpffs.state();
    let live = |state: &State, epochs: &[u32]| {
        // Ids that were given back have other epochs; those in use have not.
        state.slot4.values().all(|slot| epochs[slot.backend_id as usize] == slot.backend_epoch)
    };

    // Nor does it if it is tried again and again, and it changes nothing of what was there.
    let big = Frontend {
        lingering: ["10.42.9.9:53".parse().expect("an address")].into(),
        ..frontend("b", many(2, 12))
    };
    for _ in 0..3 {
        let error = writer.apply(&upserts(vec![(b, big.clone())])).expect_err("there is no room");
        assert!(format!("{error:#}").contains("write the endpoints 10.42.1.9:2, 10.42.1.10:2"), "{error:#}");
        let mut after = bpffs.state();
        assert!(live(&after, &after.epochs));
        after.epochs.clone_from(&before.epochs);
        assert_eq!(after, before);
    }
    // A frontend that has a smaller set keeps it.
    put(&mut writer, b, frontend("b", many(2, 1)));
    let before = bpffs.state();
    assert!(writer.apply(&upserts(vec![(b, big.clone())])).is_err());
    assert_eq!(bpffs.state().front4, before.front4);
    assert_eq!(bpffs.state().slot4, before.slot4);

    // Those behind it are served, and what is deleted makes room.
    let c_too = upserts(vec![(b, big.clone()), (c, frontend("c", many(3, 1)))]);
    let diff = Diff { deletes: vec![a], ..c_too };
    assert!(writer.apply(&diff).is_err());
    let state = bpffs.state();
    assert_eq!(state.slot4.len(), 2, "a is gone, b is as it was, c is there");
    assert_eq!(state.names.len(), 2);
    writer.apply(&diff).expect("now there is room");
    let state = bpffs.state();
    assert_eq!(state.slot4.len(), 13);
    assert!(live(&state, &state.epochs));
    // The accounts are right: all of it goes again.
    writer.apply(&Diff { upserts: vec![], deletes: vec![b, c] }).expect("delete");
    let state = bpffs.state();
    assert_eq!((state.front4.len(), state.slot4.len(), state.names.len()), (0, 0, 0));
}

#[test]
fn a_cluster_ip_without_room_for_its_address_is_tried_again() {
    // Each takes two: the port and the address.
    let bpffs = Bpffs::sized(&[("LB_FRONT4", 3)]);
    let (mut writer, _) = bpffs.writer();
    let [a, b] = ["10.96.0.1:80", "10.96.0.2:80"].map(|ip| at(ip, Protocol::Tcp));
    put(&mut writer, a, frontend("a", many(1, 1)));
    let before = bpffs.state();
    let diff = upserts(vec![(b, frontend("b", many(1, 1)))]);
    let address = |at: FrontendAddr| match at.addr().ip() {
        std::net::IpAddr::V4(ip) => FrontendKey::address(ip.into()),
        std::net::IpAddr::V6(ip) => panic!("{ip}"),
    };
    // The port is served all the same.
    for _ in 0..2 {
        let error = writer.apply(&diff).expect_err("there is no room");
        assert!(format!("{error:#}").contains("write the ClusterIP 10.96.0.2"), "{error:#}");
        let state = bpffs.state();
        assert_eq!((state.front4.len(), state.slot4.len(), state.names.len()), (3, 2, 2));
        assert!(!state.front4.contains_key(&address(b)));
    }
    // Nothing is left of it if it goes without having had its address.
    delete(&mut writer, b);
    assert_eq!(bpffs.state().front4, before.front4);
    assert_eq!((bpffs.state().slot4, bpffs.state().names), (before.slot4, before.names));

    assert!(writer.apply(&diff).is_err());
    let same_and_room = Diff { deletes: vec![a], ..diff };
    writer.apply(&same_and_room).expect("there is room");
    let state = bpffs.state();
    assert_eq!(state.front4.len(), 2);
    assert!(state.front4.contains_key(&address(b)));
}

/// Flows of a former life of the endpoint do not hide those of now.
#[test]
fn a_lingering_endpoint_is_found_by_the_flows_of_its_epoch() {
    let bpffs = Bpffs::new();
    let dns = at("10.96.0.10:53", Protocol::Udp);
    let (mut writer, _) = bpffs.writer();
    put(&mut writer, dns, frontend("dns", endpoints(&["10.42.0.5:53"])));
    let slot = *bpffs.state().slot4.values().next().expect("a slot");
    let service = *bpffs.state().names.keys().next().expect("a name");
    // It went and came back, twice; then it terminates.
    for _ in 0..2 {
        put(&mut writer, dns, frontend("dns", EndpointSet::Reject));
        put(&mut writer, dns, frontend("dns", endpoints(&["10.42.0.5:53"])));
    }
    let now = *bpffs.state().slot4.values().next().expect("a slot");
    assert_eq!((now.backend_id, now.backend_epoch), (slot.backend_id, slot.backend_epoch + 2));
    let lingers = |set: &[&str]| Frontend {
        lingering: ["10.42.0.5:53".parse().expect("an address")].into(),
        ..frontend("dns", endpoints(set))
    };
    put(&mut writer, dns, lingers(&["10.42.0.6:53"]));
    // As many old ones as it takes for one of them to be met last.
    for port in 0..64 {
        let flow = maps::Flow {
            backend: slot.addr,
            backend_port: slot.port,
            backend_id: slot.backend_id,
            backend_epoch: slot.backend_epoch + if port == 7 { 2 } else { port as u32 % 2 },
            service,
            client_port: NetPort::new(port),
            ..maps::Flow::default()
        };
        bpffs.tables().v4.flows.insert(flow.key(maps::Side::Front), flow, 0).expect("a flow");
    }
    drop(writer);
    let (mut writer, _) = bpffs.writer();
    put(&mut writer, dns, lingers(&["10.42.0.6:53"]));
    assert_eq!(bpffs.state().epochs[now.backend_id as usize], now.backend_epoch, "it still serves");
    put(&mut writer, dns, frontend("dns", endpoints(&["10.42.0.6:53"])));
    assert_eq!(bpffs.state().epochs[now.backend_id as usize], now.backend_epoch + 1, "its flows move on");
}

#[test]
fn names_that_nobody_uses_go_with_their_ranges() {
    let bpffs = Bpffs::new();
    let web = at("10.96.0.10:80", Protocol::Tcp);
    let (mut writer, _) = bpffs.writer();
    put(&mut writer, web, frontend("web", EndpointSet::Reject));
    drop(writer);
    let before = bpffs.state();
    let (id, name) = before.names.iter().next().expect("a name");
    // Killed before its first frontend was written, or after its last was deleted.
    let mut tables = bpffs.tables();
    tables.names.insert(id + 5, ServiceName { name: [b'x'; 64], ..*name }, 0).expect("a name");
    for service in [id + 5, id + 6] {
        let key = aya::maps::lpm_trie::Key::new(40, maps::SourceKey { service, addr: Ip4::default() });
        tables.v4.sources.insert(&key, 1, 0).expect("a range");
    }
    assert_ne!(bpffs.state(), before);
    let _ = bpffs.writer();
    assert_eq!(bpffs.state(), before);
}
