//! `nf_conntrack`'s table of connections, by netlink.

use lb_attach::netlink::Netlink;
use netlink_packet_core::{DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute as Attribute, ConntrackMessage, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple,
    Protocol, Status, TCPFlags, Tuple as Part,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use std::io;
use std::net::{IpAddr, SocketAddr};

const TCP: u8 = 6;
const UDP: u8 = 17;

// linux/netfilter/nfnetlink_conntrack.h and nf_conntrack_tcp.h
const CTA_NAT_SRC: u16 = 6;
const CTA_NAT_DST: u16 = 13;
const CTA_NAT_V4_MINIP: u16 = 1;
const CTA_NAT_V6_MINIP: u16 = 4;
const CTA_NAT_PROTO: u16 = 3;
const CTA_PROTONAT_PORT_MIN: u16 = 1;
const CTA_PROTONAT_PORT_MAX: u16 = 2;
const NLA_F_NESTED: u16 = 0x8000;
const TCP_ESTABLISHED: u8 = 3;
/// Any sequence number will do: this connection's were never seen.
const BE_LIBERAL: TcpFlag = 8;
/// Either end may have agreed on it, we do not know.
const SACK_PERM: TcpFlag = 2;

type TcpFlag = u8;

/// A connection's packets in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// Where they come from.
    pub src: SocketAddr,
    /// Where they go.
    pub dst: SocketAddr,
    /// IP protocol: TCP or UDP.
    pub proto: u8,
}

impl Tuple {
    /// The answers to these, were nothing translated.
    pub const fn reversed(self) -> Self {
        Self { src: self.dst, dst: self.src, proto: self.proto }
    }
}

/// An entry of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// As the client sends.
    pub original: Tuple,
    /// As the server answers.
    pub reply: Tuple,
}

impl Connection {
    /// Whether the destination is translated.
    pub fn has_other_destination(&self) -> bool {
        self.reply.src != self.original.dst
    }

    /// Whether the source is translated, be it only the port.
    pub fn has_other_source(&self) -> bool {
        self.reply.dst != self.original.src
    }
}

/// A conversation with the kernel about the connections of the calling thread's network namespace.
pub struct Conntrack(Netlink);

impl Conntrack {
    /// Opens a conversation.
    ///
    /// # Errors
    /// If the kernel does not know of connections.
    pub fn open() -> io::Result<Self> {
        Netlink::open(NETLINK_NETFILTER).map(Self)
    }

    /// Calls `each` with every TCP and UDP connection, both families. Those that come or go meanwhile may be met or not.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn for_each(&self, mut each: impl FnMut(Connection)) -> io::Result<()> {
        let all = message(NetfilterProtoFamily::Unspec, ConntrackMessage::Get(Vec::new()));
        let listed = self.0.ask(NLM_F_DUMP, all, |answer| {
            if let Some(connection) = connection(&answer) {
                each(connection);
            }
        });
        match listed {
            // It goes on changing, as every table of connections does.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            result => result,
        }
    }

    /// The connection that a packet with this tuple belongs to, in either direction.
    ///
    /// # Errors
    /// What the kernel says; that there is none is no error.
    pub fn find(&self, tuple: &Tuple) -> io::Result<Option<Connection>> {
        let question = ConntrackMessage::Get(vec![Attribute::CtaTupleOrig(parts(tuple))]);
        let mut found = None;
        match self.0.ask(NLM_F_ACK, message(family(tuple), question), |answer| found = connection(&answer)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            result => result.map(|()| found),
        }
    }

    /// Ends the entry that a packet with this tuple belongs to. Whether there was one.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove(&self, tuple: &Tuple) -> io::Result<bool> {
        let request = ConntrackMessage::Delete(vec![Attribute::CtaTupleOrig(parts(tuple))]);
        match self.0.ask(NLM_F_ACK, message(family(tuple), request), |_: NetfilterMessage| {}) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            result => result.map(|()| true),
        }
    }

    /// Enters a connection that is under way, so that netfilter translates it from now on.
    ///
    /// # Errors
    /// `AlreadyExists` if one of its tuples is another connection's, or what the kernel says.
    pub fn insert(&self, connection: &Connection, timeout: u32) -> io::Result<()> {
        let original = connection.original;
        // The kernel makes the other tuple of this one and the translations.
        let mut attributes = vec![
            Attribute::CtaTupleOrig(parts(&original)),
            Attribute::CtaTupleReply(parts(&original.reversed())),
            Attribute::CtaStatus(Status::Confirmed | Status::SeenReply | Status::Assured),
            Attribute::CtaTimeout(timeout),
        ];
        if original.proto == TCP {
            let flags = || TCPFlags::parse(&[BE_LIBERAL | SACK_PERM; 2]).map_err(io::Error::other);
            attributes.push(Attribute::CtaProtoInfo(vec![ProtoInfo::TCP(vec![
                ProtoInfoTCP::State(TCP_ESTABLISHED),
                ProtoInfoTCP::OriginalFlags(flags()?),
                ProtoInfoTCP::ReplyFlags(flags()?),
            ])]));
        }
        if connection.has_other_destination() {
            attributes.push(Attribute::Other(translation(CTA_NAT_DST, connection.reply.src)));
        }
        if connection.has_other_source() {
            attributes.push(Attribute::Other(translation(CTA_NAT_SRC, connection.reply.dst)));
        }
        let request = message(family(&original), ConntrackMessage::New(attributes));
        self.0.ask(NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, request, |_: NetfilterMessage| {})?;
        // Where another connection has the tuple of the answers, the kernel takes the next free port for this one: its
        // server would meet a client that it does not know, and reset it.
        match self.find(&original)? {
            Some(entered) if entered.reply != connection.reply => {
                self.remove(&original)?;
                Err(io::ErrorKind::AlreadyExists.into())
            }
            _ => Ok(()),
        }
    }
}

fn message(family: NetfilterProtoFamily, inner: ConntrackMessage) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), inner)
}

fn family(tuple: &Tuple) -> NetfilterProtoFamily {
    if tuple.src.is_ipv4() { NetfilterProtoFamily::IPv4 } else { NetfilterProtoFamily::IPv6 }
}

fn parts(tuple: &Tuple) -> Vec<Part> {
    vec![
        Part::Ip(vec![IPTuple::SourceAddress(tuple.src.ip()), IPTuple::DestinationAddress(tuple.dst.ip())]),
        Part::Proto(vec![
            ProtoTuple::Protocol(Protocol::from(tuple.proto)),
            ProtoTuple::SourcePort(tuple.src.port()),
            ProtoTuple::DestinationPort(tuple.dst.port()),
        ]),
    ]
}

/// One address and one port, as the range that the kernel may choose from.
fn translation(kind: u16, to: SocketAddr) -> DefaultNla {
    let (address, octets) = match to.ip() {
        IpAddr::V4(ip) => (CTA_NAT_V4_MINIP, ip.octets().to_vec()),
        IpAddr::V6(ip) => (CTA_NAT_V6_MINIP, ip.octets().to_vec()),
    };
    let port = |kind| DefaultNla::new(kind, to.port().to_be_bytes().to_vec());
    let ports = [port(CTA_PROTONAT_PORT_MIN), port(CTA_PROTONAT_PORT_MAX)];
    nested(kind, &[DefaultNla::new(address, octets), nested(CTA_NAT_PROTO, &ports)])
}

fn nested(kind: u16, attributes: &[DefaultNla]) -> DefaultNla {
    use netlink_packet_core::Emitable as _;
    let mut bytes = vec![0; attributes.buffer_len()];
    attributes.emit(&mut bytes);
    DefaultNla::new(kind | NLA_F_NESTED, bytes)
}

fn connection(message: &NetfilterMessage) -> Option<Connection> {
    let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) = &message.inner else {
        return None;
    };
    let (mut original, mut reply) = (None, None);
    for attribute in attributes {
        match attribute {
            Attribute::CtaTupleOrig(parts) => original = tuple(parts),
            Attribute::CtaTupleReply(parts) => reply = tuple(parts),
            _ => {}
        }
    }
    Some(Connection { original: original?, reply: reply? })
}

fn tuple(parts: &[Part]) -> Option<Tuple> {
    let (mut src, mut dst, mut proto, mut sport, mut dport) = (None, None, None, None, None);
    for part in parts {
        match part {
            Part::Ip(parts) => {
                for part in parts {
                    match part {
                        IPTuple::SourceAddress(ip) => src = Some(*ip),
                        IPTuple::DestinationAddress(ip) => dst = Some(*ip),
                        _ => {}
                    }
                }
            }
            Part::Proto(parts) => {
                for part in parts {
                    match part {
                        ProtoTuple::Protocol(number) => proto = Some(u8::from(*number)),
                        ProtoTuple::SourcePort(port) => sport = Some(*port),
                        ProtoTuple::DestinationPort(port) => dport = Some(*port),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let proto = proto.filter(|proto| matches!(*proto, TCP | UDP))?;
    Some(Tuple { src: SocketAddr::new(src?, sport?), dst: SocketAddr::new(dst?, dport?), proto })
}

#[cfg(test)]
mod tests;
