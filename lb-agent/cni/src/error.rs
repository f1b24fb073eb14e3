//! Errors as the specification wants them: a number, a sentence, details.

use crate::version::Version;
use serde_json::{Value, json};
use std::fmt::Display;

/// The specification's numbers, and from 100 on our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Code {
    /// The configuration's version is none of ours, or does not have this command.
    IncompatibleVersion = 1,
    /// There is no such container any more.
    ContainerUnknown = 3,
    /// An environment variable is missing or wrong.
    Environment = 4,
    /// Something cannot be read or written.
    Io = 5,
    /// What was read is not what it should be.
    Decode = 6,
    /// The configuration is wrong.
    Config = 7,
    /// It will go by itself.
    TryAgain = 11,
    /// Pods cannot be added.
    NotAvailable = 50,
    /// Pods cannot be added, and those that are there may suffer.
    LimitedConnectivity = 51,
    /// The kernel refuses.
    Kernel = 100,
    /// The record of a pod is missing or different.
    Record = 101,
    /// A pod's device is missing or another one.
    Device = 102,
    /// A pod's device is not served.
    NotServed = 103,
}

impl Code {
    /// An error with this number.
    pub(crate) fn error(self, msg: impl Into<String>) -> Error {
        Error { code: self, msg: msg.into(), details: String::new() }
    }
}

/// What goes back to the runtime.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{msg}{}{details} (code {})", if details.is_empty() { "" } else { ": " }, *code as u32)]
pub(crate) struct Error {
    pub(crate) code: Code,
    pub(crate) msg: String,
    pub(crate) details: String,
}

impl Error {
    /// The same with details.
    pub(crate) fn because(mut self, details: impl Display) -> Self {
        self.details = format!("{details:#}");
        self
    }

    /// For standard output.
    pub(crate) fn json(&self, version: Version) -> Value {
        let mut json = json!({ "cniVersion": version.as_str(), "code": self.code as u32, "msg": self.msg });
        if !self.details.is_empty() {
            json["details"] = self.details.clone().into();
        }
        json
    }
}

pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_what_the_specification_wants() {
        let error = Code::Config.error("prevResult is missing");
        let wanted = json!({"cniVersion": "0.4.0", "code": 7, "msg": "prevResult is missing"});
        assert_eq!(error.json(Version::V040), wanted);
        assert_eq!(error.to_string(), "prevResult is missing (code 7)");
        let error = Code::TryAgain.error("no agent").because("nothing is pinned");
        assert_eq!(error.json(Version::V110)["details"], "nothing is pinned");
        assert_eq!(error.to_string(), "no agent: nothing is pinned (code 11)");
    }
}
