//! The whole agent on a cluster's API, over HTTP.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xtask::agent::Agent;
use xtask::lab::{Host, Lab};
use xtask::probe::{Ask, Failure};

use super::support::{SOON, Traffic, agent_exe, answered, eventually};

#[path = "../../../lb-agent/tests/support/api/mod.rs"]
#[expect(dead_code, reason = "the agent's own tests use the rest of the stand-in")]
mod stand_in;

use stand_in::Api;

/// The stand-in on a host; it ends with this value.
pub(super) struct Server {
    pub(super) api: Arc<Api>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    pub(super) fn start(host: &Host) -> Result<Self> {
        let ((ready, started), (stop, stopped)) = (channel(), tokio::sync::oneshot::channel());
        let host = host.clone();
        let thread = std::thread::spawn(move || {
            let served = host.run_in(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                runtime.map(|runtime| {
                    runtime.block_on(async {
                        let _ = ready.send(Arc::new(Api::start().await));
                        let _ = stopped.await;
                    });
                })
            });
            assert!(matches!(served, Ok(Ok(()))), "{served:?}");
        });
        let api = started.recv_timeout(Duration::from_secs(5)).context("the stand-in did not start")?;
        Ok(Self { api, stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

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
    let server = Server::start(lab.node(0))?;
    let api = &server.api;
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
