//! The recorder's part of slowing a guest down: it runs for a slice, and stands for as long as its pace wants.
//!
//! Nothing of it is in the log: a guest knows time only by what it is told at its exits.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use super::{Ended, RecordError, Recorder};
use crate::machine::Stepped;
use crate::orders::Pace;
use crate::sink::Sink;

impl<S: Sink> Recorder<S> {
    /// Stands, if the guest has run for a slice since it last did.
    pub(super) fn keep_pace(&mut self) -> Result<Option<Ended>, RecordError> {
        if self.ran < Pace::SLICE {
            return Ok(None);
        }
        let rest = self.orders.pace().rest(std::mem::take(&mut self.ran));
        let until = Instant::now() + rest;
        loop {
            if self.orders.waiting()
                && let Some(ended) = self.obey()?
            {
                return Ok(Some(ended));
            }
            let left = until.saturating_duration_since(Instant::now());
            // A pace that was taken back is so at once.
            if left.is_zero() || self.orders.pace() == Pace::FULL {
                return Ok(None);
            }
            if self.outlet.waiting() > 0 {
                self.release();
            }
            let orders = &self.orders;
            self.stage.bell().wait(left.min(LOOK), || orders.waiting());
        }
    }

    /// Runs the guest to its next exit or kick. Its time is counted only while it is slowed down.
    pub(super) fn step_at_pace(&mut self) -> Result<Stepped, RecordError> {
        let counted = (self.orders.pace() < Pace::FULL).then(Instant::now);
        let stepped = self.machine.step()?;
        if let Some(since) = counted {
            self.ran += since.elapsed();
        }
        Ok(stepped)
    }
}

/// Between two looks whether the guest still has to stand.
const LOOK: Duration = Duration::from_millis(1);
