//! ELF files made by hand.

use crate::prepare::elf::{EM_X86_64, ET_DYN, ET_EXEC, ET_REL};

const PROGBITS: u32 = 1;
const SYMTAB: u32 = 2;
const STRTAB: u32 = 3;
const RELA: u32 = 4;
pub(super) const CODE: u64 = 6;
pub(super) const DATA: u64 = 2;

struct Part {
    name: String,
    kind: u32,
    flags: u64,
    address: u64,
    bytes: Vec<u8>,
    link: u32,
    info: u32,
}

/// A 64-bit ELF file in the making.
pub(super) struct Build {
    kind: u16,
    parts: Vec<Part>,
    symbols: Vec<(String, u16, u64)>,
}

impl Build {
    pub(super) fn executable() -> Self {
        Self {
            kind: ET_EXEC,
            parts: Vec::new(),
            symbols: Vec::new(),
        }
    }

    pub(super) fn library() -> Self {
        Self {
            kind: ET_DYN,
            ..Self::executable()
        }
    }

    pub(super) fn object() -> Self {
        Self {
            kind: ET_REL,
            ..Self::executable()
        }
    }

    /// Adds a section; its number.
    pub(super) fn section(&mut self, name: &str, flags: u64, address: u64, bytes: &[u8]) -> u16 {
        self.part(name, PROGBITS, flags, address, bytes.to_vec(), (0, 0))
    }

    pub(super) fn symbol(&mut self, name: &str, section: u16, value: u64) {
        self.symbols.push((name.to_owned(), section, value));
    }

    /// Relocations of a section: place, number of the symbol, addend. The symbols' table must be the next section.
    pub(super) fn relocations(&mut self, section: u16, entries: &[(u64, u64, i64)]) {
        let mut bytes = Vec::new();
        for (place, symbol, addend) in entries {
            bytes.extend(place.to_le_bytes());
            bytes.extend((symbol << 32 | 2).to_le_bytes());
            bytes.extend(addend.to_le_bytes());
        }
        let link = self.parts.len() as u32 + 2;
        self.part(".rela", RELA, 0, 0, bytes, (link, section.into()));
    }

    fn part(
        &mut self,
        name: &str,
        kind: u32,
        flags: u64,
        address: u64,
        bytes: Vec<u8>,
        refers: (u32, u32),
    ) -> u16 {
        let (link, info) = refers;
        self.parts.push(Part {
            name: name.to_owned(),
            kind,
            flags,
            address,
            bytes,
            link,
            info,
        });
        self.parts.len() as u16
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        if !self.symbols.is_empty() {
            let (mut table, mut names) = (vec![0; 24], vec![0]);
            for (name, section, value) in std::mem::take(&mut self.symbols) {
                table.extend((names.len() as u32).to_le_bytes());
                table.extend([2, 0]);
                table.extend(section.to_le_bytes());
                table.extend(value.to_le_bytes());
                table.extend([0; 8]);
                names.extend(name.bytes().chain([0]));
            }
            let link = self.parts.len() as u32 + 2;
            self.part(".symtab", SYMTAB, 0, 0, table, (link, 0));
            self.part(".strtab", STRTAB, 0, 0, names, (0, 0));
        }
        let mut names = vec![0];
        let mut headers = vec![0; 64];
        let mut file = vec![0; 64];
        self.part(".shstrtab", STRTAB, 0, 0, Vec::new(), (0, 0));
        let last = self.parts.len() - 1;
        for (number, part) in self.parts.iter().enumerate() {
            let name = names.len() as u32;
            names.extend(part.name.bytes().chain([0]));
            let bytes = if number == last { &names } else { &part.bytes };
            // As a section lies in memory so it lies in the file.
            file.resize(
                file.len()
                    .next_multiple_of(if part.address % 4096 == 0 { 4096 } else { 16 }),
                0,
            );
            for word in [name, part.kind] {
                headers.extend(word.to_le_bytes());
            }
            for word in [
                part.flags,
                part.address,
                file.len() as u64,
                bytes.len() as u64,
            ] {
                headers.extend(word.to_le_bytes());
            }
            for word in [part.link, part.info] {
                headers.extend(word.to_le_bytes());
            }
            headers.extend([0; 16]);
            file.extend(bytes);
        }
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[16..18].copy_from_slice(&self.kind.to_le_bytes());
        file[18..20].copy_from_slice(&EM_X86_64.to_le_bytes());
        let table = file.len() as u64;
        file[40..48].copy_from_slice(&table.to_le_bytes());
        file[58..60].copy_from_slice(&64u16.to_le_bytes());
        file[60..62].copy_from_slice(&(self.parts.len() as u16 + 1).to_le_bytes());
        file[62..64].copy_from_slice(&(self.parts.len() as u16).to_le_bytes());
        file.extend(headers);
        file
    }
}
