//! The XDP program: established flows that only pass through this node, without its stack.

use crate::tables::{self, LB_VTEP, LB_XDP, Maps, by_tables};
use aya_ebpf::bindings::{bpf_fib_lookup, xdp_action, xdp_md};
use aya_ebpf::helpers::generated as helpers;
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use bytemuck::Pod;
use lb_common::addr::{Ip6, Mac};
use lb_common::checksum::{Sum, update};
use lb_common::datapath::{self, Covered, Driver, NextHop, Packet, Query, RawPacket, Reason, Routes, Sent};
use lb_common::maps::{VtepKey, XdpDevice};

/// Packets that come in, before the kernel makes anything of them.
#[xdp]
pub(crate) fn transit(ctx: XdpContext) -> u32 {
    let frame = Frame(ctx.ctx);
    match datapath::transit(frame) {
        Sent::No => xdp_action::XDP_PASS,
        Sent::By(device) => {
            tables::count(Reason::XdpForwarded);
            frame.send(device)
        }
        Sent::Lost(reason) => {
            tables::count(reason);
            xdp_action::XDP_DROP
        }
    }
}

/// A packet and what surrounds it.
#[derive(Clone, Copy)]
struct Frame(*mut xdp_md);

impl Frame {
    #[inline(always)]
    fn send(&self, device: u32) -> u32 {
        let arrival = self.arrival();
        if device == arrival && self.xdp_device(arrival).is_some_and(|d| d.flags & XdpDevice::TX != 0) {
            return xdp_action::XDP_TX;
        }
        // SAFETY: no pointers.
        unsafe { helpers::bpf_redirect(device, 0) as u32 }
    }

    /// Start and end. Read again each time: with [`Frame::adjust`] both change, and the compiler, which knows nothing of
    /// that, would carry them over into other functions as numbers.
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        // SAFETY: the context is valid.
        unsafe {
            let data = (&raw const (*self.0).data).read_volatile();
            let end = (&raw const (*self.0).data_end).read_volatile();
            (data as usize, end as usize)
        }
    }

    #[inline(always)]
    fn adjust(&self, by: i32) -> Option<()> {
        // SAFETY: no pointers but the context.
        (unsafe { helpers::bpf_xdp_adjust_head(self.0, by) } == 0).then_some(())
    }
}

impl RawPacket for Frame {
    type Window = Window;

    /// By way of the stack: subtracted from another number, the compiler would add that to the packet's start first, and
    /// the verifier does not let it be larger than a packet.
    #[inline(always)]
    fn length(&self) -> usize {
        let (data, end) = self.bounds();
        let length = end - data;
        // SAFETY: a local variable.
        unsafe { (&raw const length).read_volatile() }
    }

    #[inline(always)]
    fn window(&self, from: usize, len: usize) -> Option<Window> {
        let (data, end) = self.bounds();
        (data + from + len <= end).then_some(Window { at: data + from, len })
    }

    #[inline(always)]
    fn grow(&self, bytes: usize) -> Option<()> {
        self.adjust(-(bytes as i32))
    }

    #[inline(always)]
    fn shrink(&self, bytes: usize) -> Option<()> {
        // SAFETY: the context is valid.
        let bare = unsafe { (*self.0).data_meta == (*self.0).data };
        // What a driver says of the packet moves along with its start, over the bytes that are to stay.
        if bare { self.adjust(bytes as i32) } else { None }
    }

    #[inline(always)]
    fn trim(&self, len: usize) -> Option<()> {
        let by = len as i32 - self.length() as i32;
        // SAFETY: no pointers but the context.
        (unsafe { helpers::bpf_xdp_adjust_tail(self.0, by) } == 0).then_some(())
    }
}

/// Bytes of the packet. The comparison with its end was made; offsets and length are constants, so that what is in it
/// costs no other one.
#[derive(Clone, Copy)]
struct Window {
    at: usize,
    len: usize,
}

impl Window {
    #[inline(always)]
    fn place<T>(&self, offset: usize) -> Option<*mut T> {
        (offset + size_of::<T>() <= self.len).then_some((self.at + offset) as *mut T)
    }
}

impl Packet for Window {
    #[inline(always)]
    fn read<T: Pod>(&self, offset: usize) -> Option<T> {
        // SAFETY: within the window, which is within the packet. Its data is at least two-byte aligned and the kernels
        // that we run on read wider words at any address.
        self.place::<T>(offset).map(|place| unsafe { *place })
    }

    /// Only what is at a known place is dealt with here.
    #[inline(always)]
    fn load<T: Pod>(&self, _: usize) -> Option<T> {
        None
    }

    #[inline(always)]
    fn store<T: Pod>(&mut self, offset: usize, value: &T) -> Result<(), Reason> {
        let place = self.place::<T>(offset).ok_or(Reason::Malformed)?;
        // SAFETY: as above.
        unsafe { *place = *value };
        Ok(())
    }

    #[inline(always)]
    fn l3_checksum(&mut self, offset: usize, change: Sum) -> Result<(), Reason> {
        let old: u16 = self.read(offset).ok_or(Reason::Malformed)?;
        self.store(offset, &update(old, change))
    }

    #[inline(always)]
    fn l4_checksum(&mut self, offset: usize, change: Sum, of: Covered) -> Result<(), Reason> {
        let old: u16 = self.read(offset).ok_or(Reason::Malformed)?;
        if of.zero_is_none && old == 0 {
            return Ok(());
        }
        let new = match update(old, change) {
            0 if of.zero_is_none => 0xffff,
            new => new,
        };
        self.store(offset, &new)
    }
}

by_tables!(Frame);

impl Driver for Frame {
    #[inline(always)]
    fn arrival(&self) -> u32 {
        // SAFETY: the context is valid.
        unsafe { (*self.0).ingress_ifindex }
    }

    #[inline(always)]
    fn xdp_device(&self, index: u32) -> Option<&XdpDevice> {
        LB_XDP.get(XdpDevice::place(index)).filter(|device| device.index == index)
    }

    #[inline(always)]
    fn vtep(&self, device: u32, mac: Mac) -> Option<Ip6> {
        // SAFETY: without preallocation an element is never reused under a reader.
        unsafe { LB_VTEP.get(&VtepKey { device, mac, pad: 0 }) }.copied()
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: no arguments.
        unsafe { helpers::bpf_get_prandom_u32() }
    }
}

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// The packet is the node's own: asked for by the device that it leaves by.
const OUTPUT: u32 = 2;

impl<A: Maps> Routes<A> for Frame {
    #[inline(always)]
    fn route(&self, query: &Query<A>) -> Option<NextHop> {
        // SAFETY: plain data; zero is valid for every field.
        let mut route: bpf_fib_lookup = unsafe { core::mem::zeroed() };
        let key = &query.key;
        route.family = if A::IS_V4 { AF_INET } else { AF_INET6 };
        route.l4_protocol = key.proto;
        (route.sport, route.dport) = (key.sport.wire(), key.dport.wire());
        route.__bindgen_anon_1.tot_len = query.len;
        route.ifindex = query.device;
        // Type of service; class and label.
        route.__bindgen_anon_2.flowinfo = if A::IS_V4 {
            u32::from(query.head.to_ne_bytes()[1])
        } else {
            query.head & 0x0fff_ffffu32.to_be()
        };
        // SAFETY: the addresses are of the family, in network order, and no longer than the fields.
        unsafe {
            (&raw mut route.__bindgen_anon_3).cast::<A>().write_unaligned(key.src);
            (&raw mut route.__bindgen_anon_4).cast::<A>().write_unaligned(key.dst);
        }
        let (size, flags) = (size_of::<bpf_fib_lookup>() as i32, if query.own { OUTPUT } else { 0 });
        // SAFETY: the helper reads and writes that structure.
        let result = unsafe { helpers::bpf_fib_lookup(self.0.cast(), &raw mut route, size, flags) };
        if result != 0 {
            return None;
        }
        // SAFETY: six bytes each, at even addresses.
        let (dst, src) = unsafe {
            ((&raw const route.dmac).cast::<Mac>().read(), (&raw const route.smac).cast::<Mac>().read())
        };
        Some(NextHop { device: route.ifindex, dst, src })
    }
}
