//! Static page tables: everything one to one, ring 3 may use all of it, accessed and dirty set beforehand so that the CPU
//! never writes them.
#![forbid(unsafe_code)]

use crate::memory::{GuestRam, MemoryError};

const PML4: u64 = 0x1_0000;
const PDPT: u64 = 0x1_1000;
const FIRST_TABLE: u64 = 0x1_2000;
const DIRECTORIES: u64 = 0x1_3000;
/// Present, writable, user, accessed, dirty.
const LEAF: u64 = 0x67;
const TABLE: u64 = 0x27;
const LARGE: u64 = 1 << 7;
/// Cache disable, for the device windows.
const UNCACHED: u64 = 1 << 4;
const MIB_2: u64 = 2 << 20;
/// The device windows' 2 MiB.
const WINDOWS: u64 = 0xd000_0000;

/// Writes the tables; returns what CR3 is to hold.
pub(super) fn write(ram: &GuestRam) -> Result<u64, MemoryError> {
    let put = |address: u64, value: u64| ram.write(address, &value.to_le_bytes());
    put(PML4, PDPT | TABLE)?;
    for gib in 0..4 {
        put(PDPT + 8 * gib, (DIRECTORIES + 0x1000 * gib) | TABLE)?;
    }
    // The first 2 MiB by 4 KiB pages, so that page 0 can be left out: a null pointer faults.
    put(DIRECTORIES, FIRST_TABLE | TABLE)?;
    for page in 1..512 {
        put(FIRST_TABLE + 8 * page, page << 12 | LEAF)?;
    }
    for large in 1..2048u64 {
        let address = large * MIB_2;
        let entry = if address < ram.size() {
            address | LEAF | LARGE
        } else if address == WINDOWS {
            address | LEAF | LARGE | UNCACHED
        } else {
            continue;
        };
        put(DIRECTORIES + 8 * large, entry)?;
    }
    Ok(PML4)
}
