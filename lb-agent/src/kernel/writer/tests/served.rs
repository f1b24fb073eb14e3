//! The bits of served addresses.

use super::*;
use crate::kernel::served::Masquerading;

/// No frontend is there that the programs do not look for.
pub(super) fn all_are_known(tables: &Tables) {
    fn of<A: NodeAddr>(family: &Family<A>) {
        for key in family.frontends.keys().map(Result::unwrap) {
            assert!(family.served.is_known(key.addr), "{key:?}");
        }
    }
    of(&tables.v4);
    of(&tables.v6);
}

fn vip(n: u16) -> FrontendAddr {
    let [high, low] = n.to_be_bytes();
    at(&format!("10.96.{high}.{low}:80"), Protocol::Tcp)
}

fn is_known(tables: &Tables, at: FrontendAddr) -> bool {
    let std::net::IpAddr::V4(ip) = at.addr().ip() else { unreachable!("IPv4") };
    tables.v4.served.is_known(Ip4::from(ip))
}

/// How many of those that are not served the programs look for all the same.
fn in_vain(tables: &Tables) -> usize {
    (0..5000).filter(|n| is_known(tables, vip(*n))).count()
}

#[test]
fn addresses_that_are_served_no_more_are_forgotten_when_they_are_many() {
    let bpffs = Bpffs::new();
    let (mut writer, _) = bpffs.writer();
    let others: Vec<_> = (0..1500).map(|n| at(&format!("10.97.0.1:{}", n + 1), Protocol::Tcp)).collect();
    let web = |at: FrontendAddr| (at, Arc::new(frontend("web", EndpointSet::Reject)));
    let upserts = (0..3000).map(vip).chain(others.clone()).map(web).collect();
    writer.apply(&Diff { upserts, deletes: vec![] }).expect("write");
    all_are_known(&writer.tables);
    let tables = bpffs.tables();
    assert!(in_vain(&tables) >= 3000);
    // As many as are left, at most: a look-up in vain now and then.
    writer.apply(&Diff { upserts: vec![], deletes: (0..1500).map(vip).collect() }).expect("delete");
    assert!(in_vain(&tables) >= 3000);
    writer.apply(&Diff { upserts: vec![], deletes: (1500..3000).map(vip).collect() }).expect("delete");
    all_are_known(&writer.tables);
    assert!(in_vain(&tables) < 10, "{}", in_vain(&tables));
    put(&mut writer, vip(7), frontend("web", EndpointSet::Reject));
    assert!(is_known(&tables, vip(7)));
}

/// By an agent that did not set the bits, or of another version's tables.
#[test]
fn what_is_there_already_is_found() {
    let bpffs = Bpffs::new();
    let (mut writer, _) = bpffs.writer();
    put(&mut writer, vip(1), frontend("web", EndpointSet::Reject));
    drop(writer);
    let mut tables = bpffs.tables();
    tables.v4.served.renew(std::iter::empty::<Ip4>()).expect("clear");
    let value = maps::Frontend::default();
    let v6: Ip6 = "fd00:96::1".parse::<std::net::Ipv6Addr>().expect("an address").into();
    tables.v6.frontends.insert(FrontendKey::new(v6, NetPort::new(80), 6), value, 0).expect("write");
    assert!(!is_known(&tables, vip(1)) && !tables.v6.served.is_known(v6));
    let uplink = maps::Device { flags: maps::Device::MASQUERADE, ..maps::Device::default() };
    tables.devices.insert(7, uplink, 0).expect("write");
    tables.devices.insert(8, maps::Device::default(), 0).expect("write");
    let masquerades = |index| Masquerading::is_known(&bpffs.pins, index);
    assert!(!masquerades(7));
    bpffs.tables().complete(&bpffs.pins).expect("as at a start");
    all_are_known(&tables);
    assert_eq!(in_vain(&tables), 1);
    assert!(masquerades(7) && !masquerades(8));
}
