//! Programs on devices by clsact filters (before 6.6).

use crate::attach::Hook;
use crate::netlink::Netlink;
use crate::pins::Place;
use crate::snapshot::Link;
use anyhow::{Context as _, Result};
use aya::programs::SchedClassifier;
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact};
use libc::{EINVAL, ENODEV, ENOENT, ETH_P_ALL};
use netlink_packet_core::NLM_F_ACK;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{self, TcAttribute, TcFilterBpfOption, TcMessage, TcOption};
use netlink_sys::protocols::NETLINK_ROUTE;

/// Priority and handle of our filters: how they are found again.
const fn priority(place: Place) -> u16 {
    match place {
        Place::Main => 50,
        Place::Front => 49,
    }
}
const HANDLE: TcHandle = TcHandle::new(0, 0x1b);

/// Attaches `program`, or puts it in place of a former one.
pub(crate) fn attach(program: &mut SchedClassifier, device: &Link, hook: Hook, place: Place) -> Result<()> {
    // Refused where it is there already.
    let _ = qdisc_add_clsact(&device.name);
    let attach_type = hook.attach_type();
    let old = SchedClassifierLink::attached(&device.name, attach_type, priority(place), HANDLE, None)?;
    let id = match program.attach_to_link(old) {
        Ok(id) => id,
        Err(_) => {
            let options = NlOptions { priority: priority(place), handle: HANDLE, classid: None };
            program
                .attach_with_options(&device.name, attach_type, TcAttachOptions::Netlink(options))
                .with_context(|| format!("attach {} to {}", hook.program(), device.name))?
        }
    };
    // A link that is dropped detaches; this one is to stay.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

/// Whether our filter on the device is the program with this id.
pub(crate) fn is_attached(id: u32, device: &Link, hook: Hook) -> Result<bool> {
    let mut question = TcMessage::default();
    question.header.index = device.index.cast_signed();
    question.header.handle = u32::from(HANDLE).into();
    question.header.parent = tc::TcHandle {
        major: tc::TcHandle::CLSACT.major,
        minor: match hook {
            Hook::Ingress => tc::TcHandle::MIN_INGRESS,
            Hook::Egress => tc::TcHandle::MIN_EGRESS,
        },
    };
    question.header.info = u32::from(priority(Place::Main)) << 16 | u32::from((ETH_P_ALL as u16).to_be());
    question.attributes.push(TcAttribute::Kind("bpf".into()));
    let mut found = None;
    let netlink = Netlink::open(NETLINK_ROUTE).context("open a netlink socket")?;
    let result = netlink.ask(NLM_F_ACK, RouteNetlinkMessage::GetTrafficFilter(question), |answer| {
        if let RouteNetlinkMessage::NewTrafficFilter(message) = answer {
            found = message.attributes.iter().find_map(program_id);
        }
    });
    match result {
        // No such filter; no qdisc that could have one; no such device.
        Err(e) if [ENOENT, EINVAL, ENODEV].map(Some).contains(&e.raw_os_error()) => Ok(false),
        result => {
            result.with_context(|| format!("ask what is attached to {}", device.name))?;
            Ok(found == Some(id))
        }
    }
}

fn program_id(attribute: &TcAttribute) -> Option<u32> {
    let TcAttribute::Options(options) = attribute else { return None };
    options.iter().find_map(|option| match option {
        TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(*id),
        _ => None,
    })
}

/// Takes our filter off; it need not be there.
pub(crate) fn detach(device: &str, hook: Hook, place: Place) {
    if let Ok(link) = SchedClassifierLink::attached(device, hook.attach_type(), priority(place), HANDLE, None)
    {
        // Dropping it detaches.
        drop(link);
    }
}
