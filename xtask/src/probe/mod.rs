//! The client and server that lab, tests, demo and benchmark send traffic with: a hidden subcommand that prints one
//! JSON line for each thing it saw, and, for Rust, methods of [`Host`](crate::lab::Host) with typed results.

mod ask;
mod bulk;
mod churn;
mod client;
mod flood;
mod pieces;
mod ping;
mod serve;
mod survey;
mod trace;
mod wire;

use anyhow::Result;
use clap::Subcommand;
use serde::Serialize;

pub use ask::{Ask, Transport};
pub use bulk::{Bulk, BulkReport, Direction};
pub use churn::{Churn, ChurnReport};
pub use client::{Lines, Server, failures, names, spread};
pub use flood::{Flood, FloodReport};
pub use pieces::Order;
pub use ping::Ping;
pub use serve::Serve;
pub use survey::{Question, Survey, Tally};
pub use trace::{Hop, IcmpError, Trace};
pub use wire::{Answer, Failure, Greeting, Reply};

/// Options of `probe`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answer requests, saying who asked
    Serve(Serve),
    /// Send requests and say who answered
    Ask(Ask),
    /// Move many bytes over one TCP connection and check each of them
    Bulk(Bulk),
    /// Open and close many TCP connections
    Churn(Churn),
    /// Send datagrams from many ports, and wait for no answers
    Flood(Flood),
    /// Send ICMP echo requests
    Ping(Ping),
    /// Send packets with growing hop limits and say which ICMP errors come back
    Trace(Trace),
    /// Ask many, at the same time
    Survey(Survey),
}

/// Runs `probe`.
pub fn run(args: Args) -> Result<()> {
    match args.command {
        Command::Serve(serve) => serve.run(),
        Command::Ask(ask) => ask.run(print_line),
        Command::Bulk(bulk) => print_line(&bulk.run()),
        Command::Churn(churn) => print_line(&churn.run()),
        Command::Flood(flood) => print_line(&flood.run()),
        Command::Ping(ping) => ping.run(print_line),
        Command::Trace(trace) => trace.run(print_line),
        Command::Survey(survey) => print_line(&survey.run()?),
    }
}

/// Prints one line of JSON, at once: the reader may be waiting for it.
fn print_line(value: &impl Serialize) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(value)?)?;
    Ok(out.flush()?)
}
