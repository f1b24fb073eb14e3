//! One observation: what is sent, what should come of it, what did.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::lab::Host;
use crate::probe::{Answer, Ask, Bulk, BulkReport, Failure, Ping, Reply, Transport, failures, spread};

/// What is sent.
#[derive(Clone, Debug)]
pub enum Action {
    /// Requests, each from a new socket.
    Ask(Ask),
    /// Many bytes over one connection.
    Bulk(Bulk),
    /// Echo requests.
    Ping(Ping),
}

/// Which source addresses servers should see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The client's own.
    Client(IpAddr),
    /// One of these, the node's.
    Node(Vec<IpAddr>),
    /// The client's own where the server is one of the names; elsewhere one of the node's.
    ClientAt(IpAddr, &'static [&'static str], Vec<IpAddr>),
    /// The client's own, but the gateway's where the named server is the client itself.
    GatewayAt(IpAddr, &'static str, IpAddr),
}

impl Seen {
    fn fits(&self, name: &str, source: IpAddr) -> bool {
        match self {
            Self::Client(ip) => source == *ip,
            Self::Node(ips) => ips.contains(&source),
            Self::ClientAt(ip, here, _) if here.contains(&name) => source == *ip,
            Self::ClientAt(_, _, ips) => ips.contains(&source),
            Self::GatewayAt(_, itself, gateway) if *itself == name => source == *gateway,
            Self::GatewayAt(ip, ..) => source == *ip,
        }
    }

    /// The expectation in words.
    fn words(&self) -> String {
        match self {
            Self::Client(ip) => format!("the client's own address {ip}"),
            Self::Node(_) => "an address of n1".into(),
            Self::ClientAt(ip, here, _) => format!("{ip} at {}, an address of n1 elsewhere", here.join(", ")),
            Self::GatewayAt(ip, itself, gateway) => format!("{gateway} at {itself}, {ip} elsewhere"),
        }
    }
}

/// What should come of it.
#[derive(Clone, Debug)]
pub enum Expect {
    /// Each of these answers its fair share, and sees these sources.
    Answers(&'static [&'static str], Seen),
    /// Refused, and at once.
    Refused,
    /// Nothing comes back.
    Silence,
    /// Every byte arrives, or every ping comes back.
    Intact,
}

/// One observation to make.
#[derive(Clone, Debug)]
pub struct Check {
    /// Who sends.
    pub from: Host,
    /// What it shows, in a word or two; often nothing.
    pub label: &'static str,
    /// What is sent.
    pub action: Action,
    /// What should come of it.
    pub expect: Expect,
}

/// What was observed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// In words: who answered, how often.
    pub answers: String,
    /// In words: the sources that the servers saw, if any.
    pub sources: String,
    /// What is wrong with it; nothing if all is well.
    pub wrong: Option<String>,
}

impl Check {
    /// Makes the observation.
    ///
    /// # Errors
    /// If the client cannot be run; unanswered requests are an outcome.
    pub fn run(&self) -> Result<Outcome> {
        let start = Instant::now();
        Ok(match &self.action {
            Action::Ask(ask) => {
                let answers = self.from.ask(ask)?;
                let wrong = self.wrong_answers(ask, &answers, start.elapsed());
                Outcome { answers: who(&answers), sources: sources(&answers), wrong }
            }
            Action::Ping(ping) => {
                let answers = self.from.ping(ping)?;
                let back = answers.iter().filter(|a| a.0.is_ok()).count();
                let fits = match self.expect {
                    Expect::Silence => back == 0,
                    _ => back == answers.len(),
                };
                let wrong = (!fits).then(|| format!("{back} of {} came back", answers.len()));
                Outcome {
                    answers: format!("{back} of {} came back", answers.len()),
                    sources: String::new(),
                    wrong,
                }
            }
            Action::Bulk(bulk) => bulk_outcome(&self.from.bulk(bulk)?),
        })
    }

    fn wrong_answers(&self, ask: &Ask, answers: &[Answer], took: Duration) -> Option<String> {
        match &self.expect {
            Expect::Refused => {
                // A host process below Linux 5.18 can only be told that it may not connect.
                let refused = |f: &&Failure| matches!(f, Failure::Refused | Failure::Denied);
                if answers.iter().filter_map(Answer::failure).filter(refused).count() != answers.len() {
                    return Some("should have been refused".into());
                }
                // Retransmitted SYNs and queries come after a second.
                (took > Duration::from_millis(900)).then(|| format!("took {took:.1?}, should be at once"))
            }
            Expect::Silence => {
                let silent = answers.iter().all(|a| a.failure() == Some(&Failure::Timeout));
                (!silent).then(|| "nothing should have come back".into())
            }
            Expect::Intact => {
                answers.iter().any(|a| a.0.is_err()).then(|| "all should have been answered".into())
            }
            Expect::Answers(names, seen) => {
                if let Some((failure, n)) = failures(answers).into_iter().next() {
                    return Some(format!(
                        "{n} × {failure}, should have been answered by {}",
                        names.join(", ")
                    ));
                }
                unfair(&spread(answers), names, answers.len())
                    .or_else(|| answers.iter().flat_map(|a| &a.0).find_map(|r| odd_reply(ask, seen, r)))
            }
        }
    }
}

fn odd_reply(ask: &Ask, seen: &Seen, reply: &Reply) -> Option<String> {
    let source = reply.peer?.ip();
    if !seen.fits(&reply.name, source) {
        return Some(format!("{} saw {source}, should be {}", reply.name, seen.words()));
    }
    let other = |addr: SocketAddr| addr != ask.to;
    if other(reply.from) {
        return Some(format!("the answer came from {}, not from where the request went", reply.from));
    }
    reply.peername.filter(|&p| other(p)).map(|p| format!("getpeername says {p}"))
}

/// Whether somebody answered who should not, or somebody got less than chance would explain.
fn unfair(spread: &BTreeMap<&str, usize>, names: &[&str], total: usize) -> Option<String> {
    if let Some(stranger) = spread.keys().find(|name| !names.contains(name)) {
        return Some(format!("{stranger} answered, should have been {}", names.join(", ")));
    }
    let share = 1.0 / names.len() as f64;
    let (mean, deviation) = (total as f64 * share, (total as f64 * share * (1.0 - share)).sqrt());
    // Less than once in 100,000 runs by chance.
    let least = (mean - 4.5 * deviation).max(0.0);
    let count = |name: &&&str| spread.get(**name).copied().unwrap_or(0);
    let poor = names.iter().find(|name| (count(name) as f64) < least);
    poor.map(|name| format!("{name} answered {} of {total}, fair is about {mean:.0}", count(&name)))
}

fn bulk_outcome(report: &BulkReport) -> Outcome {
    let wrong = report
        .error
        .as_ref()
        .map(|e| format!("{e} after {:.1} s, all bytes should have arrived", report.seconds));
    let answers = match &report.error {
        None => {
            format!("{} MB in {:.0} ms, every byte right", report.bytes / 1_000_000, report.seconds * 1e3)
        }
        Some(e) => e.to_string(),
    };
    Outcome { answers, sources: String::new(), wrong }
}

fn tally<T: std::fmt::Display + Ord>(items: impl Iterator<Item = T>) -> String {
    let mut counts = BTreeMap::<T, usize>::new();
    items.for_each(|item| *counts.entry(item).or_default() += 1);
    counts.iter().map(|(item, n)| format!("{item} ×{n}")).collect::<Vec<_>>().join("  ")
}

fn who(answers: &[Answer]) -> String {
    tally(answers.iter().map(|a| match &a.0 {
        Ok(reply) => reply.name.clone(),
        Err(failure) => failure.to_string(),
    }))
}

fn sources(answers: &[Answer]) -> String {
    let ips: BTreeSet<IpAddr> = answers.iter().filter_map(Answer::source).collect();
    match ips.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ") {
        none if none.is_empty() => none,
        some => format!("seen as {some}"),
    }
}

impl Action {
    /// What is sent, in a word.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Ask(Ask { transport: Transport::Tcp, .. }) => "TCP",
            Self::Ask(Ask { unconnected: true, .. }) => "UDP sendto",
            Self::Ask(_) => "UDP",
            Self::Bulk(_) => "TCP",
            Self::Ping(_) => "ping",
        }
    }

    /// Where it goes, in words.
    pub(super) fn to(&self) -> String {
        match self {
            Self::Ask(ask) => ask.to.to_string(),
            Self::Bulk(bulk) => bulk.to.to_string(),
            Self::Ping(ping) => ping.to.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(name: &str, source: &str) -> Answer {
        let (to, own) = (SocketAddr::from(([10, 96, 0, 10], 80)), SocketAddr::from(([10, 244, 1, 12], 4000)));
        let peer = Some(SocketAddr::new(source.parse().unwrap(), 4000));
        let peername = Some(to);
        Answer(Ok(Reply { name: name.into(), peer, local: None, from: to, peername, own, us: 1 }))
    }

    fn check(expect: Expect) -> (Check, Ask) {
        let ask = Ask::tcp(SocketAddr::from(([10, 96, 0, 10], 80)));
        let from: Host = serde_json::from_str(
            r#"{"lab":"x","name":"n1p3","role":"pod","node":0,"v4":"10.244.1.12","v6":"::1","cgroup":"/"}"#,
        )
        .unwrap();
        (Check { from, label: "", action: Action::Ask(ask.clone()), expect }, ask)
    }

    #[test]
    fn tells_right_answers_from_wrong_ones() {
        let own: IpAddr = "10.244.1.12".parse().unwrap();
        let (check, ask) = check(Expect::Answers(&["a", "b"], Seen::Client(own)));
        let wrong = |answers: &[Answer]| check.wrong_answers(&ask, answers, Duration::ZERO);
        let fair: Vec<_> =
            ["a", "b"].iter().cycle().take(40).map(|name| answer(name, "10.244.1.12")).collect();
        assert_eq!(wrong(&fair), None);

        let mut masked = fair.clone();
        masked[7] = answer("b", "10.244.1.1");
        assert!(wrong(&masked).unwrap().contains("10.244.1.1"));
        let mut stranger = fair.clone();
        stranger[7] = answer("c", "10.244.1.12");
        assert!(wrong(&stranger).unwrap().contains("c answered"));
        let mut lost = fair.clone();
        lost[7] = Answer(Err(Failure::Timeout));
        assert!(wrong(&lost).unwrap().contains("timeout"));
        let mut odd = fair.clone();
        if let Ok(reply) = &mut odd[7].0 {
            reply.from.set_port(8080);
        }
        assert!(wrong(&odd).unwrap().contains("10.96.0.10:8080"));
        let alone: Vec<_> = (0..40).map(|_| answer("a", "10.244.1.12")).collect();
        assert!(wrong(&alone).unwrap().contains("b answered 0"));
    }

    #[test]
    fn a_slow_refusal_is_wrong() {
        let (check, ask) = check(Expect::Refused);
        let refused = [Answer(Err(Failure::Refused))];
        assert_eq!(check.wrong_answers(&ask, &refused, Duration::from_millis(5)), None);
        assert!(check.wrong_answers(&ask, &refused, Duration::from_millis(1050)).is_some());
        assert!(check.wrong_answers(&ask, &[answer("a", "::1")], Duration::ZERO).is_some());
        assert!(check.wrong_answers(&ask, &[Answer(Err(Failure::Timeout))], Duration::ZERO).is_some());
    }
}
