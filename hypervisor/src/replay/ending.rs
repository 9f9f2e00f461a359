//! How a replay ends: at a position, or as the machine that goes live.
#![forbid(unsafe_code)]

use std::time::Instant;

use super::{LogSource, ReplayEnd, ReplayError, Replayer};
use crate::entry::Base;
use crate::event::{GuestTime, Output};
use crate::machine::Machine;
use crate::orders::Pace;
use crate::position::Position;

/// What is left of a replayer when it goes live.
pub struct Remains {
    /// The machine, at the last entry's sync point.
    pub machine: Machine,
    /// Where the log stands.
    pub base: Base,
    /// Outputs above the released watermark, oldest first.
    pub unreleased: Vec<Output>,
    /// When the last clock value came: guest time goes on from there.
    pub clock_came: Instant,
    /// What the guest may have of its time.
    pub share: Pace,
    /// The last clock value.
    pub clock: GuestTime,
}

impl<L: LogSource> Replayer<L> {
    /// Ends at this position at the latest, after its inputs and before the guest runs on.
    #[must_use]
    pub fn to(mut self, to: Option<Position>) -> Self {
        self.to = to;
        self
    }

    /// Ends, if that position comes before the one of the next entry.
    pub(super) fn ends_before(&mut self, next: Position) -> Result<Option<ReplayEnd>, ReplayError> {
        let Some(to) = self.to.filter(|to| next > *to) else {
            return Ok(None);
        };
        let there = self.run_to(to)?;
        Ok(Some(if there {
            ReplayEnd::There
        } else {
            ReplayEnd::Stopped
        }))
    }

    /// The machine, which is not replayed any further.
    pub fn machine_mut(&mut self) -> &mut Machine {
        &mut self.machine
    }

    /// Takes the machine over, after the log is over. Frames that were staged and not applied stay with the source.
    #[must_use]
    pub fn into_remains(mut self) -> (Remains, L) {
        self.end_tape();
        let base = self.base();
        (
            Remains {
                machine: self.machine,
                base,
                unreleased: self.unreleased.into_outputs(),
                clock_came: self.clock_came,
                share: self.share,
                clock: base.clock(),
            },
            self.source,
        )
    }
}
