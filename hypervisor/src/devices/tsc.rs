//! The time stamp of guests whose RDTSC was rewritten to a port read.
//!
//! `IN EAX, imm8` has the two bytes that RDTSC has, and traps. The stamp counts nanoseconds of the guest's clock; its upper half goes
//! into EDX, as RDTSC would put it there, which no port does: the machine sets the register.
#![forbid(unsafe_code)]

use crate::event::GuestTime;

/// The port; below 0x100, as the instruction has it in one byte.
pub const PORT: u16 = 0xe4;

/// The lower half, for EAX, and the upper, for RDX.
#[must_use]
pub fn halves(now: GuestTime) -> (u32, u64) {
    (now.0 as u32, now.0 >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_nanoseconds_in_two_halves() {
        assert_eq!(halves(GuestTime(0x1_0000_0002)), (2, 1));
    }
}
