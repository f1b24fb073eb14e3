//! What the runtime says by environment variables.

use crate::error::{Code, Result};
use crate::version::Version;
use std::path::PathBuf;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Command {
    const ALL: [Self; 6] = [Self::Add, Self::Del, Self::Check, Self::Gc, Self::Status, Self::Version];

    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }

    pub(crate) fn read(var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let all = Self::ALL.map(Self::as_str).join(", ");
        let name = var("CNI_COMMAND").ok_or_else(|| {
            let msg = "CNI_COMMAND is not set: lb-cni is a CNI plugin, to be run by a container runtime";
            Code::Environment.error(msg).because(format!("one of {all}"))
        })?;
        let found = Self::ALL.into_iter().find(|command| command.as_str() == name);
        found.ok_or_else(|| Code::Environment.error(format!("CNI_COMMAND is {name:?}, not one of {all}")))
    }

    /// The first version that has it.
    pub(crate) const fn since(self) -> Version {
        match self {
            Self::Add | Self::Del | Self::Version => Version::V031,
            Self::Check => Version::V040,
            Self::Gc | Self::Status => Version::V110,
        }
    }
}

/// Which interface of which container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attachment {
    pub(crate) container_id: String,
    pub(crate) ifname: String,
    pub(crate) netns: Option<PathBuf>,
    /// `namespace/name`, if the runtime is Kubernetes'.
    pub(crate) pod: Option<String>,
}

impl Attachment {
    /// Reads and checks it all; only DEL goes without a network namespace.
    pub(crate) fn read(var: impl Fn(&str) -> Option<String>, command: Command) -> Result<Self> {
        let get = |name: &str| var(name).filter(|value| !value.is_empty());
        let needed = ["CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS"];
        let needed = if command == Command::Del { &needed[..2] } else { &needed[..] };
        let missing: Vec<&str> = needed.iter().copied().filter(|name| get(name).is_none()).collect();
        let (Some(container_id), Some(ifname), []) =
            (get("CNI_CONTAINERID"), get("CNI_IFNAME"), &missing[..])
        else {
            let msg = format!("{} needs {}, not set", command.as_str(), missing.join(", "));
            return Err(Code::Environment.error(msg));
        };
        let wrong = |name: &str, value: &str, why: &str| {
            Code::Environment.error(format!("{name} is {value:?}: {why}"))
        };
        if !is_id(&container_id) {
            return Err(wrong("CNI_CONTAINERID", &container_id, NOT_AN_ID));
        }
        if let Some(why) = not_an_ifname(&ifname) {
            return Err(wrong("CNI_IFNAME", &ifname, why));
        }
        let args = get("CNI_ARGS").unwrap_or_default();
        let arg = |name| args.split(';').filter_map(|arg| arg.split_once('=')).find(|(key, _)| *key == name);
        let pod = arg("K8S_POD_NAMESPACE").zip(arg("K8S_POD_NAME"));
        Ok(Self {
            container_id,
            ifname,
            netns: get("CNI_NETNS").map(Into::into),
            pod: pod.map(|((_, namespace), (_, name))| format!("{namespace}/{name}")),
        })
    }
}

/// What is wrong with a name that [`is_id`] refuses.
pub(crate) const NOT_AN_ID: &str =
    "it has to begin with a letter or a digit, and go on with these, _, . or -";

/// Whether a container or a network may be called that.
pub(crate) fn is_id(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

fn not_an_ifname(text: &str) -> Option<&'static str> {
    if text.len() > 15 {
        return Some("an interface's name has at most 15 characters");
    }
    if [".", ".."].contains(&text) || text.contains(|c: char| c == '/' || c == ':' || c.is_whitespace()) {
        return Some("no interface can have this name");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(vars: &[(&str, &str)], command: Command) -> Result<Attachment> {
        let var = |name: &str| vars.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).into());
        Attachment::read(var, command)
    }

    #[test]
    fn commands_and_the_versions_that_have_them() {
        for (text, wanted) in [
            (Some("ADD"), Ok((Command::Add, Version::V031))),
            (Some("DEL"), Ok((Command::Del, Version::V031))),
            (Some("CHECK"), Ok((Command::Check, Version::V040))),
            (Some("GC"), Ok((Command::Gc, Version::V110))),
            (Some("STATUS"), Ok((Command::Status, Version::V110))),
            (Some("VERSION"), Ok((Command::Version, Version::V031))),
            (Some("add"), Err(Code::Environment)),
            (Some(""), Err(Code::Environment)),
            (None, Err(Code::Environment)),
        ] {
            let command = Command::read(|_| text.map(Into::into));
            assert_eq!(command.map(|c| (c, c.since())).map_err(|e| e.code), wanted, "{text:?}");
        }
        assert!(Command::read(|_| None).unwrap_err().msg.contains("CNI_COMMAND"));
    }

    #[test]
    fn what_is_missing_is_named() {
        let whole = [("CNI_CONTAINERID", "a1"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", "/n")];
        let attachment = read(&whole, Command::Add).unwrap();
        assert_eq!((attachment.ifname.as_str(), attachment.netns), ("eth0", Some("/n".into())));
        for (name, _) in whole {
            let rest: Vec<_> = whole.into_iter().filter(|(key, _)| *key != name).collect();
            for (command, needed) in
                [(Command::Add, true), (Command::Check, true), (Command::Del, name != "CNI_NETNS")]
            {
                let result = read(&rest, command);
                assert_eq!(result.is_err(), needed, "{command:?} without {name}");
                if let Err(error) = result {
                    assert!(error.code == Code::Environment && error.msg.contains(name), "{error}");
                }
            }
        }
        let error = read(&[("CNI_IFNAME", "")], Command::Add).unwrap_err();
        assert_eq!(error.msg, "ADD needs CNI_CONTAINERID, CNI_IFNAME, CNI_NETNS, not set");
        assert_eq!(read(&whole[..2], Command::Del).unwrap().netns, None);
    }

    #[test]
    fn names_are_checked() {
        for (id, good) in [
            ("0123456789abcdef", true),
            ("a_b.c-d", true),
            ("-a", false),
            (".", false),
            ("../../etc/passwd", false),
            ("a b", false),
            ("ä", false),
        ] {
            assert_eq!(is_id(id), good, "{id}");
            let result = read(&[("CNI_CONTAINERID", id), ("CNI_IFNAME", "eth0")], Command::Del);
            assert_eq!(result.is_ok(), good, "{id}");
        }
        for (name, good) in [
            ("eth0", true),
            ("fifteen-letters", true),
            ("sixteen-letters-", false),
            (".", false),
            ("..", false),
            ("a/b", false),
            ("a:b", false),
            ("a b", false),
        ] {
            let result = read(&[("CNI_CONTAINERID", "a"), ("CNI_IFNAME", name)], Command::Del);
            assert_eq!(result.is_ok(), good, "{name}");
        }
    }

    #[test]
    fn the_pods_name_is_among_the_arguments() {
        let pod = |args| {
            let vars = [("CNI_CONTAINERID", "a"), ("CNI_IFNAME", "eth0"), ("CNI_ARGS", args)];
            read(&vars, Command::Del).unwrap().pod
        };
        let whole = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u";
        assert_eq!(pod(whole).as_deref(), Some("shop/web-0"));
        for without in ["", "K8S_POD_NAME=web-0", ";;=;K8S_POD_NAMESPACE", "IP=1.2.3.4"] {
            assert_eq!(pod(without), None, "{without}");
        }
    }
}
