//! Where an execution stands.
#![forbid(unsafe_code)]

use std::fmt;

/// The ordinal of a sync point since the guest started: 0 before the first exit, 1 at the first
/// (the paper's instruction number, at the grain of an exit).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position(pub u64);

impl Position {
    /// The following sync point.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
