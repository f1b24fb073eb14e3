//! The redirect: the ingress hook hands packets of established flows to the pod that they are for, and does the egress
//! hook's part, too; or to the overlay that leads there, whose egress hook is still to come. They go past all that is between
//! the hooks: the node's routing, netfilter, the bridge.
//!
//! An exception to the one rule, and only where the agent has said so ([`Device::REDIRECT`]). A flow's first packet takes
//! the long way; where it leaves the node's hands with the source that it has, the flow's entries learn the devices of the
//! pods at either end.

use super::egress::back;
use super::ingress::{done, onward};
use super::parse::{ETH, Headers, Wire};
use super::{FlowRef, Kernel, Outcome, Packet, Reason, Tables, Verdict};
use crate::checksum::Sum;
use crate::maps::{Addr, Device, Flow, Side};

/// Notes in the draft behind which pod's device a new flow's client is, if replies may be redirected to it.
#[inline(never)]
pub(super) fn note_client<A: Addr, K: Tables<A>>(kernel: &K, draft: &FlowRef<'_, A>) -> u32 {
    let device = kernel.device();
    if admits(device) && is_pods(device) {
        draft.set_device(kernel.device_index());
    }
    0
}

/// Takes the note back: the flow's other entries are not for the client.
#[inline(never)]
pub(super) fn forget_client<A: Addr>(draft: &FlowRef<'_, A>) -> u32 {
    draft.set_device(0);
    0
}

#[inline(always)]
fn is_pods(device: Option<&Device>) -> bool {
    device.is_some_and(|device| device.flags & Device::POD != 0)
}

#[inline(always)]
fn admits(device: Option<&Device>) -> bool {
    device.is_some_and(|device| device.flags & Device::REDIRECT != 0)
}

/// A flow leaves by the present device, and nothing is done to its source: from now on its packets may be redirected.
/// `forward` is that entry.
#[inline(never)]
pub(super) fn settle<A: Addr, K: Tables<A>>(kernel: &K, forward: &Flow<A>) {
    let mut key = forward.key(Side::Reply);
    let mut redirected = false;
    if let Some(reply) = kernel.flow(&key)
        && reply.get().same_origin(forward)
    {
        // Only to a pod.
        redirected = reply.get().flags & Flow::<A>::DEVICE != 0;
        if redirected {
            reply.redirect();
        }
    }
    if admits(kernel.device()) {
        key = forward.key(Side::Front);
        if let Some(front) = kernel.flow(&key)
            && front.get().same_origin(forward)
        {
            if is_pods(kernel.device()) {
                front.set_device(kernel.device_index());
            }
            front.redirect();
            redirected = true;
        }
    }
    if redirected {
        kernel.count(Reason::Redirected);
    }
}

/// A request of a known flow. What there is to look up comes after the rewrite, in the program's glue ([`admitted`],
/// [`route`]): the stack of the hook that this is part of is short, so that not even a verdict of its own has room. If
/// nothing comes of it, the packet is where it would have been.
///
/// One that ends or resets a connection takes the long way: the egress hook's entry has to know, because others ask it
/// whether the flow is over.
#[inline(always)]
pub(super) fn request<A: Wire, P: Packet, K: Tables<A>>(
    packet: &mut P,
    kernel: &K,
    headers: &Headers<A>,
    front: &Flow<A>,
) -> Verdict {
    if may_go(kernel, headers, front) && headers.state() == 0 {
        mark(kernel, front);
    }
    onward(packet, headers, front)
}

#[inline(never)]
fn mark<A: Addr, K: Tables<A>>(kernel: &K, front: &Flow<A>) -> u32 {
    kernel.redirect(if front.flags & Flow::<A>::DEVICE != 0 { front.device() } else { ROUTED });
    0
}

/// In place of a device's index: where the kernel routes the packet.
pub const ROUTED: u32 = u32::MAX;

/// Whether packets may be redirected to a device. Asked for each packet, because pods come and go, and flows stay.
#[inline(always)]
pub fn admitted<K: Kernel>(kernel: &K, device: u32) -> bool {
    admits(kernel.device_at(device))
}

/// The device that a packet can be sent on by at once, as a router would; zero if it has to take the long way.
///
/// # Errors
/// If a helper fails.
#[inline(always)]
pub fn route<A: Wire, P: Packet, K: Tables<A>>(packet: &mut P, kernel: &K) -> Result<u32, Reason> {
    let (Some(src), Some(dst), Some(limit)) =
        (packet.read::<A>(ETH + A::SRC), packet.read::<A>(ETH + A::DST), packet.read::<u8>(ETH + A::TTL))
    else {
        return Ok(0);
    };
    // Where the limit is used up, the node's stack has an error for its sender.
    let device = if limit > 1 { kernel.route(src, dst) } else { 0 };
    if !admitted(kernel, device) {
        return Ok(0);
    }
    A::one_hop_less(packet, Sum(0))?;
    Ok(device)
}

/// A reply of a known flow.
#[inline(always)]
pub(super) fn reply<A: Wire, P: Packet, K: Tables<A>>(
    packet: &mut P,
    kernel: &K,
    headers: &Headers<A>,
    entry: &FlowRef<'_, A>,
) -> Verdict {
    if !may_go(kernel, headers, entry.get()) {
        return Verdict::Pass;
    }
    let Some(headers) = kernel.launder(headers) else { return Verdict::Pass };
    Verdict::from_raw(to_client(packet, kernel, headers, entry))
}

#[inline(never)]
fn to_client<A: Wire, P: Packet, K: Tables<A>>(
    packet: &mut P,
    kernel: &K,
    headers: &Headers<A>,
    entry: &FlowRef<'_, A>,
) -> Outcome {
    let flow = entry.get();
    let device = flow.device();
    // Before the rewrite: with the Service's address for its source, it would not be let through on the long way.
    if !admits(kernel.device_at(device)) {
        return Verdict::Pass.raw();
    }
    entry.seen(kernel.now(), headers.state() | Flow::<A>::SEEN);
    kernel.redirect(device);
    done(back(packet, headers, flow)).raw()
}

/// Later fragments have to find their first one's notes at both hooks: those and theirs take the long way.
#[inline(always)]
fn may_go<A: Addr, K: Kernel>(kernel: &K, headers: &Headers<A>, flow: &Flow<A>) -> bool {
    kernel.redirects() && flow.flags & Flow::<A>::REDIRECT != 0 && headers.more_fragments == 0
}

impl<A: Addr> FlowRef<'_, A> {
    /// Lets packets be redirected.
    #[inline(always)]
    fn redirect(&self) {
        self.set_flags(self.get().flags | Flow::<A>::REDIRECT);
    }
}
