//! `cargo xtask k3d` and `image` with stand-ins for docker, k3d and kubectl that write down what they are asked for.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use anyhow::{Result, ensure};

/// A directory of programs that are all there is.
struct Programs {
    dir: tempfile::TempDir,
}

impl Programs {
    fn new(programs: &[(&str, &str)]) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let this = Self { dir };
        for (name, script) in programs {
            let path = this.dir.path().join(name);
            // The interpreter has a path of its own: there is no other PATH.
            fs::write(
                &path,
                format!("#!/bin/sh\necho \"{name} $*\" >> {}\n{script}\n", this.log().display()),
            )?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        Ok(this)
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    fn asked(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
    }

    fn xtask(&self, args: &[&str]) -> Result<Output> {
        Ok(Command::new(env!("CARGO_BIN_EXE_xtask")).args(args).env("PATH", self.dir.path()).output()?)
    }

    fn refused(&self, args: &[&str], words: &[&str]) -> Result<()> {
        let out = self.xtask(args)?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(!out.status.success(), "{args:?} succeeded");
        for word in words {
            ensure!(said.contains(word), "{word:?} is not in: {said}");
        }
        Ok(())
    }
}

const NO_DAEMON: &str = "echo 'Cannot connect to the Docker daemon' >&2; exit 1";

#[test]
fn what_is_missing_is_named() -> Result<()> {
    let none = Programs::new(&[])?;
    none.refused(&["k3d", "up"], &["docker (https://", "k3d (https://k3d.io)", "kubectl (https://"])?;
    none.refused(
        &["image"],
        &["docker: not installed; podman: not installed; buildah: not", "apt-get install"],
    )?;
    let no_daemon = Programs::new(&[("docker", NO_DAEMON), ("k3d", ""), ("kubectl", "")])?;
    for args in [["k3d", "up"], ["k3d", "down"], ["k3d", "test"]] {
        no_daemon
            .refused(&args, &["k3d makes nodes of docker's containers", "Cannot connect to the Docker"])?;
    }
    ensure!(!no_daemon.asked().contains("k3d cluster"), "{}", no_daemon.asked());
    no_daemon.refused(&["image", "--engine=podman"], &["podman: not installed"])
}

#[test]
fn a_cluster_is_made_in_this_order() -> Result<()> {
    let k3d = "case $1 in kubeconfig) echo /tmp/kubeconfig-$3;; esac";
    let programs = Programs::new(&[("docker", ""), ("k3d", k3d), ("kubectl", "echo said")])?;
    let out = programs.xtask(&["k3d", "--name=try", "up", "--no-build", "--k3s=rancher/k3s:v1"])?;
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let asked = programs.asked();
    let mut lines = asked.lines();
    for (start, words) in [
        ("docker version", &[][..]),
        (
            "k3d cluster create try --servers=1 --agents=2 ",
            &[
                "--k3s-arg=--disable-kube-proxy@server:*",
                "--image rancher/k3s:v1",
                "--kubeconfig-update-default=false",
                "--kubeconfig-switch-context=false",
            ],
        ),
        ("k3d image import lb-agent:dev lb-probe:dev --cluster try", &[]),
        ("k3d kubeconfig write try", &[]),
        ("kubectl --kubeconfig /tmp/kubeconfig-try apply -f", &["manifests/k3d.yaml"]),
        ("kubectl --kubeconfig /tmp/kubeconfig-try -n kube-system rollout status daemonset/lb-agent", &[]),
        ("kubectl --kubeconfig /tmp/kubeconfig-try -n kube-system rollout status deployment/coredns", &[]),
        ("kubectl --kubeconfig /tmp/kubeconfig-try apply -f", &["manifests/sample.yaml"]),
        ("kubectl --kubeconfig /tmp/kubeconfig-try -n default rollout status deployment/web", &[]),
        ("kubectl --kubeconfig /tmp/kubeconfig-try -n default rollout status daemonset/client", &[]),
        ("kubectl --kubeconfig /tmp/kubeconfig-try -n default rollout status daemonset/host", &[]),
    ] {
        let line = lines.next().unwrap_or_default();
        ensure!(line.starts_with(start), "{start} was not asked, but {line}\n{asked}");
        for word in words {
            ensure!(line.contains(word), "{word} is not in {line}");
        }
    }
    ensure!(lines.next().is_none(), "{asked}");
    let down = programs.xtask(&["k3d", "down", "--name=try"])?;
    ensure!(down.status.success() && programs.asked().contains("k3d cluster delete try"));
    Ok(())
}

#[test]
fn the_suite_tells_what_failed() -> Result<()> {
    let pods = |name: &str, ip: &str| {
        format!(
            r#"echo '{{"items":[{{"metadata":{{"name":"{name}-1"}},"spec":{{"nodeName":"n1"}},"status":{{"podIP":"{ip}"}}}},{{"metadata":{{"name":"{name}-2"}},"spec":{{"nodeName":"n1"}},"status":{{"podIP":"{ip}"}}}}]}}'"#
        )
    };
    // Everything answers as `web-1` and `web-2`, from the client's address, but the Service without endpoints.
    let answer = |name: &str| {
        format!(
            r#"echo '{{"ok":true,"name":"{name}","peer":"10.42.0.9:1","from":"10.43.0.9:80","own":"10.42.0.9:1","us":9}}'"#
        )
    };
    let (web1, web2) = (answer("web-1"), answer("web-2"));
    let kubectl = format!(
        "case \"$*\" in\n*app=web*) {};;\n*app=client*) {};;\n*app=host*) {};;\n\
         *service\\ empty*) echo '{{\"spec\":{{\"clusterIP\":\"10.43.0.7\"}}}}';;\n\
         *service\\ sticky*) echo '{{\"spec\":{{\"clusterIP\":\"10.43.0.8\"}}}}';;\n\
         *service*) echo '{{\"spec\":{{\"clusterIP\":\"10.43.0.9\"}}}}';;\n\
         *exec*10.43.0.7*) echo '{{\"ok\":false,\"error\":\"refused\"}}';;\n\
         *exec*10.43.0.8*) {web1};;\n*exec*) {web1}; {web2};;\nesac",
        pods("web", "10.42.0.8"),
        pods("client", "10.42.0.9"),
        pods("host", "127.0.0.9"),
    );
    let programs = Programs::new(&[("docker", ""), ("k3d", "echo /tmp/none"), ("kubectl", &kubectl)])?;
    let out = programs.xtask(&["k3d", "test"])?;
    let said = String::from_utf8_lossy(&out.stdout);
    // Nobody listens on the node ports of this machine.
    for failed in ["the outside reaches NodePorts", "externalTrafficPolicy: Local"] {
        ensure!(said.contains(&format!("FAILED  {failed}")), "{failed}: {said}");
    }
    ensure!(said.lines().filter(|line| line.starts_with("ok ")).count() == 7, "{said}");
    let error = String::from_utf8_lossy(&out.stderr);
    ensure!(!out.status.success() && error.contains("2 of 9 failed"), "{error}");

    // Any other cluster takes kubectl alone.
    let programs = Programs::new(&[("kubectl", &kubectl)])?;
    programs.refused(&["k3d", "test", "--kubeconfig=/tmp/other"], &["2 of 9 failed"])?;
    let asked = programs.asked();
    let other = |line: &str| line.starts_with("kubectl --kubeconfig /tmp/other ");
    ensure!(!asked.is_empty() && asked.lines().all(other), "{asked}");
    Programs::new(&[])?
        .refused(&["k3d", "test", "--kubeconfig=/tmp/other"], &["missing on this machine: kubectl (https://"])
}
