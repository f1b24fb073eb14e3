//! The kernel's list of connected UDP sockets, and the end of one (`NETLINK_SOCK_DIAG`).

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_packet_sock_diag::{SockDiagDestroy, SockDiagMessage};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use netlink_sys::{Socket, SocketAddr};
use std::io;

/// A conversation with the kernel about the sockets of this network namespace.
pub(super) struct Diag(Socket);

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
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    /// All of both families.
    ///
    /// # Errors
    /// `ENOENT` if the kernel has no `CONFIG_INET_UDP_DIAG`.
    pub(super) fn connected(&self) -> io::Result<Vec<Connected>> {
        let mut all = Vec::new();
        for (family, socket_id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
            let message = SockDiagMessage::InetRequest(request(family, socket_id));
            self.send(NLM_F_REQUEST | NLM_F_DUMP, message)?;
            self.receive(|message| {
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
        self.send(NLM_F_REQUEST | NLM_F_ACK, SockDiagDestroy::new(message))?;
        self.receive(|_| {})
    }

    fn send<M>(&self, flags: u16, message: M) -> io::Result<()>
    where
        M: NetlinkSerializable + Into<NetlinkPayload<M>>,
    {
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        let mut message = NetlinkMessage::new(header, message.into());
        message.finalize();
        let mut buffer = vec![0; message.buffer_len()];
        message.serialize(&mut buffer);
        self.0.send(&buffer, 0).map(drop)
    }

    /// Everything up to the end of the answer.
    fn receive(&self, mut each: impl FnMut(SockDiagMessage)) -> io::Result<()> {
        loop {
            let (datagram, _) = self.0.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let message: NetlinkMessage<SockDiagMessage> =
                    NetlinkMessage::deserialize(rest).map_err(io::Error::other)?;
                match message.payload {
                    NetlinkPayload::InnerMessage(message) => each(message),
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(()),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => {}
                }
                // Messages begin at multiples of four.
                let length = (message.header.length as usize).max(size_of::<u32>()).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
            }
        }
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
