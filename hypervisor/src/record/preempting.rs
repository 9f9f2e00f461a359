//! The recorder's part of preemption: a guest that was kicked gets a place in the log where it stands.
#![forbid(unsafe_code)]

use std::time::Instant;

use super::{Ended, Intervals, RecordError, Recorder};
use crate::checkpoint::{PART_BYTES, Pages, Remembered};
use crate::courier::AROUND_A_PART;
use crate::entry::{Base, Body, Entry, Part};
use crate::orders::Stop;
use crate::sink::Sink;

impl<S: Sink> Recorder<S> {
    /// From now on it is known which pages the guest writes. The backup has the machine as it is now.
    pub(super) fn prepare_to_preempt(&mut self) -> Result<(), RecordError> {
        let kept = self.intervals.as_ref().is_some_and(Intervals::are_kept);
        if self.options.preempt && self.sink.keeps() || kept {
            self.machine.track_changes()?;
        }
        Ok(())
    }

    /// The guest is about to run: says what it would be stopped for.
    pub(super) fn entering(&mut self) {
        if self.options.preempt {
            let due = if self.machine.owes_interrupt() {
                Some(Instant::now())
            } else {
                self.machine.next_tick().map(|tick| self.clock.when(tick))
            };
            self.orders.entering(self.machine.position(), due);
        }
        if let Some(intervals) = &mut self.intervals {
            intervals.entering();
            self.orders.interval_ends(intervals.ends());
        }
    }

    /// The guest has stopped.
    pub(super) fn left(&self) {
        if self.options.preempt {
            self.orders.left();
        }
    }

    /// Whether the guest, which was kicked, is to be given a place here.
    pub(super) fn wants_place(&mut self) -> bool {
        if !self.options.preempt || !self.mid_run {
            return false;
        }
        // An order that waits still is one that needs a place to stop at.
        self.orders.waiting()
            || !self.deeds.is_empty()
            || self.something_is_due() && self.machine.preemptible()
    }

    fn something_is_due(&mut self) -> bool {
        self.machine.owes_interrupt()
            || self.machine.ticks_due(self.clock.now()) > 0
            || self.stage.has_frames() && self.machine.can_receive()
            || self.stage.has_typed() && self.machine.console_room() > 0
            || self.stage.has_done()
    }

    /// Makes the place where the guest stands one where inputs can be given: the log gets a checkpoint, which the backup
    /// loads in place of executing as far.
    pub(super) fn make_place(&mut self) -> Result<Option<Ended>, RecordError> {
        let started = Instant::now();
        self.machine.stop_between();
        self.mid_run = false;
        if self.intervals.is_some() {
            // Nobody follows step by step: any place is one.
            return self.sync_point();
        }
        if self.sink.keeps() {
            let (pages, bytes) = self.post_checkpoint()?;
            let took = started.elapsed();
            self.samples.checkpoint(Stop { took, pages, bytes });
        }
        self.sync_point()
    }

    /// A checkpoint of what the guest has written since the last one, told by what has changed in each page where the other side can have that; and how many
    /// pages that was.
    fn changes_since_last(&mut self, base: Base) -> Result<(usize, Vec<u8>), RecordError> {
        let patches = self.sink.is_read_whole() && self.sink.version().patches_pages();
        if let Some(unwritten) = self.unwritten.take() {
            self.machine.leave_open(unwritten);
        }
        let mut capture = self
            .machine
            .capture(Pages::Changed, base, Vec::new(), Vec::new())?;
        let pages = capture.pages();
        if patches {
            let told = self
                .told
                .get_or_insert_with(|| Remembered::new(self.machine.pages()));
            self.unwritten = Some(capture.patch(told, &mut Vec::new(), true));
        }
        Ok((pages, capture.sealed()))
    }

    /// Pages and bytes of it.
    fn post_checkpoint(&mut self) -> Result<(usize, usize), RecordError> {
        let position = self.machine.position();
        let base = Base::new(position, self.encoder.base().clock());
        let (pages, bytes) = self.changes_since_last(base)?;
        let most = PART_BYTES.min(self.sink.max_payload() - AROUND_A_PART);
        for part in Part::all_of(&bytes, most) {
            let body = Body::Part(part);
            self.post(&Entry { position, body }, Instant::now())?;
            // The backup takes this part while the next is written.
            self.sink.notify(true);
        }
        Ok((pages, bytes.len()))
    }
}
