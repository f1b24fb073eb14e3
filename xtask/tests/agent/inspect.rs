//! `lbctl` and the packet log: what a person is told.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xtask::demo::Cluster;
use xtask::lab::Host;
use xtask::probe::Ask;

use super::support::{agent_exe, answered, cluster, logged, store, web};

fn lbctl(node: &Host, args: &[&str]) -> Result<String> {
    let exe = agent_exe()?.with_file_name("lbctl");
    let mut command = node.command(&exe);
    let out = command.arg("--bpffs").arg(node.bpffs_dir()).args(args).output()?;
    let (stdout, stderr) =
        (String::from_utf8(out.stdout)?, String::from_utf8_lossy(&out.stderr).into_owned());
    ensure!(out.status.success(), "lbctl {args:?}: {}: {stderr}", out.status);
    Ok(stdout)
}

pub(crate) fn json(node: &Host, args: &[&str]) -> Result<Value> {
    let text = lbctl(node, &[args, &["-o", "json"]].concat())?;
    serde_json::from_str(&text).with_context(|| format!("lbctl {args:?} printed {text}"))
}

fn shows_everything(cluster: &Cluster, running: bool) -> Result<()> {
    let node = cluster.lab().node(0);
    let services = json(node, &["services", "web"])?;
    let services = services.as_array().context("a list of Services")?;
    let web_ip = services.iter().find(|s| s["address"] == "10.96.0.10:80").context("web's ClusterIP")?;
    ensure!(
        web_ip["kind"] == "ClusterIP" && web_ip["protocol"] == "TCP" && web_ip["name"] == "web",
        "{web_ip}"
    );
    let endpoints = web_ip["internal"]["endpoints"].as_array().context("endpoints")?;
    let mut endpoints: Vec<&str> = endpoints.iter().filter_map(Value::as_str).collect();
    endpoints.sort_unstable();
    // A star for those that are here.
    ensure!(endpoints == ["10.244.1.10:8080*", "10.244.1.11:8080*", "10.244.2.10:8080"], "{endpoints:?}");
    let empty = json(node, &["services", "empty"])?;
    ensure!(empty[0]["internal"]["action"] == "reject", "{empty}");

    // A flow to a backend on the other node: both of its tuples.
    let client = cluster.lab().client().v4().to_string();
    let node_port = format!("{}:30081", node.v4());
    let flows = json(node, &["flows", &node_port])?;
    let flow = &flows.as_array().context("a list of flows")?.first().context("a flow to the NodePort")?;
    let field = |tuple: &str, end: &str| flow[tuple][end].as_str().unwrap_or_default().to_owned();
    ensure!(field("original", "source").starts_with(&client), "{flow}");
    ensure!(field("original", "destination") == node_port, "{flow}");
    ensure!(field("translated", "source").starts_with("10.244.1.0:"), "{flow}");
    ensure!(field("translated", "destination") == "10.244.2.12:8080", "{flow}");
    ensure!(flow["service"].as_str().is_some_and(|s| s.starts_with("default/store")), "{flow}");

    let status = json(node, &["status"])?;
    ensure!(status["agent_running"] == running, "{status}");
    ensure!(status["drops"]["no_endpoint"].as_u64().is_some_and(|n| n >= 3), "{status}");
    let devices = status["devices"].as_array().context("devices")?;
    let uplink = devices.iter().find(|d| d["name"] == "eth0").context("the uplink")?;
    ensure!(uplink["masquerade"] == true && uplink["role"] == "node", "{uplink}");
    ensure!(devices.iter().filter(|d| d["role"] == "pod").count() == 3, "{status}");
    // The tables for people have the same in them.
    ensure!(lbctl(node, &["services"])?.contains("10.96.0.10:80"));
    ensure!(lbctl(node, &["flows"])?.contains(&node_port));
    ensure!(lbctl(node, &["status"])?.contains("no_endpoint"));
    Ok(())
}

#[test]
fn lbctl_shows_services_flows_and_drops_with_and_without_the_agent() -> Result<()> {
    let mut cluster = cluster("inspect")?;
    let (node, pod) = (cluster.lab().node(0).clone(), cluster.lab().pod(0, 2));
    answered(cluster.lab().client(), &Ask::tcp(std::net::SocketAddr::new(node.v4().into(), 30081)).count(3))?;
    answered(&pod, &Ask::tcp(web()[0]).count(3))?;
    let refused = pod.ask(&Ask::tcp("10.96.0.99:80".parse()?).count(3))?;
    ensure!(refused.iter().all(|a| a.name().is_none()), "{refused:?}");
    shows_everything(&cluster, true)?;
    cluster.kill_agent(0);
    shows_everything(&cluster, false)
}

#[test]
fn lbctl_says_where_it_looked() -> Result<()> {
    let lab = xtask::lab::Lab::builder("nothing").pods(1).build()?;
    let error = lbctl(lab.node(0), &["status"]).expect_err("nothing is pinned there").to_string();
    ensure!(error.contains("nothing is pinned in") && error.contains("has lb-agent run"), "{error}");
    Ok(())
}

#[test]
fn the_packet_log_says_why_a_packet_went_no_further() -> Result<()> {
    let mut cluster = cluster("log")?;
    cluster.restart_agent(0, &["--log-packets"])?;
    let (node, pod) = (cluster.lab().node(0).clone(), cluster.lab().pod(0, 2));
    answered(&pod, &Ask::tcp(store()[0]))?;
    for to in ["10.96.0.99:80", "[fd00:10:96::99]:80"] {
        pod.ask(&Ask::tcp(to.parse()?))?;
        logged(&node, &["no_endpoint", "a packet of", "on device"])?;
    }
    Ok(())
}
