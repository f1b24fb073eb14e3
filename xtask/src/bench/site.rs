//! Where a mode is measured: a lab of its own, so that no mode has another's rules, programs or connection tracking in
//! its way. The labs live side by side and take turns.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use super::iptables;
use super::services::{self, Services};
use super::stats::Times;
use crate::agent::Agent;
use crate::lab::{Host, Lab, xtask_exe};

/// How a connection finds its endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Mode {
    /// By the endpoint's own address: the bridge carries it, nothing is translated. The floor.
    Direct,
    /// ClusterIP, kube-proxy's rules.
    Iptables,
    /// ClusterIP, our programs on every packet.
    Ours,
}

impl Mode {
    pub(super) const ALL: [Self; 3] = [Self::Direct, Self::Iptables, Self::Ours];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Iptables => "iptables",
            Self::Ours => "ours",
        }
    }

    /// Whether bridged packets take the way through netfilter. kube-proxy's iptables mode cannot do without: replies
    /// within a bridge would miss their translation. We can, but clusters that we come to have it on.
    fn bridge_netfilter(self) -> bool {
        match self {
            Self::Direct => false,
            Self::Iptables | Self::Ours => true,
        }
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Load {
    /// Connect, a byte each way, close.
    NewConnection,
    /// A byte each way over one connection.
    RoundTrip,
}

impl Load {
    pub(super) const ALL: [Self; 2] = [Self::NewConnection, Self::RoundTrip];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::NewConnection => "new connection",
            Self::RoundTrip => "round trip",
        }
    }
}

/// One turn of one mode.
#[derive(Clone, Debug)]
pub(super) struct Turn {
    pub(super) times: Times,
    /// Per second.
    pub(super) rate: f64,
}

/// A lab with client and server in two pods of one node, and a mode's way of serving ClusterIPs on that node.
#[derive(Debug)]
pub(super) struct Site {
    pub(super) mode: Mode,
    exe: PathBuf,
    // In this order they go: the lab's processes before the lab.
    agent: Option<Agent>,
    client: Client,
    _server: Worker,
    lab: Lab,
}

impl Site {
    pub(super) fn start(mode: Mode, exe: &Path, core: usize) -> Result<Self> {
        let lab =
            Lab::builder(&format!("bench-{}", mode.name())).pods(2).build().context("starting a lab")?;
        let bridged = if mode.bridge_netfilter() { "1" } else { "0" };
        for family in ["iptables", "ip6tables"] {
            lab.node(0).sysctl(&format!("bridge.bridge-nf-call-{family}"), bridged)?;
        }
        let server = Worker::serve(&lab.pod(0, 1), core)?;
        let client = Client::start(&lab.pod(0, 0), core)?;
        Ok(Self { mode, exe: exe.to_owned(), agent: None, client, _server: server, lab })
    }

    /// Address of the server's pod, the same in every lab.
    pub(super) fn server(&self) -> Ipv4Addr {
        self.lab.pod(0, 1).v4()
    }

    /// Makes the node serve these and no other Services; how long it took from nothing.
    pub(super) fn program(&mut self, services: &Services) -> Result<Option<Duration>> {
        let node = self.lab.node(0);
        match self.mode {
            Mode::Direct => Ok(None),
            Mode::Iptables => {
                let start = Instant::now();
                iptables::load(node, services)?;
                Ok(Some(start.elapsed()))
            }
            Mode::Ours => {
                if let Some(agent) = self.agent.take() {
                    agent.stop()?;
                }
                let manifests = node.state_dir().join("manifests");
                fs::create_dir_all(&manifests)?;
                fs::write(manifests.join("nodes.yaml"), include_str!("../../../manifests/demo/nodes.yaml"))?;
                fs::write(manifests.join("services.yaml"), services::manifest(services))?;
                let start = Instant::now();
                let mut agent = Agent::start(&self.exe, node, &manifests, &[])?;
                agent.wait_healthy(Duration::from_secs(60))?;
                self.agent = Some(agent);
                Ok(Some(start.elapsed()))
            }
        }
    }

    /// Takes a turn.
    pub(super) fn measure(
        &mut self,
        load: Load,
        count: usize,
        services: &Services,
        round: usize,
    ) -> Result<Turn> {
        let service = services.measured(round);
        let to = match self.mode {
            Mode::Direct => service.endpoints.clone(),
            Mode::Iptables | Mode::Ours => vec![service.vip],
        };
        self.client.measure(load, count, &to).with_context(|| format!("{} to {}", self.mode.name(), to[0]))
    }

    /// Makes sure that the mode was what it says: connections are tracked with iptables and nowhere else.
    ///
    /// # Errors
    /// If not.
    pub(super) fn verify(&self) -> Result<()> {
        let read = || fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count");
        let tracked: u64 = match self.lab.node(0).run_in(read)? {
            Ok(text) => text.trim().parse()?,
            // No connection tracking in this kernel, or none yet.
            Err(_) => 0,
        };
        ensure!(
            (tracked > 0) == (self.mode == Mode::Iptables),
            "{tracked} connections are tracked in mode {}: the comparison is void",
            self.mode.name()
        );
        Ok(())
    }
}

/// A process of the benchmark's; it ends with this value.
#[derive(Debug)]
struct Worker(Child);

impl Worker {
    fn command(pod: &Host, what: &str, core: usize) -> Result<Command> {
        let mut command = pod.command(xtask_exe()?);
        command.args(["bench", what, "--core", &core.to_string()]).stdout(Stdio::piped());
        Ok(command)
    }

    fn serve(pod: &Host, core: usize) -> Result<Self> {
        let mut command = Self::command(pod, "serve", core)?;
        command.args(["--first-port", &services::FIRST_PORT.to_string()]);
        command.args(["--ports", &services::PORTS.to_string()]).stdin(Stdio::null());
        let mut worker = Self(command.spawn().context("starting the server")?);
        let mut line = String::new();
        BufReader::new(worker.0.stdout.take().context("no pipe")?).read_line(&mut line)?;
        ensure!(line == "ready\n", "the server on {} did not start", pod.name());
        Ok(worker)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[derive(Debug)]
struct Client {
    _worker: Worker,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Client {
    fn start(pod: &Host, core: usize) -> Result<Self> {
        let mut command = Worker::command(pod, "drive", core)?;
        let mut worker = Worker(command.stdin(Stdio::piped()).spawn().context("starting the client")?);
        let (input, output) = (worker.0.stdin.take(), worker.0.stdout.take());
        let (Some(input), Some(output)) = (input, output) else { bail!("no pipes") };
        Ok(Self { _worker: worker, input, output: BufReader::new(output) })
    }

    fn measure(&mut self, load: Load, count: usize, to: &[SocketAddrV4]) -> Result<Turn> {
        let what = match load {
            Load::NewConnection => "connect",
            Load::RoundTrip => "trip",
        };
        let to: String = to.iter().map(|a| format!(" {a}")).collect();
        writeln!(self.input, "{what} {count}{to}")?;
        let mut total = [0; 8];
        self.output.read_exact(&mut total).context("the client gave up (see above)")?;
        let mut times = vec![0; count * 4];
        self.output.read_exact(&mut times)?;
        let times: Vec<u32> =
            times.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let seconds = u64::from_le_bytes(total) as f64 / 1e9;
        Ok(Turn { times: Times::of(&times), rate: count as f64 / seconds })
    }
}
