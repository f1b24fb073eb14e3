//! `lb-cni`, a chained CNI plugin: puts the node agent's programs on a pod's device before the pod starts, so that the
//! pod's first packet is served, whether the agent runs or not. It makes no interfaces and changes no result.
//!
//! - `env`, `config`, `version`: what the runtime says, in any version of the specification. - `pod`: finds the
//!   device. - `verbs`: what is done. - `error`, `log`: what is said about it.

mod config;
mod env;
mod error;
mod log;
mod pod;
mod verbs;
mod version;

use config::Config;
use env::{Attachment, Command};
use error::{Code, Error, Result};
use log::Log;
use serde_json::{Map, Value};
use std::io::{self, Read, Write as _};
use std::process::ExitCode;
use verbs::Call;
use version::Version;

fn main() -> ExitCode {
    if std::env::args().nth(1).is_some_and(|arg| arg == "--version" || arg == "-V") {
        println!("lb-cni {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let (answer, status) = match run(|name| std::env::var(name).ok(), io::stdin()) {
        Ok(answer) => (answer, ExitCode::SUCCESS),
        Err((error, version)) => (Some(error.json(version)), ExitCode::FAILURE),
    };
    match answer.map_or(Ok(()), |answer| writeln!(io::stdout(), "{answer}")) {
        Ok(()) => status,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Does what the environment says with the configuration in `input`. An error comes with the version to say it in.
fn run(
    var: impl Fn(&str) -> Option<String>,
    mut input: impl Read,
) -> Result<Option<Value>, (Error, Version)> {
    let newest = |error| (error, Version::NEWEST);
    let command = Command::read(&var).map_err(newest)?;
    let mut text = Vec::new();
    let read = input.read_to_end(&mut text);
    let json = read
        .map_err(|error| Code::Io.error("cannot read the configuration from standard input").because(error))
        .and_then(|_| parse(&text));
    if command == Command::Version {
        return Ok(Some(Version::answer(
            json.ok().and_then(|json| json.get("cniVersion").cloned()).as_ref(),
        )));
    }
    let json = json.map_err(newest)?;
    let config = Config::read(&json, command);
    let version = Version::parse(json.get("cniVersion")).unwrap_or(Version::NEWEST);
    let config = config.map_err(|error| (error, version))?;
    let log = Log::new(config.ours.log_file.clone());
    act(command, &config, var, &log).map_err(|error| {
        log.say(&format!("{}: {error}", command.as_str()));
        (error, version)
    })
}

fn parse(text: &[u8]) -> Result<Map<String, Value>> {
    let wrong = || Code::Decode.error("the configuration on standard input is no JSON object");
    match serde_json::from_slice(text) {
        Ok(Value::Object(json)) => Ok(json),
        Ok(_) => Err(wrong()),
        Err(error) => Err(wrong().because(error)),
    }
}

fn act(
    command: Command,
    config: &Config,
    var: impl Fn(&str) -> Option<String>,
    log: &Log,
) -> Result<Option<Value>> {
    let call = Call::new(config, log);
    let attachment = || Attachment::read(&var, command);
    match command {
        Command::Add => return call.add(&attachment()?).map(|result| Some(result.into())),
        Command::Del => call.del(&attachment()?),
        Command::Check => call.check(&attachment()?),
        Command::Gc => call.gc(),
        Command::Status => call.status(),
        Command::Version => Ok(()),
    }?;
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn run(vars: &[(&str, &str)], input: &str) -> Result<Option<Value>, (Error, Version)> {
        let var = |name: &str| vars.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).into());
        super::run(var, input.as_bytes())
    }

    #[test]
    fn versions_are_told_whatever_the_input() {
        let ask = |input| run(&[("CNI_COMMAND", "VERSION")], input).unwrap().unwrap();
        assert_eq!(ask(r#"{"cniVersion": "1.0.0"}"#)["cniVersion"], "1.0.0");
        for input in ["", "{", "[]", r#"{"cniVersion": 1}"#] {
            assert_eq!(ask(input)["cniVersion"], "1.1.0", "{input}");
            assert_eq!(ask(input)["supportedVersions"][0], "0.3.1", "{input}");
        }
    }

    #[test]
    fn errors_are_said_in_the_version_of_the_configuration() {
        let config = |version| json!({"cniVersion": version, "name": "n", "prevResult": {}}).to_string();
        let add = ("CNI_COMMAND", "ADD");
        for (vars, input, code, version) in [
            (&[][..], config("1.0.0"), Code::Environment, Version::V110),
            (&[add], "{".into(), Code::Decode, Version::V110),
            (&[add], "[]".into(), Code::Decode, Version::V110),
            (&[add], config("0.4.0"), Code::Environment, Version::V040),
            (&[add], config("0.1.0"), Code::IncompatibleVersion, Version::V110),
            (&[("CNI_COMMAND", "STATUS")], config("1.0.0"), Code::IncompatibleVersion, Version::V100),
        ] {
            let (error, said_in) = run(vars, &input).unwrap_err();
            assert_eq!((error.code, said_in), (code, version), "{vars:?} {input}");
        }
    }

    #[test]
    fn input_that_cannot_be_read_is_said() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("the pipe burst"))
            }
        }
        let (error, _) = super::run(|_| Some("STATUS".into()), Broken).unwrap_err();
        assert_eq!((error.code, error.details.as_str()), (Code::Io, "the pipe burst"));
    }
}
