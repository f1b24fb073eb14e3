//! Client and server: processes of their own, in the pods' namespaces and cgroups, on one core. Nothing is computed,
//! formatted or allocated while the clock runs.

use std::io::{self, BufRead, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{setsockopt, sockopt};

use super::pin;

/// Asks the server to close after its answer.
const LAST: u8 = b'L';
/// Asks for an answer.
const NEXT: u8 = b'N';

/// `bench serve`: answers each byte with itself. A thread for each port, so that accepting takes no poll.
#[derive(Debug, clap::Args)]
pub(super) struct Serve {
    #[arg(long)]
    core: usize,
    #[arg(long)]
    first_port: u16,
    #[arg(long)]
    ports: u16,
}

impl Serve {
    pub(super) fn run(self) -> Result<()> {
        pin(self.core)?;
        let mut threads = Vec::new();
        for port in self.first_port..self.first_port + self.ports {
            let listener = TcpListener::bind(("0.0.0.0", port)).with_context(|| format!("port {port}"))?;
            // Accepted connections inherit it.
            setsockopt(&listener, sockopt::TcpNoDelay, &true)?;
            threads.push(std::thread::spawn(move || {
                loop {
                    // A client that goes away is no concern of the server's.
                    let _ = listener.accept().and_then(|(stream, _)| answer(stream));
                }
            }));
        }
        println!("ready");
        io::stdout().flush()?;
        threads.into_iter().for_each(|t| drop(t.join()));
        Ok(())
    }
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 {
        stream.write_all(&byte)?;
        if byte[0] == LAST {
            break;
        }
    }
    Ok(())
}

/// `bench drive`: measures what standard input asks for: `connect COUNT ADDR…` or `trip COUNT ADDR…`. The answer is the
/// whole time in nanoseconds as a 64-bit number, then `COUNT` 32-bit numbers, a time each.
#[derive(Debug, clap::Args)]
pub(super) struct Drive {
    #[arg(long)]
    core: usize,
}

impl Drive {
    pub(super) fn run(self) -> Result<()> {
        pin(self.core)?;
        let mut out = io::stdout().lock();
        for line in io::stdin().lock().lines() {
            let line = line?;
            let mut words = line.split(' ');
            let (what, count) = (words.next(), words.next().context("how many?")?.parse()?);
            let to: Vec<SocketAddr> =
                words.map(|w| w.parse().context(w.to_owned())).collect::<Result<_>>()?;
            let mut times = vec![0; count];
            let start = Instant::now();
            match what {
                Some("connect") => connections(&mut times, &to)?,
                Some("trip") => round_trips(&mut times, &to)?,
                other => bail!("cannot measure {other:?}"),
            }
            let mut answer = (start.elapsed().as_nanos() as u64).to_le_bytes().to_vec();
            answer.extend(times.iter().flat_map(|ns| ns.to_le_bytes()));
            out.write_all(&answer)?;
            out.flush()?;
        }
        Ok(())
    }
}

/// Connects, sends a byte, gets it back, sees the server close, closes. The server closes first, as HTTP servers do; so
/// the waiting for stray packets is its, and the client's ports are free at once.
fn connections(times: &mut [u32], to: &[SocketAddr]) -> Result<()> {
    for (i, time) in times.iter_mut().enumerate() {
        let to = to[i % to.len()];
        let start = Instant::now();
        let mut stream = TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?;
        stream.write_all(&[LAST])?;
        let mut byte = [0];
        stream.read_exact(&mut byte).with_context(|| format!("no answer from {to}"))?;
        ensure!(stream.read(&mut byte)? == 0, "{to} says more than it was asked");
        drop(stream);
        *time = nanos(start);
    }
    Ok(())
}

/// One byte there and back, over and over.
fn round_trips(times: &mut [u32], to: &[SocketAddr]) -> Result<()> {
    let to = to[0];
    let mut stream = TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?;
    stream.set_nodelay(true)?;
    let mut byte = [0];
    for time in times {
        let start = Instant::now();
        stream.write_all(&[NEXT])?;
        stream.read_exact(&mut byte).with_context(|| format!("no answer from {to}"))?;
        *time = nanos(start);
    }
    Ok(())
}

fn nanos(start: Instant) -> u32 {
    u32::try_from(start.elapsed().as_nanos()).unwrap_or(u32::MAX)
}
