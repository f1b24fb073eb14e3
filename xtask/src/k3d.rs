//! `cargo xtask k3d`: a cluster of containers without kube-proxy, our image and manifests in it, and the black-box suite
//! through `kubectl exec`.

mod kubectl;
mod suite;

use crate::image::{self, Engine};
use crate::system::{find_program, output, workspace};
use anyhow::{Context as _, Result, bail, ensure};
use clap::Subcommand;
use kubectl::Kubectl;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The names in `manifests/k3d.yaml` and `manifests/sample.yaml`.
const IMAGE: &str = image::AGENT;
const PROBE: &str = image::PROBE;
/// How long pods may take to be ready: the first ones wait for images from the internet.
const PATIENCE: &str = "--timeout=300s";

/// Options of `k3d`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the cluster
    #[arg(long, global = true, default_value = "lb")]
    name: String,
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Debug, Subcommand)]
enum Cmd {
    /// Make three nodes without kube-proxy, with the agent and the sample application
    Up(Up),
    /// Take the cluster down
    Down,
    /// Try every path in it
    Test(Test),
}

#[derive(Debug, clap::Args)]
struct Test {
    /// Any other cluster with the agent and the sample application, from a machine that is not one of its nodes but
    /// reaches them: nothing but kubectl is needed
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct Up {
    /// The nodes' image, like rancher/k3s:v1.33.5-k3s1 [default: k3d's]
    #[arg(long)]
    k3s: Option<String>,
    /// Take the images that docker has instead of building them
    #[arg(long)]
    no_build: bool,
}

/// Runs `k3d`.
///
/// # Errors
/// If something is missing here (the message says what, and where to get it), or fails.
pub fn run(args: Args) -> Result<()> {
    if let Cmd::Test(Test { kubeconfig: Some(file) }) = &args.command {
        check_programs(&[KUBECTL])?;
        return suite::run(&Kubectl::new(file));
    }
    check_programs(&PROGRAMS)?;
    // k3d works with docker alone, and with its daemon.
    image::find_engine(Some(Engine::Docker)).context("k3d makes nodes of docker's containers")?;
    match args.command {
        Cmd::Up(up) => self::up(&args.name, &up),
        Cmd::Down => k3d(&["cluster", "delete", &args.name]),
        Cmd::Test(_) => suite::run(&kubectl(&args.name)?),
    }
}

/// Programs, and where they come from.
const PROGRAMS: [(&str, &str); 3] =
    [("docker", "https://docs.docker.com/engine/install"), ("k3d", "https://k3d.io"), KUBECTL];
const KUBECTL: (&str, &str) = ("kubectl", "https://kubernetes.io/docs/tasks/tools");

fn check_programs(programs: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<_> = programs.iter().filter(|(name, _)| find_program(name).is_none()).collect();
    if !missing.is_empty() {
        let list: Vec<_> = missing.iter().map(|(name, from)| format!("{name} ({from})")).collect();
        bail!("missing on this machine: {}", list.join(", "));
    }
    Ok(())
}

fn up(name: &str, up: &Up) -> Result<()> {
    if !up.no_build {
        image::build(Engine::Docker, IMAGE)?;
        image::build_probe(Engine::Docker, PROBE)?;
    }
    let mut create: Vec<&str> = vec!["cluster", "create", name];
    create.extend(CLUSTER);
    if let Some(image) = &up.k3s {
        create.extend(["--image", image]);
    }
    k3d(&create)?;
    k3d(&["image", "import", IMAGE, PROBE, "--cluster", name])?;
    let kubectl = kubectl(name)?;
    for (file, wait) in [
        ("k3d.yaml", &[("kube-system", "daemonset/lb-agent"), ("kube-system", "deployment/coredns")][..]),
        ("sample.yaml", &suite::WORKLOADS[..]),
    ] {
        let path = workspace().join("manifests").join(file);
        println!("{}", kubectl.run(&["apply", "-f", &path.to_string_lossy()])?.trim_end());
        for (namespace, what) in wait {
            println!("{}", kubectl.run(&["-n", namespace, "rollout", "status", what, PATIENCE])?.trim_end());
        }
    }
    println!("\ncargo xtask k3d test\nexport KUBECONFIG={}", kubectl.config().display());
    Ok(())
}

/// Three nodes. Without kube-proxy, and without those that would take ports for ingresses and load balancers; flannel and
/// the network policies stay. People's own kubeconfig stays as it is.
const CLUSTER: [&str; 12] = [
    "--servers=1",
    "--agents=2",
    "--k3s-arg=--disable-kube-proxy@server:*",
    "--k3s-arg=--disable=traefik@server:*",
    "--k3s-arg=--disable=servicelb@server:*",
    "--k3s-arg=--disable=metrics-server@server:*",
    "--no-lb",
    "--kubeconfig-update-default=false",
    "--kubeconfig-switch-context=false",
    "--wait",
    "--timeout",
    "300s",
];

fn k3d(args: &[&str]) -> Result<()> {
    println!("k3d {}", args.join(" "));
    let status = Command::new("k3d").args(args).status().context("start k3d")?;
    ensure!(status.success(), "k3d {}: {status}", args.join(" "));
    Ok(())
}

/// kubectl, for this cluster and no other.
fn kubectl(name: &str) -> Result<Kubectl> {
    let path = output(Command::new("k3d").args(["kubeconfig", "write", name]))
        .with_context(|| format!("there is no cluster {name}: cargo xtask k3d up"))?;
    Ok(Kubectl::new(Path::new(path.trim())))
}
