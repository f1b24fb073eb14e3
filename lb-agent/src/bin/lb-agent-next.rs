//! The node agent of the next version, as tests of upgrades have it: see lb-common's `layout-next`.

#[path = "lb-agent.rs"]
mod agent;

fn main() -> std::process::ExitCode {
    agent::main()
}
