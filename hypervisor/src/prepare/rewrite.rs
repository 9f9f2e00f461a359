//! From what was decoded to sites with their names, and to new bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::TSC_PORT;
use super::alternatives::{Alternative, Place};
use super::clock_reader::{self, Plan};
use super::code::{Found, SITES_MOST, is_suspicious, sweep};
use super::elf::{Elf, Section};
use super::report::{Change, FileReport, Gap, Instruction, Outcome, Site};

/// Who executes the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ring {
    /// The kernel, which may use ports.
    Kernel,
    /// Programs, which may not.
    User,
}

/// New bytes for a place in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Patch {
    offset: usize,
    new: Vec<u8>,
}

/// Writes them. They come from sites in these very bytes, so they fit.
pub(super) fn apply(bytes: &mut [u8], patches: &[Patch]) {
    for patch in patches {
        bytes[patch.offset..patch.offset + patch.new.len()].copy_from_slice(&patch.new);
    }
}

/// Where the functions of a section start, counted from its first byte, and what they are called.
#[derive(Clone, Debug, Default)]
pub(super) struct Functions {
    starts: BTreeSet<usize>,
    /// Of those that have one.
    names: BTreeMap<usize, String>,
}

impl Functions {
    /// Adds a start. Of several names for one the first in the alphabet counts, so that the order of a table does not matter; one
    /// without a name gives way.
    pub(super) fn add(&mut self, start: usize, name: &str) {
        self.starts.insert(start);
        if name.is_empty() {
            return;
        }
        let known = self.names.entry(start).or_insert_with(|| name.to_owned());
        if name < known.as_str() {
            name.clone_into(known);
        }
    }

    pub(super) fn starts(&self) -> Vec<usize> {
        self.starts.iter().copied().collect()
    }

    pub(super) fn len(&self) -> usize {
        self.starts.len()
    }

    /// Those whose names begin so: from where to where, up to the next one's start or the section's end at `size`.
    fn named(&self, name: &str, size: usize) -> Vec<Range<usize>> {
        let end = |start| {
            let mut behind = self.starts.range(start + 1..);
            behind.next().copied().unwrap_or(size)
        };
        self.names
            .iter()
            .filter(|(_, own)| own.starts_with(name))
            .map(|(&start, _)| start..end(start))
            .collect()
    }

    /// Symbol and distance.
    pub(super) fn place(&self, at: usize) -> String {
        let nearest = self.names.range(..=at).next_back();
        nearest.map_or_else(String::new, |(start, name)| match at - start {
            0 => name.clone(),
            distance => format!("{name}+{distance:#x}"),
        })
    }
}

/// A file's sections with their functions.
pub(super) fn functions(elf: &Elf<'_>) -> Vec<Functions> {
    let mut functions = vec![Functions::default(); elf.sections.len()];
    for symbol in elf.symbols() {
        let section = &elf.sections[symbol.section];
        let into = match elf.kind {
            super::elf::ET_REL => usize::try_from(symbol.value)
                .ok()
                .filter(|&into| into < section.size),
            _ => section.within(symbol.value),
        };
        if let Some(into) = into
            && section.is_code()
        {
            functions[symbol.section].add(into, &symbol.name);
        }
    }
    functions
}

/// A file that is looked through: what is found goes into the report and the patches.
#[derive(Debug)]
pub(super) struct Look<'a> {
    pub(super) elf: &'a Elf<'a>,
    pub(super) ring: Ring,
    /// Where the ELF file starts in the file that is patched.
    pub(super) base: usize,
    pub(super) report: FileReport,
    pub(super) patches: Vec<Patch>,
}

impl Look<'_> {
    /// Decodes a section from its functions' starts; how many stretches made no sense.
    pub(super) fn section(&mut self, section: &Section, functions: &Functions) -> usize {
        let bytes = self.elf.bytes_of(section);
        let swept = sweep(
            bytes,
            section.address,
            self.elf.bitness(),
            &functions.starts(),
        );
        for found in &swept.found {
            let place = functions.place(found.at);
            self.site(section, *found, place);
        }
        for gap in &swept.gaps {
            self.report.undecoded += gap.len();
            // A site's second byte may be the next stretch's first.
            let end = (gap.end + 2).min(bytes.len());
            if is_suspicious(&bytes[gap.start..end]) {
                self.report.suspicious.push(Gap {
                    section: section.name.clone(),
                    place: functions.place(gap.start),
                    address: section.address.wrapping_add(gap.start as u64),
                    length: gap.len(),
                });
            }
        }
        self.report.prepared += swept.prepared;
        swept.gaps.len()
    }

    /// Decodes what alternatives put in place, which lies in this section. One replacement may serve several places: it is told of
    /// once, with the first.
    pub(super) fn replacements(
        &mut self,
        section: &Section,
        alternatives: &[Alternative],
        functions: &[Functions],
    ) {
        let mut seen = BTreeSet::new();
        for alternative in alternatives {
            let (original, into) = alternative.original;
            let range = &alternative.replacement;
            if !range.is_empty() && seen.insert(range.start) {
                let place = functions[original].place(into);
                self.replacement(section, alternative.replacement.clone(), &place);
            }
        }
    }

    /// Has the readers of the clock page count their reads (`clock_reader`), if they are in section `number`. `patched` is where the kernel
    /// puts alternatives, and how many bytes.
    pub(super) fn clock_readers(
        &mut self,
        (number, section): (usize, &Section),
        functions: &Functions,
        patched: &BTreeMap<Place, usize>,
    ) {
        let code = self.elf.bytes_of(section);
        for function in functions.named(clock_reader::NAME, code.len()) {
            let Some(bytes) = code.get(function.clone()) else {
                continue;
            };
            let changes = Plan::of(bytes).map(|plan| {
                plan.changes()
                    .map(|(range, new)| (function.start + range.start, new))
            });
            let is_patched = |(into, new): &(usize, Vec<u8>)| {
                // A place has at most 255 bytes.
                let from = (number, into.saturating_sub(usize::from(u8::MAX)));
                let mut near = patched.range(from..(number, into + new.len()));
                near.any(|((_, at), length)| at + length > *into)
            };
            let Some(changes) = changes.filter(|changes| !changes.iter().any(is_patched)) else {
                if clock_reader::reads_counter(bytes) {
                    self.report.uncounted.push(functions.place(function.start));
                }
                continue;
            };
            for (into, new) in changes {
                let old = &code[into..into + new.len()];
                let offset = self.base + section.offset + into;
                self.report.changes.push(Change {
                    section: section.name.clone(),
                    place: functions.place(into),
                    address: section.address.wrapping_add(into as u64),
                    offset,
                    old: hex(old),
                    new: hex(&new),
                });
                self.patches.push(Patch { offset, new });
            }
        }
    }

    /// Decodes one alternative's replacement, `range` of this section; `place` is what it replaces.
    fn replacement(&mut self, section: &Section, range: Range<usize>, place: &str) {
        let bytes = &self.elf.bytes_of(section)[range.clone()];
        let address = section.address.wrapping_add(range.start as u64);
        let swept = sweep(bytes, address, self.elf.bitness(), &[]);
        for found in swept.found {
            let found = Found {
                at: range.start + found.at,
                ..found
            };
            self.site(section, found, format!("for {place}"));
        }
        self.report.prepared += swept.prepared;
        for gap in swept.gaps {
            self.report.undecoded += gap.len();
            if is_suspicious(&bytes[gap.clone()]) {
                self.report.suspicious.push(Gap {
                    section: section.name.clone(),
                    place: format!("for {place}"),
                    address: address.wrapping_add(gap.start as u64),
                    length: gap.len(),
                });
            }
        }
    }

    /// Whether it has more sites than code can have. Then the report does not have them all.
    pub(super) fn is_flooded(&self) -> bool {
        self.report.sites.len() >= SITES_MOST
    }

    fn site(&mut self, section: &Section, found: Found, place: String) {
        if self.is_flooded() {
            return;
        }
        let bytes = &self.elf.bytes_of(section)[found.at..found.at + found.length];
        let offset = self.base + section.offset + found.at;
        let outcome = match (found.instruction, found.length) {
            (Instruction::Rdtsc, 2) => {
                let new = match self.ring {
                    Ring::Kernel if !reads_clock_page(&place) => [IN_EAX_IMM8, TSC_PORT],
                    Ring::Kernel | Ring::User => MOV_EAX_EDX,
                };
                self.patches.push(Patch {
                    offset,
                    new: new.to_vec(),
                });
                Outcome::Rewritten(hex(&new))
            }
            (Instruction::Rdtsc, _) => Outcome::Left(PREFIXED),
            _ => Outcome::Left(HIDDEN),
        };
        self.report.sites.push(Site {
            section: section.name.clone(),
            place,
            address: section.address.wrapping_add(found.at as u64),
            offset,
            instruction: found.instruction,
            old: hex(bytes),
            outcome,
        });
    }
}

/// Whether a site lies in the function that reads KVM's clock page, or in what may replace a part of it.
fn reads_clock_page(place: &str) -> bool {
    let place = place.strip_prefix("for ").unwrap_or(place);
    place.starts_with(clock_reader::NAME)
}

/// `IN EAX, imm8` (Intel SDM volume 2A).
const IN_EAX_IMM8: u8 = 0xe5;
/// `MOV EAX, EDX`: as long as RDTSC, and no flag changes.
const MOV_EAX_EDX: [u8; 2] = [0x89, 0xd0];

/// Of what [is flooded](Look::is_flooded).
pub(super) const FLOODED: &str =
    "it has 65536 places or more that would have to be rewritten, and no code has so many";

const PREFIXED: &str =
    "it carries a prefix, which would mean something else in front of another instruction";
const HIDDEN: &str =
    "only a CPU that has it by CPUID may execute it, and the template of replay hides it";

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
