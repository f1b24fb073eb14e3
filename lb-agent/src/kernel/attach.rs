//! Puts the tc programs on devices, so that they stay there without us, and replaces them atomically.

use super::pins::Pins;
use anyhow::{Context as _, Result};
use aya::programs::links::{FdLink, LinkOrder, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact};
use aya::programs::{SchedClassifier, TcAttachType};
use std::fs;

/// Priority and handle of our clsact filters: how they are found again.
const PRIORITY: u16 = 50;
const HANDLE: TcHandle = TcHandle::new(0, 0x1b);

/// Which of the two programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Packets that come in.
    Ingress,
    /// Packets that leave.
    Egress,
}

impl Hook {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Ingress, Self::Egress];

    /// The program's name.
    pub const fn program(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    const fn attach_type(self) -> TcAttachType {
        match self {
            Self::Ingress => TcAttachType::Ingress,
            Self::Egress => TcAttachType::Egress,
        }
    }
}

/// Name of the pin of a tcx link. By index: names change, and indexes are never used twice while a device lives.
fn link_name(index: u32, hook: Hook) -> String {
    format!("tc-{index}-{}", hook.program())
}

/// The device index in a link's name.
pub fn link_index(name: &str) -> Option<u32> {
    name.strip_prefix("tc-")?.split('-').next()?.parse().ok()
}

/// Attaches `program` to a device by a pinned tcx link, or puts it in place of a former one.
///
/// # Errors
/// If the kernel refuses.
pub fn tcx(program: &mut SchedClassifier, pins: &Pins, device: &str, index: u32, hook: Hook) -> Result<()> {
    let pin = pins.link(&link_name(index, hook));
    if pin.exists() {
        match replace(program, &pin) {
            Ok(()) => return Ok(()),
            // The device went away and its index is another's now (ENOLINK): the old link is good for nothing.
            Err(error) => tracing::debug!("{}: {error:#}; attaching anew", pin.display()),
        }
        fs::remove_file(&pin).with_context(|| format!("remove the old pin {}", pin.display()))?;
    }
    // Before everybody else at ingress and after them at egress, as PREROUTING and POSTROUTING are.
    let order = match hook {
        Hook::Ingress => LinkOrder::first(),
        Hook::Egress => LinkOrder::last(),
    };
    let id = program
        .attach_with_options(device, hook.attach_type(), TcAttachOptions::TcxOrder(order))
        .with_context(|| format!("attach {} to {device}", hook.program()))?;
    let link: FdLink = program.take_link(id)?.try_into()?;
    link.pin(&pin).with_context(|| format!("pin the link at {}", pin.display()))?;
    Ok(())
}

fn replace(program: &mut SchedClassifier, pin: &std::path::Path) -> Result<()> {
    let link = FdLink::from(PinnedLink::from_pin(pin)?);
    let link = SchedClassifierLink::try_from(link)?;
    let id = program.attach_to_link(link)?;
    // The program must not take the link along when it goes.
    let _: FdLink = program.take_link(id)?.try_into()?;
    Ok(())
}

/// Attaches `program` to a device by a clsact filter (kernels before 6.6), or puts it in place of a former one.
///
/// # Errors
/// If the kernel refuses.
pub fn clsact(program: &mut SchedClassifier, device: &str, hook: Hook) -> Result<()> {
    // Refused where it is there already.
    let _ = qdisc_add_clsact(device);
    let attach_type = hook.attach_type();
    let old = SchedClassifierLink::attached(device, attach_type, PRIORITY, HANDLE, None)?;
    let id = match program.attach_to_link(old) {
        Ok(id) => id,
        Err(_) => {
            let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
            program
                .attach_with_options(device, attach_type, TcAttachOptions::Netlink(options))
                .with_context(|| format!("attach {} to {device}", hook.program()))?
        }
    };
    // A link that is dropped detaches; this one is to stay.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

/// Takes a program off a device.
///
/// # Errors
/// If the kernel refuses. A device that is gone is no error.
pub fn detach(pins: &Pins, device: &str, index: u32, hook: Hook, tcx: bool) -> Result<()> {
    if tcx {
        let pin = pins.link(&link_name(index, hook));
        return match fs::remove_file(&pin) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("remove the pin {}", pin.display()))
            }
            _ => Ok(()),
        };
    }
    if let Ok(link) = SchedClassifierLink::attached(device, hook.attach_type(), PRIORITY, HANDLE, None) {
        // Dropping it detaches.
        drop(link);
    }
    Ok(())
}
