//! The harness's side of client and server.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::time::{ClockId, clock_gettime};

use super::{Answered, Ends, Load, Measured, Task};
use crate::bench::stats::Times;
use crate::lab::{Host, xtask_exe};

/// One turn of one mode.
#[derive(Clone, Debug)]
pub(in crate::bench) struct Turn {
    /// Whole operations, where each is timed.
    pub(in crate::bench) whole: Times,
    /// Connecting alone.
    pub(in crate::bench) connect: Times,
    /// Operations a second.
    pub(in crate::bench) rate: f64,
    /// Operations that were done, of those that were wanted.
    pub(in crate::bench) done: u64,
}

impl Turn {
    /// So many operations, none of which is timed.
    pub(in crate::bench) fn uniform(done: u64, seconds: f64) -> Self {
        Self { whole: Times::new(), connect: Times::new(), rate: done as f64 / seconds, done }
    }
}

/// A process of the benchmark's; it ends with this value.
#[derive(Debug)]
struct Worker(Child);

impl Worker {
    fn command(host: &Host, what: &str, core: usize) -> Result<Command> {
        let mut command = host.command(xtask_exe()?);
        command.args(["bench", what, "--core", &core.to_string()]).stdout(Stdio::piped());
        Ok(command)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server on a host; it ends with this value.
#[derive(Debug)]
pub(in crate::bench) struct Server(Worker);

impl Server {
    pub(in crate::bench) fn start(host: &Host, core: usize, tcp: &[u16], udp: &[SocketAddr]) -> Result<Self> {
        let mut command = Worker::command(host, "serve", core)?;
        command.args(tcp.iter().map(|port| format!("--tcp={port}")));
        command.args(udp.iter().map(|address| format!("--udp={address}")));
        let mut worker = Worker(command.stdin(Stdio::null()).spawn().context("starting the server")?);
        let mut line = String::new();
        BufReader::new(worker.0.stdout.take().context("no pipe")?).read_line(&mut line)?;
        ensure!(line == "ready\n", "the server on {} did not start", host.name());
        Ok(Self(worker))
    }

    pub(in crate::bench) fn pid(&self) -> u32 {
        self.0.0.id()
    }
}

/// A client on a host; it ends with this value.
#[derive(Debug)]
pub(in crate::bench) struct Client {
    worker: Worker,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Client {
    pub(in crate::bench) fn start(host: &Host, core: usize) -> Result<Self> {
        let mut command = Worker::command(host, "drive", core)?;
        let mut worker = Worker(command.stdin(Stdio::piped()).spawn().context("starting the client")?);
        let (input, output) = (worker.0.stdin.take(), worker.0.stdout.take());
        let (Some(input), Some(output)) = (input, output) else { bail!("no pipes") };
        Ok(Self { worker, input, output: BufReader::new(output) })
    }

    pub(in crate::bench) fn pid(&self) -> u32 {
        self.worker.0.id()
    }

    fn ask(&mut self, task: &Task) -> Result<()> {
        Ok(writeln!(self.input, "{}", serde_json::to_string(task)?)?)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let length = self.output.read_line(&mut line)?;
        ensure!(length > 0, "the client gave up (see above)");
        Ok(line)
    }

    fn samples(&mut self, count: usize) -> Result<Times> {
        let mut bytes = vec![0; count * 4];
        self.output.read_exact(&mut bytes)?;
        let samples = bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        Ok(Times::of(samples))
    }

    /// Does so many operations.
    pub(in crate::bench) fn measure(&mut self, load: Load, count: u64, to: &[SocketAddr]) -> Result<Turn> {
        self.ask(&Task::Measure { load, count, to: to.to_vec() })?;
        let measured: Measured = serde_json::from_str(&self.line()?)?;
        let [whole, connect] = measured.samples;
        let (whole, connect) = (self.samples(whole)?, self.samples(connect)?);
        let rate = measured.done as f64 / (measured.nanoseconds as f64 / 1e9);
        Ok(Turn { whole, connect, rate, done: measured.done })
    }

    /// Connects once: who answered, and whom.
    pub(in crate::bench) fn who(&mut self, to: SocketAddr) -> Result<Ends> {
        self.ask(&Task::Who { to })?;
        Ok(serde_json::from_str(&self.line()?)?)
    }

    /// Connects over and over until `changes` ends have answered or the time is over.
    pub(in crate::bench) fn watch(
        &mut self,
        to: SocketAddr,
        changes: usize,
        limit: Duration,
    ) -> Result<Watching<'_>> {
        self.ask(&Task::Watch { to, changes, seconds: limit.as_secs().max(1) })?;
        Ok(Watching { client: self, over: false })
    }
}

/// A client that looks who answers. To be read to its end.
#[derive(Debug)]
pub(in crate::bench) struct Watching<'a> {
    client: &'a mut Client,
    over: bool,
}

impl Watching<'_> {
    /// The next end that answers, and when on the monotonic clock; `None` when the time is over.
    pub(in crate::bench) fn next(&mut self) -> Result<Option<(Duration, Ends)>> {
        if self.over {
            return Ok(None);
        }
        let line = self.client.line()?;
        self.over = line.trim().is_empty();
        if self.over {
            return Ok(None);
        }
        let Answered { at, ends } = serde_json::from_str(&line)?;
        Ok(Some((Duration::from_nanos(at), ends)))
    }

    /// Now, on the clock that the client uses.
    pub(in crate::bench) fn now() -> Result<Duration> {
        Ok(clock_gettime(ClockId::CLOCK_MONOTONIC)?.into())
    }
}
