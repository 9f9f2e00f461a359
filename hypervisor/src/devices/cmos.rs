//! The real-time clock and its memory (Motorola MC146818A data sheet), at ports 0x70 and 0x71.
//!
//! The time is the wall clock at which the guest started plus the guest's clock, in BCD and 24 hours as PCs have it, so a read of
//! a time register needs the clock. The guest cannot set it: what it writes there is ignored, and no update is ever in progress. Its
//! alarm and periodic interrupts never come; Linux then falls back on timers of its own.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::event::GuestTime;

/// Selects a register.
pub const INDEX: u16 = 0x70;
/// The selected register.
pub const DATA: u16 = 0x71;

const SECONDS: u8 = 0;
const MINUTES: u8 = 2;
const HOURS: u8 = 4;
const DAY_OF_WEEK: u8 = 6;
const DAY: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// Where PCs, and the FADT, have the century.
pub const CENTURY: u8 = 0x32;

const REGISTERS: usize = 128;
/// 32,768 Hz time base, 1,024 Hz rate; no update in progress.
const A_VALUE: u8 = 0x26;
/// 24 hours, BCD.
const B_VALUE: u8 = 0x02;
/// RAM and time are valid.
const D_VALUE: u8 = 0x80;

const SECONDS_A_DAY: u64 = 86_400;

/// The clock.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Cmos {
    wall_clock_ns: u64,
    index: u8,
    memory: Vec<u8>,
}

impl Cmos {
    /// A clock that shows `wall_clock_ns` (Unix time) when the guest's clock reads 0.
    #[must_use]
    pub fn new(wall_clock_ns: u64) -> Self {
        Self {
            wall_clock_ns,
            index: 0,
            memory: vec![0; REGISTERS],
        }
    }

    /// The wall clock at which the guest's clock reads 0.
    #[must_use]
    pub fn wall_clock_ns(&self) -> u64 {
        self.wall_clock_ns
    }

    /// Whether the clock can be in this state.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.memory.len() == REGISTERS && usize::from(self.index) < REGISTERS
    }

    /// A guest's read of `port`; `None` if it needs the clock ([`Cmos::answer`]).
    #[must_use]
    pub fn read(&self, port: u16) -> Option<u8> {
        if port != DATA {
            return Some(0xff);
        }
        match self.index {
            SECONDS | MINUTES | HOURS | DAY_OF_WEEK..=YEAR | CENTURY => None,
            STATUS_A => Some(A_VALUE),
            STATUS_B => Some(self.memory[usize::from(STATUS_B)] & !B_VALUE | B_VALUE),
            STATUS_C => Some(0),
            STATUS_D => Some(D_VALUE),
            index => Some(self.memory[usize::from(index)]),
        }
    }

    /// A guest's write to `port`.
    pub fn write(&mut self, port: u16, value: u8) {
        if port == INDEX {
            // Bit 7 masks the NMI, which nobody makes.
            self.index = value & (REGISTERS as u8 - 1);
        } else {
            self.memory[usize::from(self.index)] = value;
        }
    }

    /// The selected time register at `now`.
    #[must_use]
    pub fn answer(&self, now: GuestTime) -> u8 {
        let seconds = self.wall_clock_ns.saturating_add(now.0) / 1_000_000_000;
        let (day, second) = (seconds / SECONDS_A_DAY, seconds % SECONDS_A_DAY);
        let (year, month, day_of_month) = date(day);
        let value = match self.index {
            SECONDS => second % 60,
            MINUTES => second / 60 % 60,
            HOURS => second / 3600,
            // 1970 began on a Thursday; Sunday is 1.
            DAY_OF_WEEK => (day + 4) % 7 + 1,
            DAY => day_of_month,
            MONTH => month,
            YEAR => year % 100,
            _ => year / 100,
        };
        bcd(value)
    }
}

fn bcd(value: u64) -> u8 {
    (value / 10 % 10 * 16 + value % 10) as u8
}

/// Year, month and day of month of a day since 1 January 1970, by years that begin in March: then the leap day is the last.
fn date(day: u64) -> (u64, u64, u64) {
    const DAYS_IN_400_YEARS: u64 = 146_097;
    const MARCH_0000_TO_1970: u64 = 719_468;
    let day = day + MARCH_0000_TO_1970;
    let (era, day) = (day / DAYS_IN_400_YEARS, day % DAYS_IN_400_YEARS);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // Five months from March on have 153 days, over and over.
    let shifted = (5 * day + 2) / 153;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = 400 * era + year + u64::from(month <= 2);
    (year, month, day - (153 * shifted + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(wall_clock_s: u64, now: GuestTime) -> Vec<u8> {
        let mut cmos = Cmos::new(wall_clock_s * 1_000_000_000);
        [
            CENTURY,
            YEAR,
            MONTH,
            DAY,
            HOURS,
            MINUTES,
            SECONDS,
            DAY_OF_WEEK,
        ]
        .iter()
        .map(|&register| {
            cmos.write(INDEX, 0x80 | register);
            assert_eq!(cmos.read(DATA), None);
            cmos.answer(now)
        })
        .collect()
    }

    #[test]
    fn shows_the_date_in_bcd() {
        assert_eq!(
            shown(0, GuestTime(0)),
            [0x19, 0x70, 1, 1, 0, 0, 0, 5],
            "a Thursday"
        );
        assert_eq!(
            shown(1_709_251_198, GuestTime(1_500_000_000)),
            [0x20, 0x24, 2, 0x29, 0x23, 0x59, 0x59, 5],
            "a leap day"
        );
        assert_eq!(
            shown(1_709_251_198, GuestTime(2_000_000_000)),
            [0x20, 0x24, 3, 1, 0, 0, 0, 6]
        );
        assert_eq!(
            shown(1_795_682_798, GuestTime(0)),
            [0x20, 0x26, 0x11, 0x26, 8, 0x46, 0x38, 5]
        );
    }

    #[test]
    fn memory_is_kept_and_the_time_is_not_set() {
        let mut cmos = Cmos::new(0);
        cmos.write(INDEX, 0x40);
        cmos.write(DATA, 0x5a);
        assert_eq!(cmos.read(DATA), Some(0x5a));
        cmos.write(INDEX, MINUTES);
        cmos.write(DATA, 0x30);
        assert_eq!(cmos.answer(GuestTime(0)), 0);
        cmos.write(INDEX, STATUS_B);
        cmos.write(DATA, 0x80);
        assert_eq!(cmos.read(DATA), Some(0x82));
        assert_eq!(cmos.read(INDEX), Some(0xff));
        assert!(cmos.is_sound());
    }
}
