//! Where functions start, from the tables for unwinding that even a stripped program has (LSB Core, "Exception Frames").

use super::elf::{Elf, Section, word};

/// DW_EH_PE: how an address is written. Only what compilers write for x86 is read.
const PC_RELATIVE: u8 = 0x10;
const OMITTED: u8 = 0xff;
/// Letters of what is common to several functions: there are seven kinds. It is read anew for each function, so it must be short.
const LETTERS: usize = 16;
/// Bytes of a number that fits 64 bits, seven in each.
const LEB_BYTES: usize = 10;

/// The addresses at which functions start, as far as the section makes sense.
pub(super) fn starts(elf: &Elf<'_>, section: &Section) -> Vec<u64> {
    let bytes = elf.bytes_of(section);
    let mut starts = Vec::new();
    let mut at = 0;
    while let Some((record, next)) = record(bytes, at) {
        at = next;
        // Zero marks what is common to several functions; else it is the distance back to that.
        if let Some(back @ 1..) = word(bytes, record.start, 4)
            && let Some(encoding) = record
                .start
                .checked_sub(back as usize)
                .and_then(|common| encoding(bytes, common, elf.pointer()))
            && let Some(start) = address(
                bytes,
                record.start + 4,
                encoding,
                section.address,
                elf.pointer(),
            )
        {
            starts.push(start);
        }
    }
    starts
}

/// The record at this byte, without its length, and where the next one is. A length of zero ends the table.
fn record(bytes: &[u8], at: usize) -> Option<(std::ops::Range<usize>, usize)> {
    let (from, length) = match word(bytes, at, 4)? {
        0 => return None,
        0xffff_ffff => (at + 12, usize::try_from(word(bytes, at + 4, 8)?).ok()?),
        length => (at + 4, length as usize),
    };
    let end = from.checked_add(length)?;
    (length >= 8 && end <= bytes.len()).then_some((from..end, end))
}

/// How the addresses are written of the functions that refer to the record that starts here.
fn encoding(bytes: &[u8], at: usize, pointer: usize) -> Option<u8> {
    let (common, _) = record(bytes, at)?;
    if word(bytes, common.start, 4)? != 0 {
        return None;
    }
    let version = *bytes.get(common.start + 4)?;
    let mut at = common.start + 5;
    let letters = bytes.get(at..common.end)?;
    let letters = &letters[..letters.iter().take(LETTERS).position(|&byte| byte == 0)?];
    at += letters.len() + 1;
    // Alignment of code and of data, and the register of the return address.
    skip_leb(bytes, &mut at)?;
    skip_leb(bytes, &mut at)?;
    if version == 1 {
        at += 1;
    } else {
        skip_leb(bytes, &mut at)?;
    }
    let Some((b'z', letters)) = letters.split_first() else {
        return Some(0);
    };
    skip_leb(bytes, &mut at)?;
    for letter in letters {
        match letter {
            b'R' => return bytes.get(at).copied(),
            b'L' => at += 1,
            b'P' => {
                let encoding = *bytes.get(at)?;
                at += 1 + width(encoding, pointer)?;
            }
            b'S' | b'B' => {}
            _ => return None,
        }
    }
    Some(0)
}

fn skip_leb(bytes: &[u8], at: &mut usize) -> Option<()> {
    let rest = bytes.get(*at..)?;
    let number = rest.iter().take(LEB_BYTES);
    *at += number.take_while(|&byte| byte & 0x80 != 0).count() + 1;
    Some(())
}

/// Bytes of an address that is written so.
fn width(encoding: u8, pointer: usize) -> Option<usize> {
    match encoding & 0x0f {
        0x00 => Some(pointer),
        0x02 | 0x0a => Some(2),
        0x03 | 0x0b => Some(4),
        0x04 | 0x0c => Some(8),
        _ => None,
    }
}

fn address(bytes: &[u8], at: usize, encoding: u8, base: u64, pointer: usize) -> Option<u64> {
    if encoding == OMITTED {
        return None;
    }
    let width = width(encoding, pointer)?;
    let value = word(bytes, at, width)?;
    let signed = encoding & 0x08 != 0;
    let value = match (signed, width) {
        (true, 2) => value as u16 as i16 as u64,
        (true, 4) => value as u32 as i32 as u64,
        _ => value,
    };
    match encoding & 0x70 {
        0 => Some(value),
        PC_RELATIVE => Some(base.wrapping_add(at as u64).wrapping_add(value)),
        _ => None,
    }
}
