//! Bulk over TCP.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Barrier;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::{OPERATION, says};

/// Sends that many bytes over so many connections at once, all of which the server must have got. The time begins when all
/// are connected.
pub(super) fn send(bytes: u64, connections: u64, to: SocketAddr) -> Result<u64> {
    let connected = Barrier::new(connections as usize + 1);
    let share = bytes / connections;
    std::thread::scope(|s| {
        let one = || -> Result<()> {
            let stream = TcpStream::connect(to).with_context(|| format!("connecting to {to}"));
            connected.wait();
            connected.wait();
            one_connection(stream?, share, to)
        };
        let threads: Vec<_> = (0..connections).map(|_| s.spawn(one)).collect();
        connected.wait();
        let start = Instant::now();
        connected.wait();
        for thread in threads {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(start.elapsed().as_nanos() as u64)
    })
}

fn one_connection(mut stream: TcpStream, bytes: u64, to: SocketAddr) -> Result<()> {
    let buffer = vec![0; OPERATION];
    stream.write_all(&[says::SINK])?;
    let mut left = bytes;
    while left > 0 {
        let piece = buffer.len().min(left as usize);
        stream.write_all(&buffer[..piece]).with_context(|| format!("sending to {to}"))?;
        left -= piece as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut got = [0; 8];
    stream.read_exact(&mut got).with_context(|| format!("no answer from {to}"))?;
    let got = u64::from_le_bytes(got);
    ensure!(got == bytes, "{to} got {got} of {bytes} bytes");
    Ok(())
}
