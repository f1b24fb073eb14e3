//! The client. Nothing is computed, formatted or allocated while the clock runs.

use std::io::{self, BufRead, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::time::{ClockId, clock_gettime};

use super::{Answered, Ends, Load, Measured, OPERATION, Task, datagrams, says, stream};
use crate::bench::cores::pin;

/// How long a connection that is watched for may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// `bench drive`: does what the lines of standard input ask for.
#[derive(Debug, clap::Args)]
pub(in crate::bench) struct Drive {
    #[arg(long)]
    core: usize,
}

impl Drive {
    pub(in crate::bench) fn run(self) -> Result<()> {
        pin(self.core)?;
        let mut out = io::stdout().lock();
        for line in io::stdin().lock().lines() {
            match serde_json::from_str(&line?)? {
                Task::Measure { load, count, to } => {
                    let (measured, samples) = measure(load, count, &to)?;
                    writeln!(out, "{}", serde_json::to_string(&measured)?)?;
                    let bytes: Vec<u8> = samples.iter().flatten().flat_map(|ns| ns.to_le_bytes()).collect();
                    out.write_all(&bytes)?;
                }
                Task::Watch { to, changes, seconds } => {
                    watch(to, changes, Duration::from_secs(seconds), &mut out)?;
                }
                Task::Who { to } => writeln!(out, "{}", serde_json::to_string(&who(to)?)?)?,
            }
            out.flush()?;
        }
        Ok(())
    }
}

fn measure(load: Load, count: u64, to: &[SocketAddr]) -> Result<(Measured, [Vec<u32>; 2])> {
    let first = *to.first().context("no address")?;
    let sampled = if load.is_timed() { count as usize } else { 0 };
    let connects = if load == Load::Connections { sampled } else { 0 };
    let mut samples = [vec![0; sampled], vec![0; connects]];
    let [whole, connect] = &mut samples;
    let (start, mut done, mut took) = (Instant::now(), count, None);
    match load {
        Load::Connections => connections(whole, connect, to)?,
        Load::TcpTrips => round_trips(whole, first)?,
        Load::UdpTrips => datagrams::round_trips(whole, first)?,
        Load::Packets => done = datagrams::packets(count, first)?,
        Load::Forwarded => bail!("no client sends what is only forwarded"),
        Load::Stream => took = Some(stream::send(count * OPERATION as u64, 1, first)?),
        Load::Streams => {
            // As many for each of the eight.
            done = count / 8 * 8;
            took = Some(stream::send(done * OPERATION as u64, 8, first)?);
        }
    }
    let nanoseconds = took.unwrap_or_else(|| start.elapsed().as_nanos() as u64);
    Ok((Measured { nanoseconds, done, samples: [whole.len(), connect.len()] }, samples))
}

/// Connects, sends a byte, gets it back, sees the server close, closes. The server closes first, as HTTP servers do; so
/// the waiting for stray packets is its, and the client's ports are free at once.
fn connections(whole: &mut [u32], connect: &mut [u32], to: &[SocketAddr]) -> Result<()> {
    for (i, (whole, connect)) in whole.iter_mut().zip(connect).enumerate() {
        let to = to[i % to.len()];
        let start = Instant::now();
        let mut stream = TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?;
        *connect = nanoseconds(start);
        stream.write_all(&[says::LAST])?;
        let mut byte = [0];
        stream.read_exact(&mut byte).with_context(|| format!("no answer from {to}"))?;
        ensure!(stream.read(&mut byte)? == 0, "{to} says more than it was asked");
        drop(stream);
        *whole = nanoseconds(start);
    }
    Ok(())
}

/// One byte there and back, over and over.
fn round_trips(samples: &mut [u32], to: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?;
    stream.set_nodelay(true)?;
    let mut byte = [0];
    for sample in samples {
        let start = Instant::now();
        stream.write_all(&[says::NEXT])?;
        stream.read_exact(&mut byte).with_context(|| format!("no answer from {to}"))?;
        *sample = nanoseconds(start);
    }
    Ok(())
}

fn who(to: SocketAddr) -> Result<Ends> {
    let mut stream =
        TcpStream::connect_timeout(&to, PATIENCE).with_context(|| format!("connecting to {to}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&[says::WHO])?;
    let mut text = String::new();
    stream.read_to_string(&mut text).with_context(|| format!("no answer from {to}"))?;
    Ok(serde_json::from_str(&text)?)
}

/// A line whenever another end answers than before. A connection that fails is no answer: the next one may be.
fn watch(to: SocketAddr, changes: usize, limit: Duration, out: &mut impl Write) -> Result<()> {
    let (start, mut last, mut said) = (Instant::now(), None, 0);
    while said < changes && start.elapsed() < limit {
        let Ok(ends) = who(to) else { continue };
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
        if last.replace(ends.server) != Some(ends.server) {
            let at = Duration::from(now).as_nanos() as u64;
            writeln!(out, "{}", serde_json::to_string(&Answered { at, ends })?)?;
            out.flush()?;
            said += 1;
        }
    }
    // So that whoever waits for another line learns that there is none.
    writeln!(out)?;
    Ok(())
}

pub(super) fn nanoseconds(start: Instant) -> u32 {
    u32::try_from(start.elapsed().as_nanos()).unwrap_or(u32::MAX)
}
