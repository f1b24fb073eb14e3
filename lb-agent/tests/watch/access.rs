//! How the agent is let in, and that it follows what lets it in.

use crate::faults::{NODE, pods, prepared};
use crate::log::Log;
use crate::view::View;
use lb_agent::source::kube::{Access, Cluster};
use lb_stand_in::Api;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A kubeconfig file with files that it names.
struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn write(&self, name: &str, text: &str) {
        // As Kubernetes does it: never half a file.
        let new = self.dir.path().join("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, self.dir.path().join(name)).unwrap();
    }

    fn kubeconfig(&self, cluster: Value, user: Value) -> PathBuf {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": user}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        });
        self.write("kubeconfig", &config.to_string());
        self.dir.path().join("kubeconfig")
    }
}

async fn open(file: &Path) -> Cluster {
    Cluster::open(Access::Kubeconfig(file.into()), None).await.unwrap()
}

/// The lines until one has the words: how soon something is tried again is a matter of chance.
async fn said(view: &mut View, log: &Log, words: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for _ in 0..80 {
        view.settle(Duration::from_millis(250)).await;
        lines.extend(log.take());
        if lines.iter().any(|line| line.contains(words)) {
            return lines;
        }
    }
    panic!("nobody said {words}: {lines:#?}")
}

async fn allow(api: &Api, token: &str) {
    api.behave(|behaviour| behaviour.token = Some(token.into()));
}

#[tokio::test]
async fn addresses_and_files_that_do_not_work_are_explained() {
    let error = Cluster::open(Access::Anonymous, Some("10.0.0.1:6443")).await.unwrap_err();
    assert!(error.to_string().contains("--master \"10.0.0.1:6443\" is not a URL"), "{error}");
    let error = Cluster::open(Access::Kubeconfig("/nonexistent".into()), None).await.unwrap_err();
    assert!(error.to_string().starts_with("kubeconfig /nonexistent: "), "{error}");
    let files = Files::new();
    let cluster = json!({"server": "https://192.0.2.1:6443", "proxy-url": "http://proxy:3128"});
    let file = files.kubeconfig(cluster, json!({"token": "secret"}));
    let error = Cluster::open(Access::Kubeconfig(file), None).await.unwrap_err();
    assert!(error.to_string().contains("proxy-url is not supported"), "{error}");
}

#[tokio::test]
async fn kubeconfig_files_are_understood() {
    let files = Files::new();
    let write = |server: &str| {
        files.kubeconfig(
            json!({"server": server, "insecure-skip-tls-verify": true}),
            json!({"token": "secret"}),
        )
    };
    let api = prepared().await;
    let mut view = View::new(open(&write(&api.url())).await, NODE, None);
    view.until("the lists", |view| view.synced).await;
    // The address can be given apart: the kubeconfig may name a Service that only we can make work.
    let elsewhere = Access::Kubeconfig(write("https://192.0.2.1:443"));
    let cluster = Cluster::open(elsewhere, Some(&api.url())).await.unwrap();
    let mut view = View::new(cluster, NODE, None);
    view.until("the lists", |view| view.synced).await;
    // A server that does not speak TLS is an error to try again, not the end.
    let mut view = View::new(open(&write(&api.url().replace("http:", "https:"))).await, NODE, None);
    view.settle(Duration::from_millis(500)).await;
    assert!(!view.synced);
}

/// They are for the way to the internet, and of the environment there is one for all tests of a process.
#[test]
fn proxies_of_the_environment_are_ignored() {
    let mut test = std::process::Command::new(std::env::current_exe().unwrap());
    test.args(["--exact", "access::kubeconfig_files_are_understood"]);
    for variable in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"] {
        test.env(variable, "http://127.0.0.1:1");
    }
    let out = test.output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && text.contains("1 passed"), "{text}");
}

#[tokio::test]
async fn a_token_is_read_again_when_its_file_changes() {
    let (api, files) = (prepared().await, Files::new());
    allow(&api, "first").await;
    files.write("token", "first");
    let file = files.kubeconfig(json!({"server": api.url()}), json!({"tokenFile": "token"}));
    let cluster = open(&file).await;
    let mut view = View::new(cluster, NODE, None);
    view.until("the lists", |view| view.synced).await;

    // The old one expires before there is a new one.
    let log = Log::start();
    allow(&api, "second").await;
    api.disconnect();
    let mut lines = said(&mut view, &log, "does not accept our credentials").await;
    view.settle(Duration::from_millis(1500)).await;
    lines.extend(log.take());
    assert_eq!(
        lines.iter().filter(|line| line.contains("does not accept our credentials")).count(),
        1,
        "{lines:#?}"
    );
    assert_eq!(view.names(), ["old", "web", "slice"]);
    files.write("token", "second");
    api.apply(pods(&["10.0.4.1"]));
    view.until("a change", |view| view.addresses("slice") == ["10.0.4.1"]).await;
    let lines = log.take();
    let news = "INFO the credentials for the API server have changed: using the new ones".to_owned();
    assert_eq!(lines.iter().filter(|line| **line == news).count(), 1, "{lines:#?}");
}

#[tokio::test]
async fn certificates_are_read_again_when_their_files_change() {
    let (api, files) = (prepared().await, Files::new());
    files.write("ca.crt", &api.renew_certificate());
    let cluster = json!({"server": api.url(), "certificate-authority": "ca.crt"});
    let file = files.kubeconfig(cluster, json!({"token": "secret"}));
    let cluster = open(&file).await;
    let mut view = View::new(cluster, NODE, None);
    view.until("the lists", |view| view.synced).await;

    let log = Log::start();
    let new = api.renew_certificate();
    api.disconnect();
    said(&mut view, &log, "cannot be reached (invalid peer certificate").await;
    // What cannot be read is as if it had not changed.
    files.write("ca.crt", "-----BEGIN CERTIFICATE-----\nrubbish");
    let mut lines = said(&mut view, &log, "cannot be used").await;
    view.settle(Duration::from_millis(2500)).await;
    lines.extend(log.take());
    assert_eq!(lines.iter().filter(|line| line.contains("cannot be used")).count(), 1, "{lines:#?}");
    files.write("ca.crt", &new);
    api.apply(pods(&["10.0.4.2"]));
    view.until("a change", |view| view.addresses("slice") == ["10.0.4.2"]).await;
    assert_eq!(view.deleted, [""; 0]);
}

#[tokio::test]
async fn a_kubeconfig_is_read_again_when_it_changes() {
    let (api, files) = (prepared().await, Files::new());
    allow(&api, "first").await;
    let write = |token: &str| files.kubeconfig(json!({"server": api.url()}), json!({"token": token}));
    let mut view = View::new(open(&write("first")).await, NODE, None);
    view.until("the lists", |view| view.synced).await;
    allow(&api, "second").await;
    write("second");
    api.disconnect();
    api.apply(pods(&["10.0.4.3"]));
    view.until("a change", |view| view.addresses("slice") == ["10.0.4.3"]).await;
}
