//! Requests over TCP and UDP.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

use super::pieces::{self, Order};
use super::serve::ECHO;
use super::wire::{Answer, Failure, Greeting, Pattern, Reply, canonical, millis};

/// What requests go over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize, Deserialize)]
pub enum Transport {
    /// A connection for each request.
    Tcp,
    /// A socket for each request.
    Udp,
}

/// `probe ask`: sends requests to a `probe serve`, each from a new socket, and prints what became of each.
#[derive(Clone, Debug, clap::Args)]
pub struct Ask {
    /// The protocol
    pub transport: Transport,
    /// Where to
    pub to: SocketAddr,
    /// How many requests
    #[arg(long, default_value_t = 1)]
    pub count: usize,
    /// How long to wait for each answer, in milliseconds
    #[arg(long, default_value = "2000", value_parser = millis)]
    pub timeout: Duration,
    /// Pause between requests, in milliseconds
    #[arg(long, default_value = "0", value_parser = millis)]
    pub interval: Duration,
    /// All requests over one socket
    #[arg(long)]
    pub keep: bool,
    /// UDP: sendto on an unconnected socket (the default is a connected one)
    #[arg(long)]
    pub unconnected: bool,
    /// UDP: connect first (the default)
    #[arg(long, conflicts_with = "unconnected")]
    pub connected: bool,
    /// Source address
    #[arg(long)]
    pub source: Option<IpAddr>,
    /// Source port
    #[arg(long)]
    pub source_port: Option<u16>,
    /// Size of each request in bytes
    #[arg(long, default_value_t = 6)]
    pub size: usize,
    /// UDP: answers as long as the requests, which are checked byte by byte
    #[arg(long)]
    pub echo: bool,
    /// UDP, connected: requests go out in fragments of this order
    #[arg(long, conflicts_with = "unconnected")]
    pub pieces: Option<Order>,
}

impl Ask {
    /// One request over TCP.
    pub fn tcp(to: SocketAddr) -> Self {
        Self {
            transport: Transport::Tcp,
            to,
            count: 1,
            timeout: Duration::from_secs(2),
            interval: Duration::ZERO,
            keep: false,
            unconnected: false,
            connected: false,
            source: None,
            source_port: None,
            size: 6,
            echo: false,
            pieces: None,
        }
    }

    /// One request over UDP from a connected socket.
    pub fn udp(to: SocketAddr) -> Self {
        Self { transport: Transport::Udp, ..Self::tcp(to) }
    }

    /// So many requests.
    pub fn count(mut self, count: usize) -> Self {
        self.count = count;
        self
    }

    /// Waits so long for each answer.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Waits so long between requests.
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// Uses one socket for all requests.
    pub fn keep(mut self) -> Self {
        self.keep = true;
        self
    }

    /// Uses `sendto` on an unconnected UDP socket.
    pub fn unconnected(mut self) -> Self {
        self.unconnected = true;
        self
    }

    /// Binds the source port.
    pub fn source_port(mut self, port: u16) -> Self {
        self.source_port = Some(port);
        self
    }

    /// Makes each request so many bytes long.
    pub fn size(mut self, size: usize) -> Self {
        self.size = size;
        self
    }

    /// Makes each request, and each answer, so many bytes long. UDP only.
    pub fn echo(mut self, size: usize) -> Self {
        (self.size, self.echo) = (size, true);
        self
    }

    /// Sends the fragments of each datagram in that order.
    pub fn pieces(mut self, order: Order) -> Self {
        self.pieces = Some(order);
        self
    }

    /// The command line that says the same.
    pub(crate) fn args(&self) -> Vec<String> {
        let transport = if self.transport == Transport::Tcp { "tcp" } else { "udp" };
        let mut args = vec!["ask".into(), transport.into(), self.to.to_string()];
        args.extend(["--count".into(), self.count.to_string(), "--size".into(), self.size.to_string()]);
        args.extend(["--timeout".into(), self.timeout.as_millis().to_string()]);
        args.extend(["--interval".into(), self.interval.as_millis().to_string()]);
        args.extend(self.keep.then(|| "--keep".into()));
        args.extend(self.unconnected.then(|| "--unconnected".into()));
        args.extend(self.source.iter().flat_map(|s| ["--source".into(), s.to_string()]));
        args.extend(self.source_port.iter().flat_map(|p| ["--source-port".into(), p.to_string()]));
        args.extend(self.echo.then(|| "--echo".into()));
        let order = self.pieces.and_then(|order| order.to_possible_value());
        args.extend(order.iter().flat_map(|o| ["--pieces".into(), o.get_name().to_owned()]));
        args
    }

    pub(crate) fn run(&self, mut report: impl FnMut(&Answer) -> Result<()>) -> Result<()> {
        let mut kept = None;
        for i in 0..self.count {
            if i > 0 {
                std::thread::sleep(self.interval);
            }
            let start = Instant::now();
            let answer =
                self.once(&mut kept).map(|reply| Reply { us: start.elapsed().as_micros() as u64, ..reply });
            if !self.keep || answer.is_err() {
                kept = None;
            }
            report(&Answer(answer))?;
        }
        Ok(())
    }

    /// One request from a new socket, and how long it took.
    pub(crate) fn one(&self) -> (Result<Reply, Failure>, Duration) {
        let start = Instant::now();
        (self.once(&mut None), start.elapsed())
    }

    /// What is sent.
    fn request(&self) -> Vec<u8> {
        if self.echo {
            let size = self.size.max(ECHO.len());
            return [ECHO, Pattern::new().at(0, size - ECHO.len())].concat();
        }
        let mut request = vec![b'x'; self.size.max(1) - 1];
        request.push(b'\n');
        request
    }

    fn once(&self, kept: &mut Option<Conversation>) -> Result<Reply, Failure> {
        let conversation = match kept {
            Some(conversation) => conversation,
            None => kept.insert(Conversation::open(self)?),
        };
        conversation.ask(self)
    }

    /// A socket bound as wanted, not yet connected.
    fn socket(&self) -> io::Result<Socket> {
        let (kind, protocol) = match self.transport {
            Transport::Tcp => (Type::STREAM, Protocol::TCP),
            Transport::Udp => (Type::DGRAM, Protocol::UDP),
        };
        let socket = Socket::new(Domain::for_address(self.to), kind, Some(protocol))?;
        if self.source.is_some() || self.source_port.is_some() {
            let any =
                if self.to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            socket.set_reuse_address(true)?;
            let own = SocketAddr::new(self.source.unwrap_or(any), self.source_port.unwrap_or(0));
            socket.bind(&own.into())?;
        }
        Ok(socket)
    }
}

/// A socket that requests go over.
enum Conversation {
    Tcp(BufReader<TcpStream>),
    Udp(UdpSocket),
}

impl Conversation {
    fn open(ask: &Ask) -> Result<Self, Failure> {
        let socket = ask.socket()?;
        if ask.transport == Transport::Udp {
            if !ask.unconnected {
                socket.connect(&ask.to.into())?;
            }
            return Ok(Self::Udp(socket.into()));
        }
        socket.connect_timeout(&ask.to.into(), ask.timeout)?;
        socket.set_tcp_nodelay(true)?;
        Ok(Self::Tcp(BufReader::new(socket.into())))
    }

    fn ask(&mut self, ask: &Ask) -> Result<Reply, Failure> {
        let request = ask.request();
        let (from, own, peername, text) = match self {
            Self::Tcp(reader) => {
                reader.get_ref().set_read_timeout(Some(ask.timeout))?;
                reader.get_mut().write_all(&request)?;
                let mut line = String::new();
                if reader.read_line(&mut line)? == 0 {
                    return Err(Failure::Reset);
                }
                let stream = reader.get_ref();
                let peer = stream.peer_addr()?;
                (peer, stream.local_addr()?, Some(peer), line.into_bytes())
            }
            Self::Udp(socket) => {
                socket.set_read_timeout(Some(ask.timeout))?;
                match ask.pieces {
                    Some(order) => pieces::send(socket, &request, order)?,
                    None if ask.unconnected => drop(socket.send_to(&request, ask.to)?),
                    None => drop(socket.send(&request)?),
                }
                let mut buffer = vec![0; 65536];
                let (n, from) = socket.recv_from(&mut buffer)?;
                buffer.truncate(n);
                if ask.echo {
                    let line = buffer.iter().position(|&b| b == b'\n').ok_or(Failure::Corrupt)? + 1;
                    if buffer.get(line..) != request.get(line..) {
                        return Err(Failure::Corrupt);
                    }
                    buffer.truncate(line);
                }
                (from, socket.local_addr()?, socket.peer_addr().ok(), buffer)
            }
        };
        let greeting: Greeting = serde_json::from_slice(&text).map_err(|_| Failure::Corrupt)?;
        Ok(Reply {
            name: greeting.name,
            peer: Some(greeting.peer),
            local: Some(greeting.local),
            from: canonical(from),
            peername: peername.map(canonical),
            own: canonical(own),
            us: 0,
        })
    }
}
