//! Asks everything, compares, and says what is wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use xtask::probe::{Failure, Question, Survey, Tally};

use super::cells::{BACKENDS, Cell, Client, Over};
use super::oracle::{Expected, Source, expected, tells_of_refusal};
use super::site::Site;

/// A SYN is sent again after a second: what takes less was answered at once.
const AT_ONCE: Duration = Duration::from_millis(900);

/// How long a change may take until packets see it, on a busy machine.
const SOON: Duration = Duration::from_secs(3);

/// How long to wait for what should come, if there is no second try.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);

/// How long nothing must come back.
const SILENCE: Duration = Duration::from_millis(400);

/// What becomes of a request that no Service is there for.
const NOT_SERVED: [Failure; 4] = [Failure::Refused, Failure::Timeout, Failure::Unreachable, Failure::Denied];

/// Requests to a frontend: enough to meet everybody who answers, with two endpoints.
const MOST: usize = 60;

/// What is asked, and what should come of it.
pub(crate) struct Case {
    pub(crate) client: Client,
    pub(crate) to: SocketAddr,
    pub(crate) over: Over,
    /// Whether the client learns of a refusal.
    pub(crate) told: bool,
    /// How often it is asked at least.
    pub(crate) least: usize,
    /// How long to wait for an answer that should come.
    pub(crate) patience: Duration,
    pub(crate) expected: Expected,
    /// Client, frontend, policies and backends, in words.
    pub(crate) words: [String; 4],
}

impl Case {
    pub(crate) fn of(site: &Site, cell: &Cell) -> Self {
        let policy = |local| if local { "Local" } else { "Cluster" };
        let service = cell.service;
        let words = [
            cell.client.to_string(),
            cell.front.to_string(),
            format!("{}/{}", policy(service.internal_local), policy(service.external_local)),
            BACKENDS[service.backends].0.to_owned(),
        ];
        Self {
            client: cell.client,
            to: site.destination(cell.front, service.number(), cell.v4),
            over: cell.over,
            told: tells_of_refusal(cell),
            // Where there is only one server, others cannot answer by chance.
            least: if service.endpoints().len() < 2 { 3 } else { 6 },
            patience: PATIENCE,
            expected: expected(cell),
            words,
        }
    }

    fn question(&self) -> Question {
        let (least, timeout) = match &self.expected {
            Expected::Answers(_) | Expected::Names(_) | Expected::Sticks(_) => {
                (self.least, Duration::from_secs(2))
            }
            Expected::Refused if self.told => (1, self.patience),
            Expected::Refused | Expected::Dropped | Expected::Nobody => (1, SILENCE),
            Expected::NoWay => (1, self.patience),
        };
        let until = match &self.expected {
            Expected::Answers(names) => names.keys().map(|&name| name.to_owned()).collect(),
            Expected::Names(names) => names.iter().map(|&name| name.to_owned()).collect(),
            _ => Vec::new(),
        };
        Question {
            transport: self.over.transport(),
            unconnected: self.over == Over::SendTo,
            to: self.to,
            timeout,
            least,
            most: MOST,
            until,
        }
    }

    fn is_right(&self, site: &Site, tally: &Tally) -> bool {
        let names: BTreeSet<&str> = tally.answers.iter().map(|(name, ..)| name.as_str()).collect();
        let fits = |(name, ip, _): &(String, IpAddr, usize)| match &self.expected {
            Expected::Answers(wanted) => fits(site, self.client, wanted[name.as_str()], *ip),
            _ => true,
        };
        match (&self.expected, &tally.failure) {
            (Expected::Answers(wanted), None) => {
                names.iter().eq(wanted.keys()) && tally.odd.is_none() && tally.answers.iter().all(fits)
            }
            (Expected::Names(wanted), None) => names.iter().eq(*wanted),
            (Expected::Sticks(wanted), None) => names.len() == 1 && names.iter().all(|n| wanted.contains(n)),
            (Expected::Refused, Some((Failure::Timeout, _))) => !self.told,
            (Expected::Refused, Some((Failure::Refused, took))) => *took < AT_ONCE,
            (Expected::Nobody, Some((failure, _))) => NOT_SERVED.contains(failure),
            // The kernel's clock for time-outs is a coarse one.
            (Expected::Dropped, Some((Failure::Timeout, took))) => *took > SILENCE * 3 / 4,
            (Expected::NoWay, Some((Failure::Timeout, took))) => self.over == Over::Tcp && *took < AT_ONCE,
            (Expected::NoWay, Some((Failure::Denied, took))) => self.over != Over::Tcp && *took < AT_ONCE,
            _ => false,
        }
    }
}

/// Asks everything, all clients at the same time; the tallies are in the order of the cases.
fn ask(site: &Site, cases: &[Case]) -> Result<Vec<Tally>> {
    let clients: BTreeSet<Client> = cases.iter().map(|case| case.client).collect();
    let survey = &Survey::from_port(site.source_port(0));
    let by_client = std::thread::scope(|scope| {
        let ask_for = |client| {
            let questions: Vec<_> = cases.iter().filter(|c| c.client == client).map(Case::question).collect();
            scope.spawn(move || {
                let tallies = site.host(client).survey(survey, &questions)?;
                ensure!(tallies.len() == questions.len(), "some of {client}'s questions were not asked");
                Ok((client, tallies))
            })
        };
        let threads: Vec<_> = clients.into_iter().map(ask_for).collect();
        let join = |thread: ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect::<Result<BTreeMap<_, _>>>()
    })?;
    let used = by_client.values().map(|tallies| tallies.iter().map(Tally::asked).sum()).max();
    site.source_port(used.unwrap_or_default());
    let mut by_client: BTreeMap<_, _> = by_client.into_iter().map(|(c, t)| (c, t.into_iter())).collect();
    Ok(cases.iter().filter_map(|case| by_client.get_mut(&case.client)?.next()).collect())
}

/// Asks everything. The error is a table of what is wrong.
pub(crate) fn judge(site: &Site, cases: &[Case]) -> Result<Vec<Tally>> {
    let tallies = ask(site, cases)?;
    let mut table = Table::default();
    for (case, tally) in cases.iter().zip(&tallies).filter(|(case, tally)| !case.is_right(site, tally)) {
        table.add(site, case, tally);
    }
    let wrong = table.cells;
    ensure!(wrong == 0, "{wrong} of {} cells are wrong:\n{table}\n{}", cases.len(), site.words());
    Ok(tallies)
}

fn fits(site: &Site, client: Client, wanted: Source, ip: IpAddr) -> bool {
    match wanted {
        Source::Own => site.host(client).ips().contains(&ip),
        Source::Node(node) => site.node_ips(node).contains(&ip),
    }
}

fn words(expected: &Expected) -> String {
    match expected {
        Expected::Answers(names) => {
            let seen = |(name, source): (&&str, &Source)| match source {
                Source::Own => format!("{name} sees client"),
                Source::Node(node) => format!("{name} sees n{}", node + 1),
            };
            names.iter().map(seen).collect::<Vec<_>>().join(", ")
        }
        Expected::Names(names) => names.join(", "),
        Expected::Sticks(names) => format!("always the same of {}", names.join(", ")),
        Expected::Refused => "refused".into(),
        Expected::Dropped => "nothing".into(),
        Expected::NoWay => "no way, at once".into(),
        Expected::Nobody => "nobody".into(),
    }
}

/// What was seen, in words.
fn observed(site: &Site, client: Client, tally: &Tally) -> String {
    let who = |ip: &IpAddr| match ip {
        ip if site.host(client).ips().contains(ip) => "client".to_owned(),
        ip => match (0..2).find(|&node| site.node_ips(node).contains(ip)) {
            Some(node) => format!("n{}", node + 1),
            None => ip.to_string(),
        },
    };
    let mut parts: Vec<_> =
        tally.answers.iter().map(|(name, ip, _)| format!("{name} sees {}", who(ip))).collect();
    parts.dedup();
    parts.extend(tally.failure.iter().map(|(failure, took)| {
        let when = if *took < AT_ONCE { "" } else { ", late" };
        format!("{failure}{when}")
    }));
    parts.extend(tally.odd.iter().map(|odd| format!("answer from {odd}")));
    parts.join(", ")
}

/// The wrong cells, those that differ in protocol and family only on one line.
#[derive(Default)]
struct Table {
    rows: BTreeMap<Row, BTreeSet<String>>,
    cells: usize,
}

type Row = [String; 6];

impl Table {
    fn add(&mut self, site: &Site, case: &Case, tally: &Tally) {
        let [client, front, policies, backends] = case.words.clone();
        let row =
            [client, front, policies, backends, words(&case.expected), observed(site, case.client, tally)];
        self.cells += 1;
        let family = if case.to.is_ipv4() { 4 } else { 6 };
        self.rows.entry(row).or_default().insert(format!("{:?}{family}", case.over));
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let head =
            ["client", "frontend", "iTP/eTP", "backends", "should be", "was", "over"].map(String::from);
        let body = self.rows.iter().map(|(row, over)| {
            let over = over.iter().cloned().collect::<Vec<_>>().join(" ");
            let [a, b, c, d, e, g] = row.clone();
            [a, b, c, d, e, g, over]
        });
        let lines: Vec<_> = std::iter::once(head).chain(body).collect();
        for line in &lines {
            let mut text = String::new();
            for (i, column) in line.iter().enumerate() {
                let width = lines.iter().map(|l| l[i].chars().count()).max().unwrap_or_default();
                let _ = write!(text, "{column:width$}  ");
            }
            writeln!(f, "{}", text.trim_end())?;
        }
        Ok(())
    }
}

/// Asks until everything is right: packets may see a change a little later.
pub(crate) fn settle(site: &Site, cases: &[Case]) -> Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let start = Instant::now();
        match judge(site, cases) {
            Err(e) if start > deadline => return Err(e.context(format!("even after {SOON:?}"))),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
            Ok(_) => return Ok(()),
        }
    }
}
