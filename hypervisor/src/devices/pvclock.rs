//! KVM's paravirtual clock (Documentation/virt/kvm/x86/msr.rst), of which the host is ourselves: a page in the guest that says what time
//! it is, so that a read of the clock costs no exit.
//!
//! What the page says is a function of logged inputs: it is written when a clock value is handed to the guest, and only then. The guest
//! is to add the time-stamp counter's distance to a stamp in the page, scaled; the scale given here makes nothing of any distance,
//! so whatever its (rewritten) RDTSC reads, the time is the page's. Between two inputs the clock stands still; it never goes
//! back.
//!
//! A prepared kernel counts its reads down in the page's first padding, and makes an exit, at which the page is renewed, with the one that goes below
//! zero (`prepare/clock_reader.rs`). How many it may do is a power of two in the page's other padding: doubled when they were used up within
//! half a millisecond, and made less when they took more than two, so that who reads often makes an exit about each millisecond, and who reads
//! seldom makes one with each read, as with a timer at a port. All of it is a function of the page and of logged times.
//!
//! The page's version stands still. It is for a reader to see that what it read belongs together, and here one word of the page changes alone, which
//! is read whole. A reader that `prepare` did not know, as it was inlined into another function, asks at the port between its two looks
//! at the version: that renews the page, and to such a one a version that went on with it would say for ever that it is to look again.
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

/// Where the reads that are left stand, a signed word; and the power of two that they began with, a byte.
const LEFT: usize = 4;
const POWER: usize = 30;
const FLAGS: usize = 29;
/// A guest that has read often and does so no longer is to come to its next exit soon, all the same: 64 reads. They are most of what can be
/// won, 63 of 64 exits.
const POWER_MOST: u8 = 6;
/// Reads that were used up within the first are too few (an exit takes some microseconds, a hundred where it is emulated), in
/// more than the second too many: so late what is due may be.
const TOO_SOON_NS: u64 = 500_000;
const TOO_LATE_NS: u64 = 2_000_000;

/// How a machine keeps its page: in the order of the models that brought it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keeping {
    /// The time alone; padding is zero.
    Plain,
    /// Reads are counted.
    Counted,
    /// And the version stands still.
    Steady,
    /// And the page says that it is good as it is. Else a guest holds its scheduler's clock within a tick of the last one and lets it leap at the next: who runs
    /// then pays for all of that, and where ticks come late it is whoever makes exits, at which they come.
    Stable,
}

/// `PVCLOCK_TSC_STABLE_BIT`.
const STABLE: u8 = 1;

/// The version of a page that is whole: an even one.
const WHOLE: u32 = 2;

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

    /// Shows `now`, if there is a page. Nobody sees a half: the vCPU stands.
    pub fn show(&mut self, ram: &GuestRam, now: GuestTime, keeping: Keeping) {
        let Some(address) = self.address else {
            return;
        };
        let counts = keeping >= Keeping::Counted;
        let power = counts.then(|| self.next_power(ram, address, now));
        self.version = match keeping {
            Keeping::Plain | Keeping::Counted => self.version.wrapping_add(2),
            Keeping::Steady | Keeping::Stable => WHOLE,
        };
        self.shown = now.0;
        // struct pvclock_vcpu_time_info; the stamp is 0.
        let mut page = [0; 32];
        page[..4].copy_from_slice(&self.version.to_le_bytes());
        page[16..24].copy_from_slice(&now.0.to_le_bytes());
        page[24..28].copy_from_slice(&MULTIPLIER.to_le_bytes());
        page[28] = SHIFT.to_le_bytes()[0];
        if keeping >= Keeping::Stable {
            page[FLAGS] = STABLE;
        }
        if let Some(power) = power {
            page[LEFT..LEFT + 4].copy_from_slice(&((1_i32 << power) - 1).to_le_bytes());
            page[POWER] = power;
        }
        let written = ram.write(address, &page);
        debug_assert!(written.is_ok(), "the page was checked when it was placed");
    }
}

impl PvClock {
    /// How many reads there are to be next, as a power of two. What the guest writes there itself is its own affair: it is bounded.
    fn next_power(&self, ram: &GuestRam, address: u64, now: GuestTime) -> u8 {
        let mut page = [0; 32];
        if ram.read(address, &mut page).is_err() {
            return 0;
        }
        let power = page[POWER].min(POWER_MOST);
        let left = page[LEFT..]
            .first_chunk()
            .map_or(0, |word| i32::from_le_bytes(*word));
        if left >= 0 {
            return power;
        }
        match now.0.saturating_sub(self.shown) {
            took if took < TOO_SOON_NS => (power + 1).min(POWER_MOST),
            took if took > TOO_LATE_NS => {
                // At that pace so many fit in.
                let fit = (TOO_LATE_NS << power) / took;
                fit.checked_ilog2().map_or(0, |fit| fit as u8)
            }
            _ => power,
        }
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
        clock.show(&ram, GuestTime(1), Keeping::Stable);
        assert!(!clock.is_on());
        clock.place(&ram, 0x5001);
        clock.show(&ram, GuestTime(123_456_789), Keeping::Stable);
        let mut page = [0; 32];
        ram.read(0x5000, &mut page).unwrap();
        for stamp in [0, 1, u64::MAX / 2, u64::MAX] {
            assert_eq!(read(&page, stamp), 123_456_789);
        }
        assert_eq!(page[0], 2, "an even version: nothing is being written");
        clock.place(&ram, 0x5000);
        assert!(!clock.is_on(), "bit 0 turns it off");
    }

    /// What machines of older models have, a machine of such a model has for as long as it lives.
    #[test]
    fn an_older_machines_page_is_as_it_was() {
        let ram = GuestRam::new(2).unwrap();
        for (keeping, version, counts) in [
            (Keeping::Plain, 6, (0, 0)),
            (Keeping::Counted, 6, (0, 1)),
            (Keeping::Steady, 2, (0, 1)),
            (Keeping::Stable, 2, (0, 1)),
        ] {
            ram.write(0x5000, &[0; 32]).unwrap();
            let mut clock = PvClock::default();
            clock.place(&ram, 0x5001);
            for now in 1..=3 {
                clock.show(&ram, GuestTime(now), keeping);
                if now == 2 && keeping != Keeping::Plain {
                    assert!(exits(&ram));
                }
            }
            let mut page = [0; 32];
            ram.read(0x5000, &mut page).unwrap();
            let power = page[POWER];
            assert_eq!((page[0], page[16]), (version, 3), "{keeping:?}");
            assert_eq!((page[LEFT + 1], power), counts, "{keeping:?}");
            let flags = u8::from(keeping == Keeping::Stable);
            assert_eq!(page[FLAGS], flags, "{keeping:?}");
        }
    }

    /// As a prepared kernel reads it: whether that is an exit.
    fn exits(ram: &GuestRam) -> bool {
        let mut word = [0; 4];
        ram.read(0x5004, &mut word).unwrap();
        let left = i32::from_le_bytes(word) - 1;
        ram.write(0x5004, &left.to_le_bytes()).unwrap();
        left < 0
    }

    #[test]
    fn who_reads_often_exits_each_64th_time_and_who_reads_seldom_each_time() {
        let ram = GuestRam::new(2).unwrap();
        let mut clock = PvClock::default();
        clock.place(&ram, 0x5001);
        clock.show(&ram, GuestTime(0), Keeping::Stable);
        let mut run = |from: u64, apart: u64, reads: u64| {
            let mut made = 0;
            for read in 1..=reads {
                if exits(&ram) {
                    made += 1;
                    clock.show(&ram, GuestTime(from + read * apart), Keeping::Stable);
                }
            }
            made
        };
        // Each microsecond: twice as many each time, up to the most.
        assert_eq!(run(0, 1_000, 127), 7);
        assert_eq!(run(127_000, 1_000, 6_400), 100);
        // Each 100 us: so many that it is two milliseconds at the most, from the second time on.
        let made = run(6_527_000, 100_000, 64 + 160);
        assert_eq!(made, 1 + 160 / 16);
        // Each 50 ms.
        assert_eq!(run(28_927_000, 50_000_000, 16 + 10), 11);
    }

    #[test]
    fn what_a_guest_writes_into_the_counts_is_bounded() {
        let ram = GuestRam::new(2).unwrap();
        let mut clock = PvClock::default();
        clock.place(&ram, 0x5001);
        for power in [7, 31, 32, 255] {
            ram.write(0x5000 + POWER as u64, &[power]).unwrap();
            ram.write(0x5004, &i32::MIN.to_le_bytes()).unwrap();
            clock.show(&ram, GuestTime(1), Keeping::Stable);
            let mut page = [0; 32];
            ram.read(0x5000, &mut page).unwrap();
            assert_eq!((page[POWER], page[LEFT]), (POWER_MOST, 63));
        }
    }

    #[test]
    fn a_page_outside_memory_is_none() {
        let ram = GuestRam::new(2).unwrap();
        let mut clock = PvClock::default();
        for value in [u64::MAX, (2 << 20) - 27, (2 << 20) + 1, 0x5003] {
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
