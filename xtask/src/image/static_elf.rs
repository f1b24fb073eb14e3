//! Programs that need nothing but the kernel: there is nothing else in the image.

use anyhow::{Context as _, Result, ensure};
use object::Endianness;
use object::elf::{FileHeader64, PT_INTERP};
use object::read::elf::{FileHeader as _, ProgramHeader as _};
use std::path::Path;

/// Refuses a program that a dynamic loader would have to load.
pub(super) fn check(program: &Path) -> Result<()> {
    let name = program.display();
    let data = std::fs::read(program).with_context(|| format!("read {name}"))?;
    ensure!(
        !needs_loader(&data).with_context(|| format!("{name} is no program"))?,
        "{name} is not linked statically"
    );
    Ok(())
}

fn needs_loader(data: &[u8]) -> Result<bool> {
    let header = FileHeader64::<Endianness>::parse(data)?;
    let endian = header.endian()?;
    let segments = header.program_headers(endian, data)?;
    Ok(segments.iter().any(|segment| segment.p_type(endian) == PT_INTERP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ordinary_program_has_a_loader() {
        let own = std::env::current_exe().unwrap();
        let error = check(&own).unwrap_err().to_string();
        assert!(error.ends_with("is not linked statically"), "{error}");
        assert!(needs_loader(b"#!/bin/sh").is_err());
    }
}
