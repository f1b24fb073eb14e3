//! `cargo xtask`: build, lab, demo, tests, benchmark, kernel matrix.

use std::process::ExitCode;

use clap::Parser;

/// The project's own tool.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Cmd {
    /// Build the kernel programs and the agent, installing the eBPF toolchain if there is none
    Build(xtask::build::Args),
    /// See the whole thing work: a two-node lab, real requests through every path
    Demo(xtask::demo::Args),
    /// Run every test
    Test(xtask::test::Args),
    /// Start, enter and stop a two-node lab by hand
    Lab(xtask::lab::Args),
    /// Boot other kernels in QEMU and test on them
    VmTest(xtask::vm::Args),
    /// Build the container image, with docker, podman or buildah
    Image(xtask::image::Args),
    /// A cluster of containers with the agent in it, and every path tried through kubectl
    K3d(xtask::k3d::Args),
    /// What runs inside the guests of vm-test
    #[command(hide = true)]
    VmGuest(xtask::vm::guest::Args),
    /// Measure against kube-proxy's iptables rules
    Bench(xtask::bench::Args),
    /// The client and server used in the lab
    #[command(hide = true)]
    Probe(xtask::probe::Args),
}

fn main() -> ExitCode {
    let result = match Cmd::parse() {
        Cmd::Build(a) => xtask::build::run(a),
        Cmd::Demo(a) => xtask::demo::run(a),
        Cmd::Test(a) => xtask::test::run(a),
        Cmd::Lab(a) => xtask::lab::run(a),
        Cmd::VmTest(a) => xtask::vm::run(a),
        Cmd::VmGuest(a) => xtask::vm::guest::run(a),
        Cmd::Image(a) => xtask::image::run(a),
        Cmd::K3d(a) => xtask::k3d::run(a),
        Cmd::Bench(a) => xtask::bench::run(a),
        Cmd::Probe(a) => xtask::probe::run(a),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}
