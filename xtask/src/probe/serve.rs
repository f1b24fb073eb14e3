//! The server.

use std::io::{self, BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use anyhow::{Context, Result};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn6, recvmsg, sendmsg, setsockopt, sockopt,
};
use socket2::{Domain, Protocol, Socket, Type};

use super::print_line;
use super::wire::{Greeting, Pattern, canonical};

/// `probe serve`: answers each TCP line and each UDP datagram with a line of JSON that says who asked.
///
/// TCP requests are lines, as many as wanted on one connection: `BULK n` is answered by n bytes, `SINK n` takes
/// n bytes and then answers, `HOLD` is answered and ends the conversation without ending the connection, HTTP's `GET`
/// is answered as curl likes it, anything else is answered. A datagram that begins with `ECHO` has its own end put behind
/// the answer, so that both are of one size. It prints `"ready"` once it listens on every port.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Serve {
    /// Name to answer with
    #[arg(long)]
    pub name: String,
    /// TCP ports
    #[arg(long, value_delimiter = ',')]
    pub tcp: Vec<u16>,
    /// UDP ports
    #[arg(long, value_delimiter = ',')]
    pub udp: Vec<u16>,
}

impl Serve {
    pub(crate) fn run(self) -> Result<()> {
        let (name, pattern): (Arc<str>, _) = (self.name.into(), Arc::new(Pattern::new()));
        let mut threads = Vec::new();
        for port in self.tcp {
            let socket = bind(Type::STREAM, Protocol::TCP, port)?;
            socket.listen(4096)?;
            let (listener, name, pattern) =
                (std::net::TcpListener::from(socket), name.clone(), pattern.clone());
            threads.push(std::thread::spawn(move || {
                loop {
                    match listener.accept() {
                        Ok((stream, peer)) => {
                            let (name, pattern) = (name.clone(), pattern.clone());
                            // A client that goes away is no concern of the server's.
                            std::thread::spawn(move || converse(stream, peer, &name, &pattern));
                        }
                        // Out of file descriptors for a moment, or a client that was gone already.
                        Err(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
                    }
                }
            }));
        }
        for port in self.udp {
            let socket = UdpSocket::from(bind(Type::DGRAM, Protocol::UDP, port)?);
            setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
            // Room for the datagrams of many clients while this thread waits for its turn.
            setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20)).context("enlarging the receive buffer")?;
            let name = name.clone();
            threads.push(std::thread::spawn(move || {
                let mut buffer = vec![0; 65536];
                loop {
                    // Errors here are ICMP messages about earlier answers.
                    let _ = answer_datagram(&socket, port, &name, &mut buffer);
                }
            }));
        }
        print_line(&"ready")?;
        threads.into_iter().for_each(|t| drop(t.join()));
        Ok(())
    }
}

/// How requests begin whose answers are to be as long as they are.
pub(super) const ECHO: &[u8] = b"ECHO";

/// A socket for both families.
fn bind(kind: Type, protocol: Protocol, port: u16) -> Result<Socket> {
    let socket = Socket::new(Domain::IPV6, kind, Some(protocol))?;
    socket.set_only_v6(false)?;
    if kind == Type::STREAM {
        socket.set_reuse_address(true)?;
    }
    let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    socket.bind(&address.into()).with_context(|| format!("listening on port {port}"))?;
    Ok(socket)
}

fn converse(stream: TcpStream, peer: SocketAddr, name: &str, pattern: &Pattern) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (peer, local) = (canonical(peer), canonical(stream.local_addr()?));
    let (mut reader, mut writer, mut line) = (BufReader::new(&stream), &stream, String::new());
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut greeting =
            Greeting { name: name.into(), peer, local, bytes: line.len() as u64, wrong_at: None };
        let request = line.clone();
        let mut words = request.split_whitespace();
        let (word, count) = (words.next(), words.next().and_then(|n| n.parse::<u64>().ok()));
        match (word, count) {
            (Some("BULK"), Some(n)) => {
                pattern.send(&mut writer, n)?;
                continue;
            }
            (Some("SINK"), Some(n)) => {
                greeting.bytes = n;
                greeting.wrong_at = pattern.receive(&mut reader, n)?;
            }
            _ => {}
        }
        let (hold, http) = (word == Some("HOLD"), word == Some("GET"));
        while http && line.trim() != "" {
            line.clear();
            reader.read_line(&mut line)?;
        }
        let mut answer = serde_json::to_vec(&greeting)?;
        answer.push(b'\n');
        if http {
            let length = answer.len();
            write!(
                writer,
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
            )?;
        }
        writer.write_all(&answer)?;
        if hold {
            return io::copy(&mut reader.by_ref(), &mut io::sink()).map(drop);
        }
    }
}

/// Answers one datagram from the address that it was sent to, whichever way routing would choose.
fn answer_datagram(socket: &UdpSocket, port: u16, name: &str, buffer: &mut [u8]) -> io::Result<()> {
    let mut space = nix::cmsg_space!(libc::in6_pktinfo);
    let mut parts = [IoSliceMut::new(buffer)];
    let message =
        recvmsg::<SockaddrIn6>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty())?;
    let info = message.cmsgs()?.find_map(|c| match c {
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(info),
        _ => None,
    });
    let (Some(from), Some(mut info)) = (message.address, info) else { return Ok(()) };
    let peer = SocketAddr::from((from.ip(), from.port()));
    let local = SocketAddr::from((Ipv6Addr::from(info.ipi6_addr.s6_addr), port));
    let greeting = Greeting {
        name: name.into(),
        peer: canonical(peer),
        local: canonical(local),
        bytes: message.bytes as u64,
        wrong_at: None,
    };
    let mut answer = serde_json::to_vec(&greeting)?;
    if let Some(request) = buffer.get(..greeting.bytes as usize).filter(|r| r.starts_with(ECHO)) {
        answer.push(b'\n');
        answer.extend_from_slice(request.get(answer.len()..).unwrap_or_default());
    }
    // Only the address matters; the way out is for routing to find.
    info.ipi6_ifindex = 0;
    let control = [ControlMessage::Ipv6PacketInfo(&info)];
    sendmsg(socket.as_raw_fd(), &[IoSlice::new(&answer)], &control, MsgFlags::empty(), Some(&from))?;
    Ok(())
}
