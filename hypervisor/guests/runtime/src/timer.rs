//! The 8254's channel 0 as a periodic timer on interrupt line 0.

use crate::port;

/// The interrupt line of the timer.
pub const LINE: usize = 0;
const CLOCK_HZ: u32 = 1_193_182;
const CHANNEL_0: u16 = 0x40;
const COMMAND: u16 = 0x43;
const RATE_GENERATOR: u8 = 0x34; // channel 0, both bytes, mode 2

/// Starts interrupts `hz` times a second, as nearly as the 8254 can: 19 to 596,591. The line must be opened
/// too. Three port writes.
pub fn start(hz: u32) {
    let divisor = divisor(hz);
    port::write_u8(COMMAND, RATE_GENERATOR);
    port::write_u8(CHANNEL_0, divisor as u8);
    port::write_u8(CHANNEL_0, (divisor >> 8) as u8);
}

/// Mode 2 knows no divisor of 1, and 0 stands for 65536.
fn divisor(hz: u32) -> u16 {
    ((CLOCK_HZ + hz / 2) / hz.max(1)).clamp(2, 0xffff) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisors_are_nearest_and_in_range() {
        assert_eq!(divisor(100), 11932);
        assert_eq!(divisor(1000), 1193);
        assert_eq!(divisor(0), 0xffff);
        assert_eq!(divisor(u32::MAX / 2), 2);
    }
}
