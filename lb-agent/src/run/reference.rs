//! `docs/reference.md` is what the code says.

use super::measure;
use crate::cli::RunArgs;
use crate::events::Events;
use crate::kernel::devices;
use crate::kernel::fill::Fill;
use crate::kernel::sweep::{Sweeper, Timeouts};
use crate::kernel::tables::Tables;
use crate::kernel::testing::Bpffs;
use crate::source::kube::{Access, Cluster, Scope};
use crate::source::{self, Event};
use crate::sync::Reports;
use clap::{Arg, Args as _, Command};
use lb_stand_in::Api;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::Duration;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference.md");
/// Set to have the file written.
const WRITE: &str = "LB_WRITE_REFERENCE";

#[test]
fn the_reference_has_every_flag_and_metric() {
    let text = format!("{HEAD}\n## Flags of `lb-agent run`\n{}\n## Metrics\n{}", flags(), metrics());
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(FILE, &text).expect("write the reference");
    }
    let written = std::fs::read_to_string(FILE).unwrap_or_default();
    assert!(
        written == text,
        "docs/reference.md is out of date: run {WRITE}=1 cargo test -p lb-agent --lib reference"
    );
}

const HEAD: &str = "\
# Reference

Made from the code (`LB_WRITE_REFERENCE=1 cargo test -p lb-agent --lib reference`); a test compares.
";

fn flags() -> String {
    let command = RunArgs::augment_args(Command::new("lb-agent"));
    let mut sections: BTreeMap<Option<&str>, Vec<&Arg>> = BTreeMap::new();
    for arg in command.get_arguments() {
        sections.entry(arg.get_help_heading()).or_default().push(arg);
    }
    let mut text = "\nA flag counts before its variable. A switch alone is `=true`.\n".to_owned();
    for (heading, args) in sections {
        let heading = heading.map_or_else(String::new, |heading| format!("\n{heading}:\n"));
        let _ = write!(text, "{heading}\n| flag | variable | default | |\n|---|---|---|---|\n");
        for arg in args {
            let flag = format!("--{}", arg.get_long().expect("a long name"));
            let switch = arg.get_num_args().is_some_and(|n| n.min_values() == 0);
            let value = match (switch, arg.get_value_names()) {
                (true, _) => "[=BOOL]".into(),
                (false, Some([name, ..])) => format!(" {name}"),
                (false, _) => String::new(),
            };
            let env = arg.get_env().map(|env| env.to_string_lossy().into_owned()).expect("a variable");
            let help = arg.get_help().map(ToString::to_string).expect("a help text");
            let (help, said) = match help.split_once(" [default: ") {
                Some((help, default)) => (help.to_owned(), Some(default.trim_end_matches(']').to_owned())),
                None => (help, None),
            };
            let defaults = arg.get_default_values().iter().map(|value| value.to_string_lossy());
            let default = defaults.filter(|v| !v.is_empty()).map(|v| format!("`{v}`")).next();
            let default = said.or(default).unwrap_or_else(|| "–".into());
            let _ = writeln!(text, "| `{flag}{value}` | `{env}` | {} | {} |", cell(&default), cell(&help));
        }
    }
    text
}

fn metrics() -> String {
    let bpffs = Bpffs::with_flows(4096);
    let reports = Reports { events: Events::unsent(), ..Reports::default() };
    let sweeper = Sweeper::open(&bpffs.pins, Timeouts::default()).expect("a sweeper");
    let fill = Fill::open(&bpffs.pins).expect("the maps");
    let tables = Tables::open(&bpffs.pins).expect("the maps");
    measure(&reports, tables, &sweeper, &fill, devices::Stats::default());
    let cluster = watched();
    reports.metrics.collect(Box::new(move || cluster.samples()));
    reports.metrics.synced(Duration::ZERO, Default::default(), &[]);
    let rendered = reports.metrics.render(&reports.health);

    let mut text =
        "\n`kubeproxy_…` are kube-proxy's names for the same things; `lb_api_…`, `rest_client_…` and \
                    `lb_kubernetes_events_total` are there with an API server. A histogram's buckets double from 1 ms to 262 s.\n\n| metric | type | labels | |\n|---|---|---|---|\n"
            .to_owned();
    for block in rendered.split("# HELP ").skip(1) {
        let (head, rest) = block.split_once('\n').expect("lines");
        let (name, help) = head.split_once(' ').expect("a help text");
        let (kind, samples) = rest.split_once('\n').expect("a type");
        let kind = kind.rsplit(' ').next().expect("a type");
        let mut labels: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for sample in samples.lines() {
            let inside = sample.split_once('{').and_then(|(_, rest)| rest.split_once('}'));
            for label in inside.into_iter().flat_map(|(labels, _)| labels.split(',')) {
                let (label, value) = label.split_once('=').expect("a value");
                let values = labels.entry(label).or_default();
                // These depend on the server, and on how it went.
                if label != "le" && !name.starts_with("rest_client_") {
                    values.insert(value.trim_matches('"'));
                }
            }
        }
        labels.remove("le");
        let labels = labels.into_iter().map(|(label, values)| {
            let values: Vec<_> = values.into_iter().map(|value| format!("`{value}`")).collect();
            format!("{label}{} {}", if values.is_empty() { "" } else { ":" }, values.join(" "))
        });
        let labels: Vec<_> = labels.map(|label| label.trim_end().to_owned()).collect();
        let _ = writeln!(text, "| `{name}` | {kind} | {} | {} |", labels.join("; "), cell(help));
    }
    text
}

/// A cluster that has been listed.
fn watched() -> Cluster {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let api = Api::start().await;
        let cluster = Cluster::open(Access::Anonymous, Some(&api.url())).await.expect("a client");
        let (events, mut receiver) = tokio::sync::mpsc::channel(source::QUEUE);
        tokio::spawn(source::kube::run(cluster.clone(), "node", Scope::default(), events));
        while !matches!(receiver.recv().await.expect("events"), Event::Synced { .. }) {}
        cluster
    })
}

fn cell(text: &str) -> String {
    text.replace('\n', " ").replace('|', "\\|")
}
