//! More new flows than there is room for.

use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xtask::demo::Cluster;
use xtask::lab::Host;
use xtask::probe::{Ask, Flood};

use super::support::{Traffic, answered, cluster, dns, eventually, metric, store};

/// Room for so many flows, in each family.
const ROOM: u32 = 2048;
/// How long new flows may be shut out after a flood.
const PATIENCE: Duration = Duration::from_secs(5);
/// Flows of a flood that have to go early: more than there is room for at one time.
const GONE: u32 = ROOM / 2;
/// Floods that are sent for that, at most: on a fast machine one is over before room is made for the second time, and one time
/// ends a fourth of the entries, at least.
const WAVES: u32 = 4;

/// The demo with a small flow table on n1: tables keep their size, so this one is made anew.
fn small(name: &str) -> Result<Cluster> {
    let mut cluster = cluster(name)?;
    cluster.stop_agent(0)?;
    fs::remove_dir_all(cluster.lab().node(0).bpffs_dir().join("lb")).context("remove what is pinned")?;
    cluster.start_agent(0, &["--flow-table-max", &ROOM.to_string()])?;
    Ok(cluster)
}

/// Floods of at least twice the table's size, until room was made more than once, while connections are open that must not
/// notice.
fn survives(
    name: &str,
    from: fn(&Cluster) -> Host,
    to: fn(&Cluster) -> SocketAddr,
    what: &str,
) -> Result<()> {
    let cluster = small(name)?;
    let (node, client, pod) = (cluster.lab().node(0), cluster.lab().client(), cluster.lab().pod(0, 0));
    let mut traffic = Traffic::default();
    traffic.conversation(&pod, &Ask::tcp(store()[0]))?;
    traffic.conversation(&pod, &Ask::udp(dns()[0]))?;
    traffic.conversation(client, &Ask::tcp(node.at(30081)[0]))?;
    traffic.conversation(client, &Ask::udp(node.at(30053)[0]))?;
    traffic.conversation(&pod, &Ask::tcp(cluster.lab().inet().at(8080)[0]))?;
    // A flow counts as established when both ends have spoken, and the client once more.
    std::thread::sleep(Duration::from_millis(200));

    let gone_early = || metric(node, &format!("lb_flows_dropped_early_total{{state=\"{what}\"}}"));
    let (mut gone, mut end) = (0.0, Instant::now());
    for _ in 0..WAVES {
        // A flow has four entries where both ends are translated, and two where it is only masqueraded.
        let flood = from(&cluster).flood(&Flood::new(to(&cluster), 4 * ROOM))?;
        ensure!(flood.sent > ROOM as usize * 3, "{flood:?}");
        ensure!(metric(node, "lb_drops_total{reason=\"flow_table_full\"}")? > 0.0, "there was no room");
        end = Instant::now();
        eventually(PATIENCE, || {
            for (from, to) in [(&pod, store()[0]), (client, node.at(30080)[0])] {
                answered(from, &Ask::tcp(to).count(20).timeout(Duration::from_millis(300)))?;
            }
            Ok(())
        })?;
        // Counted at the end of a sweep, which may not be over yet.
        let before = gone;
        eventually(PATIENCE, || {
            gone = gone_early()?;
            ensure!(gone > before, "{gone} flows were dropped early, as before");
            Ok(())
        })?;
        if gone > f64::from(GONE) {
            break;
        }
    }
    ensure!(gone > f64::from(GONE), "{gone} flows were dropped early");
    traffic.finish(end)?;
    Ok(())
}

#[test]
fn of_questions_that_are_answered() -> Result<()> {
    let to = |cluster: &Cluster| cluster.lab().node(0).at(30053)[0];
    survives("floodans", |cluster| cluster.lab().client().clone(), to, "closing")
}

#[test]
fn of_datagrams_that_nobody_answers() -> Result<()> {
    let to = |cluster: &Cluster| cluster.lab().inet().at(9)[0];
    survives("floodun", |cluster| cluster.lab().pod(0, 1), to, "unanswered")
}
