//! Takes over from another version, whose maps are laid out differently: an upgrade, or the way back.
//!
//! `docs/design.md` has the steps. All of it happens before anything is learned from the API server, and every step leaves
//! programs attached that know each flow; so a crash anywhere is picked up by the next start, of either version.

mod flows;
mod layout;
mod maps;

use super::pins::{Pins, Place};
use super::ports::{self, Half};
use super::programs::{self, Features};
use super::sockets;
use super::syscall::Update;
use super::tables::Tables;
use super::xdp;
use crate::cli::{RunArgs, SocketLb};
use anyhow::{Context as _, Result};
use aya::maps::{Array, Map, MapData};
use flows::Others;
use layout::Layouts;
use lb_attach::attach::{Attacher, Hook, remove};
use lb_attach::snapshot::{self, Link};
use lb_attach::syscall::{map_ids, obj_get};
use lb_common::maps::stance;
use maps::{Copied, Move};
use std::io::ErrorKind;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};
use tracing::{info, warn};

pub(crate) use maps::describe;

/// What the programs go by, in the order that a packet of a known Service needs it.
const STATE: [&str; 15] = [
    "LB_NAME",
    "LB_EPOCH",
    "LB_SLOT4",
    "LB_SLOT6",
    "LB_SOURCE4",
    "LB_SOURCE6",
    "LB_CIDR4",
    "LB_CIDR6",
    "LB_PORTS",
    "LB_TAKEN",
    "LB_NETNS",
    "LB_RANGE4",
    "LB_RANGE6",
    "LB_FRONT4",
    "LB_FRONT6",
];
/// What there is of flows.
const FLOWS: [&str; 2] = ["LB_FLOW4", "LB_FLOW6"];
const AFFINITY: &str = "LB_AFFINITY";
const SOCKETS: &str = "LB_SOCKET";
/// A packet that was under way between two programs has arrived by then, and so have most answers to datagrams.
const SETTLE: Duration = Duration::from_millis(100);

/// How often flows are copied before the first is ours, and of how few new ones that takes no more rounds.
const ROUNDS: usize = 5;
const FEW: usize = 100;

/// The version whose programs are pinned there.
///
/// # Errors
/// If the kernel does not tell: to take that for "none" would be to lose what those programs know.
fn version_at(pins: &Pins, place: Place) -> Result<Option<u32>> {
    let pin = pins.program(place, Hook::Ingress.program());
    let program = match obj_get(&pin) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        program => program.with_context(|| format!("open the program {}", pin.display()))?,
    };
    let ids = map_ids(program.as_fd()).with_context(|| format!("ask for the maps of {}", pin.display()))?;
    let uses =
        |version: &u32| maps::id(&pins.of_version(*version), "LB_STANCE").is_some_and(|id| ids.contains(&id));
    Ok(pins.versions().into_iter().find(uses))
}

/// Has our programs serve in front of another version's, if such are attached, and brings over what those know. Ends what a
/// killed agent had begun. [`finish`] is for when our own programs are pinned.
///
/// # Errors
/// If it cannot be done. The others go on then.
pub fn begin(pins: &Pins, args: &RunArgs, features: Features) -> Result<()> {
    let serving = version_at(pins, Place::Main)?;
    match (serving, version_at(pins, Place::Front)?) {
        (Some(serving), Some(front)) if front != pins.version() => {
            warn!("version {front} had begun to take over from version {serving}: what it knows goes back");
            withdraw(&pins.of_version(front), &pins.of_version(serving), features)?;
        }
        // They were only about to be attached.
        (_, None) => remove_front(pins)?,
        _ => {}
    }
    let Some(old) = serving.filter(|serving| *serving != pins.version()) else { return Ok(()) };
    let begun = version_at(pins, Place::Front)?.is_some();
    if !begun {
        // What an earlier attempt may have left is of another time.
        pins.remove_maps()?;
        pins.prepare_maps()?;
    }
    let result = take_over(&pins.of_version(old), pins, args, features, begun);
    if result.is_err() {
        give_up(pins, features);
        if matches!(version_at(pins, Place::Front), Ok(None)) {
            let _ = pins.remove_maps();
        }
    }
    result.with_context(|| format!("take over from version {old}, whose programs go on"))
}

fn take_over(old: &Pins, pins: &Pins, args: &RunArgs, features: Features, begun: bool) -> Result<()> {
    let started = Instant::now();
    info!(
        "the programs of version {} are attached: taking over, as version {}",
        old.version(),
        pins.version()
    );
    // Before anything that takes longer: maps that are not described end it here.
    let layouts: (Layouts, Layouts) = (maps::described(old)?, layout::ours());
    let mut ebpf = programs::load(pins, args, features, Place::Front)?;
    let from_old = |how| Move { from: old, to: pins, layouts: (&layouts.0, &layouts.1), how };
    if !begun {
        maps::set_stance(pins, stance::LEAVE)?;
        let state = from_old(Update::New).tables(&STATE)?;
        Tables::open(pins)?.complete(pins)?;
        if state.lost > 0 {
            warn!(
                "{} entries of the tables of Services have no place in version {}",
                state.lost,
                pins.version()
            );
        }
    }
    // It would go by the others' tables: until the end of this all packets take the other way.
    xdp::switch_off(pins);
    // What the others masquerade from now on, and what we do, cannot meet, though neither knows the other's latest.
    ports::reserve_half(&mut reserved(old)?, Half::Odd)?;
    ports::reserve_half(&mut reserved(pins)?, Half::Even)?;
    let attacher = programs::pin(&mut ebpf, pins, features, Place::Front)?;
    put_on_all_devices(pins, attacher)?;
    let mut flows = Copied::default();
    let mut copy_flows = |others| -> Result<usize> {
        let mut more = Copied::default();
        for table in FLOWS {
            more.add(from_old(Update::New).flows(table, others)?);
        }
        flows = Copied { copied: flows.copied + more.copied, ..more };
        Ok(more.copied)
    };
    // What begins while a table is read is the less the shorter that takes: the last round has only to find what is new.
    for _ in 0..ROUNDS {
        // As long as we have given none ourselves, theirs is the younger one.
        from_old(if begun { Update::New } else { Update::Any }).table(AFFINITY)?;
        if copy_flows(Others::Serve)? < FEW {
            break;
        }
    }
    for (stance, others) in
        [(stance::BEGIN, Others::Serve), (stance::ADOPT, Others::Serve), (stance::SERVE, Others::Rest)]
    {
        maps::set_stance(pins, stance)?;
        std::thread::sleep(SETTLE);
        from_old(Update::New).table(AFFINITY)?;
        copy_flows(others)?;
    }
    if args.socket_lb != SocketLb::Off {
        let copy = || from_old(Update::New).table(SOCKETS).map(drop);
        sockets::take_over(&mut ebpf, pins, args, copy)?;
    }
    info!(
        "took over {} entries of the flow tables in {:?}{}",
        flows.copied,
        started.elapsed(),
        if flows.lost > 0 { format!("; for {} there is no place", flows.lost) } else { String::new() }
    );
    Ok(())
}

fn reserved(pins: &Pins) -> Result<Array<MapData, u64>> {
    Ok(Array::try_from(Map::Array(maps::open(pins, "LB_PORTS")?))?)
}

/// A start that took over from another version has failed: that one's programs go on, with what ours have learned.
pub fn give_up(pins: &Pins, features: Features) {
    let (Ok(Some(old)), Ok(Some(front))) = (version_at(pins, Place::Main), version_at(pins, Place::Front))
    else {
        return;
    };
    if old == pins.version() || front != pins.version() {
        return;
    }
    match withdraw(pins, &pins.of_version(old), features) {
        Ok(()) => warn!("the start failed: the programs of version {old} go on"),
        Err(error) => warn!("the start failed; ours forward until the next one: {error:#}"),
    }
}

/// Our programs are pinned as those that serve: puts them in the place of others, and removes what those had. Returns what
/// attaches them from now on.
///
/// # Errors
/// If the kernel refuses.
pub fn finish(pins: &Pins, features: Features) -> Result<Attacher> {
    let open = || Attacher::open(&pins.lock()?, pins, features.tcx)?.context("our programs are not pinned");
    if version_at(pins, Place::Front)?.is_some() {
        // First everywhere in the place of the others, then off in front.
        let attacher = put_on_all_devices(pins, open()?)?;
        take_off_front(pins, attacher)?;
    }
    for version in pins.versions().into_iter().filter(|version| *version != pins.version()) {
        pins.of_version(version).remove_maps()?;
        info!("removed the maps of version {version}");
    }
    // Without those in front.
    open()
}

/// Takes a version off that had begun to take over: what it knows goes back first.
fn withdraw(front: &Pins, serving: &Pins, features: Features) -> Result<()> {
    maps::set_stance(front, stance::LEAVE)?;
    // What goes back is not marked.
    maps::distrust(serving)?;
    let layouts = (maps::described(front)?, maps::described(serving)?);
    let back = Move { from: front, to: serving, layouts: (&layouts.0, &layouts.1), how: Update::Any };
    for pause in [SETTLE, Duration::ZERO] {
        for table in FLOWS {
            back.flows(table, Others::Rest)?;
        }
        back.tables(&[AFFINITY, SOCKETS])?;
        std::thread::sleep(pause);
    }
    let turn = serving.lock()?;
    let attacher = Attacher::open(&turn, serving, features.tcx)?.context("no programs are pinned")?;
    drop(turn);
    take_off_front(serving, attacher)?;
    ports::reserve(&mut reserved(serving)?)?;
    front.remove_maps()
}

fn take_off_front(pins: &Pins, attacher: Attacher) -> Result<()> {
    // The plugin attaches none any more.
    remove_front(pins)?;
    on_all_devices(pins, attacher, |turn, attacher, link| attacher.detach_front(turn, link)).map(drop)
}

fn remove_front(pins: &Pins) -> Result<()> {
    let _turn = pins.lock()?;
    Hook::BOTH.into_iter().try_for_each(|hook| remove(&pins.program(Place::Front, hook.program())))
}

fn put_on_all_devices(pins: &Pins, attacher: Attacher) -> Result<Attacher> {
    on_all_devices(pins, attacher, |turn, attacher, link| {
        let entry = attacher.entry(link.index).unwrap_or_default();
        attacher.attach(turn, link, entry)
    })
}

/// On each device that is served and still there.
fn on_all_devices(
    pins: &Pins,
    mut attacher: Attacher,
    mut each: impl FnMut(&lb_attach::pins::Turn, &mut Attacher, &Link) -> Result<()>,
) -> Result<Attacher> {
    let served = attacher.served();
    for link in snapshot::links()?.iter().filter(|link| served.contains(&link.index)) {
        if let Err(error) = each(&pins.lock()?, &mut attacher, link) {
            // Gone meanwhile is as good.
            if snapshot::links()?.iter().any(|now| now.index == link.index) {
                return Err(error.context(format!("on {}", link.name)));
            }
        }
    }
    Ok(attacher)
}
