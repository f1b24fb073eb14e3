//! Every path, from pods, from the nodes, and from this machine, which is outside of the cluster.

use super::kubectl::{Kubectl, answers};
use crate::probe::{Answer, Ask, Failure, failures, names};
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

pub(super) const NAMESPACE: &str = "default";
/// What `manifests/sample.yaml` has, to be waited for.
pub(super) const WORKLOADS: [(&str, &str); 3] =
    [(NAMESPACE, "deployment/web"), (NAMESPACE, "daemonset/client"), (NAMESPACE, "daemonset/host")];

const TCP_NODE_PORT: u16 = 30080;
const UDP_NODE_PORT: u16 = 30053;
const LOCAL_NODE_PORT: u16 = 30081;
/// Two backends are both met by so many requests, but for one run in a million millions.
const REQUESTS: usize = 40;

/// A pod of the sample's.
#[derive(Clone, Debug)]
struct Pod {
    name: String,
    node: String,
    ip: IpAddr,
}

/// What the suite finds in the cluster.
struct Sample<'a> {
    kubectl: &'a Kubectl,
    web: Vec<Pod>,
    clients: Vec<Pod>,
    hosts: Vec<Pod>,
}

type Check<'a> = fn(&Sample<'a>) -> Result<()>;

/// Runs all of it.
pub(super) fn run<'a>(kubectl: &'a Kubectl) -> Result<()> {
    let sample = Sample {
        kubectl,
        web: pods(kubectl, "web")?,
        clients: pods(kubectl, "client")?,
        hosts: pods(kubectl, "host")?,
    };
    ensure!(sample.web.len() >= 2, "the sample application is not there: cargo xtask k3d up");
    let checks: [(&str, Check<'a>); 9] = [
        ("pods reach ClusterIPs, and keep their address", Sample::pods_to_cluster_ips),
        ("a pod reaches itself through its Service", Sample::hairpin),
        ("pods reach NodePorts of every node", Sample::pods_to_node_ports),
        ("the nodes' processes reach ClusterIPs and NodePorts", Sample::nodes),
        ("the outside reaches NodePorts of every node", Sample::outside),
        ("externalTrafficPolicy: Local", Sample::local_policy),
        ("sessionAffinity: ClientIP", Sample::affinity),
        ("no endpoints: refused", Sample::refused),
        ("agents are replaced, and nobody notices", Sample::agents_replaced),
    ];
    let mut failed = 0;
    for (name, check) in checks {
        let start = Instant::now();
        match check(&sample) {
            Ok(()) => println!("ok      {name} ({:.1} s)", start.elapsed().as_secs_f32()),
            Err(error) => {
                failed += 1;
                println!("FAILED  {name}: {error:#}");
            }
        }
    }
    ensure!(failed == 0, "{failed} of {} failed", checks.len());
    Ok(())
}

fn pods(kubectl: &Kubectl, app: &str) -> Result<Vec<Pod>> {
    let pods = kubectl.get(&["-n", NAMESPACE, "pods", "-l", &format!("app={app}")])?;
    pods.iter().map(pod).collect()
}

fn pod(object: &Value) -> Result<Pod> {
    let text = |value: &Value, what: &str| {
        value.as_str().map(str::to_owned).with_context(|| format!("a pod without {what}"))
    };
    let name = text(&object["metadata"]["name"], "a name")?;
    Ok(Pod {
        node: text(&object["spec"]["nodeName"], "a node")?,
        ip: text(&object["status"]["podIP"], "an address")?.parse()?,
        name,
    })
}

impl Sample<'_> {
    fn service(&self, name: &str) -> Result<IpAddr> {
        let service = self.kubectl.get(&["-n", NAMESPACE, "service", name])?;
        let ip = service.first().and_then(|service| service["spec"]["clusterIP"].as_str());
        Ok(ip.with_context(|| format!("the Service {name} has no ClusterIP"))?.parse()?)
    }

    /// Both protocols of the Service `web`.
    fn web(&self) -> Result<[Ask; 2]> {
        let ip = self.service("web")?;
        Ok([Ask::tcp((ip, 80).into()), Ask::udp((ip, 53).into())].map(|ask| ask.count(REQUESTS)))
    }

    fn nodes_ips(&self) -> impl Iterator<Item = IpAddr> {
        self.hosts.iter().map(|host| host.ip)
    }

    fn everybody(&self) -> BTreeSet<&str> {
        self.web.iter().map(|pod| pod.name.as_str()).collect()
    }

    /// Asks from a pod; every backend has to answer.
    fn all_answer(&self, from: &Pod, ask: &Ask) -> Result<Vec<Answer>> {
        let answers = self.kubectl.ask(&from.name, ask)?;
        answered_by(&answers, &self.everybody()).with_context(|| format!("{} → {}", from.name, ask.to))?;
        Ok(answers)
    }

    fn pods_to_cluster_ips(&self) -> Result<()> {
        for client in &self.clients {
            for ask in self.web()? {
                seen_as(&self.all_answer(client, &ask)?, &BTreeSet::from([client.ip]))?;
            }
        }
        Ok(())
    }

    fn hairpin(&self) -> Result<()> {
        for pod in &self.web {
            for ask in self.web()? {
                self.all_answer(pod, &ask)?;
            }
        }
        Ok(())
    }

    fn pods_to_node_ports(&self) -> Result<()> {
        for node in self.nodes_ips() {
            for ask in node_ports(node) {
                self.all_answer(&self.clients[0], &ask)?;
            }
        }
        Ok(())
    }

    fn nodes(&self) -> Result<()> {
        let localhost = IpAddr::from([127, 0, 0, 1]);
        for host in &self.hosts {
            let own = [self.web()?, node_ports(localhost), node_ports(host.ip)];
            for ask in own.into_iter().flatten() {
                self.all_answer(host, &ask)?;
            }
        }
        Ok(())
    }

    fn outside(&self) -> Result<()> {
        for node in self.nodes_ips() {
            for ask in node_ports(node) {
                answered_by(&from_here(&ask)?, &self.everybody())
                    .with_context(|| format!("here → {}", ask.to))?;
            }
        }
        Ok(())
    }

    fn local_policy(&self) -> Result<()> {
        for host in &self.hosts {
            let here: BTreeSet<_> =
                self.web.iter().filter(|pod| pod.node == host.node).map(|pod| pod.name.as_str()).collect();
            let ask = Ask::tcp((host.ip, LOCAL_NODE_PORT).into()).timeout(Duration::from_millis(700));
            if here.is_empty() {
                let answers = from_here(&ask)?;
                ensure!(answers[0].failure() == Some(&Failure::Timeout), "{}: {answers:?}", host.node);
            } else {
                let answers = from_here(&ask.count(REQUESTS))?;
                answered_by(&answers, &here).with_context(|| host.node.clone())?;
                let own = answers.iter().filter_map(|answer| Some(answer.0.as_ref().ok()?.own.ip()));
                seen_as(&answers, &own.collect()).context("the client's own address")?;
            }
        }
        Ok(())
    }

    fn affinity(&self) -> Result<()> {
        let ask = Ask::tcp((self.service("sticky")?, 80).into()).count(REQUESTS);
        for client in &self.clients {
            let answers = self.kubectl.ask(&client.name, &ask)?;
            let names = names(&answers);
            ensure!(failures(&answers).is_empty() && names.len() == 1, "{}: {names:?}", client.name);
        }
        Ok(())
    }

    fn refused(&self) -> Result<()> {
        let ask = Ask::tcp((self.service("empty")?, 80).into());
        for from in [&self.clients[0], &self.hosts[0]] {
            let answers = self.kubectl.ask(&from.name, &ask)?;
            ensure!(answers[0].failure() == Some(&Failure::Refused), "{}: {answers:?}", from.name);
        }
        Ok(())
    }

    fn agents_replaced(&self) -> Result<()> {
        const EVERY: Duration = Duration::from_millis(10);
        let ask = |ask: Ask| ask.count(1500).interval(EVERY);
        let [tcp, udp] = self.web()?;
        let asks = [ask(tcp.clone()), ask(tcp).keep(), ask(udp).keep()];
        let running: Vec<_> = asks
            .iter()
            .map(|ask| self.kubectl.start_asking(&self.clients[0].name, ask))
            .collect::<Result<_>>()?;
        self.kubectl.run(&[
            "-n",
            "kube-system",
            "delete",
            "pods",
            "-l",
            "app.kubernetes.io/name=lb-agent",
        ])?;
        self.kubectl.run(&[
            "-n",
            "kube-system",
            "rollout",
            "status",
            "daemonset/lb-agent",
            super::PATIENCE,
        ])?;
        for child in running {
            let out = child.wait_with_output()?;
            ensure!(out.status.success(), "kubectl exec: {}", out.status);
            let answers = answers(&String::from_utf8_lossy(&out.stdout))?;
            let failed = failures(&answers);
            ensure!(failed.is_empty() && !answers.is_empty(), "{failed:?}");
        }
        Ok(())
    }
}

fn node_ports(ip: IpAddr) -> [Ask; 2] {
    let at = |port| SocketAddr::new(ip, port);
    [Ask::tcp(at(TCP_NODE_PORT)), Ask::udp(at(UDP_NODE_PORT))].map(|ask| ask.count(REQUESTS))
}

/// This machine is outside of the cluster, on the nodes' own network.
fn from_here(ask: &Ask) -> Result<Vec<Answer>> {
    let mut answers = Vec::new();
    ask.run(|answer| {
        answers.push(answer.clone());
        Ok(())
    })?;
    Ok(answers)
}

/// All requests were answered, by all of these.
fn answered_by(answers: &[Answer], wanted: &BTreeSet<&str>) -> Result<()> {
    let failed = failures(answers);
    ensure!(failed.is_empty(), "{failed:?}");
    let found: BTreeSet<_> = names(answers).into_iter().collect();
    if found != *wanted {
        bail!("answers from {found:?}, not {wanted:?}");
    }
    Ok(())
}

/// The servers saw these sources and no others.
fn seen_as(answers: &[Answer], wanted: &BTreeSet<IpAddr>) -> Result<()> {
    let found: BTreeSet<_> = answers.iter().filter_map(Answer::source).collect();
    ensure!(found == *wanted, "seen as {found:?}, not {wanted:?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = r#"{"ok":true,"name":"web-1","peer":"10.42.0.5:4000","from":"10.43.0.9:80","own":"10.42.0.5:4000","us":90}"#;

    #[test]
    fn answers_are_judged() {
        let one = answers(&[LINE, LINE].join("\n")).unwrap();
        answered_by(&one, &BTreeSet::from(["web-1"])).unwrap();
        let error = answered_by(&one, &BTreeSet::from(["web-1", "web-2"])).unwrap_err().to_string();
        assert!(error.contains(r#"from {"web-1"}, not {"web-1", "web-2"}"#), "{error}");
        seen_as(&one, &BTreeSet::from(["10.42.0.5".parse().unwrap()])).unwrap();
        assert!(seen_as(&one, &BTreeSet::from(["10.42.0.1".parse().unwrap()])).is_err());
        let lost = answers("{\"ok\":false,\"error\":\"timeout\"}").unwrap();
        assert!(answered_by(&lost, &BTreeSet::new()).is_err());
        assert!(answers("panicked").is_err());
    }

    #[test]
    fn a_pod_that_is_not_running_yet_is_named() {
        let object = |ip: Value| serde_json::json!({"metadata": {"name": "web-1"}, "spec": {"nodeName": "n1"}, "status": {"podIP": ip}});
        assert_eq!(pod(&object("10.42.0.5".into())).unwrap().node, "n1");
        assert!(pod(&object(Value::Null)).unwrap_err().to_string().contains("an address"));
    }
}
