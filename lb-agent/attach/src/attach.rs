//! The pinned tc programs: put on devices, so that they stay there without us, and replaced atomically.

use crate::pins::{Pins, Place, Turn};
use crate::snapshot::Link;
use crate::{clsact, syscall, tcx};
use anyhow::{Context as _, Result};
use aya::maps::{HashMap, Map, MapData};
use aya::programs::tc::TcAttachType;
use aya::programs::{Program, ProgramError, SchedClassifier};
use aya::sys::SyscallError;
use lb_common::maps::Device;
use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

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

    pub(crate) const fn attach_type(self) -> TcAttachType {
        match self {
            Self::Ingress => TcAttachType::Ingress,
            Self::Egress => TcAttachType::Egress,
        }
    }
}

/// Whether the kernel has tcx links (6.6); otherwise clsact filters are used.
pub fn has_tcx() -> bool {
    // The loopback device's index in every network namespace.
    syscall::tcx_programs(1, Hook::Ingress).is_ok()
}

/// Pins a program, in place of a former one without a moment between.
///
/// # Errors
/// If the kernel refuses.
pub fn pin_program(_turn: &Turn, pins: &Pins, place: Place, name: &str, program: &mut Program) -> Result<()> {
    let pin = pins.program(place, name);
    // Names with dots are the kernel's own.
    let aside = pins.program(place, &format!("{name}-new"));
    remove(&aside)?;
    program.pin(&aside).with_context(|| format!("pin the program at {}", aside.display()))?;
    fs::rename(&aside, &pin).with_context(|| format!("rename {} to {}", aside.display(), pin.display()))
}

type Programs = [(Hook, SchedClassifier); 2];

fn pinned(pins: &Pins, place: Place) -> Result<Option<Programs>> {
    let open = |hook: Hook| -> Result<Option<(Hook, SchedClassifier)>> {
        let pin = pins.program(place, hook.program());
        match SchedClassifier::from_pin(&pin) {
            Ok(program) => Ok(Some((hook, program))),
            Err(ProgramError::SyscallError(SyscallError { io_error, .. }))
                if io_error.kind() == ErrorKind::NotFound =>
            {
                Ok(None)
            }
            Err(error) => Err(error).with_context(|| format!("open the program {}", pin.display())),
        }
    };
    let (Some(ingress), Some(egress)) = (open(Hook::Ingress)?, open(Hook::Egress)?) else {
        return Ok(None);
    };
    Ok(Some([ingress, egress]))
}

/// Puts the programs that are pinned onto devices.
pub struct Attacher {
    pins: Pins,
    tcx: bool,
    programs: Programs,
    /// Of a version that is taking over.
    front: Option<Programs>,
    devices: HashMap<MapData, u32, Device>,
}

impl Attacher {
    /// Opens what is pinned, whichever version's it is. Nothing if no agent has pinned programs; others pin theirs only when
    /// it is their turn, so what is opened in ours stays the newest as long.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn open(_turn: &Turn, pins: &Pins, tcx: bool) -> Result<Option<Self>> {
        let Some(programs) = pinned(pins, Place::Main)? else { return Ok(None) };
        let front = pinned(pins, Place::Front)?;
        let pin = pins.map("LB_DEVICE");
        let map = MapData::from_pin(&pin).with_context(|| format!("open the map {}", pin.display()))?;
        let devices = HashMap::try_from(Map::HashMap(map)).context("the device table")?;
        Ok(Some(Self { pins: pins.clone(), tcx, programs, front, devices }))
    }

    /// Serves a device: its entry, both programs. Those that are attached already are replaced without a moment between.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn attach(&mut self, _turn: &Turn, link: &Link, entry: Device) -> Result<()> {
        // The table first: a program must not meet a device that it knows nothing of.
        self.set_entry(link.index, entry)?;
        set_no_redirects(&link.name);
        if let Some(bridge) = &link.bridge_name {
            set_no_redirects(bridge);
        }
        let front = self.front.iter_mut().flatten().map(|program| (Place::Front, program));
        let all = self.programs.iter_mut().map(|program| (Place::Main, program)).chain(front);
        for (place, (hook, program)) in all {
            if self.tcx {
                tcx::attach(program, &self.pins, link, *hook, place)?;
            } else {
                clsact::attach(program, link, *hook, place)?;
            }
        }
        Ok(())
    }

    /// Takes the programs in front off a device again.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn detach_front(&self, _turn: &Turn, link: &Link) -> Result<()> {
        detach_place(&self.pins, link.index, Some(&link.name), self.tcx, Place::Front)
    }

    /// Changes what the programs know of a device.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_entry(&mut self, index: u32, entry: Device) -> Result<()> {
        self.devices.insert(index, entry, 0).context("write the device table")
    }

    /// What the programs know of a device.
    pub fn entry(&self, index: u32) -> Option<Device> {
        self.devices.get(&index, 0).ok()
    }

    /// The programs that should be on a device and are not.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn missing(&self, link: &Link) -> Result<Vec<Hook>> {
        let mut missing = Vec::new();
        for (hook, program) in &self.programs {
            let id = program.info().context("ask for a program's id")?.id();
            let attached = if self.tcx {
                tcx::is_attached(id, link, *hook)
            } else {
                clsact::is_attached(id, link, *hook)
            };
            if !attached? {
                missing.push(*hook);
            }
        }
        Ok(missing)
    }

    /// Indexes of the devices that are served, whoever attached the programs; some may be gone.
    pub fn served(&self) -> BTreeSet<u32> {
        // An entry is written before its links, and kept where there are no links.
        let entries = self.devices.keys().filter_map(Result::ok);
        entries.chain(self.pins.links().iter().filter_map(|name| tcx::index_in(name))).collect()
    }

    /// Serves a device no more. Without a name, it is gone, and only what was kept of it is removed.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn detach(&mut self, turn: &Turn, index: u32, name: Option<&str>) -> Result<()> {
        let result = detach(turn, &self.pins, index, name, self.tcx);
        // An entry of a device that is gone harms nobody.
        let _ = self.devices.remove(&index);
        result
    }
}

/// Takes the programs off a device, as [`Attacher::detach`] does, also where no program is pinned any more.
///
/// # Errors
/// If the kernel refuses.
pub fn detach(_turn: &Turn, pins: &Pins, index: u32, name: Option<&str>, tcx: bool) -> Result<()> {
    detach_place(pins, index, name, tcx, Place::Front)?;
    detach_place(pins, index, name, tcx, Place::Main)
}

fn detach_place(pins: &Pins, index: u32, name: Option<&str>, tcx: bool, place: Place) -> Result<()> {
    for hook in Hook::BOTH {
        if tcx {
            tcx::detach(&tcx::pin(pins, index, hook, place))?;
        } else if let Some(name) = name {
            clsact::detach(name, hook, place);
        }
    }
    Ok(())
}

/// Takes our filters off a device, with nothing pinned any more that could be put on it meanwhile.
pub fn detach_filters(device: &str) {
    for place in [Place::Front, Place::Main] {
        Hook::BOTH.into_iter().for_each(|hook| clsact::detach(device, hook, place));
    }
}

/// Removes a pin, which need not be there.
///
/// # Errors
/// If the kernel refuses.
pub fn remove(pin: &Path) -> Result<()> {
    match fs::remove_file(pin) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove the pin {}", pin.display()))
        }
        _ => Ok(()),
    }
}

/// Where containers see the settings of their network namespace if `/proc/sys` is read-only: a volume of that directory.
const HOST_SYSCTLS: &str = "/host/proc/sys/net";

/// Packets that enter and leave by one device are normal here, and no reason to tell pods of a better way.
fn set_no_redirects(device: &str) {
    let root = if Path::new(HOST_SYSCTLS).is_dir() { HOST_SYSCTLS } else { "/proc/sys/net" };
    for name in ["all", device] {
        let path = format!("{root}/ipv4/conf/{name}/send_redirects");
        if fs::read_to_string(&path).is_ok_and(|value| value.trim() == "0") {
            continue;
        }
        match fs::write(&path, "0") {
            Ok(()) => tracing::info!("switched off ICMP redirects: {path} = 0"),
            Err(error) => {
                tracing::warn!("{path}: {error}; clients on the same segment may be sent redirects");
            }
        }
    }
}
