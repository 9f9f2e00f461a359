//! Interrupts: the table of gates, the 8259 pair, and a counter for each line.
//!
//! A stub adds one to its line's counter and returns; the 8259s end interrupts by themselves. So an interrupt
//! costs a guest two instructions of ring 0 and no exit, and changes nothing but its counter.

use crate::port;
#[cfg(not(test))]
use crate::start;
use core::sync::atomic::{AtomicU64, Ordering};

/// The vector of interrupt line 0; the others follow.
pub const FIRST_VECTOR: usize = 0x20;
/// Interrupt lines of the 8259 pair.
pub const LINES: usize = 16;

/// How often each line has interrupted. Written by the stubs only.
pub(crate) static COUNTS: [AtomicU64; LINES] = [const { AtomicU64::new(0) }; LINES];

/// One gate of the interrupt descriptor table: 64-bit interrupt gate, DPL 0, IST 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct Gate(u64, u64);

impl Gate {
    /// A gate that is not there.
    pub const NONE: Self = Self(0, 0);

    /// The gate to ring-0 code at this address.
    #[must_use]
    pub const fn to(address: u64) -> Self {
        const CODE_SELECTOR: u64 = 0x08;
        const PRESENT_INTERRUPT_GATE_IST1: u64 = 0x8e01;
        Self(
            address & 0xffff
                | CODE_SELECTOR << 16
                | PRESENT_INTERRUPT_GATE_IST1 << 32
                | (address >> 16 & 0xffff) << 48,
            address >> 32,
        )
    }
}

/// Fills the interrupt table with the runtime's stubs.
#[cfg(not(test))]
pub(crate) fn install() {
    for vector in 0..FIRST_VECTOR + LINES {
        // SAFETY: one thread, and no interrupt line is open yet; the table is the one LIDT named.
        unsafe { (*start::TABLE.0.get())[vector] = Gate::to(start::stub(vector)) };
    }
}

/// Opens these lines (bit n is line n) and closes all others. Ten port writes.
pub fn open(lines: u16) {
    const CASCADE: u16 = 1 << 2;
    const AUTO_END_8086: u8 = 0x03;
    let mask = !if lines >> 8 == 0 {
        lines
    } else {
        lines | CASCADE
    };
    for (chip, vector, wiring, mask) in [
        (0x20, FIRST_VECTOR, 1 << 2, mask as u8),
        (0xa0, FIRST_VECTOR + 8, 2, (mask >> 8) as u8),
    ] {
        port::write_u8(chip, 0x11);
        port::write_u8(chip + 1, vector as u8);
        port::write_u8(chip + 1, wiring);
        port::write_u8(chip + 1, AUTO_END_8086);
        port::write_u8(chip + 1, mask);
    }
}

/// How often a line has interrupted since the start.
#[must_use]
pub fn count(line: usize) -> u64 {
    COUNTS[line].load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_is_laid_out_as_the_processor_reads_it() {
        let gate = Gate::to(0x1234_5678_9abc_def0);
        assert_eq!(gate, Gate(0x9abc_8e01_0008_def0, 0x1234_5678));
    }
}
