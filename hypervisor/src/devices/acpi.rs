//! The fixed ACPI registers of the board (ACPI 6.5, section 4.8): PM1 events and the power-management timer.
//!
//! No event ever happens here, so the status reads 0; what the guest enables is kept, as ACPICA reads it back. PM1 control is the
//! power-off port (`power.rs`): a sleep type of 0 with the enable bit is the board's S5. The timer is a function of the clock.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::event::GuestTime;

/// PM1 status; this register and the next have 16 bits.
pub const EVENTS: u16 = 0x600;
/// The timer: 32 bits.
pub const TIMER: u16 = 0x608;
/// The reset register: 8 bits.
pub const RESET: u16 = 0xcf9;
/// What resets the board when it is written there.
pub const RESET_VALUE: u8 = 6;

/// PM1 enable.
pub const ENABLE: u16 = EVENTS + 2;

/// Ticks a second (section 4.8.3.3).
const TIMER_HZ: u128 = 3_579_545;

/// PM1's event registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Events {
    enabled: u16,
}

impl Events {
    /// A guest's read of a 16-bit register.
    #[must_use]
    pub fn read(&self, port: u16) -> u16 {
        if port == ENABLE { self.enabled } else { 0 }
    }

    /// A guest's write. There is no event to be cleared.
    pub fn write(&mut self, port: u16, value: u16) {
        if port == ENABLE {
            self.enabled = value;
        }
    }
}

/// The timer's value at `now`.
#[must_use]
pub fn timer(now: GuestTime) -> u32 {
    (u128::from(now.0) * TIMER_HZ / 1_000_000_000) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timer_counts_its_frequency_and_wraps_at_32_bits() {
        assert_eq!(timer(GuestTime(0)), 0);
        assert_eq!(timer(GuestTime(1_000_000_000)), 3_579_545);
        let wrap = (1u64 << 32) * 1_000_000_000 / 3_579_545 + 1;
        assert_eq!(timer(GuestTime(wrap)), 0);
        let end = timer(GuestTime(u64::MAX));
        assert!(end > timer(GuestTime(u64::MAX - 1_000_000)));
    }

    #[test]
    fn what_is_enabled_is_kept_and_nothing_happens() {
        let mut events = Events::default();
        events.write(EVENTS, 0xffff);
        events.write(ENABLE, 0x20);
        assert_eq!((events.read(EVENTS), events.read(ENABLE)), (0, 0x20));
    }
}
