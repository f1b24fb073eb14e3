//! Many bytes over one connection.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::wire::{Failure, Greeting, Pattern, millis};

/// Which way bulk data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Direction {
    /// From client to server.
    Up,
    /// From server to client.
    Down,
}

/// `probe bulk`: moves bytes over one TCP connection and checks that each is the right one.
#[derive(Clone, Debug, clap::Args)]
pub struct Bulk {
    /// The protocol
    #[arg(value_parser = ["tcp"])]
    pub transport: String,
    /// Where to
    pub to: SocketAddr,
    /// How many bytes
    #[arg(long)]
    pub bytes: u64,
    /// Which way
    #[arg(long)]
    pub direction: Direction,
    /// How long a stall may last before it counts as one, in milliseconds
    #[arg(long, default_value = "5000", value_parser = millis)]
    pub timeout: Duration,
}

/// What became of a bulk transfer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BulkReport {
    /// Whether all bytes arrived as they were sent.
    pub ok: bool,
    /// Bytes asked for.
    pub bytes: u64,
    /// Seconds from the connection's opening to the last byte's arrival.
    pub seconds: f64,
    /// Gigabits in each second.
    pub gbit_per_s: f64,
    /// What went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
}

impl Bulk {
    /// A transfer of so many bytes.
    pub fn new(to: SocketAddr, bytes: u64, direction: Direction) -> Self {
        Self { transport: "tcp".into(), to, bytes, direction, timeout: Duration::from_secs(5) }
    }

    pub(crate) fn args(&self) -> Vec<String> {
        let direction = if self.direction == Direction::Up { "up" } else { "down" };
        let (bytes, timeout) = (self.bytes.to_string(), self.timeout.as_millis().to_string());
        let to = self.to.to_string();
        ["bulk", "tcp", &to, "--bytes", &bytes, "--direction", direction, "--timeout", &timeout]
            .map(String::from)
            .to_vec()
    }

    pub(crate) fn run(&self) -> BulkReport {
        let start = Instant::now();
        let error = self.transfer().err();
        let seconds = start.elapsed().as_secs_f64();
        let gbit_per_s = if error.is_none() { self.bytes as f64 * 8e-9 / seconds } else { 0.0 };
        BulkReport { ok: error.is_none(), bytes: self.bytes, seconds, gbit_per_s, error }
    }

    fn transfer(&self) -> Result<(), Failure> {
        let (stream, pattern) = (TcpStream::connect_timeout(&self.to, self.timeout)?, Pattern::new());
        stream.set_read_timeout(Some(self.timeout))?;
        stream.set_write_timeout(Some(self.timeout))?;
        let (mut reader, mut writer) = (BufReader::new(&stream), &stream);
        let wrong_at = match self.direction {
            Direction::Down => {
                writeln!(writer, "BULK {}", self.bytes)?;
                pattern.receive(&mut reader, self.bytes)?
            }
            Direction::Up => {
                writeln!(writer, "SINK {}", self.bytes)?;
                pattern.send(&mut writer, self.bytes)?;
                let mut line = String::new();
                if reader.read_line(&mut line)? == 0 {
                    return Err(Failure::Reset);
                }
                serde_json::from_str::<Greeting>(&line).map_err(|_| Failure::Corrupt)?.wrong_at
            }
        };
        wrong_at.map_or(Ok(()), |_| Err(Failure::Corrupt))
    }
}
