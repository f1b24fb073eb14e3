//! Endpoints that go while somebody talks to them.

use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xtask::demo::Cluster;
use xtask::lab::{Host, Role};
use xtask::probe::{Answer, Ask, Failure, Transport};

use super::support::{SOON, answered, cluster, dns, eventually, store, web};

/// One socket that asks every few milliseconds, and what came of it so far.
struct Talk {
    what: String,
    answers: Receiver<Answer>,
    /// A connected UDP socket of a host process: it ends with its backend, and the process connects a new one.
    ends: bool,
}

impl Talk {
    fn start(from: &Host, ask: &Ask) -> Result<Self> {
        let ask = ask.clone().keep().count(1_000_000).interval(Duration::from_millis(5));
        let ask = ask.timeout(Duration::from_millis(300));
        let kind = if ask.unconnected { "unconnected" } else { "connected" };
        let what = format!("{} → {} {kind}", from.name(), ask.to);
        let ends = from.role() == Role::Node && ask.transport == Transport::Udp && !ask.unconnected;
        let (mut lines, (sender, answers)) = (from.start_asking(&ask)?, channel());
        std::thread::spawn(move || while lines.next().is_some_and(|answer| sender.send(answer).is_ok()) {});
        Ok(Self { what, answers, ends })
    }

    /// The next answer.
    fn next(&self) -> Result<Result<String, Failure>> {
        let answer = self.answers.recv_timeout(Duration::from_secs(3));
        let answer = answer.with_context(|| format!("{}: nothing", self.what))?;
        Ok(answer.0.map(|reply| reply.name))
    }

    /// The next answer, and all that came before it unread.
    fn drain(&self) -> Result<Vec<Result<String, Failure>>> {
        let mut all: Vec<_> = self.answers.try_iter().map(|a| a.0.map(|reply| reply.name)).collect();
        all.push(self.next()?);
        Ok(all)
    }

    /// The next answer to come.
    fn latest(&self) -> Result<Result<String, Failure>> {
        self.drain()?.pop().context("no answer")
    }

    /// Reads on until `name` answers. Only those named before may have answered until then, and nothing is lost but
    /// the socket, if that ends.
    fn moves_to(&self, name: &str, before: &str) -> Result<()> {
        let (deadline, mut ends) = (Instant::now() + SOON, self.ends);
        loop {
            let answer = self.next()?;
            if answer == Err(Failure::Reset) && std::mem::take(&mut ends) {
                continue;
            }
            let who = answer.as_deref().map_err(|e| anyhow::anyhow!("{}: {e}, not {name}", self.what))?;
            if who == name {
                return Ok(());
            }
            ensure!(who == before, "{}: {who} answers, neither {name} nor {before}", self.what);
            ensure!(Instant::now() < deadline, "{}: {who} still answers, {name} should", self.what);
        }
    }

    /// For a while, nobody else answers.
    fn stays_with(&self, name: &str) -> Result<()> {
        for answer in
            self.drain()?.into_iter().chain((0..20).map(|_| self.next()).collect::<Result<Vec<_>>>()?)
        {
            ensure!(answer == Ok(name.into()), "{}: {answer:?}, should be {name}", self.what);
        }
        Ok(())
    }
}

/// Without this pod's endpoint of the name server; tells that packets see it.
fn dns_without(cluster: &Cluster, gone: &[Host]) -> Result<()> {
    cluster.without("dns.yaml", gone)?;
    let probe = cluster.lab().pod(0, 1);
    eventually(SOON, || {
        let mut names = std::collections::BTreeSet::new();
        for to in dns() {
            let asked = probe.ask(&Ask::udp(to).count(20).timeout(Duration::from_millis(300)))?;
            names.extend(asked.iter().map(|a| a.name().map(String::from)));
        }
        let missing = [cluster.lab().pod(0, 2), cluster.lab().pod(1, 1)].map(|p| gone.contains(&p));
        let wanted = match missing {
            [true, true] => vec![None],
            [true, false] => vec![Some("dns-2".to_owned())],
            [false, true] => vec![Some("dns-1".to_owned())],
            [false, false] => vec![Some("dns-1".to_owned()), Some("dns-2".to_owned())],
        };
        ensure!(names.iter().eq(wanted.iter()), "{names:?} answer, {wanted:?} should");
        Ok(())
    })
}

fn udp_follows_endpoints(name: &str, from: fn(&Cluster) -> Host, unconnected: bool) -> Result<()> {
    let cluster = cluster(name)?;
    let [dns1, dns2] = [cluster.lab().pod(0, 2), cluster.lab().pod(1, 1)];
    let from = from(&cluster);
    // Several of each, so that both servers have some.
    let mut talks = Vec::new();
    for to in [dns(), dns(), dns()].concat() {
        let ask = Ask::udp(to);
        talks.push(Talk::start(&from, &if unconnected { ask.unconnected() } else { ask })?);
    }
    let first: Vec<String> =
        talks.iter().map(|talk| talk.next()?.map_err(anyhow::Error::msg_of)).collect::<Result<_>>()?;
    for (talk, server) in talks.iter().zip(&first) {
        talk.stays_with(server)?;
    }
    dns_without(&cluster, std::slice::from_ref(&dns1))?;
    for (talk, server) in talks.iter().zip(&first) {
        talk.moves_to("dns-2", server)?;
    }
    // Given back, it gets new flows, but not these.
    dns_without(&cluster, &[])?;
    talks.iter().try_for_each(|talk| talk.stays_with("dns-2"))?;
    dns_without(&cluster, std::slice::from_ref(&dns2))?;
    talks.iter().try_for_each(|talk| talk.moves_to("dns-1", "dns-2"))?;

    dns_without(&cluster, &[dns1, dns2])?;
    for talk in &talks {
        eventually(SOON, || {
            let answer = talk.latest()?;
            let told = match (&answer, unconnected) {
                (Err(Failure::Refused | Failure::Denied), _) => true,
                // Nobody tells an unconnected socket of an ICMP error.
                (Err(Failure::Timeout), true) => true,
                _ => false,
            };
            ensure!(told, "{}: {answer:?}, should be refused", talk.what);
            Ok(())
        })?;
    }
    dns_without(&cluster, &[])?;
    for talk in &talks {
        eventually(SOON, || {
            let answer = talk.latest()?;
            ensure!(answer.is_ok(), "{}: {answer:?}, though endpoints are back", talk.what);
            Ok(())
        })?;
    }
    Ok(())
}

/// `map_err` of a failure.
trait MsgOf {
    fn msg_of(failure: Failure) -> Self;
}

impl MsgOf for anyhow::Error {
    fn msg_of(failure: Failure) -> Self {
        anyhow::anyhow!("not answered: {failure}")
    }
}

#[test]
fn udp_of_a_pod_follows_endpoints_connected() -> Result<()> {
    udp_follows_endpoints("udppc", |cluster| cluster.lab().pod(0, 0), false)
}

#[test]
fn udp_of_a_pod_follows_endpoints_unconnected() -> Result<()> {
    udp_follows_endpoints("udppu", |cluster| cluster.lab().pod(0, 0), true)
}

#[test]
fn udp_of_a_host_process_follows_endpoints_unconnected() -> Result<()> {
    udp_follows_endpoints("udphu", |cluster| cluster.lab().node(0).clone(), true)
}

#[test]
fn udp_of_a_host_process_follows_endpoints_connected() -> Result<()> {
    udp_follows_endpoints("udphc", |cluster| cluster.lab().node(0).clone(), false)
}

/// Conversations with the name server, of every kind and in both families: n1's are the flows.
fn talks_of_all(cluster: &Cluster) -> Result<Vec<Talk>> {
    let lab = cluster.lab();
    let (pod, node, client) = (lab.pod(0, 0), lab.node(0), lab.client());
    let mut talks = Vec::new();
    for family in [0, 1] {
        for (from, to) in [(&pod, dns()), (client, node.at(30053)), (node, dns())] {
            let ask = Ask::udp(to[family]);
            talks.push(Talk::start(from, &ask)?);
            talks.push(Talk::start(from, &ask.unconnected())?);
        }
    }
    Ok(talks)
}

/// Gives `dns-1` these conditions, and waits until new flows go to `dns-2` alone.
fn dns1_is(cluster: &Cluster, conditions: &str) -> Result<()> {
    let lab = cluster.lab();
    let yaml: String = include_str!("../../../manifests/demo/dns.yaml")
        .split_inclusive('\n')
        .map(|line| {
            if line.contains("nodeName: n1") { line.replace("ready: true", conditions) } else { line.into() }
        })
        .collect();
    cluster.write("dns.yaml", &yaml)?;
    new_flows_are_for_dns2(lab.node(0), [&lab.pod(0, 1), lab.client(), lab.node(0)])
}

fn new_flows_are_for_dns2(node: &Host, clients: [&Host; 3]) -> Result<()> {
    for from in clients {
        let to = if from.role() == Role::Client { node.at(30053) } else { dns() };
        for to in to {
            eventually(SOON, || {
                let names = answered(from, &Ask::udp(to).count(20))?;
                ensure!(names.iter().all(|name| name == "dns-2"), "{} → {to}: {names:?}", from.name());
                Ok(())
            })?;
        }
    }
    Ok(())
}

#[test]
fn udp_stays_with_a_terminating_endpoint_while_that_serves() -> Result<()> {
    let mut cluster = cluster("drain")?;
    dns_without(&cluster, &[cluster.lab().pod(1, 1)])?;
    let talks = talks_of_all(&cluster)?;
    talks.iter().try_for_each(|talk| talk.stays_with("dns-1"))?;
    dns_without(&cluster, &[])?;

    dns1_is(&cluster, "ready: false, serving: true, terminating: true")?;
    talks.iter().try_for_each(|talk| talk.stays_with("dns-1"))?;
    cluster.kill_agent(0);
    talks.iter().try_for_each(|talk| talk.stays_with("dns-1"))?;
    cluster.start_agent(0, &[])?;
    talks.iter().try_for_each(|talk| talk.stays_with("dns-1"))?;
    // Nor does what the new agent writes.
    dns1_is(&cluster, "ready: false, terminating: true")?;
    talks.iter().try_for_each(|talk| talk.stays_with("dns-1"))?;

    dns1_is(&cluster, "ready: false, serving: false, terminating: true")?;
    talks.iter().try_for_each(|talk| talk.moves_to("dns-2", "dns-1"))
}

#[test]
fn udp_that_began_without_endpoints_is_served_when_there_are_some() -> Result<()> {
    let cluster = cluster("began")?;
    let all = [cluster.lab().pod(0, 2), cluster.lab().pod(1, 1)];
    dns_without(&cluster, &all)?;
    let talks = talks_of_all(&cluster)?;
    for talk in &talks {
        ensure!(talk.next()?.is_err(), "{}: answered by nobody", talk.what);
    }
    dns_without(&cluster, &[])?;
    for talk in &talks {
        // Up to the one that was under way.
        talk.drain()?;
        let name = talk.next()?.map_err(anyhow::Error::msg_of).with_context(|| talk.what.clone())?;
        talk.stays_with(&name)?;
    }
    Ok(())
}

/// Nobody put the backend into this socket: it is the process's own business.
#[test]
fn udp_of_a_host_process_to_the_endpoint_itself_stays() -> Result<()> {
    let cluster = cluster("udphd")?;
    let [dns1, node] = [cluster.lab().pod(0, 2), cluster.lab().node(0).clone()];
    let direct = dns1.at(5353).map(|to| Talk::start(&node, &Ask::udp(to)));
    let direct: Vec<Talk> = direct.into_iter().collect::<Result<_>>()?;
    let service: Vec<Talk> =
        dns().iter().map(|to| Talk::start(&node, &Ask::udp(*to))).collect::<Result<_>>()?;
    direct.iter().try_for_each(|talk| talk.stays_with("dns-1"))?;
    service.iter().try_for_each(|talk| talk.next().map(drop))?;
    dns_without(&cluster, std::slice::from_ref(&dns1))?;
    service.iter().try_for_each(|talk| talk.moves_to("dns-2", "dns-1"))?;
    direct.iter().try_for_each(|talk| talk.stays_with("dns-1"))
}

#[test]
fn tcp_stays_with_its_pod_and_new_connections_do_not() -> Result<()> {
    let cluster = cluster("tcpep")?;
    let lab = cluster.lab();
    let (pod, client, node) = (lab.pod(0, 2), lab.client(), lab.node(0));
    let mut talks = Vec::new();
    for family in [0, 1] {
        for (from, to) in [(&pod, web()[family]), (client, node.at(30080)[family]), (node, web()[family])] {
            for _ in 0..2 {
                talks.push(Talk::start(from, &Ask::tcp(to))?);
            }
        }
        talks.push(Talk::start(client, &Ask::tcp(node.at(30081)[family]))?);
        talks.push(Talk::start(&pod, &Ask::tcp(store()[family]))?);
    }
    let names: Vec<String> =
        talks.iter().map(|talk| talk.next()?.map_err(anyhow::Error::msg_of)).collect::<Result<_>>()?;
    cluster.web_without(&[lab.pod(0, 0), lab.pod(0, 1), lab.pod(1, 0)])?;
    cluster.without("store.yaml", &[lab.pod(1, 2)])?;
    for to in [web(), store()].concat() {
        for from in [&pod, node] {
            eventually(SOON, || {
                let asked = from.ask(&Ask::tcp(to).timeout(Duration::from_millis(300)))?;
                ensure!(asked[0].failure() == Some(&Failure::Refused), "{} → {to}: {asked:?}", from.name());
                Ok(())
            })?;
        }
    }
    for (talk, name) in talks.iter().zip(&names) {
        talk.stays_with(name)?;
    }
    cluster.web_without(&[])?;
    for from in [&pod, node] {
        eventually(SOON, || answered(from, &Ask::tcp(web()[0])).map(drop))?;
    }
    for (talk, name) in talks.iter().zip(&names) {
        talk.stays_with(name)?;
    }
    Ok(())
}
