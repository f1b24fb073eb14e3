//! One request through every path of the design's table, in both families, against agents on both nodes of a lab.

use super::payload;
use super::report::Report;
use super::services::{self, Kind, SERVICES};
use crate::agent::{Agent, log_path, log_tail};
use crate::lab::{Host, Lab};
use crate::probe::{Answer, Ask, Failure};
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

/// An emulated guest's agent compiles its programs at a tenth of the usual speed.
const AGENT_START: Duration = Duration::from_secs(60);

/// Three programs one after the other, and what there is of flows.
const TAKE_OVER: Duration = Duration::from_secs(180);

/// tcx came with Linux 6.6.
const TCX_SINCE: (u32, u32) = (6, 6);

/// `bpf_set_retval` came with Linux 5.18.
const SET_RETVAL_SINCE: (u32, u32) = (5, 18);

/// Builds the lab, starts the agents, tries the paths.
pub(super) fn try_all(report: &mut Report) -> Result<()> {
    let lab = Lab::builder("vm").pods(2).reaper(false).build().context("build the lab")?;
    let servers = [lab.pod(0, 0), lab.pod(0, 1), lab.pod(1, 0), lab.inet().clone()];
    let serve = |host: &Host| host.serve_ports(&[services::PORT], &[services::PORT]);
    let _servers = servers.iter().map(serve).collect::<Result<Vec<_>>>().context("start the servers")?;
    let paths = Paths { lab: &lab };
    paths.both(report, "pod → pod without a Service", |v6| {
        let (from, to) = (lab.pod(0, 0), lab.pod(1, 0));
        expect(&from, at(&to, v6, services::PORT), &to, &[at(&from, v6, 0).ip()])
    });

    let manifests = Path::new("/tmp/manifests");
    fs::create_dir_all(manifests)?;
    fs::write(manifests.join("services.yaml"), services::manifests(&lab))?;
    let start = |node: &Host| {
        let mut agent = Agent::start(Path::new("/bin/lb-agent"), node, manifests, &[])?;
        agent.wait_healthy(AGENT_START)?;
        Ok(agent)
    };
    let agents: Result<Vec<Agent>> = [lab.node(0), lab.node(1)].into_iter().map(start).collect();
    let mut agents = match agents {
        Ok(agents) => agents,
        Err(error) => {
            report.check("lb-agent on both nodes", Err(error));
            return Ok(());
        }
    };
    report.check("lb-agent on both nodes", Ok(()));
    super::loaded::look(report, lab.node(0));
    let before = report.passed();
    let tried = report.checks.len();
    paths.to_services(report);
    paths.without_services(report);
    if super::loaded::version(&report.release) < Some(TCX_SINCE) {
        let result = take_over(&lab, &mut agents, manifests);
        report.check("another version takes over by clsact, and this one again", result);
    }
    let result = redirected(&lab, &mut agents, manifests, &report.release);
    report.check("packets are redirected to pods, or the agent says that it goes on without", result);
    drop(agents);
    match super::plugin::add_pod(&lab).context("lb-cni") {
        Ok(pod) => paths.both(report, "no agent, a pod added by lb-cni → ClusterIP", |v6| {
            expect(&pod, SERVICES[1].at(Kind::ClusterIp, &lab, v6), &lab.pod(1, 0), &[at(&pod, v6, 0).ip()])
        }),
        Err(error) => report.check("lb-cni adds a pod without an agent", Err(error)),
    }
    if report.passed() - before < report.checks.len() - tried {
        print!("{}{}", log_tail(lab.node(0)), log_tail(lab.node(1)));
    }
    Ok(())
}

/// Another version's programs come in front of ours, and ours of theirs, while a connection goes on. (The lab's tests do this
/// by tcx.)
fn take_over(lab: &Lab, agents: &mut Vec<Agent>, manifests: &Path) -> Result<()> {
    let (pod, server, node) = (lab.pod(0, 0), lab.pod(1, 0), lab.node(0));
    let service = SERVICES[1].at(Kind::ClusterIp, lab, false);
    let interval = Duration::from_millis(100);
    let ask = Ask::tcp(service).keep().count(1_000_000).interval(interval);
    let mut answers = pod.start_asking(&ask)?;
    let mut next = || -> Result<Duration> {
        let asked = Instant::now();
        let answer = answers.next().context("the client ended")?;
        answer.0.map_err(|why| anyhow!("the open connection: {why}"))?;
        Ok(asked.elapsed())
    };
    next()?;
    for (exe, times) in [(payload::NEXT, 1), ("lb-agent", 2)] {
        agents.remove(0).stop()?;
        let mut agent = Agent::start(&Path::new("/bin").join(exe), node, manifests, &[])?;
        let ready = agent.wait_healthy(TAKE_OVER).with_context(|| exe.to_owned());
        agents.insert(0, agent);
        ready?;
        let said = fs::read_to_string(log_path(node))?;
        ensure!(said.matches("took over").count() == times, "{exe} took nothing over:\n{said}");
        expect(&pod, service, &server, &[at(&pod, false, 0).ip()]).with_context(|| exe.to_owned())?;
        // All that was answered meanwhile, and one more.
        while next()? < interval / 2 {}
    }
    Ok(())
}

/// With `--redirect=pods` a conversation's packets do not leave by the backend's veth, but for the first: the kernel takes
/// them to the other end at once. Where the programs do not fit, the agent says so, and serves.
fn redirected(lab: &Lab, agents: &mut Vec<Agent>, manifests: &Path, release: &str) -> Result<()> {
    let (pod, server, node) = (lab.pod(0, 0), lab.pod(0, 1), lab.node(0));
    agents.remove(0).stop()?;
    let mut agent = Agent::start(Path::new("/bin/lb-agent"), node, manifests, &["--redirect=pods"])?;
    let ready = agent.wait_healthy(AGENT_START);
    agents.insert(0, agent);
    ready?;
    if super::loaded::version(release) < Some(super::verifier::SHORT_FRAMES_SINCE) {
        let said = fs::read_to_string(log_path(node))?;
        ensure!(said.contains("--redirect: going on without"), "nothing is said of --redirect:\n{said}");
        return expect(
            &pod,
            SERVICES[0].at(Kind::ClusterIp, lab, false),
            &server,
            &[at(&pod, false, 0).ip()],
        );
    }
    let requests = 20;
    for v6 in [false, true] {
        for (kind, client) in [(Kind::ClusterIp, &pod), (Kind::NodePort, lab.client())] {
            let service = SERVICES[0].at(kind, lab, v6);
            for ask in [Ask::tcp(service), Ask::udp(service)] {
                let capture = node.capture(&lab.veth_of(&server))?;
                let answers = client.ask(&ask.clone().keep().count(requests))?;
                let answered = answers.iter().filter(|answer| answer.name() == Some(server.name())).count();
                ensure!(answered == requests, "{kind:?} {ask:?}: {answers:?}");
                // A neighbour may be asked for its address, too.
                let left = capture.packets()?.iter().filter(|packet| packet.out).count();
                ensure!(left < requests / 2, "{kind:?} {ask:?}: {left} packets went the long way");
            }
        }
    }
    Ok(())
}

struct Paths<'a> {
    lab: &'a Lab,
}

impl Paths<'_> {
    fn both(&self, report: &mut Report, name: &str, path: impl Fn(bool) -> Result<()>) {
        report.check(format!("{name}, IPv4"), path(false));
        report.check(format!("{name}, IPv6"), path(true));
    }

    fn to_services(&self, report: &mut Report) {
        let (lab, pod, client) = (self.lab, self.lab.pod(0, 0), self.lab.client());
        let node = |v6| at(lab.node(0), v6, 0).ip();
        let gateway = |v6| services::bridge_address(lab, v6);
        // What a server on another node sees of a masqueraded client: an address of the node's, the overlay's included.
        let of_node = |v6| vec![node(v6), gateway(v6), services::overlay_address(lab, v6)];

        for (service, server) in [(0, lab.pod(0, 1)), (1, lab.pod(1, 0))] {
            let (service, place) = (&SERVICES[service], if service == 0 { "here" } else { "there" });
            self.both(report, &format!("pod → ClusterIP, backend {place}"), |v6| {
                expect(&pod, service.at(Kind::ClusterIp, lab, v6), &server, &[at(&pod, v6, 0).ip()])
            });
            for kind in [Kind::NodePort, Kind::LoadBalancer, Kind::ExternalIp] {
                self.both(report, &format!("outside → {kind:?}, backend {place}"), |v6| {
                    let own = vec![at(client, v6, 0).ip()];
                    let source = if place == "here" { own } else { of_node(v6) };
                    expect(client, service.at(kind, lab, v6), &server, &source)
                });
            }
            for kind in [Kind::ClusterIp, Kind::NodePort] {
                self.both(report, &format!("host process → {kind:?}, backend {place}"), |v6| {
                    expect(lab.node(0), service.at(kind, lab, v6), &server, &of_node(v6))
                });
            }
        }
        self.both(report, "pod → ClusterIP → itself (hairpin)", |v6| {
            expect(&pod, SERVICES[2].at(Kind::ClusterIp, lab, v6), &pod, &[gateway(v6)])
        });
        self.both(report, "pod → ClusterIP, backend outside the cluster", |v6| {
            expect(&pod, SERVICES[3].at(Kind::ClusterIp, lab, v6), lab.inet(), &[node(v6)])
        });
        let empty = |kind, v6| SERVICES[4].at(kind, lab, v6);
        self.both(report, "no endpoints: pod refused at once", |v6| {
            expect_failure(&pod, empty(Kind::ClusterIp, v6), &Failure::Refused)
        });
        self.both(report, "no endpoints: outside refused at once", |v6| {
            expect_failure(client, empty(Kind::NodePort, v6), &Failure::Refused)
        });
        // Older kernels let a socket hook say no, but not why.
        let old = super::loaded::version(&report.release) < Some(SET_RETVAL_SINCE);
        let failure = if old { Failure::Denied } else { Failure::Refused };
        self.both(report, &format!("no endpoints: host process {failure} at once"), |v6| {
            expect_failure(lab.node(0), empty(Kind::ClusterIp, v6), &failure)
        });
    }

    fn without_services(&self, report: &mut Report) {
        let (pod, inet) = (self.lab.pod(0, 0), self.lab.inet());
        self.both(report, "pod → outside, masqueraded", |v6| {
            expect(&pod, at(inet, v6, services::PORT), inet, &[at(self.lab.node(0), v6, 0).ip()])?;
            ensure!(pod.pings(at(inet, v6, 0).ip())?, "ping: no answer");
            Ok(())
        });
    }
}

fn at(host: &Host, v6: bool, port: u16) -> SocketAddr {
    host.at(port)[usize::from(v6)]
}

/// One request over TCP and over UDP, connected and not: `server` answers, and sees one of `sources`; the client
/// sees whom it asked.
fn expect(from: &Host, to: SocketAddr, server: &Host, sources: &[IpAddr]) -> Result<()> {
    let asks =
        [("TCP", Ask::tcp(to)), ("UDP", Ask::udp(to)), ("unconnected UDP", Ask::udp(to).unconnected())];
    for (what, ask) in asks {
        let answers = from.ask(&ask)?;
        let [Answer(Ok(reply))] = answers.as_slice() else { bail!("{what} to {to}: {answers:?}") };
        ensure!(
            reply.name == server.name(),
            "{what} to {to}: {} answered, not {}",
            reply.name,
            server.name()
        );
        ensure!(reply.from == to, "{what} to {to}: the answer came from {}", reply.from);
        let source = reply.peer.context("the server did not say whom it saw")?.ip();
        ensure!(sources.contains(&source), "{what} to {to}: the server saw {source}, not one of {sources:?}");
    }
    Ok(())
}

fn expect_failure(from: &Host, to: SocketAddr, failure: &Failure) -> Result<()> {
    for (what, ask) in [("TCP", Ask::tcp(to)), ("UDP", Ask::udp(to))] {
        let answers = from.ask(&ask)?;
        let failed = matches!(answers.as_slice(), [Answer(Err(why))] if why == failure);
        ensure!(failed, "{what} to {to}: {answers:?}");
    }
    Ok(())
}
