//! The kernel's own file.

use std::collections::BTreeMap;

use super::alternatives::{self, Alternative, REPLACEMENTS, TABLE, target};
use super::elf::{EM_X86_64, ET_DYN, ET_EXEC, Elf, is_elf, word};
use super::error::PrepareError;
use super::program;
use super::report::{FileReport, Kind, Report};
use super::rewrite::{FLOODED, Functions, Look, Patch, Ring, apply, functions};
use super::{Limits, Prepared, bzimage, counts_clock_reads, kallsyms, symbols};

/// Of so many functions one may hold bytes that are no instructions, besides a few in any case: real-mode pieces and tables in
/// assembly. Debian's has 1 among 60,000; with symbols of another kernel hardly a function begins where an instruction does.
const DOUBTFUL: usize = 100;
const DOUBTFUL_ANYWAY: usize = 8;

/// The ELF file of a kernel, taken out of its bzImage if it comes as one.
///
/// # Errors
/// [`PrepareError::Kernel`], [`PrepareError::Packed`].
pub fn vmlinux(bytes: Vec<u8>, limits: Limits) -> Result<Vec<u8>, PrepareError> {
    if is_elf(&bytes) {
        return Ok(bytes);
    }
    if !bzimage::is_bzimage(&bytes) {
        let start: Vec<u8> = bytes.iter().take(4).copied().collect();
        return Err(PrepareError::Kernel {
            why: format!(
                "it is neither a bzImage nor an ELF file (its {} bytes start with {start:02x?})",
                bytes.len()
            ),
        });
    }
    let kernel = bzimage::kernel(&bytes, limits)?;
    if is_elf(&kernel) {
        Ok(kernel)
    } else {
        Err(PrepareError::Kernel {
            why: "what the bzImage holds is no ELF file".into(),
        })
    }
}

/// Prepares a kernel: a bzImage or an ELF file, and the text of its System.map, which only one without a table of symbols needs.
///
/// # Errors
/// See [`PrepareError`].
pub fn kernel(
    bytes: Vec<u8>,
    system_map: Option<&str>,
    limits: Limits,
) -> Result<Prepared, PrepareError> {
    let mut bytes = vmlinux(bytes, limits)?;
    let (report, patches) = look(&bytes, system_map)?;
    apply(&mut bytes, &patches);
    Ok(Prepared { bytes, report })
}

fn look(bytes: &[u8], system_map: Option<&str>) -> Result<(Report, Vec<Patch>), PrepareError> {
    let elf = Elf::parse(bytes)?;
    if elf.machine != EM_X86_64 || !(elf.kind == ET_EXEC || elf.kind == ET_DYN) {
        return Err(PrepareError::Kernel {
            why: format!(
                "it is an ELF file of type {} for machine {}",
                elf.kind, elf.machine
            ),
        });
    }
    let mut code = elf.sections.iter().filter(|section| section.is_code());
    if !code.any(|section| section.address >> 63 == 1) {
        return Err(PrepareError::Kernel {
            why: "none of its code lies in the kernel's half of the addresses: it is a program"
                .into(),
        });
    }
    let functions = symbols_of(&elf, system_map)?;
    let mut look = Look {
        elf: &elf,
        ring: Ring::Kernel,
        base: 0,
        report: FileReport::new("vmlinux", Kind::Kernel),
        patches: Vec::new(),
    };
    let mut doubtful = 0;
    for (section, functions) in elf.sections.iter().zip(&functions) {
        if section.is_code() && section.name != REPLACEMENTS {
            doubtful += look.section(section, functions);
        }
    }
    let known: usize = functions.iter().map(Functions::len).sum();
    if system_map.is_some() && doubtful > known / DOUBTFUL + DOUBTFUL_ANYWAY {
        return Err(PrepareError::Symbols {
            why: format!("instructions do not begin where {doubtful} of its {known} functions do"),
        });
    }
    let alternatives = alternatives_of(&elf)?;
    if let Some((_, section)) = elf.named(REPLACEMENTS) {
        look.replacements(section, &alternatives, &functions);
    }
    let mut patched = BTreeMap::new();
    for alternative in &alternatives {
        let length = patched.entry(alternative.original).or_default();
        *length = alternative.length.max(*length);
    }
    for (number, section) in elf.sections.iter().enumerate() {
        if section.is_code() && section.name != REPLACEMENTS {
            look.clock_readers((number, section), &functions[number], &patched);
        }
    }
    look.report.counts_reads = !look.report.changes.is_empty() || counts_clock_reads(bytes);
    if look.is_flooded() {
        return Err(PrepareError::Kernel {
            why: FLOODED.into(),
        });
    }
    let mut report = Report::default();
    let mut patches = look.patches;
    report.add(look.report);
    for (file, more) in vdsos(&elf)? {
        report.add(file);
        patches.extend(more);
    }
    Ok((report, patches))
}

/// Where a kernel's functions are by its own table of symbols, as a System.map says it: what a debugger has to go by where the file's
/// table of symbols was stripped. None if it has no such table, or has symbols in its file.
///
/// # Errors
/// [`PrepareError::Elf`].
pub fn system_map(vmlinux: &[u8]) -> Result<Option<String>, PrepareError> {
    let elf = Elf::parse(vmlinux)?;
    if functions(&elf).iter().any(|functions| functions.len() > 0) {
        return Ok(None);
    }
    let mut data = elf.sections.iter().filter(|section| section.is_data());
    let is_code = |address| {
        elf.section_at(address)
            .is_some_and(|(_, section)| section.is_code())
    };
    let symbols = data.find_map(|section| kallsyms::read(elf.bytes_of(section), is_code));
    Ok(symbols.map(|symbols| {
        let line = |(address, name)| format!("{address:016x} T {name}\n");
        symbols.into_iter().map(line).collect()
    }))
}

/// The functions of each section: from a System.map, the file's table of symbols, or the kernel's own.
fn symbols_of(elf: &Elf<'_>, system_map: Option<&str>) -> Result<Vec<Functions>, PrepareError> {
    let place = |address| {
        elf.section_at(address)
            .filter(|(_, section)| section.is_code())
    };
    let placed = |symbols: Vec<(u64, String)>| {
        let mut functions = vec![Functions::default(); elf.sections.len()];
        for (address, name) in symbols {
            if let Some((number, section)) = place(address) {
                functions[number].add((address - section.address) as usize, &name);
            }
        }
        functions
    };
    let wanted = |address| place(address).is_some();
    if let Some(map) = system_map {
        return symbols::system_map(map, wanted).map(placed);
    }
    let own = functions(elf);
    // Beside a stripped table a few symbols may stay.
    if own.iter().any(|functions| functions.len() > 0) {
        return Ok(own);
    }
    let data = elf.sections.iter().filter(|section| section.is_data());
    data.filter_map(|section| kallsyms::read(elf.bytes_of(section), wanted))
        .find(|symbols| !symbols.is_empty())
        .map(placed)
        .ok_or(PrepareError::NoSymbols)
}

fn alternatives_of(elf: &Elf<'_>) -> Result<Vec<Alternative>, PrepareError> {
    let Some((number, replacements)) = elf.named(REPLACEMENTS) else {
        return Ok(Vec::new());
    };
    let Some((_, table)) = elf.named(TABLE) else {
        return Err(PrepareError::Alternatives {
            why: format!("it has replacements and no {TABLE}"),
        });
    };
    let bytes = elf.bytes_of(table);
    alternatives::read(bytes, (number, replacements.size), |at| {
        let address = target(bytes, table.address, at)?;
        // What nothing is put in place of may point right behind the last replacement, into no section.
        let (number, section) = elf.section_at(address)?;
        Some((number, section.within(address)?))
    })
    .map_err(|why| PrepareError::Alternatives { why })
}

/// The libraries that the kernel maps into programs: whole ELF files that lie in its data, each at a page's start.
fn vdsos(elf: &Elf<'_>) -> Result<Vec<(FileReport, Vec<Patch>)>, PrepareError> {
    const PAGE: usize = 4096;
    let mut found = Vec::new();
    for section in elf.sections.iter().filter(|section| section.is_data()) {
        let data = elf.bytes_of(section);
        let mut into = (section.address.wrapping_neg() % PAGE as u64) as usize;
        while let Some(image) = data.get(into..).filter(|image| !image.is_empty()) {
            let library = is_elf(image) && has_few_sections(image);
            let library = library.then(|| Elf::parse(image).ok()).flatten();
            let Some(library) = library.filter(|library| library.kind == ET_DYN) else {
                into += PAGE;
                continue;
            };
            found.push(program::look(
                &library,
                &vdso_name(&library),
                Kind::Vdso,
                section.offset + into,
            )?);
            into += library.end().max(1).next_multiple_of(PAGE);
        }
    }
    Ok(found)
}

/// As those libraries have: what is an ELF file by its first word may be anything, and many sections are work, at each page's start.
fn has_few_sections(image: &[u8]) -> bool {
    const FEW: u64 = 64;
    let at = if image.get(4) == Some(&2) { 60 } else { 48 };
    word(image, at, 2).is_some_and(|count| count <= FEW)
}

fn vdso_name(elf: &Elf<'_>) -> String {
    let name = match (elf.bitness(), elf.pointer()) {
        (32, _) => "vdso32",
        (_, 4) => "vdsox32",
        _ => "vdso64",
    };
    name.to_owned()
}
