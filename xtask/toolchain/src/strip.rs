//! Takes out of an object what its loader has no use for.

use anyhow::{Context as _, Result};
use object::build::elf::{Builder, SectionData};
use object::elf::SHT_STRTAB;

/// An object file without DWARF, which is four fifths of it. BTF stays: the kernel wants it, and its line numbers show in the
/// verifier's log.
///
/// # Errors
/// If it is no object file.
pub fn without_dwarf(object: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::read(object).context("read the object file")?;
    for section in &mut builder.sections {
        let name = section.name.strip_prefix(b".rel").unwrap_or(&section.name);
        section.delete = name.starts_with(b".debug");
    }
    // LLVM keeps the names of sections and symbols in one table, this library in two.
    let names = builder.sections.add();
    names.name = b".shstrtab"[..].into();
    names.sh_type = SHT_STRTAB;
    names.sh_addralign = 1;
    names.data = SectionData::SectionString;
    builder.delete_orphans();
    let mut stripped = Vec::new();
    builder.write(&mut stripped).context("write the object file")?;
    Ok(stripped)
}
