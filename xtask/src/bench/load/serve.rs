//! The server: every kind of conversation on each of its ports, in both families.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};

use anyhow::{Context, Result};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, Type};

use super::{Ends, datagrams, says};
use crate::bench::cores::pin;

/// `bench serve`: a thread for each port and address, so that accepting takes no poll.
#[derive(Debug, clap::Args)]
pub(in crate::bench) struct Serve {
    #[arg(long)]
    core: usize,
    /// TCP, on all addresses.
    #[arg(long)]
    tcp: Vec<u16>,
    /// UDP, on one address: so an answer leaves from there.
    #[arg(long)]
    udp: Vec<SocketAddr>,
}

impl Serve {
    pub(in crate::bench) fn run(self) -> Result<()> {
        pin(self.core)?;
        let mut threads = Vec::new();
        for &port in &self.tcp {
            for any in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)] {
                let listener = listen(SocketAddr::new(any, port))?;
                threads.push(std::thread::spawn(move || {
                    loop {
                        // A client that goes away is no concern of the server's.
                        let _ = listener.accept().and_then(|(stream, _)| answer(stream));
                    }
                }));
            }
        }
        for &address in &self.udp {
            let socket = datagrams::bind(address)?;
            threads.push(std::thread::spawn(move || datagrams::answer(&socket)));
        }
        println!("ready");
        io::stdout().flush()?;
        threads.into_iter().for_each(|t| drop(t.join()));
        Ok(())
    }
}

fn listen(address: SocketAddr) -> Result<TcpListener> {
    let open = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(1024)?;
        Ok::<_, io::Error>(TcpListener::from(socket))
    };
    let listener = open().with_context(|| format!("listening on {address}"))?;
    // Accepted connections inherit it.
    setsockopt(&listener, sockopt::TcpNoDelay, &true)?;
    Ok(listener)
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 {
        match byte[0] {
            says::WHO => {
                let ends = Ends { client: stream.peer_addr()?.ip(), server: stream.local_addr()?.ip() };
                stream.write_all(serde_json::to_string(&ends)?.as_bytes())?;
                break;
            }
            says::SINK => {
                std::thread::spawn(move || swallow(stream));
                break;
            }
            other => {
                stream.write_all(&byte)?;
                if other == says::LAST {
                    break;
                }
            }
        }
    }
    Ok(())
}

fn swallow(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 18];
    let mut sum = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => return stream.write_all(&u64::to_le_bytes(sum)),
            n => sum += n as u64,
        }
    }
}
