//! What XDP does, beside what the hooks do.

use crate::support::build::{self, ACK, L4};
use crate::support::cluster::{Net, UPLINK, sock};
use crate::support::frame::Frame;
use crate::support::world::{Fam, World};
use crate::support::xdp_node::{Network, VTEP, XdpNode, blank_ports, destination, without_source_port};
use lb_common::addr::{Ip4, Ip6};
use lb_common::datapath::{Reason, Sent};
use lb_common::maps::{Flow, FlowKey, Side};
use std::collections::HashMap;
use std::net::SocketAddr;

/// Two nodes that see the same packets: on one of them XDP has the first word.
pub(super) struct Twins {
    pub(super) plain: XdpNode,
    pub(super) fast: XdpNode,
    pub(super) sent: usize,
}

impl Twins {
    pub(super) fn new(network: Network) -> Self {
        Self { plain: XdpNode::new(network), fast: XdpNode::new(network), sent: 0 }
    }

    pub(super) fn both(&mut self, change: impl Fn(&mut XdpNode)) {
        change(&mut self.plain);
        change(&mut self.fast);
    }

    /// A packet comes to both. Whether XDP sent it on; it must have done what the hooks do then, and nothing otherwise.
    pub(super) fn packet(&mut self, frame: &Frame) -> (Option<Vec<u8>>, bool) {
        let expected = self.plain.hooks(frame).map(|frame| frame.bytes);
        let mut ours = frame.clone();
        let by = match self.fast.xdp(&mut ours) {
            Sent::No => {
                assert_eq!(&ours, frame, "left to others, but not as it came");
                let after = self.fast.hooks(frame).map(|frame| frame.bytes);
                assert_eq!(after, expected, "{:02x?}", frame.bytes);
                return (after, false);
            }
            Sent::Lost(reason) => panic!("lost ({reason:?}): {:02x?}", frame.bytes),
            Sent::By(device) => device,
        };
        assert_eq!(by, UPLINK);
        assert!(!frame.partial, "the checksum was the device's to complete: {:02x?}", frame.bytes);
        let expected =
            expected.unwrap_or_else(|| panic!("the hooks do not send it on: {:02x?}", frame.bytes));
        let wrapped = destination(&expected) == Some(Net::of(self.fast.over_v6()).router);
        if self.fast.network != Network::Routed && wrapped {
            let v6 = self.fast.over_v6();
            let ours = without_source_port(&ours.bytes, self.fast.network);
            assert_eq!(ours, blank_ports(expected, v6), "{:02x?}", frame.bytes);
        } else {
            assert_eq!(ours.bytes, expected, "{:02x?}", frame.bytes);
        }
        self.sent += 1;
        (Some(ours.bytes), true)
    }

    pub(super) fn same(&self) {
        fn flows<A: Fam>(world: &World) -> HashMap<FlowKey<A>, Flow<A>> {
            A::of(world).flows()
        }
        assert_eq!(flows::<Ip4>(&self.plain.world), flows::<Ip4>(&self.fast.world));
        assert_eq!(flows::<Ip6>(&self.plain.world), flows::<Ip6>(&self.fast.world));
        let xdp = [Reason::XdpForwarded, Reason::XdpLeft];
        for reason in Reason::ALL.into_iter().filter(|reason| !xdp.contains(reason)) {
            let (plain, fast) = (self.plain.world.counter(reason), self.fast.world.counter(reason));
            assert_eq!(plain, fast, "{reason:?}");
        }
    }

    /// A packet from a backend on the other node, as it comes in here.
    pub(super) fn arriving_from(&self, src: SocketAddr, dst: SocketAddr, l4: L4, data: &[u8]) -> Frame {
        let bytes = build::packet(src, dst, l4, data);
        Frame::new(self.arriving(bytes))
    }

    pub(super) fn arriving(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        if self.fast.network == Network::Routed {
            return bytes;
        }
        bytes[..6].copy_from_slice(&VTEP);
        self.fast.wrap(&bytes, Some(40_000))
    }
}

/// A client's connection through the node.
pub(super) struct Connection {
    pub(super) twins: Twins,
    pub(super) client: SocketAddr,
    pub(super) vip: SocketAddr,
    pub(super) backend: SocketAddr,
    pub(super) masq: SocketAddr,
    pub(super) l4: L4,
}

impl Connection {
    /// With the first packet, which XDP leaves to the hooks.
    pub(super) fn open(network: Network, v6: bool, l4: L4) -> Self {
        Self::open_at(Twins::new(network), v6, l4)
    }

    pub(super) fn open_at(mut twins: Twins, v6: bool, l4: L4) -> Self {
        let n = Net::of(v6);
        let (client, vip, backend) = (sock(n.outside, 5000), sock(n.node, 30081), sock(n.far, 8080));
        let first = Frame::new(build::packet(client, vip, l4, b""));
        let (bytes, sent) = twins.packet(&first);
        assert!(!sent, "nothing begins in XDP");
        assert!(bytes.is_some());
        let masq = masqueraded_to(&twins.fast.world, v6);
        let masq =
            *masq.iter().find(|(flow, _)| *flow == vip).map(|(_, masq)| masq).expect("a masqueraded flow");
        Self { twins, client, vip, backend, masq, l4 }
    }

    pub(super) fn request(&self, l4: L4, data: &[u8]) -> Frame {
        Frame::new(build::packet(self.client, self.vip, l4, data))
    }

    pub(super) fn reply(&self, l4: L4, data: &[u8]) -> Frame {
        self.twins.arriving_from(self.backend, self.masq, l4, data)
    }

    pub(super) fn expect(&mut self, frame: &Frame, sent: bool, what: &str) {
        let network = self.twins.fast.network;
        assert_eq!(self.twins.packet(frame).1, sent, "{what}: {network:?} {:?} {}", self.l4, self.client);
        self.twins.same();
    }

    pub(super) fn later(&self) -> L4 {
        if self.l4 == L4::Udp { L4::Udp } else { L4::Tcp(ACK) }
    }
}

/// What each flow is masqueraded to, by the Service's address.
pub(super) fn masqueraded_to(world: &World, v6: bool) -> Vec<(SocketAddr, SocketAddr)> {
    pub(super) fn all<A: Fam>(world: &World) -> Vec<(SocketAddr, SocketAddr)> {
        let flows = A::of(world).flows();
        let back = flows.values().filter(|flow| flow.side == Side::Back as u8);
        back.map(|f| (sock(f.vip.into(), f.vip_port.get()), sock(f.masq.into(), f.masq_port.get()))).collect()
    }
    if v6 { all::<Ip6>(world) } else { all::<Ip4>(world) }
}
