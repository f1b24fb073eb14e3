//! What the builder's tools need from the machine they run on.

use anyhow::{Context as _, Result, bail, ensure};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

/// Where a program is, if it can be run: `PATH`, then the directories that a plain user's `PATH` lacks.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    file.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Makes sure of programs, given as `(Debian package, program)`; installs the packages whose programs are missing.
///
/// # Errors
/// If programs are missing and this is not a machine with apt-get, or not root: the message names the packages.
pub fn ensure_debian_packages(wanted: &[(&str, &str)]) -> Result<()> {
    if missing(wanted).is_empty() {
        return Ok(());
    }
    // Tests that run side by side must not meet at dpkg's lock.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock();
    let missing = missing(wanted);
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|(package, _)| *package).collect();
    let programs: Vec<&str> = missing.iter().map(|(_, program)| *program).collect();
    let (packages, programs) = (packages.join(" "), programs.join(", "));
    if find_program("apt-get").is_none() {
        bail!("{programs} not found: install what Debian calls {packages}");
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("{programs} not found: run as root, or first `apt-get install {packages}`");
    }
    eprintln!("{programs} not found: installing Debian's {packages}");
    apt_get(&["update", "-q"])?;
    let mut install = vec!["install", "-q", "-y", "--no-install-recommends"];
    install.extend(packages.split(' '));
    apt_get(&install)?;
    let still = self::missing(wanted);
    ensure!(still.is_empty(), "apt-get installed {packages}, but there is still no {still:?}");
    Ok(())
}

fn missing<'a>(wanted: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    wanted.iter().copied().filter(|(_, program)| find_program(program).is_none()).collect()
}

fn apt_get(args: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.args(args).env("DEBIAN_FRONTEND", "noninteractive");
    output(&mut command).map(drop)
}

/// Runs a program without input and returns its standard output; what it says is shown only if it fails.
///
/// # Errors
/// If it cannot be started or fails: the message holds the end of its output.
pub fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("start {name}"))?;
    let stdout = String::from_utf8_lossy(&out.stdout).into_owned();
    if !out.status.success() {
        let args: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
        let said = format!("{stdout}{}", String::from_utf8_lossy(&out.stderr));
        let lines: Vec<_> = said.lines().collect();
        let tail = lines[lines.len().saturating_sub(15)..].join("\n  ");
        bail!("`{name} {}`: {}\n  {tail}", args.join(" "), out.status);
    }
    Ok(stdout)
}

/// The cargo that runs this tool, in the workspace's root.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace());
    // What `cargo run` and `cargo test` say of the package that they run. A build script that asks to be run again when it
    // changes (ring's does) would be whenever this tool is started in another way than the last time, and all that is built
    // on it, the agent included, built again.
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| OF_A_PACKAGE.iter().any(|prefix| name.starts_with(prefix))) {
            cargo.env_remove(name);
        }
    }
    cargo
}

/// How the variables begin that cargo sets for one package.
const OF_A_PACKAGE: [&str; 3] = ["CARGO_MANIFEST_", "CARGO_PKG_", "CARGO_BIN_"];

/// The workspace's root, where this tool was built.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a member's directory is in the workspace's")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_is_there_and_names_what_is_not() {
        assert!(find_program("sh").is_some_and(|p| p.is_absolute()));
        assert_eq!(
            missing(&[("dash", "sh"), ("some-package", "no-such-program")]),
            [("some-package", "no-such-program")]
        );
    }

    #[test]
    fn a_build_does_not_depend_on_who_starts_it() {
        assert!(std::env::var_os("CARGO_PKG_NAME").is_some(), "a test run by cargo has it");
        let removed: Vec<_> =
            cargo().get_envs().filter(|(_, to)| to.is_none()).map(|(name, _)| name.to_owned()).collect();
        for name in ["CARGO_MANIFEST_DIR", "CARGO_PKG_NAME", "CARGO_PKG_VERSION_PRE"] {
            assert!(removed.contains(&name.into()), "{name}");
        }
        assert!(!removed.contains(&"CARGO_HOME".into()));
    }

    #[test]
    fn a_failing_program_is_quoted() {
        let error = output(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.ends_with("why"), "{error}");
    }
}
