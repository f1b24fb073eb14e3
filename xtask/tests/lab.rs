//! The lab itself: who reaches whom, that labs do not see each other, and that nothing is left behind.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xtask::lab::{Host, Lab};
use xtask::probe::{Ask, Bulk, Churn, Direction, Failure, Ping, failures, names};

/// A lab whose pods, nodes and outside hosts all serve TCP and UDP on port 8080.
fn lab(name: &str) -> Result<Lab> {
    Lab::builder(name).pods(2).build().context("building a lab takes root, cgroup2 and network namespaces")
}

/// Asks `to` over TCP and UDP in both families; everything must be answered by it, to the client's own address.
fn expect_answers(from: &Host, to: &Host) -> Result<()> {
    for (at, own) in to.at(8080).into_iter().zip(from.ips()) {
        for ask in [Ask::tcp(at), Ask::udp(at), Ask::udp(at).unconnected()] {
            for answer in from.ask(&ask.clone().count(2))? {
                let reply = answer.0.map_err(|e| anyhow::anyhow!("{} → {}: {e}", from.name(), to.name()))?;
                ensure!(reply.name == to.name() && reply.from == at, "{reply:?}");
                ensure!(
                    reply.peer.map(|p| p.ip()) == Some(own),
                    "{} is seen as {:?}",
                    from.name(),
                    reply.peer
                );
                ensure!(reply.local == Some(at), "{reply:?}");
            }
        }
        ensure!(from.pings(at.ip())?, "{} does not reach {} by ping", from.name(), at.ip());
    }
    Ok(())
}

#[test]
fn pods_reach_pods_and_clients_reach_nodes() -> Result<()> {
    let lab = lab("reach")?;
    let hosts = lab.hosts();
    let servers = hosts.iter().map(|h| h.serve_ports(&[8080], &[8080])).collect::<Result<Vec<_>>>()?;
    let (a, b, c) = (lab.pod(0, 0), lab.pod(0, 1), lab.pod(1, 0));
    expect_answers(&a, &b).context("same node")?;
    expect_answers(&a, &c).context("over the overlay")?;
    expect_answers(&c, &b).context("over the overlay, back")?;
    expect_answers(lab.client(), lab.node(0))?;
    expect_answers(lab.client(), lab.node(1))?;
    expect_answers(lab.inet(), lab.client())?;
    expect_answers(lab.node(0), lab.node(1))?;
    drop(servers);
    let gone = a.ask_tcp(b.at(8080)[0], 1)?;
    ensure!(gone[0].failure() == Some(&Failure::Refused), "the server went with its handle: {gone:?}");
    Ok(())
}

#[test]
fn overlay_carries_bulk_data_and_its_own_mtu() -> Result<()> {
    let lab = lab("bulk")?;
    let (client, server) = (lab.pod(0, 0), lab.pod(1, 0));
    let _running = server.serve_ports(&[8080], &[])?;
    for at in server.at(8080) {
        for direction in [Direction::Up, Direction::Down] {
            let report = client.bulk(&Bulk::new(at, 20_000_000, direction))?;
            ensure!(report.ok, "{at} {direction:?}: {report:?}");
        }
        let churn = client.churn(&Churn::new(at, 300, 4))?;
        ensure!(churn.ok == 300 && churn.errors.is_empty(), "{churn:?}");
    }
    let [v4, v6] = server.ips();
    let fits = |ip, size| client.ping(&Ping::new(ip).unfragmented(size));
    ensure!(fits(v4, 1450 - 28)?[0].0.is_ok(), "1450 bytes go through in IPv4");
    ensure!(fits(v4, 1451 - 28)?[0].failure() == Some(&Failure::TooBig));
    ensure!(fits(v6, 1430 - 48)?[0].0.is_ok(), "1430 bytes go through in IPv6");
    let one_more = fits(v6, 1431 - 48)?;
    ensure!(one_more[0].failure() == Some(&Failure::TooBig), "the overlay's MTU is 1430: {one_more:?}");
    Ok(())
}

#[test]
fn pods_do_not_reach_the_outside_unmasqueraded() -> Result<()> {
    let lab = lab("outside")?;
    let _server = lab.inet().serve_ports(&[8080], &[8080])?;
    for at in lab.inet().at(8080) {
        ensure!(lab.node(0).ask_tcp(at, 1)?[0].0.is_ok(), "the node itself does reach {at}");
        let short = Duration::from_millis(300);
        for ask in [Ask::tcp(at), Ask::udp(at)] {
            let answers = lab.pod(0, 0).ask(&ask.timeout(short))?;
            ensure!(answers[0].0.is_err(), "{at} answered a pod that is not masqueraded: {answers:?}");
        }
    }
    for service in ["203.0.113.1", "203.0.113.129", "2001:db8:3::1"] {
        // They come to n1, which has no such address and sends them back: the hop limit ends it.
        let ip: IpAddr = service.parse()?;
        let answers = lab.client().ping(&Ping::new(ip))?;
        ensure!(answers[0].0.is_err(), "nobody has {ip}: {answers:?}");
    }
    Ok(())
}

#[test]
fn labs_do_not_see_each_other() -> Result<()> {
    let (one, two) = (lab("twin")?, lab("twin")?);
    ensure!(one.name() != two.name());
    let _server = one.pod(1, 0).serve_ports(&[8080], &[])?;
    let at = one.pod(1, 0).at(8080);
    for at in at {
        ensure!(names(&one.pod(0, 0).ask_tcp(at, 1)?) == ["n2p1"]);
        let other = two.pod(0, 0).ask_tcp(at, 1)?;
        ensure!(
            failures(&other).keys().eq([&&Failure::Refused]),
            "the same address is another pod: {other:?}"
        );
    }
    drop(one);
    two.pod(0, 0).serve_ports(&[8080], &[])?;
    ensure!(two.pod(1, 1).pings(two.pod(0, 0).v4().into())?, "the other lab goes on");
    Ok(())
}

#[test]
fn pods_come_and_go() -> Result<()> {
    let lab = lab("pods")?;
    let pod = lab.add_pod(1)?;
    ensure!(pod.name() == "n2p3");
    let server = pod.serve_ports(&[8080], &[8080])?;
    expect_answers(&lab.pod(0, 0), &pod)?;
    expect_answers(&lab.pod(1, 0), &pod)?;
    let pid = server.pid();
    lab.remove_pod(&pod)?;
    drop(server);
    ensure!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    ensure!(!pod.netns_path().exists() && !pod.cgroup_dir().exists());
    ensure!(lab.add_pod(1)? == pod, "name and addresses are free again");
    Ok(())
}

#[test]
fn node_processes_are_told_apart_by_cgroup() -> Result<()> {
    let lab = lab("cgroup")?;
    let cgroup_of = |host: &Host| -> Result<String> {
        let out = host.command("cat").arg("/proc/self/cgroup").output()?;
        let text = String::from_utf8(out.stdout)?;
        Ok(text.lines().find_map(|l| l.strip_prefix("0::")).context("no cgroup2")?.to_owned())
    };
    let (node, pod) = (cgroup_of(lab.node(0))?, cgroup_of(&lab.pod(0, 1))?);
    ensure!(node.ends_with(&format!("/lb-lab/{}/n1", lab.name())), "{node}");
    ensure!(pod == format!("{node}/n1p2"));
    let fs_type = nix::sys::statfs::statfs(&lab.node(0).bpffs_dir())?.filesystem_type();
    ensure!(fs_type == nix::sys::statfs::BPF_FS_MAGIC, "{} is a bpffs", lab.node(0).bpffs_dir().display());
    Ok(())
}

/// Everything on this machine that bears the lab's name.
fn traces(lab: &str) -> BTreeSet<String> {
    let read = |dir: &str| std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    let cgroups = ["/sys/fs/cgroup/unified/lb-lab", "/sys/fs/cgroup/lb-lab"];
    let dirs = cgroups.into_iter().chain(["/run/netns", "/run/lb-lab"]);
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut found: BTreeSet<_> = mounts.lines().filter(|l| l.contains(lab)).map(String::from).collect();
    found.extend(dirs.flat_map(read).map(|p| p.display().to_string()).filter(|p| p.contains(lab)));
    found
}

fn wait_until_gone(lab: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !traces(lab).is_empty() {
        ensure!(Instant::now() < deadline, "left behind: {:#?}", traces(lab));
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn dropping_a_lab_leaves_nothing() -> Result<()> {
    let lab = lab("drop")?;
    let name = lab.name().to_owned();
    let mut sleeper = lab.pod(0, 0).command("sleep").arg("600").spawn()?;
    ensure!(traces(&name).len() > 10, "the search finds what there is: {:?}", traces(&name));
    drop(lab);
    ensure!(traces(&name).is_empty(), "left behind: {:#?}", traces(&name));
    ensure!(!sleeper.wait()?.success(), "processes end with the lab");
    Ok(())
}

#[test]
fn a_killed_owner_leaves_nothing() -> Result<()> {
    let name = format!("killed-{}", std::process::id());
    let mut owner = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["lab", "up", &name, "--hold"])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(owner.stdout.take().context("no pipe")?).lines();
    ensure!(lines.any(|l| l.is_ok_and(|l| l.contains("lab exec"))), "the lab did not come up");
    let mut sleeper = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["lab", "exec", &name, "n1", "--", "sleep", "600"])
        .spawn()?;
    let cgroup = format!("/proc/{}/cgroup", sleeper.id());
    while !std::fs::read_to_string(&cgroup)?.contains(&name) {
        std::thread::sleep(Duration::from_millis(5));
    }
    ensure!(traces(&name).len() > 10, "{:?}", traces(&name));
    owner.kill()?;
    owner.wait()?;
    wait_until_gone(&name)?;
    ensure!(!sleeper.wait()?.success(), "processes end with the lab");
    Ok(())
}

#[test]
fn the_next_lab_removes_what_a_dead_owner_left() -> Result<()> {
    // A lab without a reaper whose owner has died: as it is when both are killed at once.
    let mut dead = Command::new("true").spawn()?;
    let pid = dead.id();
    dead.wait()?;
    let lab = Lab::builder("orphan").pods(1).reaper(false).build()?;
    let name = lab.name().to_owned();
    std::fs::write(format!("/run/lb-lab/{name}/owner"), format!("{pid} 1"))?;
    std::mem::forget(lab);
    let _next = Lab::builder("next").pods(0).build()?;
    wait_until_gone(&name)
}

#[test]
fn the_command_line_starts_uses_and_stops_a_lab() -> Result<()> {
    let xtask = |args: &[&str]| Command::new(env!("CARGO_BIN_EXE_xtask")).args(args).output();
    let name = format!("cli-{}", std::process::id());
    let up = xtask(&["lab", "up", &name, "--pods", "1"])?;
    let table = String::from_utf8_lossy(&up.stdout).into_owned();
    ensure!(up.status.success() && table.contains("10.244.2.10"), "{table}{up:?}");
    let again = xtask(&["lab", "up", &name])?;
    ensure!(
        !again.status.success() && String::from_utf8_lossy(&again.stderr).contains("lab down"),
        "{again:?}"
    );
    let exec = xtask(&["lab", "exec", &name, "n1p1", "--", "cat", "/proc/self/cgroup"])?;
    ensure!(String::from_utf8_lossy(&exec.stdout).contains(&format!("{name}/n1/n1p1")), "{exec:?}");
    let nobody = xtask(&["lab", "exec", &name, "n7", "--", "true"])?;
    ensure!(
        String::from_utf8_lossy(&nobody.stderr).contains("n1p1"),
        "says which hosts there are: {nobody:?}"
    );
    let list = xtask(&["lab", "list"])?;
    ensure!(String::from_utf8_lossy(&list.stdout).contains(&name), "{list:?}");
    ensure!(xtask(&["lab", "down", &name])?.status.success());
    ensure!(traces(&name).is_empty(), "left behind: {:#?}", traces(&name));
    ensure!(!xtask(&["lab", "down", &name])?.status.success(), "there is no such lab any more");
    Ok(())
}
