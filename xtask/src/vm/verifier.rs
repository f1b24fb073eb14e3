//! Loads every program by itself: an agent that does without one on some kernel would hide what its verifier says.

use super::report::Report;
use anyhow::{Context as _, Result, bail};
use aya::EbpfLoader;
use aya::programs::{Program, ProgramError};
use std::path::Path;

/// Before, the verifier rounds each frame of the stack up to 32 bytes, not 16: the programs that redirect do not fit.
pub(super) const SHORT_FRAMES_SINCE: (u32, u32) = (6, 12);

/// Lines of the verifier's log that go into the report; the console has all.
const LOG_LINES: usize = 6;

/// Loads each program of the object file.
pub(super) fn load_all(report: &mut Report, object: &Path) -> Result<()> {
    let mut ebpf = EbpfLoader::new().load_file(object).context("load the maps and the object file")?;
    let mut none = true;
    for (name, program) in ebpf.programs_mut() {
        none = false;
        if name.ends_with("_redirect") && super::loaded::version(&report.release) < Some(SHORT_FRAMES_SINCE) {
            println!("{name} is not for this kernel; its agent is to go on without");
            continue;
        }
        // An old kernel may need minutes to say no.
        println!("loading {name}");
        let (summary, result) = load(program).map_or_else(|e| (None, Err(e)), |s| (Some(s), Ok(())));
        report.check(format!("verifier: {name}"), result);
        summary.iter().for_each(|summary| println!("      {summary}"));
    }
    if none {
        bail!("{} holds no program", object.display());
    }
    Ok(())
}

fn load(program: &mut Program) -> Result<String> {
    let result = match program {
        Program::SchedClassifier(p) => p.load().and_then(|()| p.info()),
        Program::Xdp(p) => p.load().and_then(|()| p.info()),
        Program::CgroupSockAddr(p) => p.load().and_then(|()| p.info()),
        other => bail!("a program of type {:?}: teach {} to load it", other.prog_type(), file!()),
    };
    let info = match result {
        Ok(info) => info,
        Err(ProgramError::LoadError { io_error, verifier_log }) => {
            let log = verifier_log.to_string();
            println!("{log}");
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n    ");
            bail!("{io_error}\n    {tail}");
        }
        Err(error) => return Err(error.into()),
    };
    // Linux says so from 5.16 on.
    let visited = info.verified_instruction_count().map_or_else(|| "?".into(), |n| n.to_string());
    Ok(format!("{visited} instructions verified, {} bytes", info.size_translated().unwrap_or_default()))
}
