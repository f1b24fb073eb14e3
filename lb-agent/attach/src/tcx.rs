//! Programs on devices by pinned tcx links (6.6).

use crate::attach::{Hook, remove};
use crate::pins::{Pins, Place};
use crate::snapshot::Link;
use crate::syscall;
use anyhow::{Context as _, Result};
use aya::programs::SchedClassifier;
use aya::programs::links::{FdLink, LinkOrder, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

/// Where a link is pinned. By index: names change, and indexes are never used twice while a device lives.
pub(crate) fn pin(pins: &Pins, index: u32, hook: Hook, place: Place) -> PathBuf {
    let prefix = match place {
        Place::Main => "tc",
        Place::Front => "front",
    };
    pins.link(&format!("{prefix}-{index}-{}", hook.program()))
}

/// The device index in the name of a pin.
pub(crate) fn index_in(name: &str) -> Option<u32> {
    name.strip_prefix("tc-")?.split('-').next()?.parse().ok()
}

/// Attaches `program`, or puts it in place of the one that the pinned link has.
pub(crate) fn attach(
    program: &mut SchedClassifier,
    pins: &Pins,
    device: &Link,
    hook: Hook,
    place: Place,
) -> Result<()> {
    let main = pin(pins, device.index, hook, Place::Main);
    let (pin, id) = (pin(pins, device.index, hook, place), program.info()?.id());
    if pin.exists() {
        // Every change has the kernel wait for all processors (RCU), with its network lock held.
        if is_attached(id, device, hook)? {
            return Ok(());
        }
        match replace(program, &pin).and_then(|()| is_attached(id, device, hook)) {
            Ok(true) => return Ok(()),
            // The link may be to a device that had this index before, or have been detached (ENOLINK).
            Ok(false) => tracing::debug!("{}: a link to nothing; attaching anew", pin.display()),
            Err(error) => tracing::debug!("{}: {error:#}; attaching anew", pin.display()),
        }
        detach(&pin)?;
    }
    // Before everybody else at ingress and after them at egress, as PREROUTING and POSTROUTING are.
    let behind = (place == Place::Front).then(|| open(&main)).transpose()?;
    let order = match (&behind, hook) {
        (Some(behind), _) => LinkOrder::before_link(behind)?,
        (None, Hook::Ingress) => LinkOrder::first(),
        (None, Hook::Egress) => LinkOrder::last(),
    };
    let id = program
        .attach_with_options(&device.name, hook.attach_type(), TcAttachOptions::TcxOrder(order))
        .with_context(|| format!("attach {} to {}", hook.program(), device.name))?;
    let link: FdLink = program.take_link(id)?.try_into()?;
    link.pin(&pin).with_context(|| format!("pin the link at {}", pin.display()))?;
    Ok(())
}

fn open(pin: &Path) -> Result<SchedClassifierLink> {
    let link = PinnedLink::from_pin(pin).with_context(|| format!("open the link {}", pin.display()))?;
    Ok(SchedClassifierLink::try_from(FdLink::from(link))?)
}

fn replace(program: &mut SchedClassifier, pin: &Path) -> Result<()> {
    let id = program.attach_to_link(open(pin)?)?;
    // The program must not take the link along when it goes.
    let _: FdLink = program.take_link(id)?.try_into()?;
    Ok(())
}

/// Takes a pinned link off and removes its pin; neither need be there.
pub(crate) fn detach(pin: &Path) -> Result<()> {
    if let Ok(link) = syscall::obj_get(pin) {
        // At once, or the same program could not be attached anew at once. It fails if the device is gone.
        let _ = syscall::link_detach(link.as_fd());
    }
    remove(pin)
}

/// Whether the program with this id is on the device.
pub(crate) fn is_attached(id: u32, device: &Link, hook: Hook) -> Result<bool> {
    let programs = syscall::tcx_programs(device.index, hook)
        .with_context(|| format!("ask what is attached to {}", device.name))?;
    Ok(programs.contains(&id))
}
