//! The XDP program on uplinks: established flows that only pass through this node go on from driver to driver. All of it
//! may be missing at any moment, and packets take the other way.

mod features;
mod table;

use super::pins::{Pins, Place};
use super::sweep::monotonic_seconds;
use crate::cli::XdpArg;
use anyhow::{Context as _, Result};
use aya::maps::{Array, HashMap, Map, MapData};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::xdp::XdpLink;
use aya::programs::{ProgramError, Xdp as Program, XdpMode};
use lb_attach::attach::remove;
use lb_attach::pins::Turn;
use lb_attach::snapshot::{Link, Snapshot, XdpProgram};
use lb_attach::vxlan;
use lb_common::addr::Ip6;
use lb_common::maps::{VtepKey, XdpDevice};
use std::collections::{BTreeMap, BTreeSet, HashMap as StdMap};
use std::net::IpAddr;
use std::path::Path;
use table::{Settings, Uplink};
use tracing::{debug, info, warn};

/// The program's name.
pub const PROGRAM: &str = "transit";

/// Puts the XDP program onto uplinks, and tells it what it has to know of devices.
pub struct Xdp {
    program: Program,
    pins: Pins,
    arg: XdpArg,
    devices: Array<MapData, XdpDevice>,
    vteps: HashMap<MapData, VtepKey, Ip6>,
    /// What is in these two.
    written: Vec<XdpDevice>,
    known: StdMap<VtepKey, Ip6>,
    /// What was last said of each device.
    said: BTreeMap<u32, String>,
}

impl Xdp {
    /// With a program that is loaded.
    ///
    /// # Errors
    /// If what is pinned cannot be read.
    pub fn open(program: Program, pins: &Pins, arg: XdpArg) -> Result<Self> {
        let open = |name: &str| {
            let pin = pins.map(name);
            MapData::from_pin(&pin).with_context(|| format!("open the map {}", pin.display()))
        };
        let devices: Array<_, XdpDevice> = Array::try_from(Map::Array(open("LB_XDP")?))?;
        let vteps: HashMap<_, VtepKey, Ip6> = HashMap::try_from(Map::HashMap(open("LB_VTEP")?))?;
        let written = devices.iter().collect::<Result<_, _>>().context("read the table of XDP's devices")?;
        let known = vteps.iter().collect::<Result<_, _>>().context("read the table of overlays' ends")?;
        Ok(Self { program, pins: pins.clone(), arg, devices, vteps, written, known, said: BTreeMap::new() })
    }

    /// Indexes of the overlays whose forwarding tables matter.
    pub fn overlays(&self) -> BTreeSet<u32> {
        let overlays = self.written.iter().filter(|device| device.flags & XdpDevice::OVERLAY != 0);
        overlays.map(|device| device.index).collect()
    }

    /// Brings everything in line with what devices there are.
    ///
    /// # Errors
    /// If the kernel does not say, or tables cannot be written.
    pub fn round(&mut self, snapshot: &Snapshot, uplinks: &[&Link], overlays: &[&Link]) -> Result<()> {
        let (not, wanted): (Vec<&Link>, Vec<&Link>) =
            uplinks.iter().partition(|link| unsuited(link, self.arg).is_some());
        self.detach_all_but(&wanted);
        for link in not {
            self.say(link, format!("off: {}", unsuited(link, self.arg).unwrap_or_default()));
        }
        let mut sending = Vec::new();
        for link in wanted {
            match self.serve(link) {
                Ok(ways) => {
                    self.say(link, self.mode().into());
                    sending.push(Uplink { link, ways });
                }
                Err(why) => self.say(link, format!("off: {why:#}")),
            }
        }
        self.said.retain(|index, _| snapshot.link(*index).is_some());
        let (entries, troubles) = table::entries(&sending, overlays, &Settings::of_the_node()?);
        for (link, trouble) in troubles {
            self.say(link, trouble);
        }
        let ends = if entries.iter().any(|entry| entry.flags & XdpDevice::OVERLAY != 0) {
            vxlan::stations()?
        } else {
            StdMap::new()
        };
        // The ends of an overlay first: a device in the table may be used at once.
        self.write_ends(&ends, &entries)?;
        self.write_devices(&entries)
    }

    /// One line for each device and each change.
    fn say(&mut self, link: &Link, what: String) {
        if self.said.get(&link.index) != Some(&what) {
            info!("XDP: {}: {what}", link.name);
            self.said.insert(link.index, what);
        }
    }

    /// Sees to it that the program is on a device. How packets can leave by it.
    fn serve(&mut self, link: &Link) -> Result<u32> {
        let wanted = XdpProgram { id: self.program.info()?.id(), generic: self.is_generic() };
        if link.xdp != Some(wanted) {
            self.attach(link)?;
        }
        if self.is_generic() {
            // The kernel sends by any device then.
            return Ok(XdpDevice::TX | XdpDevice::REDIRECT);
        }
        let takes_redirected = features::of(link.index).unwrap_or_else(|error| {
            debug!("{}: what its driver can do: {error:#}", link.name);
            None
        });
        match (is_veth(link), takes_redirected) {
            (false, Some(true)) => Ok(XdpDevice::TX | XdpDevice::REDIRECT),
            (false, _) => Ok(XdpDevice::TX),
            (true, Some(true)) => Ok(XdpDevice::REDIRECT),
            (true, Some(false)) => {
                anyhow::bail!("the veth's other end has to have GRO switched on, or an XDP program")
            }
            (true, None) => {
                anyhow::bail!("this kernel cannot tell whether the veth's other end takes packets (6.3 can)")
            }
        }
    }

    fn attach(&mut self, link: &Link) -> Result<()> {
        let _turn = self.pins.lock()?;
        let pin = self.pins.xdp(link.index);
        // Only one program can be there. What a link has is replaced, another version's too (the links are all versions'); how the link was made, by the
        // driver or by the kernel, stays as it is.
        let stays = link.xdp.is_some_and(|there| there.generic == self.is_generic());
        if pin.exists() {
            match self.replace(&pin) {
                Ok(()) if stays => return Ok(()),
                Ok(()) => {}
                // It may be a link to a device that had this index before.
                Err(error) => debug!("{}: {error:#}; attaching anew", pin.display()),
            }
            remove(&pin)?;
        }
        let mode = if self.is_generic() { XdpMode::Skb } else { XdpMode::Driver };
        let id = self.program.attach_to_if_index(link.index, mode).map_err(|e| refused(&e))?;
        let attached: FdLink = self.program.take_link(id)?.try_into()?;
        attached.pin(&pin).with_context(|| format!("pin the link at {}", pin.display()))?;
        Ok(())
    }

    /// Puts the program in place of the one that the pinned link has, without a moment between.
    fn replace(&mut self, pin: &Path) -> Result<()> {
        let link = XdpLink::try_from(FdLink::from(PinnedLink::from_pin(pin)?))?;
        let id = self.program.attach_to_link(link)?;
        // The program must not take the link along when it goes.
        let _: FdLink = self.program.take_link(id)?.try_into()?;
        Ok(())
    }

    fn detach_all_but(&self, uplinks: &[&Link]) {
        take_off(&self.pins, |index| !uplinks.iter().any(|link| link.index == index));
    }

    fn is_generic(&self) -> bool {
        self.arg == XdpArg::Generic
    }

    fn mode(&self) -> &'static str {
        mode_name(self.is_generic())
    }

    fn write_devices(&mut self, entries: &[XdpDevice]) -> Result<()> {
        let now = monotonic_seconds();
        for (place, old) in (0u32..).zip(&mut self.written) {
            let wanted = entries.iter().find(|entry| XdpDevice::place(entry.index) == place);
            let wanted = wanted.copied().unwrap_or_default();
            let same = *old == XdpDevice { until: old.until, ..wanted };
            let lasts = wanted.until == 0 || old.until.wrapping_sub(now) > XdpDevice::FRESH / 2;
            if !(same && lasts) {
                self.devices.set(place, wanted, 0).context("write the table of XDP's devices")?;
                *old = wanted;
            }
        }
        Ok(())
    }

    fn write_ends(&mut self, ends: &StdMap<vxlan::Station, IpAddr>, entries: &[XdpDevice]) -> Result<()> {
        let overlay =
            |index| entries.iter().any(|entry| entry.index == index && entry.flags & XdpDevice::OVERLAY != 0);
        let wanted: StdMap<VtepKey, Ip6> = ends
            .iter()
            .filter(|((device, _), _)| overlay(*device))
            .map(|((device, mac), ip)| {
                (VtepKey { device: *device, mac: (*mac).into(), pad: 0 }, table::mapped(*ip))
            })
            .collect();
        let gone: Vec<VtepKey> = self.known.keys().filter(|key| !wanted.contains_key(key)).copied().collect();
        for key in gone {
            // Not there is as good.
            let _ = self.vteps.remove(&key);
            self.known.remove(&key);
        }
        for (key, end) in wanted {
            if self.known.get(&key) != Some(&end) {
                if let Err(error) = self.vteps.insert(key, end, 0) {
                    warn!(
                        "XDP: the table of overlays' ends: {error}; what is for {end:?} takes the other way"
                    );
                    continue;
                }
                self.known.insert(key, end);
            }
        }
        Ok(())
    }
}

fn is_veth(link: &Link) -> bool {
    link.kind.as_deref() == Some("veth")
}

/// Why the program is not for a device.
fn unsuited(link: &Link, arg: XdpArg) -> Option<&'static str> {
    match (link.kind.as_deref(), arg) {
        (Some("veth"), XdpArg::Auto) => Some(
            "a veth, which gives packets away without their checksums, and slows down all others with XDP \
             (--xdp=native has it all the same)",
        ),
        (Some("bond" | "team"), XdpArg::Auto | XdpArg::Native) => Some(
            "a bond, whose drivers run programs in its members' names, not in its own (--xdp=generic can do it)",
        ),
        _ => None,
    }
}

/// What a refusal means.
fn refused(error: &ProgramError) -> anyhow::Error {
    let code = match error {
        ProgramError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    };
    match code {
        Some(libc::EBUSY | libc::EEXIST) => anyhow::anyhow!("another XDP program is on it"),
        Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ERANGE) => {
            anyhow::anyhow!("its driver has no native XDP, or not for this MTU and these settings ({error})")
        }
        _ => anyhow::anyhow!("{error}"),
    }
}

/// Takes all of it off, when it is not wanted. What cannot be taken off is told of: packets are served all the same.
pub fn switch_off(pins: &Pins) {
    take_off(pins, |_| true);
    if let Err(error) = remove(&pins.program(Place::Main, PROGRAM)) {
        warn!("XDP: {error:#}");
    }
}

/// How the program is on a device: `native` or `generic`. Nothing if it is not.
pub fn mode(pins: &Pins, link: &Link) -> Option<&'static str> {
    let program = link.xdp?;
    pins.with_xdp().contains(&link.index).then(|| mode_name(program.generic))
}

const fn mode_name(generic: bool) -> &'static str {
    if generic { "generic" } else { "native" }
}

/// Takes the program off devices, whichever version's it is. What fails is told of and tried again in the next round.
fn take_off(pins: &Pins, goes: impl Fn(u32) -> bool) {
    let gone: Vec<u32> = pins.with_xdp().into_iter().filter(|index| goes(*index)).collect();
    if gone.is_empty() {
        return;
    }
    let turn = match pins.lock() {
        Ok(turn) => turn,
        Err(error) => return warn!("XDP: take it off: {error:#}"),
    };
    for index in gone {
        match detach(&turn, pins, index) {
            Ok(()) => info!("XDP: taken off device {index}"),
            Err(error) => warn!("XDP: take it off device {index}: {error:#}"),
        }
    }
}

fn detach(_turn: &Turn, pins: &Pins, index: u32) -> Result<()> {
    remove(&pins.xdp(index))
}
