//! A packet at the driver, in memory.

use super::cluster::{Net, UPLINK};
use super::frame::Frame;
use super::world::Fam;
use super::xdp_node::{Network, RANDOM, XdpNode};
use bytemuck::Pod;
use lb_common::addr::{Ip6, Mac};
use lb_common::checksum::Sum;
use lb_common::datapath::{
    Context, Covered, Driver, FlowRef, Flows, NextHop, Packet, Put, PutError, Query, RawPacket, Reason,
    Routes, Sent, transit,
};
use lb_common::maps::{Flow, FlowKey, VtepKey, XdpDevice};
use std::cell::RefCell;
use std::net::IpAddr;

impl XdpNode {
    /// The program on a packet that comes in by the uplink.
    pub(crate) fn xdp(&self, frame: &mut Frame) -> Sent {
        let (cell, head) = (RefCell::new(frame.clone()), RefCell::default());
        let at = At { node: self, frame: &cell, head: &head };
        let sent = transit(at);
        *frame = cell.into_inner();
        sent
    }
}

/// One packet at the driver.
#[derive(Clone, Copy)]
struct At<'a> {
    node: &'a XdpNode,
    frame: &'a RefCell<Frame>,
    /// Bytes in front of it.
    head: &'a RefCell<Vec<u8>>,
}

/// Bytes of it.
struct Window<'a> {
    frame: &'a RefCell<Frame>,
    from: usize,
    len: usize,
}

impl<'a> RawPacket for At<'a> {
    type Window = Window<'a>;

    fn length(&self) -> usize {
        self.frame.borrow().bytes.len()
    }

    fn window(&self, from: usize, len: usize) -> Option<Window<'a>> {
        (from + len <= self.length()).then_some(Window { frame: self.frame, from, len })
    }

    fn grow(&self, bytes: usize) -> Option<()> {
        let mut head = self.head.borrow_mut();
        let at = head.len().saturating_sub(bytes);
        let mut front = vec![0xee; bytes.saturating_sub(head.len())];
        front.extend(head.drain(at..));
        self.frame.borrow_mut().bytes.splice(..0, front);
        Some(())
    }

    fn shrink(&self, bytes: usize) -> Option<()> {
        self.head.borrow_mut().extend(self.frame.borrow_mut().bytes.drain(..bytes));
        Some(())
    }

    fn trim(&self, len: usize) -> Option<()> {
        self.frame.borrow_mut().bytes.truncate(len);
        Some(())
    }
}

impl Window<'_> {
    /// On the packet as a whole. The driver does not know that a checksum is partial.
    fn apply<T>(&self, offset: usize, size: usize, change: impl FnOnce(&mut Frame, usize) -> T) -> Option<T> {
        if offset + size > self.len {
            return None;
        }
        let mut frame = self.frame.borrow_mut();
        let partial = std::mem::take(&mut frame.partial);
        let result = change(&mut frame, self.from + offset);
        frame.partial = partial;
        Some(result)
    }
}

impl Packet for Window<'_> {
    fn read<T: Pod>(&self, offset: usize) -> Option<T> {
        self.apply(offset, size_of::<T>(), |frame, at| frame.load(at))?
    }

    fn load<T: Pod>(&self, _: usize) -> Option<T> {
        None
    }

    fn store<T: Pod>(&mut self, offset: usize, value: &T) -> Result<(), Reason> {
        self.apply(offset, size_of::<T>(), |frame, at| frame.store(at, value)).ok_or(Reason::Malformed)?
    }

    fn l3_checksum(&mut self, offset: usize, change: Sum) -> Result<(), Reason> {
        self.apply(offset, 2, |frame, at| frame.l3_checksum(at, change)).ok_or(Reason::Malformed)?
    }

    fn l4_checksum(&mut self, offset: usize, change: Sum, of: Covered) -> Result<(), Reason> {
        self.apply(offset, 2, |frame, at| frame.l4_checksum(at, change, of)).ok_or(Reason::Malformed)?
    }
}

impl Context for At<'_> {
    fn now(&self) -> u32 {
        self.node.world.now()
    }

    fn count(&self, reason: Reason) {
        self.node.world.count(reason);
    }

    fn backend_epoch(&self, id: u32) -> u32 {
        self.node.world.backend_epoch(id)
    }
}

impl<A: Fam> Flows<A> for At<'_> {
    fn flow(&self, key: &FlowKey<A>) -> Option<FlowRef<'_, A>> {
        self.node.world.flow(key)
    }

    fn put_flow(&self, key: &FlowKey<A>, flow: &Flow<A>, how: Put) -> Result<(), PutError> {
        self.node.world.put_flow(key, flow, how)
    }
}

impl Driver for At<'_> {
    fn arrival(&self) -> u32 {
        UPLINK
    }

    fn xdp_device(&self, index: u32) -> Option<&XdpDevice> {
        self.node.devices.get(&index)
    }

    fn vtep(&self, device: u32, mac: Mac) -> Option<Ip6> {
        self.node.vteps.get(&VtepKey { device, mac, pad: 0 }).copied()
    }

    fn random(&self) -> u32 {
        RANDOM
    }
}

impl<A: Fam> Routes<A> for At<'_> {
    fn route(&self, query: &Query<A>) -> Option<NextHop> {
        let dst: IpAddr = query.key.dst.into();
        if query.own {
            assert_eq!(query.device, UPLINK, "the overlay's packets leave by its own link");
        }
        let mtu = if !query.own && dst == Net::of(dst.is_ipv6()).far && self.node.network != Network::Routed {
            self.node.overlay_mtu
        } else {
            self.node.mtu
        };
        self.node.hop(dst).filter(|_| query.len <= mtu)
    }
}
