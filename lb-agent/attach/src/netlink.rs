//! Questions to the kernel over netlink, one after the other, without a runtime.

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkBuffer, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};
use std::io;

/// A conversation about the network namespace that it was opened in.
pub struct Netlink(Socket);

impl Netlink {
    /// Opens a socket of this protocol.
    ///
    /// # Errors
    /// If the kernel has none for us.
    pub fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Asks, and calls `each` with everything up to the end of the answer.
    ///
    /// # Errors
    /// What the kernel says; `Interrupted` if what was listed changed meanwhile, so that something may be missing.
    pub fn ask<Q, A>(&self, flags: u16, question: Q, mut each: impl FnMut(A)) -> io::Result<()>
    where
        Q: NetlinkSerializable + Into<NetlinkPayload<Q>>,
        A: NetlinkDeserializable,
    {
        self.send(flags, question)?;
        let mut interrupted = false;
        loop {
            let (datagram, _) = self.0.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let header = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
                // Messages begin at multiples of four.
                let length = (header.length() as usize).max(size_of::<u32>()).next_multiple_of(4);
                interrupted |= header.flags() & NLM_F_DUMP_INTR != 0;
                match NetlinkMessage::<A>::deserialize(rest).map(|message| message.payload) {
                    Ok(NetlinkPayload::InnerMessage(message)) => each(message),
                    Ok(NetlinkPayload::Error(error)) if error.code.is_some() => return Err(error.to_io()),
                    Ok(NetlinkPayload::Done(done)) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code));
                    }
                    Ok(NetlinkPayload::Done(_) | NetlinkPayload::Error(_)) if interrupted => {
                        return Err(io::ErrorKind::Interrupted.into());
                    }
                    Ok(NetlinkPayload::Done(_) | NetlinkPayload::Error(_)) => return Ok(()),
                    Ok(_) => {}
                    // One device of a kind that the library does not understand must not hide the others.
                    Err(error) => tracing::debug!("netlink: a message is not understood: {error}"),
                }
                rest = rest.get(length..).unwrap_or_default();
            }
        }
    }

    /// Sends several requests as one, and waits until those that ask for it ([`NLM_F_ACK`]) are acknowledged. After an
    /// error, there may be more answers to come: the conversation is of no more use.
    ///
    /// # Errors
    /// The first thing that the kernel refuses.
    pub fn send_all<Q>(&self, requests: impl IntoIterator<Item = (u16, Q)>) -> io::Result<()>
    where
        Q: NetlinkSerializable + NetlinkDeserializable + Into<NetlinkPayload<Q>>,
    {
        let (mut buffer, mut expected) = (Vec::new(), 0);
        for (flags, request) in requests {
            expected += usize::from(flags & NLM_F_ACK != 0);
            buffer.extend(bytes(flags, request));
            buffer.resize(buffer.len().next_multiple_of(4), 0);
        }
        self.0.send(&buffer, 0)?;
        while expected > 0 {
            let (datagram, _) = self.0.recv_from_full()?;
            let message = NetlinkMessage::<Q>::deserialize(&datagram).map_err(io::Error::other)?;
            if let NetlinkPayload::Error(error) = message.payload {
                if error.code.is_some() {
                    return Err(error.to_io());
                }
                expected -= 1;
            }
        }
        Ok(())
    }

    fn send<Q>(&self, flags: u16, question: Q) -> io::Result<()>
    where
        Q: NetlinkSerializable + Into<NetlinkPayload<Q>>,
    {
        self.0.send(&bytes(flags, question), 0).map(drop)
    }
}

fn bytes<Q>(flags: u16, question: Q) -> Vec<u8>
where
    Q: NetlinkSerializable + Into<NetlinkPayload<Q>>,
{
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let mut message = NetlinkMessage::new(header, question.into());
    message.finalize();
    let mut buffer = vec![0; message.buffer_len()];
    message.serialize(&mut buffer);
    buffer
}
