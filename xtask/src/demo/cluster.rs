//! The lab with servers in its pods and an agent on each node.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::agent::{self, Agent};
use crate::lab::{Host, Lab};
use crate::probe::{Serve, Server};

/// The manifests, in the binary so that it needs no checkout where it runs.
const MANIFESTS: [(&str, &str); 6] = [
    ("nodes.yaml", include_str!("../../../manifests/demo/nodes.yaml")),
    ("web.yaml", include_str!("../../../manifests/demo/web.yaml")),
    ("dns.yaml", include_str!("../../../manifests/demo/dns.yaml")),
    ("store.yaml", include_str!("../../../manifests/demo/store.yaml")),
    ("db.yaml", include_str!("../../../manifests/demo/db.yaml")),
    ("empty.yaml", include_str!("../../../manifests/demo/empty.yaml")),
];

/// A server in a pod; node and pod are counted from 0.
struct App {
    name: &'static str,
    node: usize,
    pod: usize,
    tcp: u16,
    udp: Option<u16>,
}

const fn app(name: &'static str, node: usize, pod: usize, tcp: u16, udp: Option<u16>) -> App {
    App { name, node, pod, tcp, udp }
}

const APPS: [App; 6] = [
    app("web-1", 0, 0, 8080, None),
    app("web-2", 0, 1, 8080, None),
    app("web-3", 1, 0, 8080, None),
    app("dns-1", 0, 2, 5353, Some(5353)),
    app("dns-2", 1, 1, 5353, Some(5353)),
    app("store", 1, 2, 8080, None),
];

/// How long an agent may take until it is ready.
const PATIENCE: Duration = Duration::from_secs(20);

/// The lab with the demo's applications and agents running in it.
#[derive(Debug)]
pub struct Cluster {
    exe: PathBuf,
    manifests: PathBuf,
    agents: Vec<Option<Agent>>,
    servers: Vec<Server>,
    lab: Lab,
}

impl Cluster {
    /// Starts everything and waits until both agents are ready.
    ///
    /// # Errors
    /// If something does not start; with the agents' last words.
    pub fn start(exe: PathBuf, reaper: bool) -> Result<Self> {
        Self::on(Lab::builder("demo").pods(3).reaper(reaper).build().context("starting the lab")?, exe)
    }

    /// As [`Self::start`], in a lab that has three pods on each node.
    ///
    /// # Errors
    /// If something does not start; with the agents' last words.
    pub fn on(lab: Lab, exe: PathBuf) -> Result<Self> {
        let mut cluster = Self::without_agents(lab, exe)?;
        for node in 0..2 {
            cluster.spawn_agent(node, &[])?;
        }
        for agent in cluster.agents.iter_mut().flatten() {
            agent.wait_healthy(PATIENCE)?;
        }
        Ok(cluster)
    }

    /// As [`Self::on`], but no agent runs yet.
    ///
    /// # Errors
    /// If something does not start.
    pub fn without_agents(lab: Lab, exe: PathBuf) -> Result<Self> {
        let mut servers = Vec::new();
        for app in &APPS {
            let serve = Serve { name: app.name.into(), tcp: vec![app.tcp], udp: Vec::from_iter(app.udp) };
            servers.push(lab.pod(app.node, app.pod).serve(&serve)?);
        }
        let outside = Serve { name: "outside".into(), tcp: vec![8080, 5432], udp: vec![5353] };
        servers.push(lab.inet().serve(&outside)?);

        let manifests = lab.node(0).state_dir().join("manifests");
        fs::create_dir(&manifests)?;
        for (file, text) in MANIFESTS {
            fs::write(manifests.join(file), text)?;
        }
        Ok(Self { exe, manifests, agents: vec![None, None], servers, lab })
    }

    fn spawn_agent(&mut self, node: usize, flags: &[&str]) -> Result<()> {
        self.agents[node] = Some(Agent::start(&self.exe, self.lab.node(node), &self.manifests, flags)?);
        Ok(())
    }

    /// Starts a node's agent, with these flags besides the usual ones, and waits until it is ready.
    ///
    /// # Errors
    /// If it does not become ready.
    pub fn start_agent(&mut self, node: usize, flags: &[&str]) -> Result<()> {
        self.spawn_agent(node, flags)?;
        self.wait_for_agent(node, PATIENCE)
    }

    /// Asks a node's agent to end, and waits until it has.
    ///
    /// # Errors
    /// If it does not end.
    pub fn stop_agent(&mut self, node: usize) -> Result<()> {
        self.agents[node].take().map_or(Ok(()), Agent::stop)
    }

    /// Kills a node's agent.
    pub fn kill_agent(&mut self, node: usize) {
        drop(self.agents[node].take());
    }

    /// Stops a node's agent and starts it again with these flags.
    ///
    /// # Errors
    /// If it does not end, or does not become ready.
    pub fn restart_agent(&mut self, node: usize, flags: &[&str]) -> Result<()> {
        self.stop_agent(node)?;
        self.start_agent(node, flags)
    }

    /// Has agents that are started from now on run another program.
    pub fn use_agent(&mut self, exe: &Path) {
        self.exe = exe.to_owned();
    }

    /// Starts a node's agent without waiting for it.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn begin_agent(&mut self, node: usize) -> Result<()> {
        self.spawn_agent(node, &[])
    }

    /// Waits until a node's agent has programmed everything.
    ///
    /// # Errors
    /// If it ends, or is not ready in time.
    pub fn wait_for_agent(&mut self, node: usize, patience: Duration) -> Result<()> {
        self.agents[node].as_mut().map_or(Ok(()), |agent| agent.wait_healthy(patience))
    }

    /// The program that the agents run.
    pub fn agent_exe(&self) -> &Path {
        &self.exe
    }

    /// The directory of manifests that both agents serve.
    pub fn manifests(&self) -> &Path {
        &self.manifests
    }

    /// The lab.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Rewrites the manifest of the web service without the endpoints of `gone` pods.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn web_without(&self, gone: &[Host]) -> Result<()> {
        self.without("web.yaml", gone)
    }

    /// Rewrites one of the manifests without the endpoints of `gone` pods; without any, as it was.
    ///
    /// # Errors
    /// If there is no such file, or it cannot be written.
    pub fn without(&self, file: &str, gone: &[Host]) -> Result<()> {
        let known = MANIFESTS.iter().find(|(name, _)| *name == file);
        let (_, text) = known.with_context(|| format!("{file} is none of the demo's manifests"))?;
        let of_gone = |line: &str| {
            let names =
                |ip: IpAddr| line.contains(&format!("[{ip}]")) || line.contains(&format!("[\"{ip}\"]"));
            gone.iter().flat_map(Host::ips).any(names)
        };
        let text: String = text.split_inclusive('\n').filter(|line| !of_gone(line)).collect();
        self.write(file, &text)
    }

    /// Writes a manifest.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        // Written aside and renamed, so that nobody reads half of it.
        let aside = self.manifests.join(format!(".{file}.tmp"));
        fs::write(&aside, text)?;
        Ok(fs::rename(aside, self.manifests.join(file))?)
    }

    /// Every address of n1 in a family, as servers may see it.
    pub fn node_ips(&self, v4: bool) -> Vec<IpAddr> {
        let ips: [&str; 3] = match v4 {
            true => ["172.18.0.11", "10.244.1.1", "10.244.1.0"],
            false => ["fd00:172:18::11", "fd00:10:244:1::1", "fd00:10:244:1::"],
        };
        ips.iter().filter_map(|ip| ip.parse().ok()).collect()
    }

    /// The last lines of the agents' logs.
    pub fn logs(&self) -> String {
        (0..2).map(|i| agent::log_tail(self.lab.node(i))).collect()
    }

    /// Leaves everything running.
    ///
    /// # Errors
    /// If the lab's owner cannot be written.
    pub fn keep(self) -> Result<()> {
        self.servers.into_iter().for_each(Server::keep);
        self.agents.into_iter().flatten().for_each(Agent::keep);
        self.lab.keep()
    }
}

/// A Service's addresses as the manifests have them: (IPv4, IPv6) and a port.
pub fn vip(v4: &str, v6: &str, port: u16) -> [SocketAddr; 2] {
    [v4, v6].map(|ip| SocketAddr::new(ip.parse().unwrap_or(IpAddr::from([0, 0, 0, 0])), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manifests_name_the_labs_addresses() {
        let all: String = MANIFESTS.iter().map(|(_, text)| *text).collect();
        for App { name, node, pod, .. } in APPS {
            let v4 = format!("addresses: [10.244.{}.{}]", node + 1, 10 + pod);
            let v6 = format!("addresses: [\"fd00:10:244:{}::{}\"]", node + 1, 10 + pod);
            assert!(all.contains(&v4) && all.contains(&v6), "{name} is no endpoint of any Service");
        }
    }
}
