//! Kernel packages from Debian's archive, through an apt of our own: the system's sources, lists and packages are
//! read for the mirror's address and otherwise left alone.

use crate::system::output;
use anyhow::{Context as _, Result, bail, ensure};
use std::cmp::Ordering;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Suites that between them hold every kernel of the matrix, and whether each is in the security archive.
const SUITES: [(&str, bool); 5] = [
    ("bullseye-security", true),
    ("bookworm-security", true),
    ("trixie", false),
    ("trixie-backports", false),
    ("forky", false),
];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A private apt root.
pub(super) struct Apt {
    config: PathBuf,
    /// What `apt-get update` complained about, for the error message of a kernel that is not found.
    complaints: String,
}

/// A kernel image package and what belongs to it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) package: String,
    pub(super) version: String,
    /// `package=version` of the image and of the packages that newer kernels are split into.
    parts: Vec<String>,
    /// The same of `linux-base-…`: up to 6.18 it is empty, and may be gone while the kernel is still there.
    base: Option<String>,
}

impl Apt {
    /// Sets up the root under `dir` and fetches the package lists; `mirror` is a Debian archive's address
    /// (`…/debian`) to use in place of the system's.
    pub(super) fn open(dir: &Path, mirror: Option<&str>) -> Result<Self> {
        for sub in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(sub)).with_context(|| format!("create {}/{sub}", dir.display()))?;
        }
        let dir = dir.canonicalize()?;
        let (main, security) = match mirror {
            Some(mirror) => (mirror.to_owned(), security_of(mirror)),
            None => system_mirror()?,
        };
        let options =
            if Path::new(KEYRING).exists() { format!("signed-by={KEYRING}") } else { String::new() };
        let mut sources = String::new();
        for (suite, from_security) in SUITES {
            let uri = if from_security { &security } else { &main };
            writeln!(sources, "deb [arch=amd64 {options}] {uri} {suite} main")?;
        }
        fs::write(dir.join("sources.list"), sources)?;
        fs::write(dir.join("status"), "")?;
        let config = dir.join("apt.conf");
        fs::write(&config, config_file(&dir))?;
        let mut apt = Self { config, complaints: String::new() };
        // An index that cannot be fetched is only a warning for apt: the kernels of the other suites still work.
        let update = apt.command("apt-get").args(["update", "-q"]).output().context("start apt-get")?;
        apt.complaints = String::from_utf8_lossy(&update.stderr)
            .lines()
            .filter(|l| l.starts_with("W:") || l.starts_with("E:"))
            .fold(String::new(), |all, line| all + "\n  " + line);
        ensure!(
            update.status.success(),
            "apt-get update, with the mirror of the system's sources:{}",
            apt.complaints
        );
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(&self.config).env("LC_ALL", "C").stdin(std::process::Stdio::null());
        command
    }

    /// The image packages of a kernel series (`6.1`), newest first.
    pub(super) fn candidates(&self, series: &str) -> Result<Vec<Candidate>> {
        let pattern = format!("^linux-image-{}[.][0-9][^ ]*-cloud-amd64$", series.replace('.', "[.]"));
        let found = output(self.command("apt-cache").args(["search", "--names-only", &pattern]))?;
        let names: Vec<&str> = found.lines().filter_map(|line| line.split(' ').next()).collect();
        if names.is_empty() {
            let suites = SUITES.map(|(suite, _)| suite).join(", ");
            bail!("no linux-image-{series}.*-cloud-amd64 in {suites}{}", self.complaints);
        }
        let mut candidates = parse(&output(self.command("apt-cache").arg("show").args(names))?);
        candidates.sort_by(|a, b| compare_versions(&b.version, &a.version));
        Ok(candidates)
    }

    /// Downloads a candidate's packages and unpacks them, one over the other, into `dir`.
    pub(super) fn unpack(&self, candidate: &Candidate, dir: &Path) -> Result<()> {
        let debs = tempfile::tempdir_in(dir.parent().context("the cache has a parent")?)?;
        let base = candidate.base.as_ref();
        // Of a package that is only named by others, apt-cache shows nothing and is content.
        let there = |base: &&String| {
            output(self.command("apt-cache").arg("show").arg(base)).is_ok_and(|s| !s.is_empty())
        };
        let base = base.filter(there);
        let mut download = self.command("apt-get");
        output(download.args(["download", "-q"]).args(&candidate.parts).args(base).current_dir(debs.path()))?;
        for deb in fs::read_dir(debs.path())? {
            output(Command::new("dpkg").arg("-x").arg(deb?.path()).arg(dir))?;
        }
        Ok(())
    }
}

/// Read after the system's configuration, so that its proxy settings hold here too; its hooks would clean the
/// system's caches and are left out.
fn config_file(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        r#"Dir::State "{dir}";
Dir::State::lists "{dir}/lists";
Dir::State::status "{dir}/status";
Dir::Cache "{dir}/cache";
Dir::Etc::sourcelist "{dir}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
APT::Architecture "amd64";
APT::Sandbox::User "root";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"#
    )
}

/// The archive and the security archive that this machine's apt uses.
fn system_mirror() -> Result<(String, String)> {
    let targets = output(Command::new("apt-get").args([
        "indextargets",
        "Created-By: Packages",
        "--format",
        "$(RELEASE) $(REPO_URI)",
    ]))?;
    let os_release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    pick_mirror(&targets, &os_release).context(
        "the kernels come from Debian's archive, and this machine's apt has no Debian source: name one with --mirror",
    )
}

fn pick_mirror(targets: &str, os_release: &str) -> Option<(String, String)> {
    let codename = os_release.lines().find_map(|l| l.strip_prefix("VERSION_CODENAME="))?.trim_matches('"');
    let debian = os_release.lines().any(|l| l == "ID=debian");
    let uri_of = |release: &str| {
        targets
            .lines()
            .filter_map(|l| l.split_once(' '))
            .find(|(r, _)| *r == release)
            .map(|(_, uri)| uri.to_owned())
    };
    let main = uri_of(codename).filter(|_| debian)?;
    let security = uri_of(&format!("{codename}-security")).unwrap_or_else(|| security_of(&main));
    Some((main, security))
}

/// Mirrors keep the two archives side by side.
fn security_of(main: &str) -> String {
    format!("{}-security", main.trim_end_matches('/'))
}

/// Reads `apt-cache show`.
fn parse(show: &str) -> Vec<Candidate> {
    show.split("\n\n")
        .filter_map(|stanza| {
            let field = |name: &str| stanza.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(": "));
            let (package, version) = (field("Package")?, field("Version")?);
            let abi = package.strip_prefix("linux-image-")?;
            let depends = field("Depends").unwrap_or_default();
            let part = |kind: &str| {
                let name = format!("linux-{kind}-{abi}");
                let needed = depends.split(", ").any(|d| d.split(' ').next() == Some(&name));
                needed.then(|| format!("{name}={version}"))
            };
            let image = format!("{package}={version}");
            let parts = [Some(image), part("binary"), part("modules")].into_iter().flatten().collect();
            Some(Candidate { package: package.into(), version: version.into(), parts, base: part("base") })
        })
        .collect()
}

fn compare_versions(a: &str, b: &str) -> Ordering {
    let is = |relation: &str| {
        Command::new("dpkg").args(["--compare-versions", a, relation, b]).status().is_ok_and(|s| s.success())
    };
    if is("lt") {
        Ordering::Less
    } else if is("gt") {
        Ordering::Greater
    } else {
        Ordering::Equal
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_kernel_brings_its_parts() {
        let show = "Package: linux-image-7.2.12+deb14-cloud-amd64\nVersion: 7.2.12-1\nDepends: dracut | \
                    initramfs-tools (>= 0.1), linux-base-7.2.12+deb14-cloud-amd64 (= 7.2.12-1), \
                    linux-binary-7.2.12+deb14-cloud-amd64 (= 7.2.12-1), linux-modules-7.2.12+deb14-cloud-amd64 (= \
                    7.2.12-1)\nPre-Depends: linux-base (>= 4.17~)\n\nPackage: linux-image-5.10.0-46-cloud-amd64\n\
                    Version: 5.10.262-1\nDepends: kmod, linux-base (>= 4.3~)\n";
        let found = parse(show);
        assert_eq!(found.len(), 2);
        let names: Vec<_> = found[0].parts.iter().map(|p| p.split('-').nth(1).unwrap()).collect();
        assert_eq!(names, ["image", "binary", "modules"]);
        assert_eq!(found[0].base.as_deref(), Some("linux-base-7.2.12+deb14-cloud-amd64=7.2.12-1"));
        assert_eq!(found[1].parts, ["linux-image-5.10.0-46-cloud-amd64=5.10.262-1"]);
    }

    #[test]
    fn the_mirror_is_the_systems_own() {
        let os = "ID=debian\nVERSION_CODENAME=bookworm\n";
        let targets =
            "nodistro http://other/x/\nbookworm http://m/debian/\nbookworm-updates http://m/debian/\n";
        let pair = |a: &str, b: &str| Some((a.to_owned(), b.to_owned()));
        assert_eq!(pick_mirror(targets, os), pair("http://m/debian/", "http://m/debian-security"));
        let with_security = format!("{targets}bookworm-security http://s/sec/\n");
        assert_eq!(pick_mirror(&with_security, os), pair("http://m/debian/", "http://s/sec/"));
        assert_eq!(pick_mirror("noble http://u/ubuntu/\n", "ID=ubuntu\nVERSION_CODENAME=noble\n"), None);
    }
}
