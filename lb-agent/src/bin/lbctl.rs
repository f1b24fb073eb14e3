//! The inspector: shows what the kernel holds, whether the agent runs or not.

use anyhow::Result;
use clap::{Parser, Subcommand, ValueEnum};
use comfy_table::{Table, presets};
use lb_agent::inspect::{self, Flow, Frontend, Pod, Status};
use lb_agent::kernel::pins::DEFAULT_BPFFS;
use lb_attach::records::{DEFAULT_STATE_DIR, Records};
use serde::Serialize;
use std::io::{ErrorKind, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "lbctl", version, about = "Shows what lb-agent has put into the kernel of this node")]
struct Cli {
    /// The BPF file system that lb-agent was given
    #[arg(long, global = true, value_name = "DIR", env = "LB_BPFFS", default_value = DEFAULT_BPFFS)]
    bpffs: PathBuf,
    /// Where the CNI plugin writes pods down
    #[arg(long, global = true, value_name = "DIR", env = "LB_STATE_DIR", default_value = DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
    /// Form of the output
    #[arg(short, long, global = true, value_enum, default_value = "table")]
    output: Output,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    Table,
    /// For scripts
    Json,
}

#[derive(Subcommand)]
enum Command {
    /// Addresses that are served, and their endpoints (`*`: on this node)
    Services {
        /// Only Services whose `namespace/name` contains this
        filter: Option<String>,
    },
    /// Flows that are translated: as the client sent them, and as the backend sees them
    Flows {
        /// Only flows that have this in an address or in the Service's name
        filter: Option<String>,
    },
    /// Devices, sizes, and what was dropped and why
    Status,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(text) => match std::io::stdout().write_all(text.as_bytes()) {
            Err(e) if e.kind() != ErrorKind::BrokenPipe => ExitCode::FAILURE,
            _ => ExitCode::SUCCESS,
        },
        Err(error) => {
            eprintln!("lbctl: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<String> {
    let (pins, tables) = inspect::open(&cli.bpffs)?;
    match cli.command {
        Command::Services { filter } => {
            let mut all = inspect::services(&tables)?;
            if let Some(text) = filter {
                all.retain(|f| format!("{}/{}", f.namespace, f.name).contains(&text));
            }
            print(cli.output, &all, || services(&all))
        }
        Command::Flows { filter } => {
            let mut all = inspect::flows(&tables)?;
            if let Some(text) = filter {
                all.retain(|f| flow_text(f).iter().any(|field| field.contains(&text)));
            }
            print(cli.output, &all, || flows(&all))
        }
        Command::Status => {
            let status = inspect::status(&pins, &Records::at(&cli.state_dir), &tables)?;
            print(cli.output, &status, || show_status(&status))
        }
    }
}

fn print<T: Serialize>(output: Output, value: &T, table: impl FnOnce() -> String) -> Result<String> {
    Ok(match output {
        Output::Table => table() + "\n",
        Output::Json => serde_json::to_string_pretty(value)? + "\n",
    })
}

fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    table
}

fn services(all: &[Frontend]) -> String {
    let mut table = table(["SERVICE", "KIND", "ADDRESS", "PROTO", "FROM INSIDE", "FROM OUTSIDE"]);
    for f in all {
        let port = if f.port.is_empty() { String::new() } else { format!(":{}", f.port) };
        let outside = if f.external == f.internal { "same".into() } else { f.external.to_string() };
        table.add_row([
            format!("{}/{}{port}", f.namespace, f.name),
            f.kind.into(),
            f.address.clone(),
            f.protocol.clone(),
            f.internal.to_string(),
            outside,
        ]);
    }
    table.to_string()
}

fn flow_text(f: &Flow) -> [String; 6] {
    [
        f.protocol.clone(),
        format!("{} → {}", f.original.source, f.original.destination),
        format!("{} → {}", f.translated.source, f.translated.destination),
        f.service.clone().unwrap_or_else(|| "-".into()),
        f.state.into(),
        format!("{}s", f.idle),
    ]
}

fn flows(all: &[Flow]) -> String {
    let mut table = table(["PROTO", "ORIGINAL", "TRANSLATED", "SERVICE", "STATE", "IDLE"]);
    for f in all {
        table.add_row(flow_text(f));
    }
    table.to_string()
}

fn pod(pod: &Pod) -> String {
    let ips: Vec<String> = pod.ips.iter().map(ToString::to_string).collect();
    format!("{} ({})", pod.name, ips.join(", "))
}

fn show_status(s: &Status) -> String {
    let agent = if s.agent_running { "running" } else { "not running (packets are served all the same)" };
    let hooks = if s.socket_hooks.is_empty() { "none".into() } else { s.socket_hooks.join(", ") };
    let mut text = format!(
        "agent         {agent}\npins          {}\nsocket hooks  {hooks}\nfrontends     {}\nflows         {} ({} entries)\n\n",
        s.pins, s.frontends, s.flows, s.flow_entries
    );
    let mut devices = table(["DEVICE", "ROLE", "POD", "MASQUERADES PODS", "XDP", "TO"]);
    for d in &s.devices {
        devices.add_row([
            d.name.clone().unwrap_or_else(|| format!("#{} (in another namespace)", d.index)),
            d.role.into(),
            d.pod.as_ref().map_or_else(String::new, pod),
            if d.masquerade { "yes" } else { "no" }.into(),
            d.xdp.unwrap_or("off").into(),
            d.masquerade_to.join(" "),
        ]);
    }
    text += &devices.to_string();
    for (title, counters) in [("DROPPED OR REJECTED", &s.drops), ("EVENTS", &s.events)] {
        let mut counts = table([title, "PACKETS"]);
        for (name, count) in counters {
            counts.add_row([(*name).to_owned(), count.to_string()]);
        }
        if counters.is_empty() {
            counts.add_row(["nothing", ""]);
        }
        text += &format!("\n\n{counts}");
    }
    text
}
