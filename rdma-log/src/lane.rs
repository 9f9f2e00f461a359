//! One lane: one writer, one reader, and the bytes between them.
//!
//! Positions count bytes since the start of the connection and never go back; the place in the ring is the position
//! modulo the lane's size, the *lap* the position divided by it.
//!
//! ```text
//!        consumed            cursor of the reader       tail, cursor of the writer       consumed + size
//!  ─────────┼──────────────────────┼─────────────────────────────┼──────────────────────────────┼───▶ bytes
//!   free    │  copied out; credit  │  committed, to be read      │  free: the writer's credit   │
//!           │  is on its way back  │                             │  [pad] [entry being built]   │
//! ```
//!
//! Over `shm` the reader's cursor may stand one entry beyond the tail for a moment: it takes an entry as soon as it is
//! whole, and the writer moves the tail after that.
//!
//! The writer builds an entry beyond the tail and posts it; it never builds beyond `consumed + size`, so it never
//! overruns what was not copied out. The reader copies an entry into a buffer of its own, checks the copy, moves its
//! cursor and returns the credit. It believes nothing it has not copied: a peer that changes bytes meanwhile gets an
//! error named by position, field, expected and found.
#![forbid(unsafe_code)]

mod reader;
mod writer;

pub(crate) use reader::ReaderParts;
pub use reader::{LaneReader, Missing, ReadError};
pub(crate) use writer::WriterParts;
pub use writer::{Counter, LaneWriter, Slot, WriteError};

use crate::entry::{HEADER_LEN, LAPS, LINE, MAX_PAYLOAD};

/// A lane is never smaller than this, in bytes. Small enough under loom that every interleaving can be tried.
pub const MIN_LANE: usize = if cfg!(loom) { 4 * LINE } else { 4096 };

/// A lane is never larger than this, in bytes.
pub const MAX_LANE: usize = 1 << 30;

/// The arithmetic of a lane of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    size: u64,
}

impl Geometry {
    /// `None` unless the size is a power of two from [`MIN_LANE`] to [`MAX_LANE`].
    pub(crate) fn new(size: usize) -> Option<Geometry> {
        let fits = size.is_power_of_two() && (MIN_LANE..=MAX_LANE).contains(&size);
        fits.then_some(Geometry { size: size as u64 })
    }

    pub(crate) fn size(self) -> u64 {
        self.size
    }

    /// The place in the ring.
    pub(crate) fn offset(self, at: u64) -> usize {
        (at & (self.size - 1)) as usize
    }

    /// The lap, as it goes into a stamp.
    pub(crate) fn lap(self, at: u64) -> u32 {
        ((at >> self.size.trailing_zeros()) % u64::from(LAPS)) as u32
    }

    /// Bytes up to the end of the lap.
    pub(crate) fn to_end(self, at: u64) -> u64 {
        self.size - (at & (self.size - 1))
    }

    /// The longest payload. A quarter of the lane, so that a pad and an entry always fit into an empty one.
    pub(crate) fn max_payload(self) -> usize {
        (self.size as usize / 4 - HEADER_LEN).min(MAX_PAYLOAD)
    }

    /// Bytes of ring that an entry with such a payload takes.
    pub(crate) fn span(payload: usize) -> u64 {
        (HEADER_LEN + payload).next_multiple_of(LINE) as u64
    }

    /// Bytes that a pad must fill before an entry with such a payload can start.
    pub(crate) fn pad(self, at: u64, payload: usize) -> u64 {
        let left = self.to_end(at);
        if Geometry::span(payload) > left {
            left
        } else {
            0
        }
    }
}

#[cfg(all(test, not(loom)))]
pub(crate) mod tests;
