//! Broken and contradictory manifests: the agent says what is wrong, and serves the rest.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xtask::probe::{Ask, Failure};

use super::support::{SOON, Traffic, answered, cluster, eventually, logged, service, store, web};

#[test]
fn what_cannot_be_read_is_named_and_the_rest_is_served() -> Result<()> {
    let cluster = cluster("broken")?;
    let lab = cluster.lab();
    let (pod, node) = (lab.pod(0, 2), lab.node(0));
    let mut traffic = Traffic::default();
    traffic.connections(&pod, web()[0]);
    traffic.connections(lab.client(), node.at(30081)[1]);

    // Line 8 has a tab, which YAML does not know; the Service behind it is fine.
    let good = service("good", "10.96.1.1", &[lab.pod(0, 0).at(8080)[0]]);
    let bad = "apiVersion: v1\nkind: Service\nmetadata:\n  name: bad\n  namespace: shop\nspec:\n  ports:\n\t- port: 80\n";
    cluster.write("mixed.yaml", &format!("{bad}---\n{good}"))?;
    logged(node, &["mixed.yaml:8", "Service", "bad"])?;
    eventually(SOON, || answered(&pod, &Ask::tcp("10.96.1.1:80".parse()?)).map(drop))?;

    // A wrong type deep inside.
    let wrong = "apiVersion: v1\nkind: Service\nmetadata: { name: wrong, namespace: shop }\nspec:\n  ports:\n    - port: eighty\n";
    cluster.write("wrong.yaml", wrong)?;
    logged(node, &["wrong.yaml:6", "Service shop/wrong"])?;
    logged(lab.node(1), &["wrong.yaml:6", "Service shop/wrong"])?;

    // What was served stays while its file is broken.
    let text = std::fs::read_to_string(cluster.manifests().join("web.yaml"))?;
    cluster.write("web.yaml", &text.replace("port: 80,", "port: \"eighty,"))?;
    logged(node, &["web.yaml:21", "Service web"])?;
    answered(&pod, &Ask::tcp(web()[1]).count(10))?;
    cluster.write("web.yaml", "{")?;
    cluster.write("store.yaml", "\u{0}\u{1}\u{2}")?;
    logged(node, &["store.yaml"])?;
    std::thread::sleep(Duration::from_millis(300));
    answered(&pod, &Ask::tcp(web()[1]).count(10))?;
    answered(&pod, &Ask::tcp(store()[0]).count(3))?;

    // Mended, it counts again.
    cluster.without("store.yaml", &[])?;
    cluster.web_without(&[lab.pod(0, 0), lab.pod(0, 1)])?;
    eventually(SOON, || {
        let names = answered(&pod, &Ask::tcp(web()[0]).count(20))?;
        ensure!(names.iter().all(|name| name == "web-3"), "{names:?}");
        Ok(())
    })?;
    traffic.finish(Instant::now() - Duration::from_millis(200))?;
    Ok(())
}

#[test]
fn an_agent_that_starts_with_broken_manifests_keeps_what_they_served() -> Result<()> {
    let mut cluster = cluster("brokst")?;
    let pod = cluster.lab().pod(0, 2);
    cluster.kill_agent(0);
    cluster.write("web.yaml", "kind: [")?;
    cluster.start_agent(0, &[])?;
    logged(cluster.lab().node(0), &["web.yaml:1"])?;
    for family in [0, 1] {
        answered(&pod, &Ask::tcp(web()[family]).count(10))?;
        answered(&pod, &Ask::tcp(store()[family]))?;
    }
    Ok(())
}

#[test]
fn contradictions_are_settled_and_told() -> Result<()> {
    let cluster = cluster("contra")?;
    let lab = cluster.lab();
    let (pod, node) = (lab.pod(0, 2), lab.node(0));
    let at = |pod: &xtask::lab::Host| pod.at(8080)[0];
    let age = |yaml: String, year: u32| {
        yaml.replacen(
            "namespace: default }",
            &format!("namespace: default, creationTimestamp: \"{year}-01-01T00:00:00Z\" }}"),
            1,
        )
    };
    // Two claim one address: the older has it, whichever comes first.
    cluster.write("a-young.yaml", &age(service("young", "10.96.2.1", &[at(&lab.pod(0, 0))]), 2025))?;
    let shared: std::net::SocketAddr = "10.96.2.1:80".parse()?;
    eventually(SOON, || {
        let names = answered(&pod, &Ask::tcp(shared))?;
        ensure!(names == ["web-1"], "{names:?}");
        Ok(())
    })?;
    cluster.write("b-old.yaml", &age(service("old", "10.96.2.1", &[at(&lab.pod(1, 0))]), 2020))?;
    logged(node, &["Service default/young", "10.96.2.1", "default/old"])?;
    eventually(SOON, || {
        let names = answered(&pod, &Ask::tcp(shared).count(5))?;
        ensure!(names.iter().all(|name| name == "web-3"), "{names:?}");
        Ok(())
    })?;
    std::fs::remove_file(cluster.manifests().join("b-old.yaml"))?;
    eventually(SOON, || {
        let names = answered(&pod, &Ask::tcp(shared).count(5))?;
        ensure!(names.iter().all(|name| name == "web-1"), "{names:?}");
        Ok(())
    })?;

    // What cannot be served at all, or in part.
    let sctp =
        service("sctp", "10.96.2.2", &[at(&lab.pod(0, 0))]).replacen("protocol: TCP", "protocol: SCTP", 1);
    cluster.write("sctp.yaml", &sctp)?;
    logged(node, &["Service default/sctp", "SCTP"])?;
    let nowhere = service("nowhere", "", &[at(&lab.pod(0, 0))]).replacen("  clusterIP: \"\"\n", "", 1);
    cluster.write("nowhere.yaml", &nowhere)?;
    logged(node, &["Service default/nowhere", "clusterIP"])?;
    cluster.write("odd.yaml", &service("odd", "10.96.2.300", &[at(&lab.pod(0, 0))]))?;
    logged(node, &["Service default/odd", "10.96.2.300"])?;

    // Endpoints of a Service that is none, then is one.
    cluster.write("late-1.yaml", &super::support::slice("late", "late-x", &[at(&lab.pod(0, 1))]))?;
    let late = service("late", "10.96.2.3", &[]);
    let (late, _) = late.split_once("---").context("two documents")?;
    cluster.write("late-2.yaml", late)?;
    eventually(SOON, || {
        let names = answered(&pod, &Ask::tcp("10.96.2.3:80".parse()?))?;
        ensure!(names == ["web-2"], "{names:?}");
        Ok(())
    })?;
    std::fs::remove_file(cluster.manifests().join("late-1.yaml"))?;
    eventually(SOON, || {
        let asked = pod.ask(&Ask::tcp("10.96.2.3:80".parse()?))?;
        ensure!(asked[0].failure() == Some(&Failure::Refused), "{asked:?}");
        Ok(())
    })
}
