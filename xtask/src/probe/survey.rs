//! Many questions at once: who answers each, and what they see.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::wire::{Failure, Reply};
use super::{Ask, Transport};

/// Most of them wait for what does not come.
const WORKERS: usize = 48;

/// Who is asked, and how often.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Question {
    /// The protocol.
    pub transport: Transport,
    /// UDP: by `sendto` on an unconnected socket.
    pub unconnected: bool,
    /// Where to.
    pub to: SocketAddr,
    /// How long to wait for each answer.
    pub timeout: Duration,
    /// It is asked so often at least, if nothing fails,
    pub least: usize,
    /// so often at most,
    pub most: usize,
    /// and otherwise until all of these have answered.
    pub until: Vec<String>,
}

/// What became of a [`Question`]. The first failure ends it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Who answered, having seen which source address, how often.
    pub answers: Vec<(String, IpAddr, usize)>,
    /// The first failure, and how long it took to come.
    pub failure: Option<(Failure, Duration)>,
    /// An answer, or a peer's name, that was not the address asked.
    pub odd: Option<SocketAddr>,
}

/// `probe survey`: reads questions from its input, as a JSON list, and prints the list of their tallies.
#[derive(Clone, Debug, clap::Args)]
pub struct Survey {
    /// How many are asked at the same time
    #[arg(long, default_value_t = WORKERS)]
    pub workers: usize,
    /// The first source port: each request has one of its own, so that no two are one flow to one backend
    #[arg(long, default_value_t = 33_000)]
    pub first_port: u16,
}

impl Survey {
    /// With source ports from that one on.
    pub fn from_port(first_port: u16) -> Self {
        Self { workers: WORKERS, first_port }
    }

    /// The command line that says the same.
    pub(crate) fn args(&self) -> Vec<String> {
        let [workers, first_port] = [self.workers.to_string(), self.first_port.to_string()];
        vec!["survey".into(), "--workers".into(), workers, "--first-port".into(), first_port]
    }

    pub(crate) fn run(&self) -> Result<Vec<Tally>> {
        let questions: Vec<Question> =
            serde_json::from_reader(std::io::stdin().lock()).context("reading questions")?;
        let (next, port) = (AtomicUsize::new(0), AtomicU16::new(self.first_port));
        let tallies = Mutex::new(BTreeMap::new());
        std::thread::scope(|scope| {
            for _ in 0..self.workers {
                scope.spawn(|| {
                    loop {
                        let i = next.fetch_add(1, Ordering::Relaxed);
                        let Some(question) = questions.get(i) else { return };
                        let tally = question.put(|| port.fetch_add(1, Ordering::Relaxed));
                        tallies.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(i, tally);
                    }
                });
            }
        });
        let tallies = tallies.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        Ok(tallies.into_values().collect())
    }
}

impl Tally {
    /// How many requests it stands for.
    pub fn asked(&self) -> usize {
        self.answers.iter().map(|(.., n)| n).sum::<usize>() + usize::from(self.failure.is_some())
    }
}

impl Question {
    fn put(&self, port: impl Fn() -> u16) -> Tally {
        let (mut tally, mut answers) = (Tally::default(), BTreeMap::<(String, IpAddr), usize>::new());
        let missing = |answers: &BTreeMap<(String, IpAddr), usize>| {
            self.until.iter().any(|name| answers.keys().all(|(other, _)| other != name))
        };
        let mut asked = 0;
        while asked < self.least || (asked < self.most && missing(&answers)) {
            asked += 1;
            let mut ask = Ask { transport: self.transport, ..Ask::tcp(self.to) }.timeout(self.timeout);
            ask.unconnected = self.unconnected;
            let (answer, took) = ask.source_port(port()).one();
            match answer {
                Ok(Reply { name, peer: Some(peer), from, peername, .. }) => {
                    *answers.entry((name, peer.ip())).or_default() += 1;
                    let others = [Some(from), peername].into_iter().flatten().find(|&addr| addr != self.to);
                    tally.odd = tally.odd.or(others);
                }
                Ok(_) => tally.failure = Some((Failure::Corrupt, took)),
                Err(failure) => tally.failure = Some((failure, took)),
            }
            if tally.failure.is_some() {
                break;
            }
        }
        tally.answers = answers.into_iter().map(|((name, source), n)| (name, source, n)).collect();
        tally
    }
}
