//! The kernel's list of UDP sockets, and the end of one (`NETLINK_SOCK_DIAG`).

use lb_attach::netlink::Netlink;
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP};
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_packet_sock_diag::{SockDiagDestroy, SockDiagMessage};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use std::io;

/// A conversation with the kernel about the sockets of this network namespace.
pub(crate) struct Diag(Netlink);

/// A UDP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UdpSocket {
    family: u8,
    pub(crate) id: SocketId,
}

impl UdpSocket {
    /// The kernel's name for the socket, as BPF programs have it.
    pub(crate) fn cookie(&self) -> u64 {
        // Two words, the lower one first, each in the machine's order.
        let [a, b, c, d, e, f, g, h] = self.id.cookie;
        u64::from(u32::from_ne_bytes([a, b, c, d])) | u64::from(u32::from_ne_bytes([e, f, g, h])) << 32
    }
}

impl Diag {
    pub(crate) fn open() -> io::Result<Self> {
        Netlink::open(NETLINK_SOCK_DIAG).map(Self)
    }

    /// All that are connected, of both families.
    ///
    /// # Errors
    /// `ENOENT` if the kernel has no `CONFIG_INET_UDP_DIAG`.
    pub(crate) fn connected(&self) -> io::Result<Vec<UdpSocket>> {
        // UDP has the names of TCP's states.
        self.list(StateFlags::ESTABLISHED)
    }

    /// All that are not.
    ///
    /// # Errors
    /// `ENOENT` if the kernel has no `CONFIG_INET_UDP_DIAG`.
    pub(crate) fn unconnected(&self) -> io::Result<Vec<UdpSocket>> {
        self.list(StateFlags::CLOSE)
    }

    fn list(&self, states: StateFlags) -> io::Result<Vec<UdpSocket>> {
        let mut all = Vec::new();
        for (family, socket_id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
            let message = SockDiagMessage::InetRequest(request(family, socket_id, states.clone()));
            self.0.ask(NLM_F_DUMP, message, |message| {
                if let SockDiagMessage::InetResponse(response) = message {
                    all.push(UdpSocket { family, id: response.header.socket_id });
                }
            })?;
        }
        Ok(all)
    }

    /// Ends a socket: it is connected to nobody, and its owner's next `recv` says `ECONNABORTED`.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if the kernel has no `CONFIG_INET_DIAG_DESTROY`; `ENOENT` if it is gone, or another one now.
    pub(crate) fn destroy(&self, socket: &UdpSocket) -> io::Result<()> {
        let request = request(socket.family, socket.id.clone(), StateFlags::ESTABLISHED);
        let message = SockDiagMessage::InetRequest(request);
        self.0.ask(NLM_F_ACK, SockDiagDestroy::new(message), |_: SockDiagMessage| {})
    }
}

fn request(family: u8, socket_id: SocketId, states: StateFlags) -> InetRequest {
    InetRequest { family, protocol: IPPROTO_UDP, extensions: ExtensionFlags::empty(), states, socket_id }
}
