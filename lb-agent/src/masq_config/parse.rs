//! The file's format, as ip-masq-agent reads it: YAML or JSON; keys in any case, as Go's decoder has them; what is not
//! said keeps its default.

use super::LEAST_INTERVAL;
use crate::cli::go_duration;
use ipnet::IpNet;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// What the file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MasqConfig {
    non_masquerade: Vec<IpNet>,
    masq_link_local: bool,
    masq_link_local_v6: bool,
    pub(super) resync_interval: Duration,
    /// Keys that mean nothing.
    pub(super) unknown: Vec<String>,
}

/// RFC 1918's.
const DEFAULT: [&str; 3] = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"];
const LINK_LOCAL: &str = "169.254.0.0/16";
const LINK_LOCAL_V6: &str = "fe80::/10";
/// The kernel's table has room for 4096 ranges in each family, the cluster's included. (ip-masq-agent's own limit,
/// `cidrLimit`, is there for the length of an iptables chain.)
const MOST: usize = 2048;

impl Default for MasqConfig {
    fn default() -> Self {
        Self {
            non_masquerade: DEFAULT.iter().filter_map(|range| range.parse().ok()).collect(),
            masq_link_local: false,
            masq_link_local_v6: false,
            resync_interval: Duration::from_secs(60),
            unknown: Vec::new(),
        }
    }
}

impl MasqConfig {
    /// What holds without `--ip-masq-agent-config`, besides what flags add: flannel's rule. It masquerades to
    /// 169.254.0.0/16 as to any other place: a pod reaches a cloud's metadata server by way of its node. (Nothing is
    /// ever routed to `fe80::/10`.)
    pub fn without_file() -> Self {
        Self { non_masquerade: Vec::new(), masq_link_local: true, ..Self::default() }
    }

    /// All that is not masqueraded to.
    pub fn ranges(&self, flags: &[IpNet]) -> Vec<IpNet> {
        let local = [(self.masq_link_local, LINK_LOCAL), (self.masq_link_local_v6, LINK_LOCAL_V6)];
        let local =
            local.iter().filter(|(masquerade, _)| !masquerade).filter_map(|(_, range)| range.parse().ok());
        let mut all: Vec<IpNet> = self.non_masquerade.iter().chain(flags).copied().chain(local).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    pub(super) fn parse(text: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(text).map_err(|_| "is not text (UTF-8)".to_owned())?;
        let parsed: Option<BTreeMap<String, Value>> = serde_saphyr::from_str(text)
            .map_err(|error| format!("is not YAML or JSON with settings: {error}"))?;
        let mut config = Self::default();
        for (key, value) in parsed.unwrap_or_default() {
            let wrong = |wanted: &str| format!("says {key}: {value}, but {wanted} is needed");
            match key.to_ascii_lowercase().as_str() {
                "nonmasqueradecidrs" => config.non_masquerade = cidrs(&key, &value)?,
                // No null changes a default but a list's.
                "cidrlimit" | "masqlinklocal" | "masqlinklocalipv6" | "resyncinterval" if value.is_null() => {
                }
                "cidrlimit" => {
                    value.as_i64().ok_or_else(|| wrong("a number"))?;
                }
                "masqlinklocal" => {
                    config.masq_link_local = value.as_bool().ok_or_else(|| wrong("true or false"))?
                }
                "masqlinklocalipv6" => {
                    config.masq_link_local_v6 = value.as_bool().ok_or_else(|| wrong("true or false"))?;
                }
                "resyncinterval" => {
                    let interval = value.as_str().ok_or_else(|| wrong("a duration like 60s"))?;
                    let interval = go_duration(interval).map_err(|error| format!("says {key}: {error}"))?;
                    config.resync_interval = interval.max(LEAST_INTERVAL);
                }
                _ => config.unknown.push(key),
            }
        }
        Ok(config)
    }
}

fn cidrs(key: &str, value: &Value) -> Result<Vec<IpNet>, String> {
    let list = match value {
        Value::Null => &Vec::new(),
        Value::Array(list) => list,
        other => return Err(format!("says {key}: {other}, but a list is needed")),
    };
    if list.len() > MOST {
        return Err(format!("has {} {key}: there is room for {MOST}", list.len()));
    }
    list.iter()
        .map(|item| {
            let range = item.as_str().and_then(|text| text.parse::<IpNet>().ok());
            match range {
                Some(range) if range == range.trunc() => Ok(range),
                Some(range) => Err(format!("has {range} in {key}: the network is {}", range.trunc())),
                None => Err(format!("has {item} in {key}, which is not a CIDR like 10.0.0.0/8 or fd00::/8")),
            }
        })
        .collect()
}

impl fmt::Display for MasqConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not masqueraded:")?;
        for range in self.ranges(&[]) {
            write!(f, " {range}")?;
        }
        Ok(())
    }
}
