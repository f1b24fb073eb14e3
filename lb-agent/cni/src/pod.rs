//! Finds a pod's device on the host.

use crate::error::{Code, Result};
use lb_attach::snapshot::{self, Link, Snapshot};
use nix::sched::{CloneFlags, setns};
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// A pod's network namespace.
#[derive(Debug)]
pub(crate) struct Netns(File);

impl Netns {
    /// Opens the one that the runtime names.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let said = path.display();
        let file = File::open(path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                Code::ContainerUnknown.error(format!("there is no network namespace {said} (CNI_NETNS)"))
            }
            _ => Code::Environment.error(format!("cannot open CNI_NETNS, {said}")).because(error),
        })?;
        let here = File::open("/proc/thread-self/ns/net").and_then(|file| file.metadata());
        let same = here.and_then(|here| {
            let there = file.metadata()?;
            Ok((here.dev(), here.ino()) == (there.dev(), there.ino()))
        });
        match same {
            Ok(false) => Ok(Self(file)),
            Ok(true) => Err(Code::Environment.error(format!("CNI_NETNS, {said}, is the host's own"))),
            Err(error) => Err(Code::Io.error("cannot look at network namespaces").because(error)),
        }
    }

    /// The interfaces inside.
    fn links(&self) -> Result<Vec<Link>> {
        // A thread that has been elsewhere is of no more use.
        std::thread::scope(|scope| {
            let links = scope.spawn(|| {
                setns(&self.0, CloneFlags::CLONE_NEWNET).map_err(|error| {
                    Code::Environment
                        .error("cannot enter CNI_NETNS: is it a network namespace?")
                        .because(error)
                })?;
                snapshot::links()
                    .map_err(|error| Code::Kernel.error("cannot list the pod's interfaces").because(error))
            });
            links.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// A pod's interface, from the host's side.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// The host's end of its veth.
    Device(Link),
    /// It has none, and why.
    None(String),
    /// There is no such interface.
    Absent,
}

/// Looks for the host's end of the interface `ifname` of a pod. What the namespaces say counts, not names in a result.
pub(crate) fn find(netns: &Netns, ifname: &str, host: &Snapshot) -> Result<Found> {
    let inside = netns.links()?;
    let id = snapshot::namespace_id(&netns.0)
        .map_err(|error| Code::Kernel.error("cannot tell the pod's network namespace").because(error))?;
    Ok(other_end(&inside, ifname, id, &host.links))
}

fn other_end(inside: &[Link], ifname: &str, id: Option<i32>, host: &[Link]) -> Found {
    let none = |why: String| Found::None(format!("{why}: packets cannot be met on the host"));
    let Some(interface) = inside.iter().find(|link| link.name == ifname) else {
        return Found::Absent;
    };
    let kind = interface.kind.as_deref().unwrap_or("physical device");
    if kind != "veth" {
        return none(format!("{ifname} is no veth but a {kind}"));
    }
    let is_other_end = |link: &&Link| {
        link.kind.as_deref() == Some("veth")
            && Some(link.index) == interface.peer
            && link.peer == Some(interface.index)
            && link.peer_netns.is_some()
            && link.peer_netns == id
    };
    match host.iter().find(is_other_end) {
        Some(link) => Found::Device(link.clone()),
        None => none(format!("the other end of {ifname} is not in the host's network namespace")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, kind: &str, peer: u32, peer_netns: Option<i32>) -> Link {
        let (name, kind) = (name.into(), (!kind.is_empty()).then(|| kind.into()));
        Link { index, name, kind, peer: Some(peer), peer_netns, ..Link::default() }
    }

    #[test]
    fn only_the_other_end_will_do() {
        let inside = [
            link(1, "lo", "", 0, None),
            link(2, "eth0", "veth", 7, Some(0)),
            link(3, "net1", "macvlan", 4, Some(0)),
            link(4, "phys", "", 0, None),
            link(5, "far", "veth", 9, Some(1)),
        ];
        let host = [
            link(4, "eth0", "", 0, None),
            link(6, "veth6", "veth", 2, Some(3)),
            // The same indexes, but of another pod, or no veth at all.
            link(7, "veth7", "veth", 2, Some(2)),
            link(9, "veth9", "veth", 2, Some(2)),
        ];
        let why = |ifname, id| match other_end(&inside, ifname, id, &host) {
            Found::None(why) => why,
            Found::Absent => "absent".into(),
            Found::Device(link) => link.name,
        };
        assert_eq!(why("eth0", Some(2)), "veth7");
        for (ifname, id, words) in [
            ("eth0", Some(3), "the other end of eth0 is not in the host's"),
            ("eth0", None, "the other end of eth0 is not in the host's"),
            ("net1", Some(2), "net1 is no veth but a macvlan"),
            ("phys", Some(2), "phys is no veth but a physical device"),
            ("far", Some(2), "the other end of far"),
            ("eth1", Some(2), "absent"),
        ] {
            assert!(why(ifname, id).starts_with(words), "{ifname} {id:?}: {}", why(ifname, id));
        }
    }
}
