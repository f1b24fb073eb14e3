//! Who a lab belongs to, and taking it down whatever became of its owner.

use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, umount2};

use super::{cgroup, netns};

/// Where labs keep their state: a directory for each lab, with `owner`, `lab.json` and a directory for each host.
pub(crate) const DIR: &str = "/run/lb-lab";

const PERSISTENT: &str = "persistent";

/// The directory of a lab.
pub(crate) fn lab_dir(lab: &str) -> PathBuf {
    Path::new(DIR).join(lab)
}

/// Names of all labs of this machine.
pub(crate) fn labs() -> Vec<String> {
    let names = fs::read_dir(DIR).into_iter().flatten().flatten();
    // What begins with a dot is being made: it has no owner yet, and must not be taken for one whose owner has died.
    let names = names.filter_map(|e| e.file_name().into_string().ok()).filter(|name| !name.starts_with('.'));
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

/// A process, told apart from a later one with the same id by its start time.
fn identity(pid: &str) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name may contain anything; the start time is the 20th field after it.
    let start = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?;
    Some(format!("{pid} {start}"))
}

/// What `owner` says, empty if there is none.
pub(crate) fn of(lab: &str) -> String {
    fs::read_to_string(lab_dir(lab).join("owner")).unwrap_or_default()
}

/// Who keeps the lab up, in words.
pub(crate) fn describe(lab: &str) -> String {
    match of(lab) {
        owner if owner == PERSISTENT => "until taken down".into(),
        owner if is_alive(&owner) => {
            format!("while process {} runs", owner.split(' ').next().unwrap_or_default())
        }
        _ => "its process has died".into(),
    }
}

fn is_alive(owner: &str) -> bool {
    owner == PERSISTENT
        || owner.split_once(' ').is_some_and(|(pid, _)| identity(pid).as_deref() == Some(owner))
}

/// Takes the name for this process. The directory appears with its owner inside, so that nobody sees it ownerless.
pub(crate) fn claim(lab: &str) -> Result<()> {
    let me = std::process::id().to_string();
    let fresh = Path::new(DIR).join(format!(".{lab}.{me}"));
    // Another lab may be removing the common parent at this moment.
    let create = || fs::create_dir_all(&fresh);
    create()
        .or_else(|_| create())
        .with_context(|| format!("creating {} (root is needed)", fresh.display()))?;
    fs::write(fresh.join("owner"), identity(&me).context("reading /proc/self/stat")?)?;
    if let Err(e) = fs::rename(&fresh, lab_dir(lab)) {
        fs::remove_dir_all(&fresh)?;
        if e.kind() == ErrorKind::DirectoryNotEmpty {
            bail!("there is a lab {lab} already: cargo xtask lab down {lab}");
        }
        return Err(e).with_context(|| format!("creating {}", lab_dir(lab).display()));
    }
    Ok(())
}

/// From now on the lab stays until somebody takes it down.
pub(crate) fn make_persistent(lab: &str) -> Result<()> {
    Ok(fs::write(lab_dir(lab).join("owner"), PERSISTENT)?)
}

/// Takes down the labs whose owner has died.
pub(crate) fn reap_dead() -> Result<()> {
    labs().into_iter().filter(|lab| !is_alive(&of(lab))).try_for_each(|lab| teardown(&lab))
}

/// Removes everything that a lab consists of, processes included. May run twice, also at the same time.
pub(crate) fn teardown(lab: &str) -> Result<()> {
    cgroup::destroy(&cgroup::lab_dir(lab)?)?;
    let dir = lab_dir(lab);
    let mounts = fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
    for at in mounts.lines().filter_map(|l| l.split(' ').nth(1)).filter(|at| Path::new(at).starts_with(&dir))
    {
        let _ = umount2(at, MntFlags::MNT_DETACH);
    }
    for host in fs::read_dir(&dir).into_iter().flatten().flatten().filter(|e| e.path().is_dir()) {
        netns::delete(&format!("{lab}-{}", host.file_name().display()));
    }
    match fs::remove_dir_all(&dir) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("removing {}", dir.display()));
        }
        _ => {}
    }
    // The last lab takes the common parent along; with others still there this fails, as it should.
    let _ = fs::remove_dir(DIR);
    Ok(())
}

/// A process that takes the lab down when this one ends in any way.
#[derive(Debug)]
pub(crate) struct Reaper(Child);

impl Reaper {
    /// Starts it. It notices the end of this process by the end of its own standard input.
    pub(crate) fn start(exe: &Path, lab: &str) -> Result<Self> {
        let mut command = Command::new(exe);
        command.args(["lab", "reap", lab, &of(lab)]).stdin(Stdio::piped()).stdout(Stdio::null());
        // SAFETY: setsid is async-signal-safe. Ctrl-C at the terminal is for the owner, not for its reaper.
        unsafe { command.pre_exec(|| Ok(nix::unistd::setsid().map(drop)?)) };
        let child =
            command.spawn().with_context(|| format!("starting {} as the lab's reaper", exe.display()))?;
        Ok(Self(child))
    }

    /// Lets it go; it finds nothing left to do if the lab has been taken down.
    pub(crate) fn finish(mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// The reaper's side: waits for the owner's end and takes the lab down if it is still the same owner's.
pub(crate) fn reap(lab: &str, owner: &str) -> Result<()> {
    std::io::stdin().read_to_end(&mut Vec::new())?;
    if of(lab) == owner { teardown(lab) } else { Ok(()) }
}

/// The xtask binary: `$LB_XTASK`, this program, or the one in the build directory that this program lies in.
pub fn xtask_exe() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("LB_XTASK") {
        return Ok(path.into());
    }
    let own = std::env::current_exe().context("finding this program's own path")?;
    // A build may have replaced the file while this program runs: then its name ends in " (deleted)".
    if own.file_name().is_some_and(|n| n == "xtask" || n == "xtask (deleted)") {
        return Ok("/proc/self/exe".into());
    }
    match own.ancestors().skip(1).take(3).map(|dir| dir.join("xtask")).find(|p| p.is_file()) {
        Some(path) => Ok(path),
        None => bail!(
            "no xtask binary near {}: run `cargo build -p xtask` or set LB_XTASK to its path",
            own.display()
        ),
    }
}
