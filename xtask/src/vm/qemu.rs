//! Boots a kernel and brings home what the guest reported.

use super::report::Report;
use anyhow::{Context as _, Result, bail};
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How a boot ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The payload ran to its end; its exit status, and its report if it wrote one.
    Exited(i32, Option<Report>),
    /// The guest stopped without a word: a crash of the kernel or of QEMU.
    Crashed,
    /// Still running when its time was up.
    TimedOut,
}

/// The files and limits of one boot.
pub(super) struct Boot<'a> {
    pub(super) image: &'a Path,
    pub(super) initramfs: &'a Path,
    /// The console goes here; the second serial port, which carries the result, beside it.
    pub(super) log: &'a Path,
    pub(super) timeout: Duration,
}

impl Boot<'_> {
    /// Runs the guest to its end.
    ///
    /// # Errors
    /// If QEMU cannot be started or refuses its arguments.
    pub(super) fn run(&self) -> Result<Outcome> {
        let result = self.log.with_extension("result");
        fs::write(&result, "").with_context(|| format!("write {}", result.display()))?;
        let mut guest = Guest(
            Command::new("qemu-system-x86_64")
                // Emulation always: stock kernels hang under nested KVM. Without cx16, because QEMU 7 with plain
                // `max` crashes now and then.
                .args(["-accel", "tcg", "-M", "q35", "-cpu", "max,-cx16", "-m", "1024", "-smp", "1"])
                .args(["-nodefaults", "-display", "none", "-no-reboot"])
                .arg("-serial")
                .arg(format!("file:{}", self.log.display()))
                .arg("-serial")
                .arg(format!("file:{}", result.display()))
                .arg("-kernel")
                .arg(self.image)
                .arg("-initrd")
                .arg(self.initramfs)
                .args(["-append", super::COMMAND_LINE])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .context("start qemu-system-x86_64")?,
        );
        let deadline = Instant::now() + self.timeout;
        let status = loop {
            if let Some(status) = guest.0.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                return Ok(Outcome::TimedOut);
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        // Killed by a signal is a crash like the guest's; an exit status is a complaint about our arguments.
        if status.code().is_some_and(|code| code != 0) {
            let mut said = String::new();
            if let Some(mut stderr) = guest.0.stderr.take() {
                std::io::Read::read_to_string(&mut stderr, &mut said)?;
            }
            bail!("qemu-system-x86_64: {status}: {}", said.trim());
        }
        Ok(outcome(&fs::read_to_string(&result)?))
    }
}

/// A guest that does not outlive us, whichever way we leave.
struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Reads what init wrote: a line of JSON if there is a report, then `exit N`.
fn outcome(result: &str) -> Outcome {
    let status = result.lines().find_map(|line| line.trim().strip_prefix("exit ")?.parse().ok());
    let report = result.lines().find_map(|line| serde_json::from_str(line.trim()).ok());
    status.map_or(Outcome::Crashed, |status| Outcome::Exited(status, report))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_exit_status_is_a_crash() {
        assert!(matches!(outcome(""), Outcome::Crashed));
        assert!(matches!(
            outcome("{\"release\":\"6.1\",\"boot_seconds\":1.5,\"checks\":[]}\r\n"),
            Outcome::Crashed
        ));
        assert!(matches!(outcome("exit 3\r\n"), Outcome::Exited(3, None)));
    }

    #[test]
    fn a_report_survives_the_serial_line() {
        let mut report =
            Report { release: "6.1.0".into(), attach: Some("clsact".into()), ..Default::default() };
        report.check("veth", Err(anyhow::anyhow!("no \"veth\"")));
        let line = format!("{}\r\nexit 1\r\n", serde_json::to_string(&report).unwrap());
        let Outcome::Exited(1, Some(read)) = outcome(&line) else { panic!("{:?}", outcome(&line)) };
        assert_eq!(read, report);
    }
}
