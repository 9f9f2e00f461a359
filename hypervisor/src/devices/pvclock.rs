//! KVM's paravirtual clock (Documentation/virt/kvm/x86/msr.rst), of which the host is ourselves: a page in the guest that says what time
//! it is, so that a read of the clock costs no exit.
//!
//! What the page says is a function of logged inputs: it is written when a clock value is handed to the guest, and only then. The guest
//! is to add the time-stamp counter's distance to a stamp in the page, scaled; the scale given here makes nothing of any distance,
//! so whatever its (rewritten) RDTSC reads, the time is the page's. Between two inputs the clock stands still; it never goes
//! back.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::event::GuestTime;
use crate::memory::GuestRam;

/// MSR_KVM_WALL_CLOCK_NEW: the guest says where it wants the wall clock of its start.
pub const WALL_CLOCK: u32 = 0x4b56_4d00;
/// MSR_KVM_SYSTEM_TIME_NEW: the guest says where the page is; bit 0 enables it.
pub const SYSTEM_TIME: u32 = 0x4b56_4d01;

/// `tsc_shift`: a distance is shifted right by 63 bits first, and multiplied by 2^-32 then.
const SHIFT: i8 = -63;
const MULTIPLIER: u32 = 1;

/// The clock page.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PvClock {
    address: Option<u64>,
    version: u32,
    shown: u64,
}

impl PvClock {
    /// Whether the guest has a page.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.address.is_some()
    }

    /// The value that the page shows.
    #[must_use]
    pub fn shown(&self) -> GuestTime {
        GuestTime(self.shown)
    }

    /// The guest's write to [`SYSTEM_TIME`]. A page that is not in memory is none.
    pub fn place(&mut self, ram: &GuestRam, value: u64) {
        let address = value & !1;
        let usable = value & 1 != 0 && address.is_multiple_of(4) && ram.contains(address, 32);
        self.address = usable.then_some(address);
    }

    /// Shows `now`, if there is a page. Nobody sees a half: the vCPU stands, and the version says that it is whole.
    pub fn show(&mut self, ram: &GuestRam, now: GuestTime) {
        let Some(address) = self.address else {
            return;
        };
        self.version = self.version.wrapping_add(2);
        self.shown = now.0;
        // struct pvclock_vcpu_time_info; the stamp is 0, and no flag is set: other CPUs' pages may differ.
        let mut page = [0; 32];
        page[..4].copy_from_slice(&self.version.to_le_bytes());
        page[16..24].copy_from_slice(&now.0.to_le_bytes());
        page[24..28].copy_from_slice(&MULTIPLIER.to_le_bytes());
        page[28] = SHIFT.to_le_bytes()[0];
        let written = ram.write(address, &page);
        debug_assert!(written.is_ok(), "the page was checked when it was placed");
    }
}

/// The guest's write to [`WALL_CLOCK`]: `struct pvclock_wall_clock`, version, seconds and nanoseconds. An address that is not in memory
/// is left alone.
pub fn write_wall_clock(ram: &GuestRam, address: u64, wall_clock_ns: u64) {
    const VERSION: u32 = 2;
    let (seconds, nanoseconds) = (wall_clock_ns / 1_000_000_000, wall_clock_ns % 1_000_000_000);
    let mut wall = [0; 12];
    wall[..4].copy_from_slice(&VERSION.to_le_bytes());
    wall[4..8].copy_from_slice(&(seconds as u32).to_le_bytes());
    wall[8..].copy_from_slice(&(nanoseconds as u32).to_le_bytes());
    let _ = ram.write(address, &wall);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `pvclock_scale_delta` and its caller in Linux.
    fn read(page: &[u8; 32], stamp: u64) -> u64 {
        let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
        let multiplier = u64::from(u32::from_le_bytes(page[24..28].try_into().unwrap()));
        let shift = i8::from_le_bytes([page[28]]);
        let mut delta = stamp.wrapping_sub(word(8));
        if shift < 0 {
            delta >>= -shift;
        } else {
            delta <<= shift;
        }
        let product = u128::from(delta) * u128::from(multiplier);
        word(16) + (product >> 32) as u64
    }

    #[test]
    fn whatever_the_counter_reads_the_time_is_the_pages() {
        let ram = GuestRam::new(2).unwrap();
        let mut clock = PvClock::default();
        clock.show(&ram, GuestTime(1));
        assert!(!clock.is_on());
        clock.place(&ram, 0x5001);
        clock.show(&ram, GuestTime(123_456_789));
        let mut page = [0; 32];
        ram.read(0x5000, &mut page).unwrap();
        for stamp in [0, 1, u64::MAX / 2, u64::MAX] {
            assert_eq!(read(&page, stamp), 123_456_789);
        }
        assert_eq!(page[0], 2, "an even version: nothing is being written");
        clock.place(&ram, 0x5000);
        assert!(!clock.is_on(), "bit 0 turns it off");
    }

    #[test]
    fn a_page_outside_memory_is_none() {
        let ram = GuestRam::new(2).unwrap();
        let mut clock = PvClock::default();
        for value in [u64::MAX, (2 << 20) - 31, (2 << 20) + 1, 0x5003] {
            clock.place(&ram, value);
            assert!(!clock.is_on(), "{value:#x}");
        }
        write_wall_clock(&ram, u64::MAX, 5);
        write_wall_clock(&ram, 0x6000, 3_000_000_007);
        let mut wall = [0; 12];
        ram.read(0x6000, &mut wall).unwrap();
        assert_eq!(wall, [2, 0, 0, 0, 3, 0, 0, 0, 7, 0, 0, 0]);
    }
}
