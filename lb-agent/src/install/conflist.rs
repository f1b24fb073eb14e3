//! Network configurations: our plugin put into one, and taken out again. Nothing else in them changes.

use serde_json::{Map, Value, json};
use std::path::Path;

/// The plugin's name: of its file, and in configurations.
pub const PLUGIN: &str = "lb-cni";

/// Versions of the specification in which plugins form a chain, and which the plugin speaks.
const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// Why a configuration is left as it is.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Unusable {
    /// Somebody has only half written it, perhaps.
    #[error("is not JSON: {0}")]
    NotJson(String),
    /// Some other JSON.
    #[error("is not a network configuration: it has no {0:?}")]
    Lacks(&'static str),
    /// Nobody would have made a device for the pod.
    #[error("has no plugin besides {PLUGIN}")]
    Alone,
    /// `prevResult` came with 0.3.0, and what comes after 1.1.0 nobody knows.
    #[error(
        "has cniVersion {0}, which {PLUGIN} cannot be part of: use one of {list}",
        list = VERSIONS.join(", ")
    )]
    Version(String),
}

/// A list of plugins with ours in it, last unless it has a place already; `None` if nothing is to be changed.
///
/// # Errors
/// If it is not such a list, or none that our plugin can be part of.
pub fn add(text: &str, bpffs: &Path) -> Result<Option<String>, Unusable> {
    let mut list = object(text)?;
    check_version(&list)?;
    let plugins = plugins(&mut list)?;
    if !plugins.iter().any(|plugin| !is_ours(plugin)) {
        return Err(Unusable::Alone);
    }
    let before = plugins.clone();
    // Last: a place before the plugin that makes the device would be none.
    let first = plugins.iter().position(is_ours).filter(|place| *place > 0);
    let mut at = 0;
    plugins.retain(|plugin| {
        at += 1;
        !is_ours(plugin) || Some(at - 1) == first
    });
    match plugins.iter_mut().find(|plugin| is_ours(plugin)) {
        Some(ours) => ours["bpffs"] = path(bpffs),
        None => plugins.push(entry(bpffs)),
    }
    Ok((*plugins != before).then(|| write(list)))
}

/// The list without our plugin; `None` if it is not in it.
///
/// # Errors
/// If it is not such a list, or our plugin is all that is in it.
pub fn remove(text: &str) -> Result<Option<String>, Unusable> {
    // A file that never had it may be as broken as it likes.
    if !text.contains(PLUGIN) {
        return Ok(None);
    }
    let mut list = object(text)?;
    let plugins = plugins(&mut list)?;
    let before = plugins.len();
    plugins.retain(|plugin| !is_ours(plugin));
    match plugins.len() {
        0 if before > 0 => Err(Unusable::Alone),
        after => Ok((after < before).then(|| write(list))),
    }
}

/// The list that a runtime makes of a single plugin's configuration, with ours behind it.
///
/// # Errors
/// If it is not such a configuration, or none that our plugin can follow.
pub fn wrap(text: &str, bpffs: &Path) -> Result<String, Unusable> {
    let single = object(text)?;
    check_version(&single)?;
    let own = |key: &'static str| {
        let value = single.get(key).filter(|value| value.is_string());
        value.cloned().ok_or(Unusable::Lacks(key))
    };
    own("type")?;
    let list = json!({
        "cniVersion": own("cniVersion")?,
        "name": own("name")?,
        "plugins": [single, entry(bpffs)],
    });
    let Value::Object(list) = list else { unreachable!("an object was written above") };
    Ok(write(list))
}

fn object(text: &str) -> Result<Map<String, Value>, Unusable> {
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(Unusable::Lacks("name")),
        Err(error) => Err(Unusable::NotJson(error.to_string())),
    }
}

fn plugins(list: &mut Map<String, Value>) -> Result<&mut Vec<Value>, Unusable> {
    list.get_mut("plugins").and_then(Value::as_array_mut).ok_or(Unusable::Lacks("plugins"))
}

/// Whichever version a runtime picks must be one of ours.
fn check_version(config: &Map<String, Value>) -> Result<(), Unusable> {
    let several = config.get("cniVersions").and_then(Value::as_array).into_iter().flatten();
    let mut found = config.get("cniVersion").into_iter().chain(several).peekable();
    if found.peek().is_none() {
        return Err(Unusable::Version("0.1.0 (none is given)".into()));
    }
    for version in found {
        if !version.as_str().is_some_and(|version| VERSIONS.contains(&version)) {
            return Err(Unusable::Version(version.to_string().replace('"', "")));
        }
    }
    Ok(())
}

fn is_ours(plugin: &Value) -> bool {
    plugin["type"] == PLUGIN
}

fn entry(bpffs: &Path) -> Value {
    json!({"type": PLUGIN, "bpffs": path(bpffs)})
}

fn path(path: &Path) -> Value {
    path.to_string_lossy().into()
}

fn write(list: Map<String, Value>) -> String {
    format!("{:#}\n", Value::Object(list))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BPFFS: &str = "/run/lb-agent/bpf";

    fn add(text: &str) -> Result<Option<String>, Unusable> {
        super::add(text, Path::new(BPFFS))
    }

    fn types(text: &str) -> Vec<String> {
        let list: Value = serde_json::from_str(text).unwrap();
        let plugins = list["plugins"].as_array().unwrap();
        plugins.iter().map(|plugin| plugin["type"].as_str().unwrap().to_owned()).collect()
    }

    const FLANNEL: &str = r#"{
  "name": "cbr0",
  "cniVersion": "1.0.0",
  "zeta": {"b": 1, "a": [2, null]},
  "plugins": [
    {
      "type": "flannel",
      "delegate": {
        "hairpinMode": true,
        "forceAddress": true,
        "isDefaultGateway": true
      }
    },
    {
      "type": "portmap",
      "capabilities": {
        "portMappings": true
      }
    }
  ]
}
"#;

    #[test]
    fn it_goes_behind_the_others_and_out_again_and_nothing_else_changes() {
        let with = add(FLANNEL).unwrap().expect("it was not there");
        assert_eq!(types(&with), ["flannel", "portmap", "lb-cni"]);
        assert!(with.contains(r#""bpffs": "/run/lb-agent/bpf""#), "{with}");
        let order: Vec<_> =
            ["cbr0", "zeta", "\"b\"", "\"a\"", "hairpinMode", "forceAddress", "isDefaultGateway"]
                .map(|key| with.find(key).expect(key))
                .to_vec();
        assert!(order.is_sorted(), "keys keep their order: {with}");
        assert_eq!(add(&with).unwrap(), None, "once is enough");
        let without = remove(&with).unwrap().expect("it was there");
        let same = |text: &str| serde_json::from_str::<Value>(text).unwrap().to_string();
        assert_eq!(same(&without), same(FLANNEL));
        assert_eq!(remove(&without).unwrap(), None);
    }

    #[test]
    fn a_place_that_it_has_is_kept_unless_it_is_the_first() {
        let list =
            |plugins: &str| format!(r#"{{"cniVersion": "0.3.1", "name": "n", "plugins": [{plugins}]}}"#);
        let ours = format!(r#"{{"type": "lb-cni", "bpffs": "{BPFFS}"}}"#);
        let (bridge, istio) = (r#"{"type": "bridge"}"#, r#"{"type": "istio-cni"}"#);
        assert_eq!(add(&list(&[bridge, &ours, istio].join(","))).unwrap(), None);
        for before in [
            [bridge, r#"{"type": "lb-cni", "bpffs": "/old", "log": "x"}"#, istio],
            [bridge, r#"{"type": "lb-cni", "log": "x"}"#, istio],
        ] {
            let after = add(&list(&before.join(","))).unwrap().expect("another bpffs");
            assert_eq!(types(&after), ["bridge", "lb-cni", "istio-cni"]);
            assert!(after.contains(BPFFS) && after.contains(r#""log": "x""#), "{after}");
        }
        for before in [[&ours, bridge, istio], [bridge, istio, &ours]] {
            let after = add(&list(&before.join(","))).unwrap();
            let after = after.unwrap_or_else(|| list(&before.join(",")));
            assert_eq!(types(&after), ["bridge", "istio-cni", "lb-cni"]);
        }
        let twice = [bridge, &ours, istio, &ours].join(",");
        assert_eq!(types(&add(&list(&twice)).unwrap().unwrap()), ["bridge", "lb-cni", "istio-cni"]);
    }

    #[test]
    fn a_single_configuration_becomes_a_list() {
        let single =
            r#"{"cniVersion": "0.4.0", "name": "mynet", "type": "bridge", "ipam": {"z": 1, "a": 2}}"#;
        let list = wrap(single, Path::new(BPFFS)).unwrap();
        assert_eq!(types(&list), ["bridge", "lb-cni"]);
        let value: Value = serde_json::from_str(&list).unwrap();
        assert_eq!((&value["cniVersion"], &value["name"]), (&json!("0.4.0"), &json!("mynet")));
        assert_eq!(value["plugins"][0], serde_json::from_str::<Value>(single).unwrap());
        assert_eq!(add(&list).unwrap(), None);
    }

    #[test]
    fn what_cannot_be_changed_is_refused_with_the_reason() {
        for (text, expected) in [
            ("", "is not JSON: EOF"),
            (r#"{"name": "cbr0", "plugins": [{"type": "fla"#, "is not JSON: EOF"),
            ("[]", "it has no \"name\""),
            (r#"{"cniVersion": "1.0.0", "name": "n"}"#, "it has no \"plugins\""),
            (r#"{"cniVersion": "1.0.0", "name": "n", "plugins": {}}"#, "it has no \"plugins\""),
            (r#"{"cniVersion": "1.0.0", "name": "n", "plugins": []}"#, "no plugin besides lb-cni"),
            (r#"{"cniVersion": "1.0.0", "plugins": [{"type": "lb-cni"}]}"#, "no plugin besides lb-cni"),
            (r#"{"cniVersion": "0.2.0", "plugins": [{"type": "a"}]}"#, "has cniVersion 0.2.0, which"),
            (r#"{"cniVersion": "1.2.0", "plugins": [{"type": "a"}]}"#, "has cniVersion 1.2.0, which"),
            (r#"{"cniVersion": 1, "plugins": [{"type": "a"}]}"#, "has cniVersion 1, which"),
            (r#"{"plugins": [{"type": "a"}]}"#, "has cniVersion 0.1.0 (none is given)"),
            (
                r#"{"cniVersion": "1.0.0", "cniVersions": ["1.1.0", "2.0.0"], "plugins": [{"type": "a"}]}"#,
                "has cniVersion 2.0.0, which",
            ),
        ] {
            let error = add(text).expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        for (text, expected) in [
            (r#"{"cniVersion": "1.0.0", "name": "n"}"#, "it has no \"type\""),
            (r#"{"cniVersion": "1.0.0", "type": "bridge"}"#, "it has no \"name\""),
            (r#"{"name": "n", "type": "bridge"}"#, "none is given"),
            (r#"{"cniVersion": "1.0.0", "name": "n", "plugins": []}"#, "it has no \"type\""),
        ] {
            let error = wrap(text, Path::new(BPFFS)).expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        assert_eq!(remove("{ broken").unwrap(), None, "nothing of ours in it");
        assert!(remove(r#"{"type": "lb-cni"#).is_err());
        assert_eq!(remove(r#"{"plugins": [{"type": "lb-cni"}]}"#), Err(Unusable::Alone));
    }
}
