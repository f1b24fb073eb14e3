//! `cargo xtask lab`.

use std::os::unix::process::CommandExt;

use anyhow::{Context, Result, bail};
use clap::Subcommand;

use super::{Host, Lab, owner};

/// Options of `lab`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a lab
    Up {
        /// Its name
        #[arg(default_value = "lab")]
        name: String,
        /// Pods on each node
        #[arg(long, default_value_t = 3)]
        pods: usize,
        /// Keep it only while this command runs; otherwise it stays until it is taken down
        #[arg(long)]
        hold: bool,
    },
    /// Take a lab down, with all processes that run in it
    Down {
        /// Its name
        #[arg(default_value = "lab")]
        name: String,
        /// All labs, those of running tests too
        #[arg(long, conflicts_with = "name")]
        all: bool,
    },
    /// Run a command on a host of a lab
    Exec {
        /// The lab
        name: String,
        /// The host: n1, n1p1, client, inet, …
        host: String,
        /// The command
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Show what labs there are
    List,
    /// Wait for the end of standard input, then take the lab down
    #[command(hide = true)]
    Reap {
        /// The lab
        name: String,
        /// Its owner; a later lab of the same name is left alone
        owner: String,
    },
}

/// Runs `lab`.
pub fn run(args: Args) -> Result<()> {
    match args.command {
        Command::Up { name, pods, hold } => {
            let lab = Lab::named(&name).pods(pods).build()?;
            let hosts = lab.hosts();
            print_hosts(&hosts);
            println!("\ncargo xtask lab exec {name} n1p1 -- ping -c1 {}", hosts[0].v4);
            println!("ip netns exec {name}-n1 ip route        # or any other tool");
            if hold {
                // Ends by a signal; the reaper sees to the rest.
                loop {
                    std::thread::park();
                }
            }
            println!("cargo xtask lab down {name}");
            lab.keep()
        }
        Command::Down { all: true, .. } => owner::labs().iter().try_for_each(|lab| owner::teardown(lab)),
        Command::Down { name, .. } => {
            hosts(&name)?;
            owner::teardown(&name)
        }
        Command::Exec { name, host, command } => {
            let hosts = hosts(&name)?;
            let Some(host) = hosts.iter().find(|h| h.name == host) else {
                let names: Vec<_> = hosts.iter().map(|h| h.name.as_str()).collect();
                bail!("lab {name} has no host {host}, only {}", names.join(", "));
            };
            Err(host.command(&command[0]).args(&command[1..]).exec())
                .with_context(|| format!("running {} on {}", command[0], host.name))
        }
        Command::List => {
            for lab in owner::labs() {
                let hosts = hosts(&lab).map(|h| h.len().to_string()).unwrap_or_else(|_| "?".into());
                println!("{lab}\t{hosts} hosts\t{}", owner::describe(&lab));
            }
            Ok(())
        }
        Command::Reap { name, owner } => owner::reap(&name, &owner),
    }
}

/// The hosts of a lab that is up.
fn hosts(lab: &str) -> Result<Vec<Host>> {
    let path = owner::lab_dir(lab).join("lab.json");
    let Ok(text) = std::fs::read(&path) else {
        bail!("no lab {lab} is up; there is: {}", owner::labs().join(", "));
    };
    serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))
}

fn print_hosts(hosts: &[Host]) {
    println!("{:<8} {:<15} {:<22} {:<18} CGROUP", "HOST", "IPV4", "IPV6", "NETNS");
    for h in hosts {
        let (v4, v6) = (h.v4.to_string(), h.v6.to_string());
        println!("{:<8} {v4:<15} {v6:<22} {:<18} {}", h.name, h.netns_name(), h.cgroup.display());
    }
    for h in hosts.iter().filter(|h| h.role == super::Role::Node) {
        println!("bpffs of {}: {}", h.name, h.bpffs_dir().display());
    }
}
