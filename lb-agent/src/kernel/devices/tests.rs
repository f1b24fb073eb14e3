//! Programs on real devices, both ways that there are.

use super::*;
use crate::kernel::programs::{self, Features, OBJECT};
use crate::kernel::testing::{Bpffs, WHY_ROOT};
use aya::programs::tc::qdisc_detach_program;
use aya::programs::{SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use lb_attach::attach::{self, Hook};
use lb_attach::netlink::Netlink;
use lb_attach::pins::Place;
use lb_attach::syscall;
use netlink_packet_core::NLM_F_DUMP;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::sched::{CloneFlags, unshare};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::TcMessage;
use rtnetlink::{LinkUnspec, LinkVeth, LinkVxlan};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd as _;

/// A veth in a network namespace of this thread's own.
fn veth(name: &str) -> Link {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().expect("a runtime");
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().expect("netlink");
        tokio::spawn(connection);
        let peer = format!("{name}-peer");
        handle.link().add(LinkVeth::new(name, &peer).up().build()).execute().await.expect("a veth");
        handle.link().set(LinkUnspec::new_with_name("lo").up().build()).execute().await.expect("lo");
    });
    let snapshot = Snapshot::take().expect("the devices");
    snapshot.links.into_iter().find(|link| link.name == name).expect("the veth")
}

/// A vxlan device above another that has those addresses, in a network namespace of this thread's own.
fn vxlan_above(addresses: &[IpAddr], local: Option<Ipv4Addr>) -> Snapshot {
    let below = veth("below").index;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().expect("a runtime");
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().expect("netlink");
        tokio::spawn(connection);
        for ip in addresses {
            handle.address().add(below, *ip, 24).execute().await.expect("an address");
        }
        let vxlan = LinkVxlan::new("vx", 1).port(8472).dev(below);
        let vxlan = match local {
            Some(ip) => vxlan.local(ip),
            None => vxlan,
        };
        handle.link().add(vxlan.build()).execute().await.expect("a vxlan device");
    });
    Snapshot::take().expect("the devices")
}

#[test]
fn overlays_are_carried_between_their_own_addresses_or_those_of_the_device_below() {
    let [v4, other] = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];
    let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    let port = NetPort::new(8472);
    let carried = |local| {
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect(WHY_ROOT);
            let snapshot = vxlan_above(&[v4.into(), v6.into()], local);
            carrier(snapshot.links.iter().filter_map(|link| link.vxlan.as_ref()), &snapshot)
        })
        .join()
        .expect("in a namespace of its own")
    };
    let below = Carrier { port, addr4: v4.into(), addr6: v6.into(), ..Carrier::default() };
    assert_eq!(carried(None), below);
    assert_eq!(carried(Some(other)), Carrier { port, addr4: other.into(), ..Carrier::default() });
}

fn load(pins: &Pins) -> Ebpf {
    let mut loader = EbpfLoader::new();
    for map in programs::MAPS {
        loader.map_pin_path(map, pins.map(map));
    }
    let mut ebpf = loader.load(OBJECT).expect(WHY_ROOT);
    for hook in Hook::BOTH {
        let program: &mut SchedClassifier =
            ebpf.program_mut(hook.program()).expect("a program").try_into().expect("of this kind");
        program.load().expect("load");
    }
    ebpf
}

fn each_way(way: impl Fn(Pins, bool) + Sync) {
    for tcx in [true, false] {
        // Kernels before 6.6 have the one way only; from then on both are tested.
        if tcx && !attach::has_tcx() {
            continue;
        }
        let bpffs = Bpffs::new();
        unshare(CloneFlags::CLONE_NEWNET).expect(WHY_ROOT);
        // In a thread of its own, which gives up what the DaemonSet's agent does not have.
        std::thread::scope(|scope| {
            let container = scope.spawn(|| {
                keep_the_agents_capabilities();
                way(bpffs.pins.clone(), tcx);
            });
            container.join().expect("in a container's thread");
        });
    }
}

/// Those of `manifests/base`.
fn keep_the_agents_capabilities() {
    // Of linux/capability.h, which neither `libc` nor `nix` has.
    const CAP_NET_ADMIN: u32 = 12;
    const CAP_PERFMON: u32 = 38;
    const CAP_BPF: u32 = 39;
    const LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;
    const KEPT: u64 = 1 << CAP_NET_ADMIN | 1 << CAP_PERFMON | 1 << CAP_BPF;
    let header: [u32; 2] = [LINUX_CAPABILITY_VERSION_3, 0]; // this thread
    let (low, high) = (KEPT as u32, (KEPT >> 32) as u32);
    // Effective, permitted, inheritable: of the lower 32, then of the others.
    let sets: [u32; 6] = [low, low, 0, high, high, 0];
    // SAFETY: the kernel reads both, which have the sizes of this version.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn what_is_attached_is_known_replaced_and_taken_off() {
    each_way(|pins, tcx| {
        let link = veth("pod");
        let features = Features { tcx, flags: 0 };
        let entry = Entry { flags: Entry::POD, netns: 3, ..Entry::default() };
        let turn = pins.lock().expect("our turn");
        assert!(Attacher::open(&turn, &pins, tcx).expect("open").is_none(), "nothing is pinned yet");
        drop(turn);
        let mut first = programs::pin(&mut load(&pins), &pins, features, Place::Main).expect("pin");
        let both = Hook::BOTH.to_vec();
        assert_eq!(first.missing(&link).expect("look"), both, "tcx {tcx}: nothing is attached yet");
        for again in 0..2 {
            first.attach(&pins.lock().expect("our turn"), &link, entry).expect("attach");
            assert_eq!(first.missing(&link).expect("look"), [], "tcx {tcx}, {again}");
            assert_eq!(first.entry(link.index), Some(entry));
        }
        assert_eq!(first.served().into_iter().collect::<Vec<_>>(), [link.index]);

        // Others come, with programs of their own.
        let mut second = programs::pin(&mut load(&pins), &pins, features, Place::Main).expect("pin");
        assert_eq!(second.missing(&link).expect("look"), both, "tcx {tcx}: the old programs are on it");
        second.attach(&pins.lock().expect("our turn"), &link, entry).expect("attach");
        assert_eq!(second.missing(&link).expect("look"), [], "tcx {tcx}: replaced");
        assert_eq!(first.missing(&link).expect("look"), both, "tcx {tcx}: not beside them");

        // Somebody takes one off.
        if tcx {
            let pin = pins.link(&format!("tc-{}-egress", link.index));
            syscall::link_detach(syscall::obj_get(&pin).expect("the link").as_fd()).expect("detach");
        } else {
            qdisc_detach_program("pod", TcAttachType::Egress, "egress").expect("detach");
        }
        assert_eq!(second.missing(&link).expect("look"), [Hook::Egress], "tcx {tcx}");
        second.attach(&pins.lock().expect("our turn"), &link, entry).expect("attach");
        assert_eq!(second.missing(&link).expect("look"), [], "tcx {tcx}: back");

        second.detach(&pins.lock().expect("our turn"), link.index, Some("pod")).expect("detach");
        assert_eq!(second.missing(&link).expect("look"), both, "tcx {tcx}");
        assert_eq!((second.entry(link.index), second.served().len()), (None, 0));
        // Once more, as for a device that is gone.
        second.detach(&pins.lock().expect("our turn"), link.index, None).expect("detach");
        let gone = Link { name: "gone".into(), index: 999, ..link };
        assert!(second.missing(&gone).map_or(true, |missing| missing == both), "tcx {tcx}");
    });
}

/// How many filters hang there.
fn filters(link: &Link, parent: u32) -> usize {
    let mut question = TcMessage::default();
    question.header.index = link.index.cast_signed();
    question.header.parent = parent.into();
    let mut all = 0;
    let netlink = Netlink::open(NETLINK_ROUTE).expect("netlink");
    let asked = netlink.ask(NLM_F_DUMP, RouteNetlinkMessage::GetTrafficFilter(question), |answer| {
        // Each priority has a head of its own, without a handle.
        if let RouteNetlinkMessage::NewTrafficFilter(filter) = answer {
            all += usize::from(filter.header.handle != 0.into());
        }
    });
    asked.expect("list the filters");
    all
}

/// An agent and plugins see a device at the same moment.
#[test]
fn many_at_once_attach_one_program() {
    each_way(|pins, tcx| {
        let link = veth("pod");
        let features = Features { tcx, flags: 0 };
        drop(programs::pin(&mut load(&pins), &pins, features, Place::Main).expect("pin"));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let turn = pins.lock().expect("our turn");
                    let attacher = Attacher::open(&turn, &pins, tcx).expect("open");
                    attacher.expect("pinned").attach(&turn, &link, Entry::default()).expect("attach");
                });
            }
        });
        for (hook, parent) in [(Hook::Ingress, 0xffff_fff2), (Hook::Egress, 0xffff_fff3)] {
            let attached = match tcx {
                true => syscall::tcx_programs(link.index, hook).expect("look").len(),
                false => filters(&link, parent),
            };
            assert_eq!(attached, 1, "tcx {tcx}: {hook:?}");
        }
    });
}
