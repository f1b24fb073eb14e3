//! Each object is one that Kubernetes knows, and what objects say of each other and of the agent is true.

use crate::{all, containers, list, of_kind, text};
use clap::{Args as _, Command};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use lb_agent::cli::{CleanupArgs, InstallArgs, RunArgs};
use lb_agent::health::Health;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::collections::BTreeMap;

/// Whatever a type does not know is lost on the way through it.
fn passes_through<T: Serialize + DeserializeOwned>(object: &Value) {
    let typed: T =
        serde_json::from_value(object.clone()).unwrap_or_else(|error| panic!("{error}: {object:#}"));
    let back = serde_json::to_value(typed).expect("JSON");
    assert_eq!(back, *object, "fields that the type does not have");
}

#[test]
fn kubernetes_knows_every_field() {
    for (_, objects) in all() {
        for object in &objects {
            match text(&object["kind"]) {
                "DaemonSet" => passes_through::<DaemonSet>(object),
                "ConfigMap" => passes_through::<ConfigMap>(object),
                "ServiceAccount" => passes_through::<ServiceAccount>(object),
                "ClusterRole" => passes_through::<ClusterRole>(object),
                "ClusterRoleBinding" => passes_through::<ClusterRoleBinding>(object),
                other => panic!("{other} is not expected"),
            }
        }
    }
}

#[test]
fn what_is_referred_to_is_there() {
    for (file, objects) in all() {
        let (set, account) = (of_kind(&objects, "DaemonSet"), of_kind(&objects, "ServiceAccount"));
        let (template, binding) = (&set["spec"]["template"], of_kind(&objects, "ClusterRoleBinding"));
        let pod = &template["spec"];
        assert_eq!(pod["serviceAccountName"], account["metadata"]["name"], "{file}");
        assert_eq!(binding["subjects"][0]["name"], account["metadata"]["name"], "{file}");
        assert_eq!(binding["subjects"][0]["namespace"], account["metadata"]["namespace"], "{file}");
        assert_eq!(
            binding["roleRef"]["name"],
            of_kind(&objects, "ClusterRole")["metadata"]["name"],
            "{file}"
        );
        assert_eq!(set["spec"]["selector"]["matchLabels"], template["metadata"]["labels"], "{file}");
        for object in objects.iter().filter(|object| !text(&object["kind"]).starts_with("Cluster")) {
            assert_eq!(object["metadata"]["namespace"], "kube-system", "{file}");
        }
        let annotations = template["metadata"]["annotations"].as_object().expect("annotations");
        let config = of_kind(&objects, "ConfigMap");
        for container in containers(&objects) {
            assert_eq!(container["envFrom"][0]["configMapRef"]["name"], config["metadata"]["name"], "{file}");
            for mount in list(&container["volumeMounts"]) {
                let volumes = list(&pod["volumes"]);
                assert!(volumes.iter().any(|volume| volume["name"] == mount["name"]), "{file}: {mount}");
            }
        }
        for (key, value) in annotations {
            let name = key.split_once('/').expect("a prefix").1;
            let name = if name == "default-container" { text(value) } else { name };
            assert!(containers(&objects).iter().any(|c| c["name"] == name), "{file}: {key}");
        }
    }
}

/// The variables that a container gets, as far as they are written here.
fn environment(objects: &[Value], container: &Value) -> BTreeMap<String, String> {
    let config = of_kind(objects, "ConfigMap")["data"].as_object().expect("values");
    let config = config.iter().map(|(name, value)| (name.clone(), text(value).to_owned()));
    let own = list(&container["env"]).iter().map(|variable| {
        let value = variable["value"].as_str().unwrap_or("from-the-node");
        (text(&variable["name"]).to_owned(), value.to_owned())
    });
    config.chain(own).collect()
}

fn command(name: &'static str) -> Option<Command> {
    let command = Command::new(name);
    match name {
        "run" => Some(RunArgs::augment_args(command)),
        "install" => Some(InstallArgs::augment_args(command)),
        "cleanup" => Some(CleanupArgs::augment_args(command)),
        "wait" => None,
        other => panic!("lb-agent {other}"),
    }
}

const COMMANDS: [&str; 4] = ["run", "install", "cleanup", "wait"];

#[test]
fn the_agent_understands_its_arguments_and_variables() {
    for (file, objects) in all() {
        let mut known: Vec<String> = vec!["RUST_LOG".into()];
        let run = command("run").expect("flags");
        known.extend(
            run.get_arguments().filter_map(|arg| Some(arg.get_env()?.to_string_lossy().into_owned())),
        );
        for container in containers(&objects) {
            let args: Vec<_> = list(&container["args"]).iter().map(text).collect();
            let name = COMMANDS.into_iter().find(|name| *name == args[0]).expect("a command");
            let variables = environment(&objects, container);
            for variable in variables.keys() {
                assert!(known.contains(variable), "{file}: {variable} is none of the agent's");
            }
            let Some(command) = command(name) else { continue };
            // As flags, so that the values are looked at and this process's own variables are not.
            let flags = command.get_arguments().filter_map(|arg| {
                let value = variables.get(&*arg.get_env()?.to_string_lossy())?;
                Some(format!("--{}={value}", arg.get_long()?))
            });
            let line: Vec<_> = args.iter().map(ToString::to_string).chain(flags).collect();
            command.try_get_matches_from(&line).unwrap_or_else(|error| panic!("{file}: {line:?}: {error}"));
        }
    }
}

#[test]
fn the_program_has_these_commands() {
    for name in COMMANDS {
        let mut program = std::process::Command::new(env!("CARGO_BIN_EXE_lb-agent"));
        let out = program.args([name, "--help"]).output().expect("start lb-agent");
        assert!(out.status.success(), "lb-agent {name}: {}", String::from_utf8_lossy(&out.stderr));
    }
}

#[test]
fn probes_ask_what_the_agent_answers() {
    let answers = Health::default().probes();
    for (file, objects) in all() {
        for container in containers(&objects) {
            let variables = environment(&objects, container);
            for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
                let get = &container[probe]["httpGet"];
                let is_agent = list(&container["args"]) == ["run"];
                assert_eq!(get.is_object(), is_agent, "{file}: {} {probe}", container["name"]);
                if is_agent {
                    let at = format!("{}:{}", text(&get["host"]), get["port"]);
                    assert_eq!(variables["LB_PROBE_BIND_ADDRESS"], at, "{file}: {probe}");
                    assert!(answers(text(&get["path"])).is_some(), "{file}: {probe}");
                }
            }
        }
    }
}

/// The plugin runs on the node and is told the agent's directory: a path must mean the same in both.
#[test]
fn paths_that_the_node_uses_are_the_nodes() {
    for (file, objects) in all() {
        let volumes = list(&of_kind(&objects, "DaemonSet")["spec"]["template"]["spec"]["volumes"]);
        let path_of = |name: &Value| {
            let volume = volumes.iter().find(|volume| volume["name"] == *name).expect("a volume");
            text(&volume["hostPath"]["path"])
        };
        let mut settings = Vec::new();
        for container in containers(&objects) {
            let variables = environment(&objects, container);
            let state = ["LB_BPFFS", "LB_CGROUP"].map(|name| variables.get(name).cloned());
            let cni = ["LB_CNI_BIN_DIR", "LB_CNI_CONF_DIR"].map(|name| variables.get(name).cloned());
            settings.push((state.clone(), cni.clone()));
            let mounts = list(&container["volumeMounts"]);
            for path in cni.iter().flatten().filter(|_| !mounts.is_empty()) {
                assert!(mounts.iter().any(|mount| text(&mount["mountPath"]) == path), "{file}: {path}");
            }
            if list(&container["args"]) == ["run"] {
                for path in state.iter().flatten() {
                    let inside = |mount: &&Value| {
                        path.strip_prefix(text(&mount["mountPath"])).is_some_and(|rest| rest.starts_with('/'))
                    };
                    let mount = mounts.iter().find(inside).unwrap_or_else(|| panic!("{file}: {path}"));
                    assert_eq!(path_of(&mount["name"]), text(&mount["mountPath"]), "{file}");
                }
            }
        }
        assert!(settings.windows(2).all(|pair| pair[0] == pair[1]), "{file}: {settings:?}");
    }
}
