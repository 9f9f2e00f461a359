//! A kernel module: an object file, mostly with a signature behind it.

use std::collections::BTreeMap;

use super::alternatives::{self, REPLACEMENTS, TABLE};
use super::elf::{EM_X86_64, ET_REL, Elf};
use super::report::{FileReport, Kind};
use super::rewrite::{FLOODED, Look, Patch, Ring, apply, functions};

/// What ends a signed module (kernel/module_signature.c).
const SIGNED: &[u8] = b"~Module signature appended~\n";
/// `struct module_signature`: lengths of two names that nobody writes any more, and the signature's, all before that.
const SIGNATURE: usize = 12;
/// A section that every module has and no other object file.
const INFO: &str = ".modinfo";

/// Whether an object file is a module.
pub(super) fn is_module(elf: &Elf<'_>) -> bool {
    elf.kind == ET_REL && elf.named(INFO).is_some()
}

/// Prepares a module. One that cannot be read is left as it is, and the report says why. A signature is taken off if
/// anything was rewritten: the kernel takes a module without one, and refuses one with a wrong one where it checks.
#[must_use]
pub fn module(mut bytes: Vec<u8>, path: &str) -> (Vec<u8>, FileReport) {
    let (mut report, patches) = look(&bytes, path);
    if !patches.is_empty() {
        if let Some(length) = unsigned(&bytes) {
            if Elf::parse(&bytes).is_ok_and(|elf| elf.end() > length) {
                let why = "by its length its signature begins within the module: it is damaged";
                return (bytes, FileReport::skipped(path, Kind::Module, why));
            }
            bytes.truncate(length);
            report.signature_stripped = true;
        }
        apply(&mut bytes, &patches);
    }
    (bytes, report)
}

fn look(bytes: &[u8], path: &str) -> (FileReport, Vec<Patch>) {
    let skipped = |why: String| (FileReport::skipped(path, Kind::Module, why), Vec::new());
    let elf = match Elf::parse(bytes) {
        Ok(elf) => elf,
        Err(error) => return skipped(error.to_string()),
    };
    if elf.machine != EM_X86_64 || !is_module(&elf) {
        return skipped("it is no module for x86-64".into());
    }
    let functions = functions(&elf);
    let mut look = Look {
        elf: &elf,
        ring: Ring::Kernel,
        base: 0,
        report: FileReport::new(path, Kind::Module),
        patches: Vec::new(),
    };
    for (section, functions) in elf.sections.iter().zip(&functions) {
        if section.is_code() && section.name != REPLACEMENTS {
            look.section(section, functions);
        }
    }
    if let Some((number, replacements)) = elf.named(REPLACEMENTS) {
        let Some((table_number, table)) = elf.named(TABLE) else {
            return skipped(format!("it has replacements and no {TABLE}"));
        };
        // Before a module is loaded its table is empty, and relocations say what will be in it.
        let targets: BTreeMap<u64, (usize, usize)> = elf
            .relocations(table_number)
            .into_iter()
            .filter_map(|relocation| {
                Some((
                    relocation.place,
                    (relocation.section, usize::try_from(relocation.into).ok()?),
                ))
            })
            .collect();
        let alternatives =
            alternatives::read(elf.bytes_of(table), (number, replacements.size), |at| {
                targets.get(&(at as u64)).copied()
            });
        let alternatives = match alternatives {
            Ok(alternatives) => alternatives,
            Err(why) => {
                return skipped(format!(
                    "its table of alternatives is of no kind known here: {why}"
                ));
            }
        };
        look.replacements(replacements, &alternatives, &functions);
    }
    if look.is_flooded() {
        return skipped(FLOODED.into());
    }
    (look.report, look.patches)
}

/// How many bytes a signed module has without its signature.
fn unsigned(bytes: &[u8]) -> Option<usize> {
    let rest = bytes.strip_suffix(SIGNED)?;
    let (rest, facts) = rest.split_at_checked(rest.len().checked_sub(SIGNATURE)?)?;
    let names = usize::from(facts[3]) + usize::from(facts[4]);
    let length = u32::from_be_bytes([facts[8], facts[9], facts[10], facts[11]]) as usize;
    rest.len().checked_sub(names)?.checked_sub(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_ends_where_its_length_says() {
        let mut signed = b"module".to_vec();
        signed.extend([7; 300]);
        signed.extend([0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 44]);
        signed.extend(SIGNED);
        assert_eq!(unsigned(&signed), Some(6));
        assert_eq!(unsigned(b"module"), None);
        // One that claims more than there is.
        let at = signed.len() - SIGNED.len() - 4;
        signed[at] = 1;
        assert_eq!(unsigned(&signed), None);
        assert_eq!(unsigned(SIGNED), None);
    }
}
