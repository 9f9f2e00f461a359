//! The platform page: halt, clock, random bits (guest ABI, "The platform page").
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// Where the page is.
pub const BASE: u64 = 0xd000_0000;
/// Its length.
pub const LEN: u64 = 0x1000;

/// A register of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Register {
    /// Notifies every queue, waits until something happened, returns the clock.
    Halt,
    /// The clock.
    Clock,
    /// 64 random bits.
    Random,
}

/// Bytes of every register, and of the only access that reads one.
pub const REGISTER_BYTES: usize = 8;

/// The register that a read of `len` bytes at `offset` reads, if any: exactly 8 bytes, exactly there.
#[must_use]
pub fn register(offset: u64, len: usize) -> Option<Register> {
    match (offset, len) {
        (0x00, REGISTER_BYTES) => Some(Register::Halt),
        (0x08, REGISTER_BYTES) => Some(Register::Clock),
        (0x10, REGISTER_BYTES) => Some(Register::Random),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exact_accesses_hit() {
        assert_eq!(register(0, 8), Some(Register::Halt));
        assert_eq!(register(8, 8), Some(Register::Clock));
        assert_eq!(register(16, 8), Some(Register::Random));
        for (offset, len) in [(0, 4), (4, 8), (24, 8), (8, 1), (16, 16), (0xff8, 8)] {
            assert_eq!(register(offset, len), None);
        }
    }
}
