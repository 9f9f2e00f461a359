//! A divergence: the replayed machine did something else than the recorded one.
#![forbid(unsafe_code)]

use std::fmt;

use crate::digest::ExitRecord;
use crate::machine::Machine;
use crate::position::Position;

/// The first difference that was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Divergence {
    /// The sync point at which it was seen.
    pub position: Position,
    /// The last sync point at which both were known to be equal.
    pub equal_until: Position,
    /// What differs.
    pub field: &'static str,
    /// What the log says.
    pub expected: String,
    /// What happened here.
    pub found: String,
    /// The exits since `equal_until`, as far as they are kept.
    pub exits: Vec<ExitRecord>,
}

impl std::error::Error for Divergence {}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "divergence at position {}: {} was {} in the log, is {} here (equal until position {})",
            self.position, self.field, self.expected, self.found, self.equal_until
        )
    }
}

impl Divergence {
    pub(crate) fn new(
        machine: &Machine,
        equal_until: Position,
        field: &'static str,
        expected: String,
        found: String,
    ) -> Self {
        Self {
            position: machine.position(),
            equal_until,
            field,
            expected,
            found,
            exits: machine
                .history()
                .iter()
                .filter(|exit| exit.position() > equal_until)
                .copied()
                .collect(),
        }
    }

    /// Names the first exit and field that differ, given the recorded side's exits. Unchanged if they tell nothing.
    #[must_use]
    pub fn narrowed(mut self, recorded: &[ExitRecord]) -> Self {
        let first = self.exits.iter().find_map(|found| {
            let expected = recorded
                .iter()
                .find(|exit| exit.position() == found.position())?;
            Some((found.position(), expected.first_difference(found)?))
        });
        if let Some((position, difference)) = first {
            self.position = position;
            self.field = difference.field;
            self.expected = difference.expected;
            self.found = difference.found;
        }
        self
    }
}
