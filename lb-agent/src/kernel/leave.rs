//! Goes, and no connection with us: netfilter goes on with those that we translate.
//!
//! First whatever begins is left to the host, where kube-proxy's rules are by now. Then each flow is taken out of the flow
//! table and put into `nf_conntrack`'s, with the same translation.

mod flows;
mod sockets;

use super::flows::all;
use super::netfilter::conntrack::Conntrack;
use super::netfilter::nft;
use super::pins::Pins;
use super::sweep::{Sweeper, Timeouts};
use super::tables::{Family, NodeAddr, Tables};
use anyhow::{Context as _, Result};
use lb_common::maps::{Side, stance};
use std::path::Path;
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// A connection that has just begun is established after so long, or will hardly be.
const SETTLE: Duration = Duration::from_secs(2);
/// Between two looks at what is left.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What became of the flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    handed_over: usize,
    failed: usize,
}

/// Leaves all traffic to the host. What is pinned, and does no more, is for the caller to remove.
///
/// # Errors
/// If the pinned maps cannot be used.
pub fn leave(bpffs: &Path, drain: Duration) -> Result<()> {
    let pins = Pins::at(bpffs);
    if !pins.map("LB_STANCE").exists() {
        if pins.versions().iter().any(|other| pins.of_version(*other).map("LB_STANCE").exists()) {
            warn!("what is pinned is another version's: connections that it translates are cut");
        }
        return Ok(());
    }
    let mut tables = Tables::open(&pins)?;
    tables.stance.set(0, stance::DRAIN, 0).context("have new flows left to the host")?;
    info!("new connections are left to the host; those that there are go on");
    let conntrack = match Conntrack::open() {
        Ok(conntrack) => Some(conntrack),
        Err(error) => {
            warn!("netfilter cannot take connections over ({error}): those that are left in the end are cut");
            None
        }
    };
    if let Some(conntrack) = &conntrack {
        // Without, it translates nothing where nobody has rules that ask for it.
        nft::keep_tracking().context("have netfilter translate (a table inet lb-agent)")?;
        sockets::hand_over(&pins, conntrack)?;
    }
    sockets::detach(&pins)?;
    wait(&pins, &tables, SETTLE.max(drain))?;
    let Some(conntrack) = conntrack else { return Ok(()) };
    let mut count = hand_over(&mut tables.v4, &conntrack)?;
    let v6 = hand_over(&mut tables.v6, &conntrack)?;
    count.handed_over += v6.handed_over;
    count.failed += v6.failed;
    say(count, &conntrack)
}

/// Until all flows have ended, or so long.
fn wait(pins: &Pins, tables: &Tables, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    let mut sweeper = Sweeper::open(pins, Timeouts::default())?;
    let mut told = false;
    loop {
        sweeper.look()?;
        let living = living(&tables.v4)? + living(&tables.v6)?;
        if living == 0 || Instant::now() >= deadline {
            return Ok(());
        }
        if patience > SETTLE && !std::mem::replace(&mut told, true) {
            info!("waiting {patience:?} at most for {living} connections to end");
        }
        std::thread::sleep(LOOK_EVERY.min(deadline - Instant::now()));
    }
}

/// Flows that are not over.
fn living<A: NodeAddr>(family: &Family<A>) -> Result<usize> {
    let is = |whole: &super::flows::Whole<A>| {
        whole.entry.side != Side::Foreign as u8 && !whole.seen.is_over(whole.entry.proto)
    };
    Ok(all(family)?.iter().filter(|whole| is(whole)).count())
}

fn hand_over<A: NodeAddr>(family: &mut Family<A>, conntrack: &Conntrack) -> Result<Count> {
    let mut count = Count::default();
    for whole in all(family)? {
        match flows::hand_over(family, conntrack, &whole) {
            Ok(true) => count.handed_over += 1,
            Ok(false) => {}
            Err(error) => {
                if count.failed == 0 {
                    warn!("a connection cannot be handed over to netfilter: {error:#}");
                }
                count.failed += 1;
            }
        }
    }
    Ok(count)
}

fn say(count: Count, conntrack: &Conntrack) -> Result<()> {
    if count.failed > 0 {
        warn!("{} connections could not be handed over to netfilter, and are cut", count.failed);
    }
    let mut translated = 0;
    conntrack
        .for_each(|c| translated += usize::from(c.has_other_destination() || c.has_other_source()))
        .context("list netfilter's connections")?;
    if translated == 0 {
        nft::stop_tracking().context("remove the table inet lb-agent")?;
        return Ok(());
    }
    info!(
        "netfilter goes on with {} connections; when they have ended, the nftables table that sees to it can go: nft delete \
         table inet lb-agent",
        count.handed_over
    );
    Ok(())
}
