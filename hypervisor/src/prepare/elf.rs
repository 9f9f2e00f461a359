//! ELF files, as far as rewriting needs them: sections and symbols (System V gABI, chapter 4). Nothing in them is believed.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::error::PrepareError;

pub(super) const EM_386: u16 = 3;
pub(super) const EM_X86_64: u16 = 62;
pub(super) const ET_REL: u16 = 1;
pub(super) const ET_EXEC: u16 = 2;
pub(super) const ET_DYN: u16 = 3;
const SHT_PROGBITS: u32 = 1;
const SHT_SYMTAB: u32 = 2;
const SHT_RELA: u32 = 4;
const SHT_NOBITS: u32 = 8;
const SHT_DYNSYM: u32 = 11;
const SHF_ALLOC: u64 = 2;
const SHF_EXECINSTR: u64 = 4;
/// `st_shndx` from here on names no section.
const SHN_LORESERVE: u16 = 0xff00;
/// Bytes of a relocation with an addend in a 64-bit file.
const RELA: usize = 24;
/// A longer name is cut: the kernel's have at most 512 bytes (KSYM_NAME_LEN), and of others only the report tells. Many may share
/// one text, which would be copied for each.
const NAME_MAX: usize = 512;

/// A section's header.
#[derive(Clone, Debug)]
pub(super) struct Section {
    pub(super) name: String,
    kind: u32,
    flags: u64,
    pub(super) address: u64,
    /// Where its bytes are in the file; empty for one that has none there.
    pub(super) offset: usize,
    pub(super) size: usize,
    link: usize,
    info: usize,
}

impl Section {
    /// Whether the file has instructions in it.
    pub(super) fn is_code(&self) -> bool {
        self.kind == SHT_PROGBITS
            && self.flags & (SHF_ALLOC | SHF_EXECINSTR) == SHF_ALLOC | SHF_EXECINSTR
    }

    /// Whether it is data that a running program has in memory.
    pub(super) fn is_data(&self) -> bool {
        self.kind == SHT_PROGBITS && self.flags & (SHF_ALLOC | SHF_EXECINSTR) == SHF_ALLOC
    }

    pub(super) fn range(&self) -> std::ops::Range<usize> {
        self.offset..self.offset + self.size
    }

    /// How far into it this address lies.
    pub(super) fn within(&self, address: u64) -> Option<usize> {
        let into = usize::try_from(address.checked_sub(self.address)?).ok()?;
        (into < self.size).then_some(into)
    }
}

/// A symbol that lies in a section.
#[derive(Clone, Debug)]
pub(super) struct Symbol {
    pub(super) name: String,
    pub(super) section: usize,
    /// An address, or in an object file how far into the section.
    pub(super) value: u64,
}

/// A relocation of an object file: the place, and what it refers to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Relocation {
    /// How far into the section that is relocated.
    pub(super) place: u64,
    /// The section referred to.
    pub(super) section: usize,
    /// How far into that section.
    pub(super) into: u64,
}

/// A checked ELF file.
#[derive(Debug)]
pub(super) struct Elf<'a> {
    bytes: &'a [u8],
    wide: bool,
    pub(super) machine: u16,
    pub(super) kind: u16,
    pub(super) entry: u64,
    pub(super) sections: Vec<Section>,
    /// Addresses and numbers of those that are loaded and have bytes, in their order.
    loaded: Vec<(u64, usize)>,
    /// Where the table of sections ends.
    headers_end: usize,
}

/// Little-endian words; what lies outside is `None`.
pub(super) fn word(bytes: &[u8], at: usize, width: usize) -> Option<u64> {
    let mut word = [0; 8];
    word[..width].copy_from_slice(bytes.get(at..at.checked_add(width)?)?);
    Some(u64::from_le_bytes(word))
}

/// Whether this starts as an ELF file does.
pub(super) fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF")
}

fn text(bytes: &[u8], at: usize) -> Option<&[u8]> {
    let rest = bytes.get(at..)?;
    let near = &rest[..rest.len().min(NAME_MAX)];
    match near.iter().position(|&byte| byte == 0) {
        Some(end) => near.get(..end),
        None => (near.len() == NAME_MAX).then_some(near),
    }
}

impl<'a> Elf<'a> {
    /// Reads the headers.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, PrepareError> {
        let outside = || PrepareError::elf("its headers lie outside the file");
        if !is_elf(bytes) {
            return Err(PrepareError::elf("it does not start as one"));
        }
        let (class, order) = (word(bytes, 4, 1), word(bytes, 5, 1));
        let wide = match (class, order) {
            (Some(2), Some(1)) => true,
            (Some(1), Some(1)) => false,
            _ => {
                return Err(PrepareError::elf(
                    "it is not little-endian, or neither of 32 nor of 64 bits",
                ));
            }
        };
        let half = |at: usize| word(bytes, at, 2).map(|value| value as u16);
        let kind = half(16).ok_or_else(outside)?;
        let machine = half(18).ok_or_else(outside)?;
        // Widths and places differ between the classes: e_entry, e_shoff, e_shentsize, e_shnum, e_shstrndx.
        let (pointer, shoff, shentsize, expected) = if wide {
            (8, 40, 58, 64)
        } else {
            (4, 32, 46, 40)
        };
        let entry = word(bytes, 24, pointer).ok_or_else(outside)?;
        let table = word(bytes, shoff, pointer)
            .and_then(|at| usize::try_from(at).ok())
            .ok_or_else(outside)?;
        let size = usize::from(half(shentsize).ok_or_else(outside)?);
        let count = usize::from(half(shentsize + 2).ok_or_else(outside)?);
        let names = usize::from(half(shentsize + 4).ok_or_else(outside)?);
        let mut elf = Self {
            bytes,
            wide,
            machine,
            kind,
            entry,
            sections: Vec::new(),
            loaded: Vec::new(),
            headers_end: 0,
        };
        if table == 0 || count == 0 {
            return Ok(elf);
        }
        if size != expected {
            return Err(PrepareError::elf(format!(
                "its section headers have {size} bytes each, not {expected}"
            )));
        }
        let headers = table
            .checked_add(size * count)
            .and_then(|end| bytes.get(table..end))
            .ok_or_else(|| PrepareError::elf("its section headers lie outside the file"))?;
        elf.headers_end = table + headers.len();
        let mut named = Vec::with_capacity(count);
        for header in headers.chunks_exact(size) {
            let (section, name) = elf.section(header)?;
            elf.sections.push(section);
            named.push(name);
        }
        // They never overlap in a file that a linker made; where they may, a small file is a lot of work, and one byte two things.
        let mut ranges: Vec<_> = elf
            .sections
            .iter()
            .map(Section::range)
            .filter(|range| !range.is_empty())
            .collect();
        ranges.sort_by_key(|range| range.start);
        if ranges.windows(2).any(|pair| pair[0].end > pair[1].start) {
            return Err(PrepareError::elf("its sections overlap"));
        }
        let strings = elf
            .sections
            .get(names)
            .map(|section| &bytes[section.range()])
            .ok_or_else(|| PrepareError::elf("its section names are in no section"))?;
        for (section, at) in elf.sections.iter_mut().zip(named) {
            let name = text(strings, at)
                .ok_or_else(|| PrepareError::elf("a section's name has no end"))?;
            section.name = String::from_utf8_lossy(name).into_owned();
        }
        let sections = elf.sections.iter().enumerate();
        elf.loaded = sections
            .filter(|(_, section)| section.flags & SHF_ALLOC != 0 && section.size > 0)
            .map(|(number, section)| (section.address, number))
            .collect();
        elf.loaded
            .sort_by_key(|&(address, number)| (address, Reverse(number)));
        Ok(elf)
    }

    fn section(&self, header: &[u8]) -> Result<(Section, usize), PrepareError> {
        let at = |narrow: usize, wide: usize, width: usize| {
            let at = if self.wide { wide } else { narrow };
            word(header, at, width).unwrap_or(0)
        };
        let pointer = if self.wide { 8 } else { 4 };
        let kind = at(4, 4, 4) as u32;
        let (mut offset, mut size) = (at(16, 24, pointer), at(20, 32, pointer));
        if kind == SHT_NOBITS || kind == 0 {
            (offset, size) = (0, 0);
        }
        let end = offset
            .checked_add(size)
            .filter(|&end| end <= self.bytes.len() as u64);
        if end.is_none() {
            return Err(PrepareError::elf(format!(
                "a section of {size} bytes at {offset} lies outside the file's {}",
                self.bytes.len()
            )));
        }
        let section = Section {
            name: String::new(),
            kind,
            flags: at(8, 8, pointer),
            address: at(12, 16, pointer),
            offset: offset as usize,
            size: size as usize,
            link: at(24, 40, 4) as usize,
            info: at(28, 44, 4) as usize,
        };
        Ok((section, at(0, 0, 4) as usize))
    }

    /// Where it ends: its last section, or their headers.
    pub(super) fn end(&self) -> usize {
        let ends = self.sections.iter().map(|section| section.range().end);
        ends.fold(self.headers_end, usize::max)
    }

    /// Bytes of a section.
    pub(super) fn bytes_of(&self, section: &Section) -> &'a [u8] {
        &self.bytes[section.range()]
    }

    /// The first section of this name, with its number.
    pub(super) fn named(&self, name: &str) -> Option<(usize, &Section)> {
        self.sections
            .iter()
            .enumerate()
            .find(|(_, section)| section.name == name)
    }

    /// Which section an address lies in.
    pub(super) fn section_at(&self, address: u64) -> Option<(usize, &Section)> {
        let behind = self.loaded.partition_point(|&(start, _)| start <= address);
        let (_, number) = *self.loaded[..behind].last()?;
        let section = &self.sections[number];
        section.within(address).map(|_| (number, section))
    }

    /// How wide its code's addresses are.
    pub(super) fn bitness(&self) -> u32 {
        if self.machine == EM_386 { 32 } else { 64 }
    }

    /// Bytes of an address in it.
    pub(super) fn pointer(&self) -> usize {
        if self.wide { 8 } else { 4 }
    }

    /// Symbols of both tables that lie in a section, in no order.
    pub(super) fn symbols(&self) -> Vec<Symbol> {
        let mut symbols = Vec::new();
        for table in &self.sections {
            if table.kind == SHT_SYMTAB || table.kind == SHT_DYNSYM {
                symbols.extend(self.table(table).into_iter().flatten());
            }
        }
        symbols
    }

    /// All places of a table of symbols; what is in no section is `None`, so that numbers stay.
    fn table(&self, table: &Section) -> Vec<Option<Symbol>> {
        let size = if self.wide { 24 } else { 16 };
        let Some(strings) = self
            .sections
            .get(table.link)
            .map(|section| self.bytes_of(section))
        else {
            return Vec::new();
        };
        let one = |entry: &[u8]| -> Option<Symbol> {
            let (value, section) = if self.wide {
                (word(entry, 8, 8)?, word(entry, 6, 2)?)
            } else {
                (word(entry, 4, 4)?, word(entry, 14, 2)?)
            };
            if section == 0
                || section >= u64::from(SHN_LORESERVE)
                || section as usize >= self.sections.len()
            {
                return None;
            }
            let name = text(strings, word(entry, 0, 4)? as usize)?;
            Some(Symbol {
                name: String::from_utf8_lossy(name).into_owned(),
                section: section as usize,
                value,
            })
        };
        self.bytes_of(table).chunks_exact(size).map(one).collect()
    }

    /// Relocations of a section of a 64-bit object file whose symbols lie in sections of it.
    pub(super) fn relocations(&self, section: usize) -> Vec<Relocation> {
        let mut relocations = Vec::new();
        if !self.wide {
            return relocations;
        }
        // Several may refer to one.
        let mut tables = BTreeMap::new();
        for table in &self.sections {
            if table.kind != SHT_RELA || table.info != section {
                continue;
            }
            let symbols = tables.entry(table.link).or_insert_with(|| {
                let link = self.sections.get(table.link);
                link.map(|link| self.table(link)).unwrap_or_default()
            });
            for entry in self.bytes_of(table).chunks_exact(RELA) {
                let (Some(place), Some(info), Some(addend)) =
                    (word(entry, 0, 8), word(entry, 8, 8), word(entry, 16, 8))
                else {
                    continue;
                };
                if let Some(Some(symbol)) = symbols.get((info >> 32) as usize) {
                    relocations.push(Relocation {
                        place,
                        section: symbol.section,
                        into: symbol.value.wrapping_add(addend),
                    });
                }
            }
        }
        relocations
    }
}
