//! From a guest's virtual address to its physical one, by its page tables (AMD64 Architecture Programmer's Manual, volume 2, 5.3).
#![forbid(unsafe_code)]

/// Of CR0: paging is on.
const PG: u64 = 1 << 31;
/// Of CR4: tables of 64-bit entries.
const PAE: u64 = 1 << 5;
/// Of EFER: long mode is active.
const LMA: u64 = 1 << 10;
/// Of an entry.
const PRESENT: u64 = 1;
/// Of an entry above the last level: it maps a large page.
const LARGE: u64 = 1 << 7;
/// Bits of an entry that are an address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// How the guest finds its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Paging {
    pub(super) cr0: u64,
    pub(super) cr3: u64,
    pub(super) cr4: u64,
    pub(super) efer: u64,
}

impl Paging {
    /// The physical address; none where nothing is mapped, or by tables of a kind that no guest of ours has (32-bit ones; a fifth
    /// level, which is hidden from guests).
    pub(super) fn physical(
        &self,
        address: u64,
        entry_at: impl Fn(u64) -> Option<u64>,
    ) -> Option<u64> {
        if self.cr0 & PG == 0 {
            return Some(address);
        }
        let canonical = matches!(address as i64 >> 47, 0 | -1);
        if self.cr4 & PAE == 0 || self.efer & LMA == 0 || !canonical {
            return None;
        }
        let mut table = self.cr3 & ADDRESS;
        for shift in [39, 30, 21, 12] {
            let entry = entry_at(table + (address >> shift & 0x1ff) * 8)?;
            if entry & PRESENT == 0 {
                return None;
            }
            let is_page = shift == 12 || entry & LARGE != 0 && shift < 39;
            if is_page {
                let within = (1 << shift) - 1;
                return Some((entry & ADDRESS & !within) | (address & within));
            }
            table = entry & ADDRESS;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const LONG: Paging = Paging {
        cr0: PG | 1,
        cr3: 0x1018,
        cr4: PAE,
        efer: LMA,
    };

    fn look(entries: &[(u64, u64)]) -> impl Fn(u64) -> Option<u64> {
        let entries: BTreeMap<u64, u64> = entries.iter().copied().collect();
        move |at| Some(entries.get(&at).copied().unwrap_or(0))
    }

    #[test]
    fn pages_of_all_sizes_are_found() {
        let small = look(&[
            (0x1000 + 8 * 0x1ff, 0x2000 | PRESENT),
            (0x2000 + 8 * 0x1fe, 0x3000 | PRESENT),
            (0x3000 + 8 * 8, 0x4000 | PRESENT | 1 << 63),
            (0x4000 + 8 * 3, 0xabc_d000 | PRESENT | LARGE),
        ]);
        let address = 0xffff_ffff_8100_3123;
        assert_eq!(LONG.physical(address, small), Some(0xabc_d123));
        let large = look(&[
            (0x1000, 0x2000 | PRESENT),
            (0x2000, 0x3000 | PRESENT),
            (0x3000 + 8, 0x60_0000 | PRESENT | LARGE | 1 << 12),
        ]);
        assert_eq!(LONG.physical(0x20_1234, large), Some(0x60_1234));
        let huge = look(&[
            (0x1000, 0x2000 | PRESENT),
            (0x2000 + 8, 0x8000_0000 | PRESENT | LARGE),
        ]);
        assert_eq!(LONG.physical(0x4012_3456, huge), Some(0x8012_3456));
    }

    #[test]
    fn what_is_not_mapped_is_not_found() {
        let entries = |_: u64| Some(PRESENT ^ PRESENT);
        assert_eq!(LONG.physical(0x1000, entries), None);
        assert_eq!(LONG.physical(0x0000_8000_0000_0000, entries), None);
        assert_eq!(LONG.physical(0x1000, |_| None), None);
        let off = Paging { cr0: 1, ..LONG };
        assert_eq!(off.physical(0x7c00, entries), Some(0x7c00));
        let legacy = Paging { efer: 0, ..LONG };
        assert_eq!(legacy.physical(0x7c00, entries), None);
    }
}
