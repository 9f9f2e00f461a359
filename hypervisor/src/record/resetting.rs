//! The recorder's part of a reset: the machine starts anew at a sync point, and the log says so there.
//!
//! A guest that resets itself is asked for it by no input, so the log would not need the entry; but it is where outputs that were made
//! before have been posted, and an operator's reset is then the same thing.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use super::{Ended, RecordError, Recorder, SLEEP_MAX};
use crate::entry::{Control, Wish};
use crate::sink::Sink;

/// A guest that starts anew again and again does so no oftener than this. Each start writes the image's memory, and under replication sends it, or
/// has the backup do as much: a guest in a loop must not get a CPU, or the network, for that alone. Small beside what a guest
/// takes to start, so that nobody else notices.
const APART: Duration = Duration::from_secs(1);

/// Of a machine that starts anew.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Resets {
    last: Option<Instant>,
    /// Until then it stands, as it did so a moment ago.
    stands_until: Option<Instant>,
}

impl<S: Sink> Recorder<S> {
    /// Starts the machine anew. Everything that was made and supplied so far has been posted.
    pub(super) fn reset(&mut self, wish: Wish) -> Result<(), RecordError> {
        self.post_control(Control::Reset(wish))?;
        let (orders, position) = (&self.orders, self.machine.position());
        self.machine.reset(|| {
            orders.resting();
            orders.working(position);
        })?;
        self.orders.report_reset(wish);
        let now = Instant::now();
        self.resets.stands_until = self.resets.last.map(|last| last + APART);
        self.resets.last = Some(now);
        Ok(())
    }

    /// Stands, if the machine started anew twice within a short time. Everything else goes on.
    pub(super) fn stand_after_resets(&mut self) -> Result<Option<Ended>, RecordError> {
        while let Some(until) = self.resets.stands_until {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.resets.stands_until = None;
                break;
            }
            if self.orders.waiting()
                && let Some(ended) = self.obey()?
            {
                return Ok(Some(ended));
            }
            if let Some(ended) = self.do_deeds()? {
                return Ok(Some(ended));
            }
            if let Some(ended) = self.keep_intervals()? {
                return Ok(Some(ended));
            }
            self.cut_if_wanted()?;
            self.release();
            self.orders.resting();
            let (orders, intervals) = (&self.orders, self.intervals.as_ref());
            self.stage.bell().wait(left.min(SLEEP_MAX), || {
                orders.waiting() || intervals.is_some_and(super::Intervals::calls)
            });
        }
        Ok(None)
    }
}
