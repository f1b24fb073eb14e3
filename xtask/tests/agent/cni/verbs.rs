//! Every command by hand, with good input and with bad.

use std::fs;
use std::os::fd::AsFd as _;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lb_attach::syscall;
use lb_common::maps::Device;
use serde_json::{Value, json};
use xtask::cni::{Answer, call};
use xtask::demo::Cluster;
use xtask::lab::{Host, Lab};
use xtask::probe::Ask;
use xtask::system::{ensure_debian_packages, output};

use super::super::support::{SOON, agent_exe, answered, eventually, web};
use super::repair::index;
use super::{all_served, device_table, ours, pins, plugin_exe, served, state_dir};

const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// The plugin on a node, for a pod.
struct By<'a> {
    node: &'a Host,
    pod: Host,
    config: Value,
}

impl<'a> By<'a> {
    fn hand(node: &'a Host, pod: Host, version: &str) -> Self {
        let mut config = ours(node);
        config["cniVersion"] = version.into();
        config["name"] = "cbr0".into();
        config["prevResult"] = result(&pod, version);
        Self { node, pod, config }
    }

    fn with(&self, key: &str, value: Value) -> Self {
        let mut config = self.config.clone();
        config[key] = value;
        Self { node: self.node, pod: self.pod.clone(), config }
    }

    fn without(&self, key: &str) -> Self {
        let mut config = self.config.clone();
        config.as_object_mut().map(|config| config.remove(key));
        Self { node: self.node, pod: self.pod.clone(), config }
    }

    /// Runs a command, with these variables instead of the usual ones; empty ones are left out.
    fn run(&self, command: &str, vars: &[(&str, &str)]) -> Result<Answer> {
        self.feed(command, vars, &self.config.to_string())
    }

    fn feed(&self, command: &str, vars: &[(&str, &str)], input: &str) -> Result<Answer> {
        let netns = self.pod.netns_path().display().to_string();
        let args = format!("K8S_POD_NAMESPACE=lab;K8S_POD_NAME={}", self.pod.name());
        let usual = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", self.pod.name()),
            ("CNI_NETNS", &netns),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", &args),
        ];
        let kept = usual.iter().filter(|(name, _)| !vars.iter().any(|(other, _)| other == name));
        let all: Vec<_> = kept.chain(vars).copied().filter(|(_, value)| !value.is_empty()).collect();
        call(self.node, &plugin_exe()?, &all, input)
    }

    /// It succeeds.
    fn good(&self, command: &str) -> Result<Option<Value>> {
        let answer = self.run(command, &[])?;
        ensure!(answer.ok, "{command}: {answer:?}");
        Ok(answer.json)
    }

    /// It fails with this code, and says this.
    fn bad(&self, command: &str, code: u32, words: &str) -> Result<()> {
        refused(&self.run(command, &[])?, code, words).with_context(|| command.to_owned())
    }

    fn record(&self) -> Result<Value> {
        let path = state_dir(self.node).join(format!("pods/{}:eth0.json", self.pod.name()));
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(serde_json::from_str(&text)?)
    }
}

/// An error as the specification wants it, and nothing else.
fn refused(answer: &Answer, code: u32, words: &str) -> Result<()> {
    let json = answer.json.as_ref().and_then(Value::as_object).with_context(|| format!("{answer:?}"))?;
    let known = ["cniVersion", "code", "msg", "details"];
    ensure!(!answer.ok && json.keys().all(|key| known.contains(&key.as_str())), "{answer:?}");
    ensure!(json["code"] == code && json["cniVersion"].is_string(), "not {code}: {answer:?}");
    let said = format!("{} {}", json["msg"], json.get("details").unwrap_or(&Value::Null));
    ensure!(said.contains(words), "{words:?} is not in {said}");
    Ok(())
}

/// As the bridge plugin would have it, with something of the runtime's own.
fn result(pod: &Host, version: &str) -> Value {
    let ip = |address: String, family: &str| match version {
        "0.3.1" | "0.4.0" => json!({ "version": family, "address": address, "interface": 2 }),
        _ => json!({ "address": address, "interface": 2 }),
    };
    json!({
        "cniVersion": version,
        "interfaces": [{ "name": "cni0" }, { "name": "veth" }, { "name": "eth0", "sandbox": pod.netns_path() }],
        "ips": [ip(format!("{}/24", pod.v4()), "4"), ip(format!("{}/64", pod.v6()), "6")],
        "dns": { "nameservers": ["10.96.0.53"] }, "x-runtime": { "keep": [true, null, 1.5] },
    })
}

#[test]
fn before_any_agent_ran_and_after() -> Result<()> {
    let lab = Lab::builder("verbs").pods(3).build()?;
    let mut cluster = Cluster::without_agents(lab, agent_exe()?)?;
    let node = cluster.lab().node(0).clone();
    let pod = By::hand(&node, cluster.lab().pod(0, 0), "1.1.0");

    // A cluster has to be able to start, so pods are let through, unless the list says otherwise.
    pod.bad("STATUS", 50, "no programs are pinned")?;
    ensure!(pod.good("ADD")?.as_ref() == Some(&pod.config["prevResult"]), "the result is passed on");
    ensure!(pod.record()?["note"].as_str().is_some_and(|n| n.contains("attaches it when it comes")));
    pod.bad("CHECK", 103, "no programs are pinned")?;
    pod.good("DEL")?;
    pod.with("required", true.into()).bad("ADD", 11, "no programs are pinned")?;
    ensure!(pod.record().is_err(), "nothing is written of a pod that was refused");
    pod.good("ADD")?;
    cluster.start_agent(0, &[])?;
    pod.good("CHECK")?;
    ensure!(pod.good("STATUS")?.is_none(), "STATUS says nothing");
    after_the_agent(&cluster, &pod)?;
    cluster.kill_agent(0);
    pod.good("STATUS")?;

    versions(&cluster)?;
    bad_input(&cluster)?;
    what_check_finds(&cluster)?;
    del_of_what_is_gone(&cluster)?;
    no_veth(&cluster)?;
    garbage(&cluster)?;
    let log = fs::read_to_string(state_dir(&node).join("cni.log"))?;
    let line = format!("ADD lab/{} eth0 in cbr0 ({}, {}) on", pod.pod.name(), pod.pod.v4(), pod.pod.v6());
    ensure!(log.contains(&line), "{line} is not in the log:\n{log}");
    Ok(())
}

/// The agent sees a device before the chain comes to us, and knows more of it.
fn after_the_agent(cluster: &Cluster, pod: &By) -> Result<()> {
    for family in ["iptables", "ip6tables"] {
        pod.node.sysctl(&format!("bridge.bridge-nf-call-{family}"), "1")?;
    }
    let index = index(pod.node, &cluster.lab().veth_of(&pod.pod))?;
    let entry = || device_table(pod.node)?.get(&index, 0).context("no entry");
    let bridged = Device::BRIDGED4 | Device::BRIDGED6;
    eventually(SOON, || {
        let flags = entry()?.flags;
        ensure!(flags & bridged == bridged, "{flags:#x}");
        Ok(())
    })?;
    let before = entry()?;
    pod.good("ADD")?;
    ensure!(entry()? == before, "{:?}, not {before:?}", entry()?);
    Ok(())
}

fn versions(cluster: &Cluster) -> Result<()> {
    let node = cluster.lab().node(0);
    let version = By::hand(node, cluster.lab().pod(0, 0), "0.4.0").good("VERSION")?;
    ensure!(version == Some(json!({ "cniVersion": "0.4.0", "supportedVersions": VERSIONS })), "{version:?}");
    let veth = cluster.lab().veth_of(&cluster.lab().pod(0, 1));
    for version in VERSIONS {
        let pod = By::hand(node, cluster.lab().pod(0, 1), version);
        // As a pod is before the plugin has seen it.
        pod.good("DEL")?;
        ensure!(served(node)?[&veth] == ([vec![], vec![]], false), "{version}: DEL takes it off");
        let added = pod.good("ADD")?;
        ensure!(added.as_ref() == Some(&pod.config["prevResult"]), "{version}: {added:?}");
        all_served(node)?;
        let (pod_host, record) = (&pod.pod, pod.record()?);
        ensure!(record["ips"] == json!(pod_host.ips()) && record["device"]["name"] == veth, "{record}");
        ensure!(
            record["pod"] == format!("lab/{}", pod_host.name()) && record["network"] == "cbr0",
            "{record}"
        );
        for family in [0, 1] {
            answered(pod_host, &Ask::tcp(web()[family]))?;
        }
        // The same again changes nothing.
        pod.good("ADD")?;
        all_served(node)?;
        if version == "0.3.1" {
            pod.bad("CHECK", 1, "has no CHECK")?;
        } else {
            ensure!(pod.good("CHECK")?.is_none(), "CHECK says nothing");
        }
        if version != "1.1.0" {
            pod.bad("STATUS", 1, "has no STATUS")?;
            pod.bad("GC", 1, "has no GC")?;
        }
    }
    // A result of another version than the list's.
    let mixed = By::hand(node, cluster.lab().pod(0, 1), "1.0.0");
    let old = mixed.with("prevResult", result(&mixed.pod, "0.4.0"));
    ensure!(old.good("ADD")?.as_ref() == Some(&mixed.config["prevResult"]), "brought into shape");
    Ok(())
}

fn bad_input(cluster: &Cluster) -> Result<()> {
    let node = cluster.lab().node(0);
    let pod = By::hand(node, cluster.lab().pod(0, 0), "1.0.0");
    let own = node.netns_path().display().to_string();
    for (command, vars, code, words) in [
        ("", &[][..], 4, "CNI_COMMAND"),
        ("add", &[], 4, "CNI_COMMAND"),
        ("ADD", &[("CNI_CONTAINERID", "")], 4, "CNI_CONTAINERID"),
        ("ADD", &[("CNI_CONTAINERID", "../x")], 4, "CNI_CONTAINERID"),
        ("DEL", &[("CNI_CONTAINERID", "")], 4, "CNI_CONTAINERID"),
        ("ADD", &[("CNI_IFNAME", "")], 4, "CNI_IFNAME"),
        ("ADD", &[("CNI_IFNAME", "a/b")], 4, "CNI_IFNAME"),
        ("ADD", &[("CNI_NETNS", "")], 4, "CNI_NETNS"),
        ("CHECK", &[("CNI_NETNS", "")], 4, "CNI_NETNS"),
        ("ADD", &[("CNI_NETNS", "/run/netns/no-such-pod")], 3, "/run/netns/no-such-pod"),
        ("CHECK", &[("CNI_NETNS", "/run/netns/no-such-pod")], 3, "/run/netns/no-such-pod"),
        ("ADD", &[("CNI_NETNS", "/dev/null")], 4, "CNI_NETNS"),
        ("ADD", &[("CNI_NETNS", &own)], 4, "the host's own"),
    ] {
        refused(&pod.run(command, vars)?, code, words).with_context(|| format!("{command} {vars:?}"))?;
    }
    for (config, code, words) in [
        (pod.without("prevResult"), 7, "prevResult"),
        (pod.with("prevResult", json!(7)), 6, "prevResult"),
        (pod.with("prevResult", json!({ "ips": [{ "address": "10.244.1.999/24" }] })), 6, "10.244.1.999"),
        (pod.without("name"), 7, "name"),
        (pod.with("name", json!("a b")), 7, "a b"),
        (pod.without("cniVersion"), 1, "0.1.0"),
        (pod.with("cniVersion", json!("0.2.0")), 1, "0.2.0"),
        (pod.with("cniVersion", json!("2.0.0")), 1, "2.0.0"),
        (pod.with("cniVersion", json!("new")), 6, "new"),
        (pod.with("bpffs", json!("relative")), 7, "bpffs"),
        (pod.with("required", json!("no")), 7, "required"),
        (pod.with("stateDir", json!("/proc/none")), 5, "/proc/none"),
    ] {
        config.bad("ADD", code, words)?;
    }
    for input in ["", "{", "[]", "\"x\"", "{\"cniVersion\": \"1.0.0\"} and more"] {
        refused(&pod.feed("ADD", &[], input)?, 6, "JSON").with_context(|| input.to_owned())?;
    }
    Ok(())
}

fn what_check_finds(cluster: &Cluster) -> Result<()> {
    let node = cluster.lab().node(0);
    let pod = By::hand(node, cluster.lab().pod(0, 0), "1.0.0");
    pod.good("ADD")?;
    pod.good("CHECK")?;
    let index = pod.record()?["device"]["index"].as_u64().context("a device")? as u32;
    let record = state_dir(node).join(format!("pods/{}:eth0.json", pod.pod.name()));
    type Break<'a> = Box<dyn Fn() -> Result<()> + 'a>;
    let unlink = |hook: &str| {
        let pin = pins(node).join(format!("links/tc-{index}-{hook}"));
        // Not by its pin alone, which takes it off some time later.
        Box::new(move || Ok(syscall::link_detach(syscall::obj_get(&pin)?.as_fd())?)) as Break<'_>
    };
    let rewrite = |from: &'static str, to: &'static str| -> Break<'_> {
        let record = record.clone();
        Box::new(move || Ok(fs::write(&record, fs::read_to_string(&record)?.replace(from, to))?))
    };
    let cases: [(Break<'_>, u32, &str); 7] = [
        (unlink("ingress"), 103, "ingress not attached"),
        (unlink("egress"), 103, "egress not attached"),
        (Box::new(|| Ok(device_table(node)?.remove(&index)?)), 103, "device table"),
        (Box::new(|| Ok(fs::remove_file(&record)?)), 101, "missing"),
        (rewrite("10.244.1.10", "10.244.1.99"), 101, "10.244.1.99"),
        (rewrite("\"veth", "\"other"), 102, "other"),
        (rewrite("cbr0", "else"), 101, "missing"),
    ];
    for (break_it, code, words) in cases {
        break_it()?;
        pod.bad("CHECK", code, words)?;
        pod.good("ADD")?;
        pod.good("CHECK")?;
    }
    pod.with("prevResult", result(&cluster.lab().pod(0, 1), "1.0.0")).bad("CHECK", 101, "other addresses")?;
    refused(&pod.run("CHECK", &[("CNI_IFNAME", "eth7")])?, 101, "missing")
}

fn del_of_what_is_gone(cluster: &Cluster) -> Result<()> {
    let lab = cluster.lab();
    let node = lab.node(0);
    let pod = By::hand(node, lab.pod(0, 1), "1.1.0");
    let veth = lab.veth_of(&pod.pod);
    let off = || -> Result<()> {
        ensure!(served(node)?[&veth] == ([vec![], vec![]], false), "{veth} is still served");
        ensure!(pod.record().is_err(), "there is still a record");
        Ok(())
    };
    let bare = pod.without("prevResult");
    let broken = state_dir(node).join(format!("pods/{}:eth0.json", pod.pod.name()));
    // No result and no namespace; no record but a namespace; a broken record; nothing at all.
    pod.good("ADD")?;
    ensure!(bare.run("DEL", &[("CNI_NETNS", "")])?.ok);
    off()?;
    pod.good("ADD")?;
    fs::remove_file(&broken)?;
    ensure!(bare.run("DEL", &[])?.ok);
    off()?;
    pod.good("ADD")?;
    fs::write(&broken, "{ half")?;
    ensure!(pod.run("DEL", &[])?.ok);
    off()?;
    for netns in ["", "/run/netns/no-such-pod", "/dev/null"] {
        let answer = bare.run("DEL", &[("CNI_NETNS", netns), ("CNI_CONTAINERID", "never-seen")])?;
        ensure!(answer.ok && answer.json.is_none(), "{netns}: {answer:?}");
    }
    // Of another network, which a container can be in with another interface: none of its business.
    pod.good("ADD")?;
    pod.with("name", json!("other")).good("DEL")?;
    pod.good("CHECK")?;
    // A device that has got the index of one that is gone is left alone.
    let mut record = pod.record()?;
    record["device"]["mac"] = "0a:00:00:00:00:01".into();
    fs::write(&broken, record.to_string())?;
    pod.good("DEL")?;
    all_served(node)?;
    pod.good("ADD")?;
    Ok(())
}

/// A pod that is on a macvlan, which has no end on the host.
fn no_veth(cluster: &Cluster) -> Result<()> {
    ensure_debian_packages(&[("iproute2", "ip")])?;
    let node = cluster.lab().node(0);
    let host = cluster.lab().add_unplugged_pod(0)?;
    let netns = host.netns_name();
    node.run_in(|| {
        let add = ["link", "add", "link", "eth0", "name", "mv0", "type", "macvlan"];
        output(Command::new("ip").args(add))?;
        output(Command::new("ip").args(["link", "set", "mv0", "netns", &netns, "name", "eth0"])).map(drop)
    })??;
    let pod = By::hand(node, host.clone(), "1.0.0");
    ensure!(pod.good("ADD")?.as_ref() == Some(&pod.config["prevResult"]));
    let record = pod.record()?;
    let note = record["note"].as_str().unwrap_or_default();
    ensure!(record["device"].is_null() && note.contains("macvlan"), "{record}");
    pod.good("CHECK")?;
    pod.good("DEL")?;
    // No interface at all: fine, unless the result has one.
    let nothing = pod.with("prevResult", json!({ "cniVersion": "1.0.0" }));
    let absent = [("CNI_IFNAME", "eth5")];
    ensure!(nothing.run("ADD", &absent)?.ok && nothing.run("CHECK", &absent)?.ok);
    ensure!(nothing.run("DEL", &absent)?.ok);
    let wrong = json!({ "ips": [{ "address": "10.244.1.77/24" }] });
    refused(&pod.with("prevResult", wrong).run("ADD", &absent)?, 102, "eth5")?;
    cluster.lab().remove_unplugged_pod(&host)
}

fn garbage(cluster: &Cluster) -> Result<()> {
    let lab = cluster.lab();
    let node = lab.node(0);
    let pods = [0, 1, 2].map(|pod| By::hand(node, lab.pod(0, pod), "1.1.0"));
    let other = pods[2].with("name", json!("other"));
    for pod in [&pods[0], &pods[1], &other] {
        pod.good("DEL")?;
        pod.good("ADD")?;
    }
    let key = "cni.dev/valid-attachments";
    pods[0].bad("GC", 7, key)?;
    let stays = json!([{ "containerID": pods[0].pod.name(), "ifname": "eth0" }]);
    // Without the variables of a container.
    let names = ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"].map(|name| (name, ""));
    let answer = pods[0].without("prevResult").with(key, stays).run("GC", &names)?;
    ensure!(answer.ok && answer.json.is_none(), "{answer:?}");
    pods[0].good("CHECK")?;
    other.good("CHECK")?;
    ensure!(pods[1].record().is_err(), "what is no more is forgotten");
    let now = served(node)?;
    let gone = &now[&lab.veth_of(&pods[1].pod)];
    ensure!(*gone == ([vec![], vec![]], false), "what is no more is taken off: {now:?}");
    ensure!(pods[0].with(key, json!(null)).run("GC", &names)?.ok);
    ensure!(pods[0].record().is_err() && other.record().is_ok(), "all of this network, none of the other");
    Ok(())
}
