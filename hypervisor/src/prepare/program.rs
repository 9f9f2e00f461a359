//! Programs and libraries.

use super::eh_frame;
use super::elf::{EM_386, EM_X86_64, ET_DYN, ET_EXEC, Elf};
use super::error::PrepareError;
use super::report::{FileReport, Kind};
use super::rewrite::{FLOODED, Functions, Look, Patch, Ring, apply, functions};

/// Prepares a program or library. One that cannot be read is left as it is, and the report says why.
#[must_use]
pub fn program(mut bytes: Vec<u8>, path: &str) -> (Vec<u8>, FileReport) {
    let looked = Elf::parse(&bytes).and_then(|elf| look(&elf, path, Kind::Program, 0));
    match looked {
        Ok((report, patches)) => {
            apply(&mut bytes, &patches);
            (bytes, report)
        }
        Err(error) => (
            bytes,
            FileReport::skipped(path, Kind::Program, error.to_string()),
        ),
    }
}

/// Looks through an ELF file whose code programs execute and which starts at byte `base` of the file to be patched.
pub(super) fn look(
    elf: &Elf<'_>,
    path: &str,
    kind: Kind,
    base: usize,
) -> Result<(FileReport, Vec<Patch>), PrepareError> {
    let skipped = |why: String| Ok((FileReport::skipped(path, kind, why), Vec::new()));
    if !(elf.machine == EM_X86_64 || elf.machine == EM_386) {
        return skipped(format!("it is for another machine ({})", elf.machine));
    }
    if !(elf.kind == ET_EXEC || elf.kind == ET_DYN) {
        return skipped("it is an object file, which nothing runs as it is".into());
    }
    if elf.sections.is_empty() {
        return skipped(
            "it has no sections, so nothing says which of its bytes are instructions".into(),
        );
    }
    let mut look = Look {
        elf,
        ring: Ring::User,
        base,
        report: FileReport::new(path, kind),
        patches: Vec::new(),
    };
    let functions = starts(elf);
    for (section, functions) in elf.sections.iter().zip(&functions) {
        if section.is_code() {
            look.section(section, functions);
        }
    }
    if look.is_flooded() {
        return skipped(FLOODED.into());
    }
    Ok((look.report, look.patches))
}

/// Where functions start: as symbols say, the tables for unwinding, and the header. A section's first byte is one in any case.
fn starts(elf: &Elf<'_>) -> Vec<Functions> {
    let mut functions = functions(elf);
    let mut add = |address: u64| {
        if let Some((number, section)) = elf.section_at(address)
            && let Some(into) = section.within(address)
            && section.is_code()
        {
            functions[number].add(into, "");
        }
    };
    add(elf.entry);
    for section in elf
        .sections
        .iter()
        .filter(|section| section.name == ".eh_frame")
    {
        for start in eh_frame::starts(elf, section) {
            add(start);
        }
    }
    functions
}
