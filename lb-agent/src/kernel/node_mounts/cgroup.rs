//! Which cgroup is the node's own, and where it is mounted: from the text of files in `/proc`.
//!
//! A node is a machine, or a container (k3d, kind) that shares the kernel with others. Programs belong on the cgroup
//! that holds all of the node's processes and, as far as that is possible, nobody else's: never one above it.

use std::path::PathBuf;

/// What the kernel says of the node's first process, as seen from that process's own namespaces.
#[derive(Clone, Copy, Debug)]
pub(super) struct FirstProcess<'a> {
    /// `/proc/1/cgroup`.
    pub(super) cgroup: &'a str,
    /// `/proc/1/mountinfo`.
    pub(super) mountinfo: &'a str,
    /// Whether it is in the cgroup namespace that the kernel started with.
    pub(super) initial_cgroup_ns: bool,
    /// The same of its process ids: a container's are its own.
    pub(super) initial_pid_ns: bool,
}

/// Where service managers put themselves, below the node's own cgroup: systemd, and k3d's entry point.
const MANAGERS: [&str; 2] = ["/init.scope", "/init"];

impl<'a> FirstProcess<'a> {
    /// The node's own cgroup, as a path in the cgroup2 hierarchy; `None` if the kernel has no such hierarchy.
    ///
    /// With a cgroup namespace of its own, its root. Otherwise that of a container's first process, less the part
    /// that its service manager has added; of a machine, the hierarchy's root.
    pub(super) fn own_cgroup(&self) -> Option<&'a str> {
        let of_first = self.cgroup.lines().find_map(|line| line.strip_prefix("0::"))?;
        if !self.initial_cgroup_ns || self.initial_pid_ns {
            return Some("/");
        }
        let own = MANAGERS.iter().find_map(|manager| of_first.strip_suffix(manager)).unwrap_or(of_first);
        Some(if own.is_empty() { "/" } else { own })
    }

    /// Whether the node shares that cgroup with others: a container of a host that manages containers by the old
    /// hierarchies (cgroup v1) and leaves them all in one cgroup of the new one.
    pub(super) fn is_shared(&self) -> bool {
        let v1 = |line: &'a str| {
            let mut fields = line.splitn(3, ':').skip(1);
            fields.next().is_some_and(|name| !name.is_empty()).then(|| fields.next()).flatten()
        };
        let own = self.own_cgroup();
        let apart = self.cgroup.lines().filter_map(v1).any(|path| path != "/" && Some(path) != own);
        !self.initial_pid_ns && self.initial_cgroup_ns && apart
    }

    /// Directories where a cgroup can be found, if anywhere; the last mounted first, since it may hide others.
    pub(super) fn visible_at(&self, cgroup: &str) -> Vec<PathBuf> {
        let mut found: Vec<_> =
            self.mountinfo.lines().filter_map(|line| Mount::parse(line)?.place_of(cgroup)).collect();
        found.reverse();
        found
    }
}

/// A cgroup2 mount.
struct Mount {
    /// The cgroup that is at its root.
    root: String,
    at: String,
}

impl Mount {
    /// `36 35 98:0 /root /mount/point rw,noatime master:1 - cgroup2 source options`
    fn parse(line: &str) -> Option<Self> {
        let (mount, filesystem) = line.split_once(" - ")?;
        if filesystem.split(' ').next()? != "cgroup2" {
            return None;
        }
        let mut fields = mount.split(' ').skip(3);
        Some(Self { root: unescape(fields.next()?), at: unescape(fields.next()?) })
    }

    fn place_of(&self, cgroup: &str) -> Option<PathBuf> {
        let root = self.root.trim_end_matches('/');
        let below = cgroup.strip_prefix(root)?;
        // "/.." is outside of the namespace, and "/ab" is not below "/a".
        let ours = !self.root.starts_with("/..") && (below.is_empty() || below.starts_with('/'));
        ours.then(|| {
            PathBuf::from(format!("{}{}", self.at.trim_end_matches('/'), below.trim_end_matches('/')))
        })
        .map(|path| if path.as_os_str().is_empty() { "/".into() } else { path })
    }
}

/// The kernel writes blanks and the like in paths as octal numbers.
fn unescape(field: &str) -> String {
    let mut text = String::new();
    let mut rest = field;
    while let Some((before, after)) = rest.split_once('\\') {
        text += before;
        match after.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                text.push(byte.into());
                rest = &after[3..];
            }
            None => {
                text.push('\\');
                rest = after;
            }
        }
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Case {
        name: &'static str,
        cgroup: &'static str,
        mountinfo: &'static str,
        initial: (bool, bool),
        own: Option<&'static str>,
        at: &'static [&'static str],
        shared: bool,
    }

    const SYSTEMD: &str = "\
24 30 0:22 / /proc rw,nosuid shared:14 - proc proc rw
26 25 0:23 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate
27 25 0:24 / /sys/fs/bpf rw,nosuid,nodev,noexec,relatime shared:5 - bpf bpf rw,mode=700
";
    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    const CASES: &[Case] = &[
        Case {
            name: "a machine with systemd",
            cgroup: "0::/init.scope\n",
            mountinfo: SYSTEMD,
            initial: (true, true),
            own: Some("/"),
            at: &["/sys/fs/cgroup"],
            shared: false,
        },
        Case {
            name: "a machine with both hierarchies",
            cgroup: "12:memory:/init.scope\n1:name=systemd:/init.scope\n0::/init.scope\n",
            mountinfo: HYBRID,
            initial: (true, true),
            own: Some("/"),
            at: &["/sys/fs/cgroup/unified"],
            shared: false,
        },
        Case {
            name: "a machine with the old hierarchies alone",
            cgroup: "4:memory:/\n1:name=systemd:/init.scope\n0::/\n",
            mountinfo: "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
            initial: (true, true),
            own: Some("/"),
            at: &[],
            shared: false,
        },
        Case {
            name: "a kernel without cgroup2",
            cgroup: "4:memory:/\n",
            mountinfo: "",
            initial: (true, true),
            own: None,
            at: &[],
            shared: false,
        },
        Case {
            name: "k3d, cgroup v2, a cgroup namespace of its own",
            cgroup: "0::/init\n",
            mountinfo: "700 690 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime - cgroup2 cgroup rw,nsdelegate\n",
            initial: (false, false),
            own: Some("/"),
            at: &["/sys/fs/cgroup"],
            shared: false,
        },
        Case {
            name: "kind, cgroup v2, a cgroup namespace of its own",
            cgroup: "0::/init.scope\n",
            mountinfo: "\
700 690 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime - cgroup2 cgroup rw,nsdelegate
701 700 0:26 /kubelet.slice /sys/fs/cgroup/kubelet rw,relatime - cgroup2 cgroup rw,nsdelegate
",
            initial: (false, false),
            own: Some("/"),
            at: &["/sys/fs/cgroup"],
            shared: false,
        },
        Case {
            name: "docker --cgroupns=host, cgroup v2, systemd as its driver",
            cgroup: "0::/system.slice/docker-4f2a.scope/init\n",
            mountinfo: "700 690 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate\n",
            initial: (true, false),
            own: Some("/system.slice/docker-4f2a.scope"),
            at: &["/sys/fs/cgroup/system.slice/docker-4f2a.scope"],
            shared: false,
        },
        Case {
            name: "docker --cgroupns=host, cgroup v2, only its own part mounted",
            cgroup: "0::/docker/4f2a\n",
            mountinfo: "700 690 0:26 /docker/4f2a /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate\n",
            initial: (true, false),
            own: Some("/docker/4f2a"),
            at: &["/sys/fs/cgroup"],
            shared: false,
        },
        Case {
            name: "k3d on a host with cgroup v1 and cgroup2 beside it",
            cgroup: "12:memory:/docker/4f2a\n1:name=systemd:/docker/4f2a\n0::/system.slice/containerd.service\n",
            mountinfo: "\
710 700 0:32 /docker/4f2a /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw,memory
",
            initial: (true, false),
            own: Some("/system.slice/containerd.service"),
            at: &[],
            shared: true,
        },
        Case {
            name: "a container in a container, whose mounts come from farther out",
            cgroup: "0::/\n",
            mountinfo: "\
700 690 0:26 /../.. /host/cgroup rw - cgroup2 cgroup rw
701 690 0:26 / /sys/fs/cgroup rw shared:7 master:3 - cgroup2 cgroup rw
702 690 0:26 / /a\\040b rw - cgroup2 cgroup rw
",
            initial: (false, false),
            own: Some("/"),
            at: &["/a b", "/sys/fs/cgroup"],
            shared: false,
        },
    ];

    #[test]
    fn the_nodes_own_cgroup_is_found() {
        for case in CASES {
            let first = FirstProcess {
                cgroup: case.cgroup,
                mountinfo: case.mountinfo,
                initial_cgroup_ns: case.initial.0,
                initial_pid_ns: case.initial.1,
            };
            assert_eq!(first.own_cgroup(), case.own, "{}", case.name);
            let at = case.own.map(|own| first.visible_at(own)).unwrap_or_default();
            assert_eq!(at, case.at.iter().map(PathBuf::from).collect::<Vec<_>>(), "{}", case.name);
            assert_eq!(first.is_shared(), case.shared, "{}", case.name);
        }
    }

    #[test]
    fn a_cgroup_is_below_a_mount_by_whole_names() {
        let mount = |root: &str, at: &str| Mount { root: root.into(), at: at.into() };
        for (root, at, cgroup, expected) in [
            ("/", "/cg", "/", Some("/cg")),
            ("/", "/", "/", Some("/")),
            ("/", "/cg", "/a/b", Some("/cg/a/b")),
            ("/a", "/cg", "/a", Some("/cg")),
            ("/a", "/cg", "/a/b", Some("/cg/b")),
            ("/a", "/cg", "/ab", None),
            ("/a", "/cg", "/", None),
            ("/../x", "/cg", "/", None),
        ] {
            let place = mount(root, at).place_of(cgroup);
            assert_eq!(place, expected.map(PathBuf::from), "{cgroup} in {root} at {at}");
        }
    }
}
