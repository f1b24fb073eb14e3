//! What watches the agent (`manifests/components/monitoring`) asks for what the agent has: its alerts, its dashboard, and
//! the dashboards that people have for kube-proxy, against `/metrics` of the built agent.

mod exported;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use promql_parser::label::{MatchOp, Matcher};
use promql_parser::parser::{self, Expr};
use promql_parser::util::{ExprVisitor, walk_expr};
use serde_json::{Value, json};
use xtask::agent::Agent;
use xtask::lab::{ApiServer, Lab};
use xtask::system::workspace;

use super::health::get;
use super::support::{SOON, agent_exe, eventually};
use exported::Exported;

/// What Prometheus adds to every series, by itself or by pod-monitor.yaml.
const ADDED: [&str; 3] = ["instance", "job", "node"];

/// Of kubernetes-mixin's dashboard and alerts for kube-proxy, without what is Go's own.
const KUBE_PROXYS: [&str; 11] = [
    r#"sum(rate(kubeproxy_sync_proxy_rules_duration_seconds_count{job="kube-proxy", instance=~"$instance"}[$__rate_interval]))"#,
    r#"histogram_quantile(0.99,rate(kubeproxy_sync_proxy_rules_duration_seconds_bucket{job="kube-proxy", instance=~"$instance"}[$__rate_interval]))"#,
    r#"sum(rate(kubeproxy_network_programming_duration_seconds_count{job="kube-proxy", instance=~"$instance"}[$__rate_interval]))"#,
    r#"histogram_quantile(0.99, sum(rate(kubeproxy_network_programming_duration_seconds_bucket{job="kube-proxy"}[$__rate_interval])) by (instance, le))"#,
    r#"sum(rate(rest_client_requests_total{job="kube-proxy", instance=~"$instance",code=~"2.."}[$__rate_interval]))"#,
    r#"sum(rate(rest_client_requests_total{job="kube-proxy", instance=~"$instance",code=~"5.."}[$__rate_interval]))"#,
    r#"histogram_quantile(0.99, sum(rate(rest_client_request_duration_seconds_bucket{job="kube-proxy",instance=~"$instance",verb="POST"}[$__rate_interval])) by (verb, le))"#,
    r#"histogram_quantile(0.99, sum(rate(rest_client_request_duration_seconds_bucket{job="kube-proxy", instance=~"$instance", verb="GET"}[$__rate_interval])) by (verb, le))"#,
    r#"process_resident_memory_bytes{job="kube-proxy",instance=~"$instance"}"#,
    r#"rate(process_cpu_seconds_total{job="kube-proxy",instance=~"$instance"}[$__rate_interval])"#,
    r#"absent(up{job="kube-proxy"} == 1)"#,
];

fn dir() -> PathBuf {
    workspace().join("manifests/components/monitoring")
}

fn yaml(name: &str) -> Result<Value> {
    let text = std::fs::read_to_string(dir().join(name)).with_context(|| name.to_owned())?;
    serde_saphyr::from_str(&text).with_context(|| name.to_owned())
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// All rules of the plain file.
fn rules() -> Result<Vec<Value>> {
    let file = yaml("alerts.yaml")?;
    Ok(list(&file["groups"]).iter().flat_map(|group| list(&group["rules"]).to_vec()).collect())
}

/// The expressions of all panels.
fn panels() -> Result<Vec<String>> {
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(dir().join("dashboard.json"))?)?;
    let targets = list(&dashboard["panels"]).iter().flat_map(|panel| list(&panel["targets"]));
    Ok(targets.map(|target| text(&target["expr"]).to_owned()).collect())
}

#[derive(Default)]
struct Asked {
    series: Vec<(String, Vec<Matcher>)>,
    grouped: BTreeSet<String>,
}

impl ExprVisitor for Asked {
    type Error = anyhow::Error;

    fn pre_visit(&mut self, expr: &Expr) -> Result<bool> {
        let selector = match expr {
            Expr::VectorSelector(selector) => selector,
            Expr::MatrixSelector(matrix) => &matrix.vs,
            Expr::Aggregate(aggregate) => {
                self.grouped.extend(aggregate.modifier.iter().flat_map(|by| by.labels().labels.clone()));
                return Ok(true);
            }
            _ => return Ok(true),
        };
        let name = selector.name.clone().context("a series without a name")?;
        self.series.push((name, selector.matchers.matchers.clone()));
        Ok(true)
    }
}

/// As Grafana does before it asks.
fn expand(expr: &str) -> String {
    expr.replace("$__rate_interval", "5m").replace("$instance", ".*")
}

/// Whether Prometheus would find what an expression asks for.
fn check(expr: &str, exported: &Exported) -> Result<()> {
    let parsed = parser::parse(&expand(expr)).map_err(anyhow::Error::msg)?;
    let mut asked = Asked::default();
    walk_expr(&mut asked, &parsed)?;
    ensure!(!asked.series.is_empty(), "no series");
    let mut labels: BTreeSet<&str> = ADDED.into();
    for (name, matchers) in asked.series.iter().filter(|(name, _)| name != "up") {
        let has = exported.0.get(name).with_context(|| format!("there is no {name}"))?;
        labels.extend(has.keys().map(String::as_str));
        for matcher in matchers.iter().filter(|matcher| !ADDED.contains(&&*matcher.name)) {
            let values = has.get(&matcher.name).with_context(|| format!("{name} has no {}", matcher.name))?;
            let wanted: Vec<&str> = match &matcher.op {
                MatchOp::Equal | MatchOp::NotEqual => vec![&matcher.value],
                MatchOp::Re(_) | MatchOp::NotRe(_) => matcher.value.split('|').collect(),
            };
            for wanted in wanted.into_iter().filter(|value| !value.contains('.')) {
                ensure!(values.contains(wanted), "{name} has no {}={wanted}: {values:?}", matcher.name);
            }
        }
    }
    for label in &asked.grouped {
        ensure!(labels.contains(&**label), "nothing here has {label}");
    }
    Ok(())
}

/// `/metrics` of an agent that watches an API server and has told of something.
fn scrape() -> Result<Exported> {
    let lab = Lab::builder("scraped").pods(1).build()?;
    let node = lab.node(0);
    let server = ApiServer::start(node)?;
    server.api().apply(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}}));
    server.api().apply(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"},
        "spec": {"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ports": [{"port": 80, "protocol": "TCP"}]},
    }));
    let mut command = Agent::command(&agent_exe()?, node);
    command.args(["--master", &server.api().url()]);
    let mut agent = Agent::spawn(command, node)?;
    agent.wait_healthy(Duration::from_secs(20))?;
    let mut exported = None;
    eventually(SOON, || {
        let (_, metrics) = get(node, "127.0.0.1:10249".parse()?, "/metrics")??;
        ensure!(metrics.contains("lb_kubernetes_events_total{result=\"sent\"} 1"), "{metrics}");
        // What an alert divides by, and what it watches, is there and says what is.
        for (line, least) in [
            ("lb_map_max_entries{map=\"LB_FLOW4\"}", 1000.0),
            ("lb_map_memory_bytes{map=\"LB_FRONT4\"}", 100.0),
            ("lb_map_entries{map=\"LB_FRONT4\"}", 2.0),
            ("lb_devices{role=\"pod\"}", 1.0),
            ("lb_devices{role=\"uplink\"}", 1.0),
            ("lb_api_up", 1.0),
            ("lb_build_info{version=\"0.1.0\"}", 1.0),
        ] {
            let found = metrics.lines().find_map(|text| text.strip_prefix(line)?.trim().parse::<f64>().ok());
            ensure!(found.is_some_and(|value| value >= least), "{line} is {found:?}");
        }
        exported = Some(Exported::parse(&metrics)?);
        Ok(())
    })?;
    exported.context("no metrics")
}

#[test]
fn alerts_and_dashboards_ask_for_what_the_agent_has() -> Result<()> {
    let exported = scrape()?;
    let rules = rules()?;
    let alerts = rules.iter().map(|rule| (text(&rule["alert"]).to_owned(), text(&rule["expr"]).to_owned()));
    let panels = panels()?.into_iter().map(|expr| ("a panel".to_owned(), expr));
    let others = KUBE_PROXYS.map(|expr| ("kube-proxy's dashboard".to_owned(), expr.to_owned()));
    let mut wrong = Vec::new();
    for (of, expr) in alerts.chain(panels).chain(others) {
        if let Err(error) = check(&expr, &exported) {
            wrong.push(format!("{of}: {expr}: {error:#}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));

    // The check finds what is wrong.
    for expr in [
        "lb_nothing > 0",
        "rate(lb_drops_total{reason=\"bad_luck\"}[5m])",
        "lb_drops_total{why=\"x\"}",
        "sum by (colour) (lb_flows)",
        "lb_drops_total{",
    ] {
        ensure!(check(expr, &exported).is_err(), "{expr} passes");
    }
    Ok(())
}

#[test]
fn every_alert_says_what_to_do() -> Result<()> {
    let rules = rules()?;
    ensure!(rules.len() >= 15, "{} alerts", rules.len());
    let reference = std::fs::read_to_string(workspace().join("docs/reference.md"))?;
    let mut names = BTreeSet::new();
    for rule in &rules {
        let name = text(&rule["alert"]);
        ensure!(name.starts_with("Lb") && names.insert(name), "{name}");
        ensure!(["critical", "warning", "info"].contains(&text(&rule["labels"]["severity"])), "{name}");
        let notes = &rule["annotations"];
        ensure!(!text(&notes["summary"]).is_empty() && !text(&notes["description"]).is_empty(), "{name}");
        let runbook = text(&notes["runbook"]);
        ensure!(["kubectl ", "on NODE: "].iter().any(|how| runbook.starts_with(how)), "{name}: {runbook}");
        let words: Vec<&str> = runbook.split([' ', ';', '|']).collect();
        for pair in words.windows(2).filter(|pair| pair[0] == "lbctl") {
            ensure!(["status", "flows", "services"].contains(&pair[1]), "{name}: lbctl {}", pair[1]);
        }
        let said = format!("{} {runbook}", text(&notes["description"]));
        for flag in said.split([' ', ',', ';', ':']).filter(|word| {
            word.starts_with("--flow") || word.starts_with("--masquerade") || word.starts_with("--log")
        }) {
            ensure!(reference.contains(&format!("| `{flag}")), "{name}: {flag} is no flag");
        }
    }
    Ok(())
}

#[test]
fn the_pieces_fit_together() -> Result<()> {
    let (plain, operator) = (yaml("alerts.yaml")?, yaml("prometheus-rule.yaml")?);
    ensure!(plain["groups"] == operator["spec"]["groups"], "prometheus-rule.yaml is not what alerts.yaml is");
    let kustomization = yaml("kustomization.yaml")?;
    let mut files: Vec<String> =
        list(&kustomization["resources"]).iter().map(|f| text(f).to_owned()).collect();
    files.extend(list(&kustomization["patches"]).iter().map(|patch| text(&patch["path"]).to_owned()));
    let generated = list(&kustomization["configMapGenerator"]).iter().flat_map(|map| list(&map["files"]));
    files.extend(generated.map(|file| text(file).rsplit('=').next().unwrap_or_default().to_owned()));
    ensure!(files.len() == 5, "{files:?}");
    for file in &files {
        ensure!(dir().join(file).is_file(), "there is no {file}");
    }
    let base = |name: &str| -> Result<Value> {
        let text = std::fs::read_to_string(workspace().join("manifests/base").join(name))?;
        Ok(serde_saphyr::from_str(&text)?)
    };
    for (patch, target) in [("config.yaml", "config.yaml"), ("daemon-set.yaml", "daemon-set.yaml")] {
        let (patch, target) = (yaml(patch)?, base(target)?);
        for field in ["name", "namespace"] {
            ensure!(patch["metadata"][field] == target["metadata"][field], "{patch}");
        }
    }
    // Prometheus asks the port that the agent answers on, of the pods that there are.
    let container = yaml("daemon-set.yaml")?["spec"]["template"]["spec"]["containers"][0].clone();
    let monitor = yaml("pod-monitor.yaml")?;
    ensure!(monitor["spec"]["podMetricsEndpoints"][0]["port"] == container["ports"][0]["name"]);
    let port = container["ports"][0]["containerPort"].to_string();
    ensure!(text(&yaml("config.yaml")?["data"]["LB_METRICS_BIND_ADDRESS"]).ends_with(&format!(":{port}")));
    let pods = base("daemon-set.yaml")?["spec"]["selector"].clone();
    ensure!(monitor["spec"]["selector"] == pods, "{pods}");
    Ok(())
}
