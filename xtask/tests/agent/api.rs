//! The whole agent on a cluster's API, over HTTP.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use xtask::agent::Agent;
use xtask::lab::{ApiServer, Host, Lab};
use xtask::probe::{Ask, Failure};

use super::support::{SOON, Traffic, agent_exe, answered, eventually};

fn slice(name: &str, endpoints: &[&Host]) -> Value {
    let endpoints: Vec<_> = endpoints.iter().map(|pod| json!({"addresses": [pod.v4()]})).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": "web"},
        },
        "addressType": "IPv4", "ports": [{"port": 8080, "protocol": "TCP"}], "endpoints": endpoints,
    })
}

#[test]
fn traffic_follows_the_api_and_outlives_it() -> Result<()> {
    let lab = Lab::builder("api").pods(2).build()?;
    let (here, client, there) = (lab.pod(0, 0), lab.pod(0, 1), lab.pod(1, 0));
    let _servers = [here.serve_ports(&[8080], &[])?, there.serve_ports(&[8080], &[])?];
    let server = ApiServer::start(lab.node(0))?;
    let api = server.api().clone();
    let vip = "10.96.0.10:80".parse()?;
    api.apply(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}}));
    api.apply(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"},
        "spec": {"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ports": [{"port": 80, "protocol": "TCP"}]},
    }));
    api.apply(slice("web-1", &[&here]));

    let exe = agent_exe()?;
    let start = |url: &str| -> Result<Agent> {
        let mut command = Agent::command(&exe, lab.node(0));
        command.args(["--master", url]);
        Agent::spawn(command, lab.node(0))
    };
    let mut agent = start(&api.url())?;
    agent.wait_healthy(Duration::from_secs(20))?;
    // The stand-in chooses addresses unless one is given.
    let only = |name: &str| -> Result<()> {
        let names = answered(&client, &Ask::tcp(vip).count(10))?;
        ensure!(names.iter().all(|n| n == name), "{names:?}, should be {name}");
        Ok(())
    };
    eventually(SOON, || only(here.name()))?;
    api.apply(slice("web-1", &[&there]));
    eventually(SOON, || only(there.name()))?;
    api.delete("endpointslices", "default", "web-1");
    eventually(SOON, || {
        let asked = client.ask(&Ask::tcp(vip))?;
        ensure!(asked[0].failure() == Some(&Failure::Refused), "{asked:?}");
        Ok(())
    })?;
    api.apply(slice("web-2", &[&here, &there]));
    eventually(SOON, || {
        let names = answered(&client, &Ask::tcp(vip).count(30))?;
        ensure!([&here, &there].iter().all(|pod| names.iter().any(|n| n == pod.name())), "{names:?}");
        Ok(())
    })?;

    // Without the API server, traffic goes on: with the agent, without it, and with one that finds no server.
    let mut traffic = Traffic::default();
    traffic.connections(&client, vip);
    let url = api.url();
    drop(server);
    std::thread::sleep(Duration::from_millis(500));
    drop(agent);
    std::thread::sleep(Duration::from_millis(200));
    let _blind = start(&url)?;
    std::thread::sleep(Duration::from_millis(1000));
    traffic.finish(Instant::now() - Duration::from_millis(200))?;
    Ok(())
}
