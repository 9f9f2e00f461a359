//! The kernel's table of alternatives: which instructions it patches in when it boots, and where
//! (arch/x86/include/asm/alternative.h, `struct alt_instr`).

use std::ops::Range;

use super::elf::word;

pub(super) const TABLE: &str = ".altinstructions";
pub(super) const REPLACEMENTS: &str = ".altinstr_replacement";

/// A place that an entry names: a section by its number, and how far into it.
pub(super) type Place = (usize, usize);

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Alternative {
    /// What is patched.
    pub(super) original: Place,
    /// Bytes of it.
    pub(super) length: usize,
    /// Where what it is patched with lies in the section of replacements; empty for one that puts nothing but padding there.
    pub(super) replacement: Range<usize>,
}

/// The entry's layout by kernel: its size, and where its two lengths are. Both distances come first, four bytes each.
#[derive(Clone, Copy, Debug)]
struct Layout {
    size: usize,
    original_length: usize,
    replacement_length: usize,
}

/// From 5.13 to 6.2 (and its stable kernels), before, and since. What fits the whole table is the one.
const LAYOUTS: [Layout; 3] = [
    Layout {
        size: 12,
        original_length: 10,
        replacement_length: 11,
    },
    Layout {
        size: 13,
        original_length: 10,
        replacement_length: 11,
    },
    Layout {
        size: 14,
        original_length: 12,
        replacement_length: 13,
    },
];

/// Reads the table. `resolve` says what the distance at this byte of the table points to; `replacements` is the number and size of
/// the section that all replacements must lie in.
///
/// # Errors
/// Why no layout fits.
pub(super) fn read(
    table: &[u8],
    replacements: (usize, usize),
    resolve: impl Fn(usize) -> Option<Place>,
) -> Result<Vec<Alternative>, String> {
    LAYOUTS
        .iter()
        .find_map(|layout| fits(table, replacements, *layout, &resolve))
        .ok_or_else(|| {
            format!(
                "{} bytes that are not made of entries of 12, 13 or 14 bytes",
                table.len()
            )
        })
}

fn fits(
    table: &[u8],
    (section, size): (usize, usize),
    layout: Layout,
    resolve: &impl Fn(usize) -> Option<Place>,
) -> Option<Vec<Alternative>> {
    let entries = table.chunks_exact(layout.size);
    if entries.remainder().iter().any(|&byte| byte != 0) {
        return None;
    }
    let mut alternatives = Vec::new();
    for (number, entry) in entries.enumerate() {
        let at = number * layout.size;
        let length = usize::from(entry[layout.original_length]);
        let new = usize::from(entry[layout.replacement_length]);
        if new > length {
            return None;
        }
        let original = resolve(at)?;
        // One that puts nothing but padding there may point behind the last.
        let replacement = if new > 0 {
            let (where_to, into) = resolve(at + 4)?;
            let end = into.checked_add(new)?;
            if where_to != section || end > size {
                return None;
            }
            into..end
        } else {
            0..0
        };
        alternatives.push(Alternative {
            original,
            length,
            replacement,
        });
    }
    Some(alternatives)
}

/// The distance at this byte of a table that lies at `address`, as the address that it points to.
pub(super) fn target(table: &[u8], address: u64, at: usize) -> Option<u64> {
    let distance = word(table, at, 4)? as u32 as i32;
    Some(
        address
            .wrapping_add(at as u64)
            .wrapping_add_signed(i64::from(distance)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(layout: Layout, original: u8, replacement: u8, lengths: (u8, u8)) -> Vec<u8> {
        let mut entry = vec![0; layout.size];
        entry[0] = original;
        entry[4] = replacement;
        entry[layout.original_length] = lengths.0;
        entry[layout.replacement_length] = lengths.1;
        entry
    }

    #[test]
    fn each_kernels_layout_is_told_from_the_others() {
        for layout in LAYOUTS {
            let mut table = Vec::new();
            for number in 0..40 {
                table.extend(entry(layout, number, number * 5, (5, 5)));
            }
            table.extend(entry(layout, 41, 0, (5, 0)));
            let resolve = |at: usize| {
                let section = if at % layout.size == 4 { 7 } else { 1 };
                Some((section, usize::from(*table.get(at)?)))
            };
            let read = read(&table, (7, 200), resolve).expect("a table");
            assert_eq!(read.len(), 41, "{layout:?}");
            assert_eq!(
                read[3],
                Alternative {
                    original: (1, 3),
                    length: 5,
                    replacement: 15..20
                }
            );
            let padding = &read[40];
            assert!(padding.replacement.is_empty() && padding.length == 5);
        }
    }

    #[test]
    fn a_replacement_outside_its_section_or_longer_than_its_place_fits_nothing() {
        for (replacement, lengths) in [(198, (5, 5)), (0, (2, 3))] {
            let table = entry(LAYOUTS[0], 0, replacement, lengths);
            let resolve = |at: usize| Some((7, usize::from(table[at])));
            assert!(read(&table, (7, 200), resolve).is_err());
        }
        assert!(read(&[1; 12], (7, 200), |_| None).is_err());
    }
}
