//! What the plugin does.

use crate::config::Config;
use crate::env::Attachment;
use crate::error::{Code, Error, Result};
use crate::log::Log;
use crate::pod::{Found, Netns, find};
use crate::version::addresses;
use lb_attach::attach::{self, Attacher, Hook};
use lb_attach::pins::{Busy, Pins, Turn};
use lb_attach::records::{Device, Record, Records};
use lb_attach::snapshot::{self, Link, Snapshot};
use lb_common::maps::Device as Entry;
use serde_json::{Map, Value};

/// One call of the plugin.
pub(crate) struct Call<'a> {
    config: &'a Config,
    log: &'a Log,
    pins: Pins,
    records: Records,
}

/// Our turn, and what is pinned.
type Open = (Turn, Option<Attacher>);

impl<'a> Call<'a> {
    pub(crate) fn new(config: &'a Config, log: &'a Log) -> Self {
        let pins = Pins::at(&config.ours.bpffs);
        let records = Records::at(&config.ours.state_dir);
        Self { config, log, pins, records }
    }

    /// Serves a pod's device before the pod starts, and writes the pod down.
    pub(crate) fn add(&self, attachment: &Attachment) -> Result<Map<String, Value>> {
        let result = self.config.prev_result.clone().unwrap_or_default();
        let ips = addresses(&result, &attachment.ifname)?;
        let (link, note) = match self.look(attachment)? {
            (Found::Device(link), host) => (Some(link.clone()), self.serve(&link, &host)?),
            (Found::None(why), _) => (None, Some(why)),
            (Found::Absent, _) if !ips.is_empty() => return Err(absent(attachment)),
            (Found::Absent, _) => (None, Some(format!("the pod has no interface {}", attachment.ifname))),
        };
        let record = Record {
            network: self.config.name.clone(),
            container_id: attachment.container_id.clone(),
            ifname: attachment.ifname.clone(),
            pod: attachment.pod.clone(),
            ips,
            device: link.as_ref().map(Device::of),
            note,
        };
        self.records.write(&record).map_err(io)?;
        let device = link.map_or_else(String::new, |link| format!(" on {}", link.name));
        let ips: Vec<String> = record.ips.iter().map(ToString::to_string).collect();
        let done = record.note.as_deref().unwrap_or("is served");
        self.log.say(&format!("ADD {} ({}){device}: {done}", who(&record), ips.join(", ")));
        Ok(result)
    }

    /// Attaches to a device, or returns why not.
    fn serve(&self, link: &Link, host: &Snapshot) -> Result<Option<String>> {
        if let Some((turn, Some(mut attacher))) = self.open()? {
            let mut entry = host.entry(link, Entry::POD);
            // The agent may have been first, and knows more.
            let known = attacher.entry(link.index).filter(|known| known.netns == entry.netns);
            entry.flags |= known.map_or(0, |known| known.flags & Entry::OF_THE_AGENT);
            let attached = attacher.attach(&turn, link, entry);
            let failed =
                |e| Code::Kernel.error(format!("cannot serve the pod's device {}", link.name)).because(e);
            return attached.map_err(failed).map(|()| None);
        }
        let why = self.nothing_pinned();
        if self.config.ours.required {
            return Err(Code::TryAgain.error("lb-agent has not run on this node yet").because(why));
        }
        Ok(Some(format!("{why}; lb-agent attaches it when it comes")))
    }

    /// Removes what ADD has left. What is gone already is no error.
    pub(crate) fn del(&self, attachment: &Attachment) -> Result<()> {
        let record = self.records.read(&attachment.container_id, &attachment.ifname);
        let record = record.unwrap_or_else(|error| {
            self.log.say(&format!("DEL: {error:#}; removed"));
            None
        });
        if record.as_ref().is_some_and(|record| record.network != self.config.name) {
            // Of another network that the container is in.
            return Ok(());
        }
        let known = record.as_ref().and_then(|record| record.device.clone());
        // Without a record, the namespace can tell, if there still is one.
        let device = known.or_else(|| match self.look(attachment) {
            Ok((Found::Device(link), _)) => Some(Device::of(&link)),
            _ => None,
        });
        if let Some(device) = device {
            self.take_off(&device)?;
        }
        self.records.remove(&attachment.container_id, &attachment.ifname).map_err(io)?;
        if let Some(record) = record {
            self.log.say(&format!("DEL {}", who(&record)));
        }
        Ok(())
    }

    /// Takes the programs off a device, unless another one has its index by now.
    fn take_off(&self, device: &Device) -> Result<()> {
        let links = snapshot::links().map_err(kernel)?;
        let there = links.iter().find(|link| link.index == device.index);
        if there.is_some_and(|link| Device::of(link) != *device) {
            return Ok(());
        }
        let name = there.map(|link| link.name.as_str());
        let taken_off = match self.open()? {
            None => Ok(()),
            Some((turn, Some(mut attacher))) => attacher.detach(&turn, device.index, name),
            Some((turn, None)) => attach::detach(&turn, &self.pins, device.index, name, attach::has_tcx()),
        };
        taken_off.map_err(|e| Code::Kernel.error(format!("cannot take {} off", device.name)).because(e))
    }

    /// Whether all is as ADD has left it.
    pub(crate) fn check(&self, attachment: &Attachment) -> Result<()> {
        let result = self.config.prev_result.clone().unwrap_or_default();
        let ips = addresses(&result, &attachment.ifname)?;
        let (found, host) = self.look(attachment)?;
        let record = self.records.read(&attachment.container_id, &attachment.ifname).map_err(io)?;
        let record = record.filter(|record| record.network == self.config.name).ok_or_else(|| {
            let path = self.records.path(&attachment.container_id, &attachment.ifname);
            Code::Record.error(format!("the pod's record is missing: {}", path.display()))
        })?;
        if record.ips != ips {
            let msg = format!("the pod's record has other addresses: {:?}, not {ips:?}", record.ips);
            return Err(Code::Record.error(msg));
        }
        let link = match found {
            Found::Device(link) => Some(link),
            Found::None(_) => None,
            Found::Absent if !ips.is_empty() => return Err(absent(attachment)),
            Found::Absent => None,
        };
        if link.as_ref().map(Device::of) != record.device {
            let text = |device: Option<&Device>| device.map_or("none".into(), |device| format!("{device:?}"));
            let now = link.as_ref().map(Device::of);
            return Err(Code::Device.error("the pod's device is another one").because(format!(
                "recorded was {}, found {}",
                text(record.device.as_ref()),
                text(now.as_ref())
            )));
        }
        let Some(link) = link else { return Ok(()) };
        let Some((_turn, Some(attacher))) = self.open()? else {
            let msg = format!("{} is not served: {}", link.name, self.nothing_pinned());
            return Err(Code::NotServed.error(msg));
        };
        let missing = attacher.missing(&link).map_err(kernel)?;
        if !missing.is_empty() {
            let names: Vec<&str> = missing.into_iter().map(Hook::program).collect();
            let msg = format!("{} is not served: {} not attached", link.name, names.join(" and "));
            return Err(Code::NotServed.error(msg));
        }
        // What it masquerades to may have changed with the node's addresses, which is the agent's to follow.
        let of_pod = |entry: Entry| (entry.flags & Entry::POD, entry.netns);
        if attacher.entry(link.index).map(of_pod) != Some(of_pod(host.entry(&link, Entry::POD))) {
            let msg =
                format!("{} is not served: its entry in the device table is missing or different", link.name);
            return Err(Code::NotServed.error(msg));
        }
        Ok(())
    }

    /// Removes what ADD has left of attachments that are no more. Goes on after an error, and reports the first.
    pub(crate) fn gc(&self) -> Result<()> {
        let mut result = Ok(());
        for record in self.records.all().map_err(io)? {
            let (Record { container_id, ifname, .. }, valid) = (&record, &self.config.valid);
            if record.network != self.config.name || valid.contains(&(container_id.clone(), ifname.clone())) {
                continue;
            }
            let taken_off = record.device.as_ref().map_or(Ok(()), |device| self.take_off(device));
            let removed = taken_off.and_then(|()| self.records.remove(container_id, ifname).map_err(io));
            match &removed {
                Ok(()) => self.log.say(&format!("GC {}: removed", who(&record))),
                Err(error) => self.log.say(&format!("GC {}: {error}", who(&record))),
            }
            result = result.and(removed);
        }
        result
    }

    /// Whether pods can be added.
    pub(crate) fn status(&self) -> Result<()> {
        match self.open() {
            Ok(Some((_, Some(_)))) => Ok(()),
            Ok(_) => {
                let msg = "lb-agent has not run on this node yet: Services would not work in new pods";
                Err(Code::NotAvailable.error(msg).because(self.nothing_pinned()))
            }
            Err(error) if error.code == Code::TryAgain => Err(error),
            Err(error) => {
                let msg = "what lb-agent has pinned cannot be used: Services may not work in any pod";
                Err(Code::LimitedConnectivity.error(msg).because(error))
            }
        }
    }

    /// The pod's device, and what else there is on the host.
    fn look(&self, attachment: &Attachment) -> Result<(Found, Snapshot)> {
        let path = attachment.netns.as_deref().unwrap_or_else(|| "".as_ref());
        let netns = Netns::open(path)?;
        let host = Snapshot::take().map_err(kernel)?;
        Ok((find(&netns, &attachment.ifname, &host)?, host))
    }

    /// Waits for our turn. Nothing if no agent has ever run here.
    fn open(&self) -> Result<Option<Open>> {
        if !self.pins.exist() {
            return Ok(None);
        }
        let turn = self.pins.lock().map_err(|error| match error.is::<Busy>() {
            true => Code::TryAgain.error("somebody else is at it").because(error),
            false => io(error),
        })?;
        let attacher = Attacher::open(&turn, &self.pins, attach::has_tcx()).map_err(kernel)?;
        Ok(Some((turn, attacher)))
    }

    fn nothing_pinned(&self) -> String {
        format!("no programs are pinned in {}", self.pins.root().display())
    }
}

fn who(record: &Record) -> String {
    let Record { container_id, ifname, network, pod, .. } = record;
    format!("{} {ifname} in {network}", pod.as_ref().unwrap_or(container_id))
}

fn absent(attachment: &Attachment) -> Error {
    Code::Device.error(format!("the pod has no interface {}, though prevResult says so", attachment.ifname))
}

fn io(error: anyhow::Error) -> Error {
    Code::Io.error("cannot read or write what is kept of pods").because(error)
}

fn kernel(error: anyhow::Error) -> Error {
    Code::Kernel.error("the kernel refuses").because(error)
}
