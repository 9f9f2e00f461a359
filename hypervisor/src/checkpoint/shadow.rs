//! The shadow area: parts of a checkpoint gather here, and nothing of them is seen before all are there.
#![forbid(unsafe_code)]

use super::format::{self, FormatError};
use super::interval::{self, IntervalError};

/// Bytes of a part. Large against an entry's own bytes, small against a lane, so that the reader works on one part while
/// the next is written.
pub const PART_BYTES: usize = 64 << 10;

/// The largest area that is kept for the next checkpoint: 4,096 pages. The kernel has to find a new one page by page, which takes as long
/// as to copy it; larger ones are rare, and a side must not hold their memory for good.
const KEPT_BYTES: usize = 16 << 20;

/// Why a part does not fit.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ShadowError {
    /// A part is missing, or came twice.
    #[error("part {found} of a checkpoint came, where part {expected} was due")]
    Order {
        /// The part that was due.
        expected: u32,
        /// The part that came.
        found: u32,
    },
    /// More bytes than it announced.
    #[error("the checkpoint has more than the {announced} bytes it announced")]
    TooLong {
        /// Bytes it announced.
        announced: u64,
    },
    /// The first part does not begin a checkpoint of this machine.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The first part does not begin an interval of this machine.
    #[error(transparent)]
    Interval(#[from] IntervalError),
}

/// What gathers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Checkpoint,
    Interval,
}

/// Gathers one checkpoint, or the interval that ends with it.
#[derive(Debug)]
pub struct Shadow {
    kind: Kind,
    ram_pages: u64,
    bytes: Vec<u8>,
    next: u32,
    announced: u64,
}

impl Shadow {
    /// An empty area for a checkpoint of a machine with so much RAM.
    #[must_use]
    pub fn new(ram_pages: u64) -> Self {
        Self {
            kind: Kind::Checkpoint,
            ram_pages,
            bytes: Vec::new(),
            next: 0,
            announced: 0,
        }
    }

    /// An empty area for an interval of such a machine.
    #[must_use]
    pub fn of_intervals(ram_pages: u64) -> Self {
        Self {
            kind: Kind::Interval,
            ..Self::new(ram_pages)
        }
    }

    /// Whether nothing has come yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.next == 0
    }

    /// Adds a part. The first tells how much will come, and room is made for no more than that.
    ///
    /// # Errors
    /// See [`ShadowError`]; the area is then of no further use.
    pub fn add(&mut self, part: u32, bytes: &[u8]) -> Result<(), ShadowError> {
        if part != self.next {
            return Err(ShadowError::Order {
                expected: self.next,
                found: part,
            });
        }
        if part == 0 {
            self.announced = match self.kind {
                Kind::Checkpoint => format::announced(bytes, self.ram_pages)?,
                Kind::Interval => interval::announced(bytes, self.ram_pages)?,
            };
        }
        self.next += 1;
        if self.bytes.len() as u64 + bytes.len() as u64 > self.announced {
            return Err(ShadowError::TooLong {
                announced: self.announced,
            });
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// What has come, after the last part; and the area is empty again.
    #[must_use]
    pub fn take(&mut self) -> Vec<u8> {
        self.next = 0;
        std::mem::take(&mut self.bytes)
    }

    /// Gives back what was taken, for the next one to gather in.
    pub fn give_back(&mut self, mut bytes: Vec<u8>) {
        if self.is_empty() && bytes.capacity() <= KEPT_BYTES {
            bytes.clear();
            self.bytes = bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::format::{Scope, State, head, sealed};
    use crate::checkpoint::patch::Told;
    use crate::digest::Digest;
    use crate::entry::Base;
    use crate::position::Position;

    fn checkpoint() -> Vec<u8> {
        let state = State {
            position: Position(1),
            digest: Digest(2),
            injectable: false,
            halted: false,
            off: None,
            base: Base::default(),
            cpu: vec![7; 3000],
            devices: Vec::new(),
            staged: Vec::new(),
        };
        sealed(head(Scope::Full, 512, &state, &[], &Told::default()), &[])
    }

    #[test]
    fn parts_in_order_make_the_whole() {
        let whole = checkpoint();
        let mut shadow = Shadow::new(512);
        assert!(shadow.is_empty());
        for (part, bytes) in whole.chunks(1000).enumerate() {
            shadow.add(part as u32, bytes).unwrap();
        }
        assert!(!shadow.is_empty());
        let taken = shadow.take();
        assert_eq!(taken, whole);
        assert!(shadow.is_empty());
        shadow.give_back(taken);
        assert!(shadow.is_empty());
        shadow.add(0, &whole).unwrap();
        shadow.give_back(vec![7]);
        assert_eq!(shadow.take(), whole, "it had begun to gather");
    }

    #[test]
    fn missing_repeated_and_foreign_parts_are_refused() {
        let whole = checkpoint();
        let mut shadow = Shadow::new(512);
        assert_eq!(
            shadow.add(1, &whole),
            Err(ShadowError::Order {
                expected: 0,
                found: 1
            })
        );
        shadow.add(0, &whole[..1000]).unwrap();
        assert_eq!(
            shadow.add(0, &whole),
            Err(ShadowError::Order {
                expected: 1,
                found: 0
            })
        );
        let announced = whole.len() as u64;
        assert_eq!(
            shadow.add(1, &whole),
            Err(ShadowError::TooLong { announced })
        );
        assert!(matches!(
            Shadow::new(513).add(0, &whole),
            Err(ShadowError::Format(FormatError::Ram { .. }))
        ));
        assert!(matches!(
            Shadow::new(512).add(0, b"DOPL"),
            Err(ShadowError::Format(_))
        ));
    }
}
