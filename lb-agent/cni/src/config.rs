//! The network configuration, from standard input.

use crate::env::{Command, NOT_AN_ID, is_id};
use crate::error::{Code, Error, Result};
use crate::version::{self, Version};
use lb_attach::pins::DEFAULT_BPFFS;
use lb_attach::records::DEFAULT_STATE_DIR;
use serde_json::{Map, Value};
use std::path::PathBuf;

/// What we go by. All other keys are others'.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Config {
    pub(crate) version: Version,
    /// The network's name.
    pub(crate) name: String,
    /// The result so far, in the shape of `version`.
    pub(crate) prev_result: Option<Map<String, Value>>,
    /// The attachments that GC is to leave: container and interface.
    pub(crate) valid: Vec<(String, String)>,
    pub(crate) ours: Ours,
}

/// The keys that are ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ours {
    /// `bpffs`: the BPF file system that the agent was given.
    pub(crate) bpffs: PathBuf,
    /// `stateDir`: where pods are written down.
    pub(crate) state_dir: PathBuf,
    /// `required`: no pod without, even if the agent has never run.
    pub(crate) required: bool,
    /// `logFile`: where to say what was done.
    pub(crate) log_file: Option<PathBuf>,
}

impl Config {
    /// Reads what `command` needs.
    pub(crate) fn read(json: &Map<String, Value>, command: Command) -> Result<Self> {
        let version = Version::parse(json.get("cniVersion"))?;
        if version < command.since() {
            let (command, version) = (command.as_str(), version.as_str());
            let msg = format!("CNI version {version}, which the configuration asks for, has no {command}");
            return Err(Code::IncompatibleVersion.error(msg));
        }
        let name = string(json, "name")?
            .filter(|name| !name.is_empty())
            .ok_or_else(|| Code::Config.error("the configuration has no \"name\" of the network"))?;
        if !is_id(&name) {
            return Err(Code::Config.error(format!("the network's name is {name:?}: {NOT_AN_ID}")));
        }
        let prev_result = match json.get("prevResult") {
            None | Some(Value::Null) => None,
            Some(Value::Object(result)) => Some(version::shape(result.clone(), version)?),
            Some(other) => return Err(Code::Decode.error(format!("prevResult is {other}, not an object"))),
        };
        if prev_result.is_none() && matches!(command, Command::Add | Command::Check) {
            let msg =
                "there is no prevResult: lb-cni does not make interfaces, put it after the plugin that does";
            return Err(Code::Config.error(msg));
        }
        let valid = if command == Command::Gc { valid_attachments(json)? } else { Vec::new() };
        Ok(Self { version, name, prev_result, valid, ours: Ours::read(json)? })
    }
}

impl Ours {
    fn read(json: &Map<String, Value>) -> Result<Self> {
        let path = |key| -> Result<Option<PathBuf>> {
            match string(json, key)?.map(PathBuf::from) {
                Some(path) if !path.is_absolute() => {
                    Err(Code::Config.error(format!("{key:?} is {path:?}, not an absolute path")))
                }
                path => Ok(path),
            }
        };
        let required = match json.get("required") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(required)) => *required,
            Some(other) => return Err(not("required", other, "true or false")),
        };
        Ok(Self {
            bpffs: path("bpffs")?.unwrap_or_else(|| DEFAULT_BPFFS.into()),
            state_dir: path("stateDir")?.unwrap_or_else(|| DEFAULT_STATE_DIR.into()),
            required,
            log_file: path("logFile")?,
        })
    }
}

fn string(json: &Map<String, Value>, key: &str) -> Result<Option<String>> {
    match json.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(not(key, other, "a string")),
    }
}

fn not(key: &str, value: &Value, wanted: &str) -> Error {
    Code::Config.error(format!("{key:?} is {value}, not {wanted}"))
}

/// `null` is what runtimes write in Go for an empty list; a list that is not there at all is no reason to remove all.
fn valid_attachments(json: &Map<String, Value>) -> Result<Vec<(String, String)>> {
    const KEY: &str = "cni.dev/valid-attachments";
    let list = match json.get(KEY) {
        None => return Err(Code::Config.error(format!("GC needs {KEY:?}, which is missing"))),
        Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(not(KEY, other, "a list")),
    };
    let attachment = |item: &Value| {
        let text = |key: &str| item[key].as_str().map(String::from);
        let wrong = || not(KEY, item, "an object with containerID and ifname, as each item has to be");
        text("containerID").zip(text("ifname")).ok_or_else(wrong)
    };
    list.iter().map(attachment).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(extra: Value, command: Command) -> Result<Config> {
        let mut json = json!({"cniVersion": "1.1.0", "name": "cbr0", "type": "lb-cni"});
        let object = json.as_object_mut().unwrap();
        object.extend(extra.as_object().unwrap().clone());
        Config::read(object, command)
    }

    #[test]
    fn defaults_and_keys() {
        let config = read(json!({"prevResult": {}, "runtimeConfig": {"x": 1}}), Command::Add).unwrap();
        assert_eq!((config.version, config.name.as_str()), (Version::V110, "cbr0"));
        assert_eq!(config.prev_result.unwrap()["cniVersion"], "1.1.0");
        assert_eq!(config.ours.bpffs, PathBuf::from("/sys/fs/bpf"));
        assert_eq!(config.ours.state_dir, PathBuf::from("/run/lb-agent"));
        assert_eq!((config.ours.required, config.ours.log_file), (false, None));
        let keys = json!({"bpffs": "/b", "stateDir": "/s", "required": true, "logFile": "/l"});
        let (bpffs, state_dir) = ("/b".into(), "/s".into());
        let ours = Ours { bpffs, state_dir, required: true, log_file: Some("/l".into()) };
        assert_eq!(read(keys, Command::Del).unwrap().ours, ours);
    }

    #[test]
    fn what_is_wrong_is_said() {
        use Command::{Add, Check, Del, Gc, Status};
        let result = json!({"prevResult": {}});
        for (extra, command, code, word) in [
            (json!({"cniVersion": "2.0.0"}), Add, Code::IncompatibleVersion, "2.0.0"),
            (json!({"cniVersion": "0.3.1"}), Check, Code::IncompatibleVersion, "CHECK"),
            (json!({"cniVersion": "1.0.0"}), Gc, Code::IncompatibleVersion, "GC"),
            (json!({"cniVersion": "1.0.0"}), Status, Code::IncompatibleVersion, "STATUS"),
            (json!({"cniVersion": []}), Add, Code::Decode, "[]"),
            (json!({"name": null}), Del, Code::Config, "name"),
            (json!({"name": ""}), Del, Code::Config, "name"),
            (json!({"name": 5}), Del, Code::Config, "5"),
            (json!({"name": "a/b"}), Del, Code::Config, "a/b"),
            (json!({}), Add, Code::Config, "prevResult"),
            (json!({"prevResult": null}), Check, Code::Config, "prevResult"),
            (json!({"prevResult": "x"}), Add, Code::Decode, "prevResult"),
            (json!({"prevResult": []}), Del, Code::Decode, "prevResult"),
            (json!({"prevResult": {"cniVersion": "7.0.0"}}), Add, Code::Decode, "prevResult"),
            (json!({"bpffs": 5}), Del, Code::Config, "bpffs"),
            (json!({"bpffs": "sys/fs/bpf"}), Status, Code::Config, "absolute"),
            (json!({"stateDir": ""}), Del, Code::Config, "stateDir"),
            (json!({"required": "yes"}), Del, Code::Config, "required"),
            (json!({"logFile": {}}), Del, Code::Config, "logFile"),
            (json!({}), Gc, Code::Config, "cni.dev/valid-attachments"),
            (json!({"cni.dev/valid-attachments": "all"}), Gc, Code::Config, "all"),
            (json!({"cni.dev/valid-attachments": [{"containerID": "a"}]}), Gc, Code::Config, "ifname"),
            (json!({"cni.dev/valid-attachments": ["a"]}), Gc, Code::Config, "containerID"),
        ] {
            let error = read(extra.clone(), command).unwrap_err();
            assert_eq!(error.code, code, "{extra} {command:?}: {error}");
            assert!(error.to_string().contains(word), "{extra} {command:?}: {error}");
        }
        for (extra, command) in
            [(json!({}), Del), (json!({}), Status), (result.clone(), Add), (result, Check)]
        {
            read(extra, command).unwrap();
        }
    }

    #[test]
    fn the_attachments_that_stay() {
        let valid =
            |list: Value| read(json!({"cni.dev/valid-attachments": list}), Command::Gc).unwrap().valid;
        assert_eq!(valid(json!(null)), []);
        assert_eq!(valid(json!([])), []);
        let two =
            json!([{"containerID": "a", "ifname": "eth0"}, {"containerID": "b", "ifname": "x", "more": 1}]);
        assert_eq!(valid(two), [("a", "eth0"), ("b", "x")].map(|(a, b)| (a.into(), b.into())));
    }
}
