//! `kubectl logs` as a person reads it: a line for each thing that matters, and none for the rest.

use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xtask::agent::{Agent, log_path};
use xtask::lab::{ApiServer, Host, Lab};

use super::support::{agent_exe, eventually, metric};

/// What is tried again is tried after seconds.
const LATER: Duration = Duration::from_secs(20);

fn service(name: &str, ip: &str, protocol: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "shop"},
        "spec": {"clusterIP": ip, "clusterIPs": [ip], "ports": [{"name": "p", "port": 80, "protocol": protocol}]},
    })
}

fn slice(address: &str) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "ports": [{"name": "p", "port": 8080}], "endpoints": [{"addresses": [address]}],
    })
}

/// As Kubernetes does it: never half a file.
fn write(dir: &Path, name: &str, text: &str) -> Result<()> {
    std::fs::write(dir.join("new"), text)?;
    Ok(std::fs::rename(dir.join("new"), dir.join(name))?)
}

/// The lines so far, without their times and what else differs from run to run.
fn lines(node: &Host, url: &str) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(log_path(node))?;
    let line = |line: &str| {
        let (_, line) = line.trim().split_once(' ').with_context(|| format!("no time: {line}"))?;
        let line = line.trim().replace(url, "URL");
        Ok(line.split(" after ").next().unwrap_or_default().to_owned())
    };
    text.lines().map(line).collect()
}

#[test]
fn the_log_has_a_line_for_each_thing_that_matters() -> Result<()> {
    let lab = Lab::builder("log").pods(1).build()?;
    let node = lab.node(0);
    let server = ApiServer::start(node)?;
    let (api, url) = (server.api(), server.api().url());
    let dir = node.state_dir().join("access");
    std::fs::create_dir(&dir)?;
    let token = |token: &str| write(&dir, "token", token);
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {"tokenFile": dir.join("token")}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    });
    write(&dir, "kubeconfig", &config.to_string())?;
    token("first")?;
    api.behave(|behaviour| behaviour.token = Some("first".into()));
    api.apply(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}}));
    api.apply(service("web", "10.96.0.10", "TCP"));
    api.apply(slice("10.244.9.1"));

    let mut command = Agent::command(&agent_exe()?, node);
    command.arg("--kubeconfig").arg(dir.join("kubeconfig"));
    let mut agent = Agent::spawn(command, node)?;
    let written = agent.wait_written(Duration::from_secs(20))?;
    let has = |times: usize, part: &str| {
        eventually(LATER, || {
            let found = lines(node, &url)?.iter().filter(|line| line.contains(part)).count();
            ensure!(found == times, "{part}: {found} times");
            Ok(())
        })
    };
    // One thing after the other, each until it is seen: a hundred changes are no news, a Service that cannot be served is.
    for change in 0..100 {
        api.apply(slice(&format!("10.244.9.{change}")));
    }
    eventually(LATER, || {
        ensure!(agent_wrote(node)? > written);
        Ok(())
    })?;
    let told = || metric(node, "lb_kubernetes_events_total{result=\"sent\"}").unwrap_or(0.0);
    let before = told();
    api.apply(service("sig", "10.96.0.11", "SCTP"));
    has(1, "Service shop/sig")?;
    // An Event that had to wait until the credentials are refused would be one more thing to say.
    eventually(LATER, || {
        ensure!(told() > before, "the cluster was not told");
        Ok(())
    })?;
    // Watches that break, and a history that is gone, are the watcher's own business.
    api.disconnect();
    api.compact();
    api.apply(slice("10.244.9.200"));
    api.down();
    has(1, "cannot be reached")?;
    api.up();
    has(1, "is back")?;
    api.behave(|behaviour| behaviour.token = Some("second".into()));
    api.disconnect();
    has(1, "does not accept our credentials")?;
    token("second")?;
    has(2, "is back")?;
    // Renewed in time: nothing to say.
    token("third")?;
    api.behave(|behaviour| behaviour.token = Some("third".into()));
    api.disconnect();
    api.apply(service("late", "10.96.0.12", "SCTP"));
    has(1, "Service shop/late")?;
    agent.stop()?;

    let mut seen = lines(node, &url)?;
    ensure!(seen[0].starts_with("INFO lb-agent 0.1.0 on node n1: "), "{}", seen[0]);
    seen.remove(0);
    // These come in any order.
    let end = seen.iter().position(|line| line.contains("are in place")).context("no end of the start")?;
    seen[..end].sort();
    let expected = [
        "INFO EndpointSlices: 1 listed",
        "INFO Services: 1 listed",
        "INFO health checks on http://0.0.0.0:10256",
        "INFO metrics on http://127.0.0.1:10249",
        "INFO serving eth0 (uplink)",
        "INFO serving flannel-v6.1 (overlay)",
        "INFO serving flannel.1 (overlay)",
        "INFO serving vethn1p1 (pod)",
        "INFO this Node: 1 listed",
        "INFO watching the API server URL",
        "INFO 1 Services with 1 frontends are in place",
        "WARN Service shop/sig: port \"p\" is not served: protocol SCTP is not supported",
        "WARN the API server URL cannot be reached (",
        "INFO the API server URL is back",
        "WARN the API server URL does not accept our credentials (401): the token or certificate has expired, ",
        "INFO the credentials for the API server have changed: using the new ones",
        "INFO the API server URL is back",
        "INFO the credentials for the API server have changed: using the new ones",
        "WARN Service shop/late: port \"p\" is not served: protocol SCTP is not supported",
        "INFO stopping; what is programmed keeps forwarding",
    ];
    // What follows depends on how the connection broke.
    let same = seen.iter().zip(expected).all(|(line, expected)| line.starts_with(expected));
    ensure!(same && seen.len() == expected.len(), "{seen:#?}");
    Ok(())
}

#[test]
fn lost_packets_are_told_in_the_log_and_to_the_cluster() -> Result<()> {
    let lab = Lab::builder("lost").pods(1).build()?;
    let (node, pod, inet) = (lab.node(0), lab.pod(0, 0), lab.inet());
    let _server = inet.serve_ports(&[8080], &[])?;
    let server = ApiServer::start(node)?;
    let api = server.api();
    api.apply(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}}));
    let mut command = Agent::command(&agent_exe()?, node);
    command.args(["--master", &api.url(), "--masquerade-ports", "20000-20001"]);
    let mut agent = Agent::spawn(command, node)?;
    agent.wait_healthy(Duration::from_secs(20))?;

    let at = inet.at(8080)[0];
    let open = || (0..4).map(|_| TcpStream::connect_timeout(&at, Duration::from_millis(300)));
    let connections: Vec<_> = pod.run_in(|| open().collect())?;
    ensure!(connections.iter().filter(|one| one.is_ok()).count() == 2, "{connections:?}");
    eventually(LATER, || {
        let lines = lines(node, &api.url())?;
        let told: Vec<_> = lines.iter().filter(|line| line.contains("masquerade_ports_exhausted")).collect();
        let words = "dropped (masquerade_ports_exhausted): no masquerade port is left";
        ensure!(told.len() == 1 && told[0].starts_with("WARN ") && told[0].contains(words), "{lines:#?}");
        let events = api.objects("events");
        let told = events.iter().filter(|event| event["reason"] == "MasqueradePortsExhausted");
        let told: Vec<_> =
            told.map(|event| (&event["regarding"]["kind"], &event["regarding"]["name"])).collect();
        ensure!(told == [(&json!("Node"), &json!("n1"))], "{events:#?}");
        Ok(())
    })
}

/// When it last wrote.
fn agent_wrote(node: &Host) -> Result<f64> {
    xtask::agent::last_written(node)?.context("nothing was written")
}
