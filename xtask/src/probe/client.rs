//! The probe as methods of a lab's hosts.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Lines as IoLines, Write};
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;

use super::wire::{Answer, Failure};
use super::{
    Ask, Bulk, BulkReport, Churn, ChurnReport, Flood, FloodReport, Ping, Question, Serve, Survey, Tally,
};
use crate::lab::{Host, xtask_exe};

/// A server that runs until it is dropped.
#[derive(Debug)]
pub struct Server(Child);

impl Server {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Leaves it running.
    pub fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Answers as they come in; dropping it ends the client.
#[derive(Debug)]
pub struct Lines {
    child: Child,
    lines: IoLines<BufReader<ChildStdout>>,
}

impl Iterator for Lines {
    type Item = Answer;

    fn next(&mut self) -> Option<Answer> {
        let line = self.lines.next()?.ok()?;
        Some(
            serde_json::from_str(&line)
                .unwrap_or_else(|e| Answer(Err(Failure::Other(format!("{line}: {e}"))))),
        )
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Host {
    fn probe(&self, args: &[String]) -> Result<Command> {
        let mut command = self.command(xtask_exe()?);
        command.arg("probe").args(args).stdin(Stdio::null());
        Ok(command)
    }

    /// Runs a probe to its end and reads the lines that it printed.
    pub(super) fn probe_lines<T: DeserializeOwned>(&self, args: &[String]) -> Result<Vec<T>> {
        let what = || format!("probe {} on {}", args.join(" "), self.name());
        let output = self.probe(args)?.output().with_context(what)?;
        if !output.status.success() {
            bail!("{}: {}", what(), String::from_utf8_lossy(&output.stderr).trim());
        }
        let text = String::from_utf8(output.stdout)?;
        text.lines().map(|l| serde_json::from_str(l).with_context(|| format!("{}: {l}", what()))).collect()
    }

    /// Starts a server and waits until it listens.
    pub fn serve(&self, serve: &Serve) -> Result<Server> {
        let ports = |ports: &[u16]| ports.iter().map(u16::to_string).collect::<Vec<_>>().join(",");
        let mut args = vec!["serve".to_owned(), "--name".into(), serve.name.clone()];
        args.extend((!serve.tcp.is_empty()).then(|| format!("--tcp={}", ports(&serve.tcp))));
        args.extend((!serve.udp.is_empty()).then(|| format!("--udp={}", ports(&serve.udp))));
        let mut child = self.probe(&args)?.stdout(Stdio::piped()).spawn()?;
        let (out, server) = (child.stdout.take(), Server(child));
        let ready = out.and_then(|out| BufReader::new(out).lines().next());
        match ready {
            Some(Ok(line)) if line == "\"ready\"" => Ok(server),
            _ => bail!("the server {} on {} did not start", serve.name, self.name()),
        }
    }

    /// Starts a server that is called like this host.
    pub fn serve_ports(&self, tcp: &[u16], udp: &[u16]) -> Result<Server> {
        self.serve(&Serve { name: self.name().into(), tcp: tcp.into(), udp: udp.into() })
    }

    /// Sends requests and collects the answers.
    pub fn ask(&self, ask: &Ask) -> Result<Vec<Answer>> {
        self.probe_lines(&ask.args())
    }

    /// `count` requests over TCP, a connection each.
    pub fn ask_tcp(&self, to: SocketAddr, count: usize) -> Result<Vec<Answer>> {
        self.ask(&Ask::tcp(to).count(count))
    }

    /// `count` requests over UDP, a connected socket each.
    pub fn ask_udp(&self, to: SocketAddr, count: usize) -> Result<Vec<Answer>> {
        self.ask(&Ask::udp(to).count(count))
    }

    /// Sends requests and gives each answer as it comes in.
    pub fn start_asking(&self, ask: &Ask) -> Result<Lines> {
        let mut child = self.probe(&ask.args())?.stdout(Stdio::piped()).spawn()?;
        let out = child.stdout.take().context("no pipe from the probe")?;
        Ok(Lines { child, lines: BufReader::new(out).lines() })
    }

    /// Moves bytes over one TCP connection.
    pub fn bulk(&self, bulk: &Bulk) -> Result<BulkReport> {
        self.probe_lines(&bulk.args())?.pop().context("no report from the probe")
    }

    /// Opens and closes many TCP connections.
    pub fn churn(&self, churn: &Churn) -> Result<ChurnReport> {
        self.probe_lines(&churn.args())?.pop().context("no report from the probe")
    }

    /// Sends datagrams from many ports.
    pub fn flood(&self, flood: &Flood) -> Result<FloodReport> {
        self.probe_lines(&flood.args())?.pop().context("no report from the probe")
    }

    /// Asks many at the same time; the tallies are in the order of the questions.
    pub fn survey(&self, survey: &Survey, questions: &[Question]) -> Result<Vec<Tally>> {
        let mut child = self.probe(&survey.args())?.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut input = child.stdin.take().context("no pipe to the probe")?;
        input.write_all(&serde_json::to_vec(questions)?)?;
        drop(input);
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "probe survey on {}: {}", self.name(), output.status);
        serde_json::from_slice(&output.stdout).with_context(|| format!("probe survey on {}", self.name()))
    }

    /// Sends echo requests.
    pub fn ping(&self, ping: &Ping) -> Result<Vec<Answer>> {
        self.probe_lines(&ping.args())
    }

    /// Whether one echo request is answered.
    pub fn pings(&self, to: IpAddr) -> Result<bool> {
        Ok(self.ping(&Ping::new(to))?.iter().any(|a| a.0.is_ok()))
    }
}

/// Who answered how often.
pub fn spread(answers: &[Answer]) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    answers.iter().filter_map(Answer::name).for_each(|name| *counts.entry(name).or_default() += 1);
    counts
}

/// Who answered at all.
pub fn names(answers: &[Answer]) -> Vec<&str> {
    spread(answers).into_keys().collect()
}

/// What went wrong, how often.
pub fn failures(answers: &[Answer]) -> BTreeMap<&Failure, usize> {
    let mut counts = BTreeMap::new();
    answers.iter().filter_map(Answer::failure).for_each(|f| *counts.entry(f).or_default() += 1);
    counts
}
