//! The kernel's list of connected UDP sockets, and the end of one (`NETLINK_SOCK_DIAG`).

use lb_attach::netlink::Netlink;
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP};
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_packet_sock_diag::{SockDiagDestroy, SockDiagMessage};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use std::io;

/// A conversation with the kernel about the sockets of this network namespace.
pub(super) struct Diag(Netlink);

/// A connected UDP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Connected {
    family: u8,
    pub(super) id: SocketId,
}

impl Connected {
    /// The kernel's name for the socket, as BPF programs have it.
    pub(super) fn cookie(&self) -> u64 {
        // Two words, the lower one first, each in the machine's order.
        let [a, b, c, d, e, f, g, h] = self.id.cookie;
        u64::from(u32::from_ne_bytes([a, b, c, d])) | u64::from(u32::from_ne_bytes([e, f, g, h])) << 32
    }
}

impl Diag {
    pub(super) fn open() -> io::Result<Self> {
        Netlink::open(NETLINK_SOCK_DIAG).map(Self)
    }

    /// All of both families.
    ///
    /// # Errors
    /// `ENOENT` if the kernel has no `CONFIG_INET_UDP_DIAG`.
    pub(super) fn connected(&self) -> io::Result<Vec<Connected>> {
        let mut all = Vec::new();
        for (family, socket_id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
            let message = SockDiagMessage::InetRequest(request(family, socket_id));
            self.0.ask(NLM_F_DUMP, message, |message| {
                if let SockDiagMessage::InetResponse(response) = message {
                    all.push(Connected { family, id: response.header.socket_id });
                }
            })?;
        }
        Ok(all)
    }

    /// Ends a socket: it is connected to nobody, and its owner's next `recv` says `ECONNABORTED`.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if the kernel has no `CONFIG_INET_DIAG_DESTROY`; `ENOENT` if it is gone, or another one now.
    pub(super) fn destroy(&self, socket: &Connected) -> io::Result<()> {
        let message = SockDiagMessage::InetRequest(request(socket.family, socket.id.clone()));
        self.0.ask(NLM_F_ACK, SockDiagDestroy::new(message), |_: SockDiagMessage| {})
    }
}

fn request(family: u8, socket_id: SocketId) -> InetRequest {
    InetRequest {
        family,
        protocol: IPPROTO_UDP,
        extensions: ExtensionFlags::empty(),
        // Connected: UDP has the names of TCP's states.
        states: StateFlags::ESTABLISHED,
        socket_id,
    }
}
