//! What load balancers and people ask an agent for: `healthCheckNodePort`, Kubernetes Events.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};
use xtask::agent::Agent;
use xtask::demo::Cluster;
use xtask::lab::{ApiServer, Host, Lab};
use xtask::probe::Ask;

use super::support::{SOON, agent_exe, answered, cluster, eventually};

pub(crate) const PORT: u16 = 32100;

/// As curl would: the head and the body of what `path` has.
pub(crate) fn get(from: &Host, at: SocketAddr, path: &str) -> Result<std::io::Result<(String, String)>> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n");
    from.run_in(move || {
        let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(request.as_bytes())?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        Ok((head.to_owned(), body.to_owned()))
    })
}

/// The answer about `default/shop` with so many endpoints.
pub(crate) fn says(from: &Host, at: SocketAddr, endpoints: usize) -> Result<()> {
    let (head, body) = get(from, at, "/healthz")?.with_context(|| format!("{} → {at}", from.name()))?;
    let status = if endpoints > 0 { "HTTP/1.1 200 OK\r\n" } else { "HTTP/1.1 503 Service Unavailable\r\n" };
    let weight = format!("\r\nX-Load-Balancing-Endpoint-Weight: {endpoints}");
    ensure!(head.starts_with(status) && head.contains(&weight), "{at}: {head}");
    let expected = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"shop\"\n\t}},\n\
         \t\"localEndpoints\": {endpoints},\n\t\"serviceProxyHealthy\": true\n}}"
    );
    ensure!(body == expected, "{at}: {body}");
    Ok(())
}

pub(crate) fn refused(from: &Host, at: SocketAddr) -> Result<()> {
    let answer = get(from, at, "/")?;
    let refused = answer.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
    ensure!(refused, "{} → {at} should be refused: {answer:?}", from.name());
    Ok(())
}

/// `default/shop` in IPv4, for clients from outside on NodePort 30090, its endpoint of n1 in that condition.
pub(crate) fn shop(cluster: &Cluster, policy: &str, here: &str) -> Result<()> {
    let yaml = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: shop, namespace: default }}\nspec:\n  \
         type: LoadBalancer\n  clusterIP: 10.96.7.1\n  externalTrafficPolicy: {policy}\n  \
         healthCheckNodePort: {PORT}\n  ports: [{{ protocol: TCP, port: 80, nodePort: 30090 }}]\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: shop-1\n  \
         namespace: default\n  labels: {{ kubernetes.io/service-name: shop }}\naddressType: IPv4\n\
         ports: [{{ protocol: TCP, port: 8080 }}]\nendpoints:\n  \
         - {{ addresses: [\"{}\"], nodeName: n1, conditions: {{ {here} }} }}\n  \
         - {{ addresses: [\"{}\"], nodeName: n2 }}\n",
        cluster.lab().pod(0, 0).v4(),
        cluster.lab().pod(1, 0).v4(),
    );
    cluster.write("shop.yaml", &yaml)
}

#[test]
fn health_check_node_ports_tell_load_balancers_where_to_go() -> Result<()> {
    let mut cluster = cluster("hcnp")?;
    let lab = cluster.lab();
    let (client, n1, n2) = (lab.client().clone(), lab.node(0).clone(), lab.node(1).clone());
    let (pod, bridge) = (lab.pod(0, 1), SocketAddr::from(([10, 244, 1, 1], PORT)));
    let both = |node: &Host| node.at(PORT);
    refused(&client, both(&n1)[0])?;
    // Asked in either family, as kube-proxy can be.
    shop(&cluster, "Local", "ready: true")?;
    for at in [both(&n1), both(&n2)].concat() {
        eventually(SOON, || says(&client, at, 1))?;
    }
    says(&n1, SocketAddr::from(([127, 0, 0, 1], PORT)), 1)?;
    says(&pod, bridge, 1)?;

    // An endpoint that shuts down still answers, but load balancers are to go elsewhere.
    shop(&cluster, "Local", "ready: false, serving: true, terminating: true")?;
    for at in both(&n1) {
        eventually(SOON, || says(&client, at, 0))?;
        says(&client, both(&n2)[0], 1)?;
    }
    ensure!(answered(&client, &Ask::tcp(n1.at(30090)[0]))? == ["web-1"]);
    shop(&cluster, "Local", "ready: false")?;
    eventually(SOON, || says(&client, both(&n1)[0], 0))?;

    // Without the agent there is no answer. With the next there is, at once, though connections to the last linger.
    shop(&cluster, "Local", "ready: true")?;
    eventually(SOON, || says(&client, both(&n1)[1], 1))?;
    let open = client.run_in(|| TcpStream::connect(both(&n1)[0]))??;
    cluster.kill_agent(0);
    refused(&client, both(&n1)[0])?;
    cluster.start_agent(0, &[])?;
    for at in both(&n1) {
        eventually(Duration::from_millis(300), || says(&client, at, 1))?;
    }
    drop(open);

    // Only where NodePorts are answered.
    cluster.restart_agent(0, &["--nodeport-addresses=primary"])?;
    for at in both(&n1) {
        eventually(SOON, || says(&client, at, 1))?;
    }
    refused(&pod, bridge)?;

    shop(&cluster, "Cluster", "ready: true")?;
    eventually(SOON, || refused(&client, both(&n1)[0]))?;
    shop(&cluster, "Local", "ready: true")?;
    eventually(SOON, || says(&client, both(&n1)[0], 1))?;
    std::fs::remove_file(cluster.manifests().join("shop.yaml"))?;
    for at in [both(&n1), both(&n2)].concat() {
        eventually(SOON, || refused(&client, at))?;
    }
    Ok(())
}

/// Sockets of health checks alone are more than the files that a runtime may allow at first.
#[test]
fn many_health_checks_do_not_use_up_the_files() -> Result<()> {
    const SERVICES: u16 = 100;
    let lab = Lab::builder("files").pods(1).build()?;
    let node = lab.node(0);
    let dir = node.state_dir().join("manifests");
    std::fs::create_dir(&dir)?;
    let service = |number: u16| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{ name: lb-{number}, namespace: default }}\nspec:\n  \
             type: LoadBalancer\n  clusterIP: 10.96.8.{number}\n  externalTrafficPolicy: Local\n  \
             healthCheckNodePort: {}\n  ports: [{{ protocol: TCP, port: 80 }}]\n---\n",
            PORT + number,
        )
    };
    std::fs::write(dir.join("all.yaml"), (1..=SERVICES).map(service).collect::<String>())?;
    let mut command = Agent::command(&agent_exe()?, node);
    command.arg("--manifests").arg(&dir);
    let few = || {
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
        Ok(setrlimit(Resource::RLIMIT_NOFILE, u64::from(SERVICES), most)?)
    };
    // SAFETY: two system calls.
    unsafe { command.pre_exec(few) };
    let mut agent = Agent::spawn(command, node)?;
    agent.wait_healthy(Duration::from_secs(20))?;
    for at in (1..=SERVICES).flat_map(|number| node.at(PORT + number)) {
        eventually(SOON, || {
            let (head, _) = get(node, at, "/")?.with_context(|| format!("{at}"))?;
            ensure!(head.starts_with("HTTP/1.1 503 "), "{at}: {head}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn the_cluster_is_told_what_is_not_served() -> Result<()> {
    let lab = Lab::builder("told").pods(1).build()?;
    let node = lab.node(0);
    let server = ApiServer::start(node)?;
    let api = server.api();
    api.apply(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}}));
    api.apply(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "sig", "namespace": "default"},
        "spec": {
            "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": PORT,
            "ports": [{"name": "sctp", "port": 9900, "protocol": "SCTP"}, {"name": "tcp", "port": 80}],
        },
    }));
    let taken = node.run_in(|| std::net::TcpListener::bind((std::net::Ipv4Addr::UNSPECIFIED, PORT)))??;
    let mut command = Agent::command(&agent_exe()?, node);
    command.args(["--master", &api.url()]);
    let mut agent = Agent::spawn(command, node)?;
    agent.wait_healthy(Duration::from_secs(20))?;

    eventually(SOON, || {
        let events = api.objects("events");
        for (kind, name, reason) in [
            ("Node", "n1", "Starting"),
            ("Service", "sig", "UnsupportedProtocol"),
            ("Service", "sig", "FailedToStartServiceHealthcheck"),
        ] {
            let found = events.iter().filter(|event| {
                let regarding = &event["regarding"];
                regarding["kind"] == kind && regarding["name"] == name && event["reason"] == reason
            });
            ensure!(found.count() == 1, "not one {reason} of {kind} {name} in {events:#?}");
        }
        ensure!(events.len() == 3, "{events:#?}");
        Ok(())
    })?;
    let (_, metrics) = get(node, "127.0.0.1:10249".parse()?, "/metrics")??;
    for line in [
        "lb_unserved{reason=\"UnsupportedProtocol\"} 1",
        "lb_unserved{reason=\"FailedToStartServiceHealthcheck\"} 1",
        "lb_kubernetes_events_total{result=\"sent\"} 3",
    ] {
        ensure!(metrics.lines().any(|other| other == line), "{line} is not in\n{metrics}");
    }
    // The family whose port is free has had its server all the while; now the other has one, too.
    let says = |at: SocketAddr| -> Result<()> {
        let (head, body) = get(node, at, "/")??;
        let body: Value = serde_json::from_str(&body)?;
        ensure!(head.starts_with("HTTP/1.1 503 ") && body["service"]["name"] == "sig", "{head}\n{body}");
        Ok(())
    };
    says(node.at(PORT)[1])?;
    drop(taken);
    eventually(Duration::from_secs(3), || says(node.at(PORT)[0]))
}
