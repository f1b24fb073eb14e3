//! Versions of the specification, and what differs between them.

use crate::error::{Code, Result};
use serde_json::{Map, Value, json};
use std::net::IpAddr;

/// A version that we speak, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    V031,
    V040,
    V100,
    V110,
}

impl Version {
    pub(crate) const ALL: [Self; 4] = [Self::V031, Self::V040, Self::V100, Self::V110];
    pub(crate) const NEWEST: Self = Self::V110;

    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::V031 => "0.3.1",
            Self::V040 => "0.4.0",
            Self::V100 => "1.0.0",
            Self::V110 => "1.1.0",
        }
    }

    /// The version that a configuration asks for.
    pub(crate) fn parse(text: Option<&Value>) -> Result<Self> {
        // The specification's word for a configuration without.
        let text = match text {
            None | Some(Value::Null) => "0.1.0",
            Some(Value::String(text)) => text,
            Some(other) => return Err(Code::Decode.error(format!("cniVersion is {other}, not a string"))),
        };
        let is_number = |part: &str| part.parse::<u32>().is_ok();
        if text.split('.').count() != 3 || !text.split('.').all(is_number) {
            return Err(Code::Decode.error(format!("cniVersion is {text:?}, which is no version")));
        }
        Self::ALL.into_iter().find(|version| version.as_str() == text).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.into_iter().map(Self::as_str).collect();
            Code::IncompatibleVersion
                .error(format!("CNI version {text} is not supported, only {}", known.join(", ")))
        })
    }

    /// The answer to VERSION.
    pub(crate) fn answer(asked: Option<&Value>) -> Value {
        let asked = asked.and_then(Value::as_str).unwrap_or(Self::NEWEST.as_str());
        json!({ "cniVersion": asked, "supportedVersions": Self::ALL.map(Self::as_str) })
    }

    /// Whether results have `version` in each of `ips`.
    fn says_family(self) -> bool {
        self < Self::V100
    }
}

/// What 1.1.0 has added to a result's lists.
const ADDED_IN_110: [(&str, &[&str]); 2] = [
    ("interfaces", &["mtu", "socketPath", "pciID"]),
    ("routes", &["mtu", "advmss", "priority", "table", "scope"]),
];

/// A result in the shape of `version`. A runtime hands it over in that shape already, and then it is left as it is.
pub(crate) fn shape(mut result: Map<String, Value>, version: Version) -> Result<Map<String, Value>> {
    let from = match result.get("cniVersion") {
        None | Some(Value::Null) => version,
        said => Version::parse(said).map_err(|e| Code::Decode.error("prevResult").because(e.msg))?,
    };
    result.insert("cniVersion".into(), version.as_str().into());
    if from.says_family() != version.says_family() {
        for ip in items(&mut result, "ips") {
            if !version.says_family() {
                ip.remove("version");
                continue;
            }
            let address = ip.get("address").and_then(Value::as_str).unwrap_or_default();
            let family = if address.contains(':') { "6" } else { "4" };
            ip.insert("version".into(), family.into());
        }
    }
    if from == Version::V110 && version < Version::V110 {
        for (list, added) in ADDED_IN_110 {
            for item in items(&mut result, list) {
                item.retain(|key, _| !added.contains(&key.as_str()));
            }
        }
    }
    Ok(result)
}

fn items<'a>(
    result: &'a mut Map<String, Value>,
    list: &str,
) -> impl Iterator<Item = &'a mut Map<String, Value>> {
    let list = result.get_mut(list).and_then(Value::as_array_mut);
    list.into_iter().flatten().filter_map(Value::as_object_mut)
}

/// The addresses in a result that are of the interface called `ifname`, or of none that is named.
pub(crate) fn addresses(result: &Map<String, Value>, ifname: &str) -> Result<Vec<IpAddr>> {
    let list = |name: &str| result.get(name).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let interfaces = list("interfaces");
    let mut all = Vec::new();
    for ip in list("ips") {
        let of = ip["interface"].as_u64().and_then(|at| interfaces.get(usize::try_from(at).ok()?));
        if of.is_some_and(|interface| interface["name"] != ifname) {
            continue;
        }
        let text = ip["address"].as_str().unwrap_or_default();
        let address = text.split('/').next().unwrap_or_default().parse();
        all.push(
            address.map_err(|_| {
                Code::Decode.error(format!("prevResult has {} for an address", ip["address"]))
            })?,
        );
    }
    Ok(all)
}

#[cfg(test)]
mod tests;
