//! The recorder's part of a copy of the running machine: what the desk asks, between two steps of the guest.
#![forbid(unsafe_code)]

use std::time::Instant;

use rdma_log::Seq;

use super::{Ended, RecordError, Recorder};
use crate::checkpoint::{CheckpointError, Pages, STAGED_MAX};
use crate::desk::{Answer, Ask, Cut};
use crate::machine::Phase;
use crate::orders::Order;
use crate::sink::Sink;

/// A log that is to begin.
pub(super) struct Cutting<S> {
    /// Of the question.
    number: u64,
    sink: Box<S>,
    /// All is to leave first, the inputs lane is to have committed so far, and the guest is to stand then.
    stand: Option<Seq>,
}

/// Pages for which the guest stands while KVM begins to note them anew: half a millisecond's worth.
const SWEPT_AT_ONCE: usize = 512;

impl<S: Sink> Recorder<S> {
    /// Answers what can be answered anywhere; a cut waits for a place.
    pub(super) fn attend(&mut self) {
        let Some(desk) = self.desk.clone() else {
            return;
        };
        let Some((number, ask)) = desk.take() else {
            return;
        };
        let answer = match ask {
            Ask::Watch => self.machine.track_for_copy().map(|()| Answer::Watching),
            Ask::Changed => self
                .machine
                .sweep_uncopied(SWEPT_AT_ONCE)
                .map(Answer::Changed),
            Ask::Cut(sink) => {
                self.cut = Some(Cutting {
                    number,
                    sink,
                    stand: None,
                });
                return;
            }
            Ask::Stand(sink, inputs) => {
                self.cut = Some(Cutting {
                    number,
                    sink,
                    stand: Some(inputs),
                });
                return;
            }
            Ask::Forget => {
                self.cut = None;
                self.machine.end_copy();
                return;
            }
        };
        let answer = answer.unwrap_or_else(|error| Answer::Failed(error.to_string()));
        desk.answer(number, answer);
    }

    /// Cuts here, if that is wanted and this is a place: the guest could run on or waits in HLT, and everything that was made
    /// and supplied so far has been posted.
    pub(super) fn cut_if_wanted(&mut self) -> Result<Option<Ended>, RecordError> {
        let ready = self.cut.is_some()
            && matches!(self.machine.phase(), Phase::Ready | Phase::HltInstruction)
            && !self.machine.has_outputs()
            // They are of the log before; the copy has their requests as answered.
            && !self.stage.has_done()
            && self.step.inputs.is_empty();
        if !ready {
            return Ok(None);
        }
        if let Some(inputs) = self.cut.as_ref().and_then(|cut| cut.stand) {
            return self.stand_for_newcomer(inputs);
        }
        let (Some(Cutting { number, sink, .. }), Some(desk)) = (self.cut.take(), self.desk.clone())
        else {
            return Ok(None);
        };
        let started = Instant::now();
        // Whoever took over may have inherited more than a checkpoint takes, for a guest that takes none: as on a wire, it is lost.
        match self.checkpoint_for_copy(STAGED_MAX as usize) {
            Ok(checkpoint) => {
                if let Some(disk) = &self.disk {
                    // Before anything that is asked from here on.
                    disk.copy_rest();
                }
                // Before the first entry, which may meet the new log's own fence.
                self.orders.begin_log();
                self.begin_log(*sink)?;
                let stopped = started.elapsed();
                let cut = Cut {
                    checkpoint,
                    stopped,
                };
                desk.answer(number, Answer::Cut(cut));
                self.tell_share()?;
            }
            // The guest is as it was, and goes on as before.
            Err(error) => desk.answer(number, Answer::Failed(error.to_string())),
        }
        Ok(None)
    }

    /// Lets out all that was made, gives the newcomer the rest of its copy, and stands until it is known which log goes on.
    fn stand_for_newcomer(&mut self, inputs: Seq) -> Result<Option<Ended>, RecordError> {
        loop {
            while let Some(order) = self.orders.take() {
                match order {
                    deed if deed.is_deed() => self.deeds.push_back(deed),
                    Order::Attend => self.attend(),
                    // The protocol has decided otherwise meanwhile.
                    other => {
                        self.forget_stand();
                        return Ok((!self.obey_one(other)).then_some(Ended::Stopped));
                    }
                }
            }
            if self.cut.as_ref().is_none_or(|cut| cut.stand.is_none()) {
                return Ok(None);
            }
            if self.all_has_left(inputs) {
                break;
            }
        }
        let (Some(cut), Some(desk)) = (self.cut.take(), self.desk.clone()) else {
            return Ok(None);
        };
        let (base, started) = (self.encoder.base(), Instant::now());
        // The old backup, which may be the one that goes on, takes no checkpoint here, and has every frame of the stage.
        let stands = match self.machine.phase() {
            Phase::Ready => self.machine.stand_to_run().map_err(CheckpointError::from),
            _ => Ok(()),
        };
        match stands.and_then(|()| self.checkpoint_for_copy(usize::MAX)) {
            Ok(checkpoint) => {
                if let Some(disk) = &self.disk {
                    // All that was asked is in it, and nothing is asked before it is known which log goes on.
                    disk.copy_rest();
                }
                let stopped = started.elapsed();
                desk.answer(
                    cut.number,
                    Answer::Cut(Cut {
                        checkpoint,
                        stopped,
                    }),
                );
            }
            Err(error) => {
                desk.answer(cut.number, Answer::Failed(error.to_string()));
                self.encoder.rebase(base);
                return Ok(None);
            }
        }
        self.begins = false;
        if !self.obey_one(Order::Freeze) {
            return Ok(Some(Ended::Stopped));
        }
        if std::mem::take(&mut self.begins) {
            self.begin_log(*cut.sink)?;
            self.outlet.open();
            self.tell_share()?;
        } else {
            // The old log counts from its own last entry, and nobody was told of another clock.
            self.encoder.rebase(base);
            self.machine.end_copy();
        }
        Ok(None)
    }

    /// A guest that is to stand for a newcomer runs on.
    pub(super) fn forget_stand(&mut self) {
        if self.cut.as_ref().is_some_and(|cut| cut.stand.is_some()) {
            self.cut = None;
            self.machine.end_copy();
        }
    }

    /// With so many staged frames at most; what is beyond is lost.
    fn checkpoint_for_copy(&mut self, frames: usize) -> Result<Vec<u8>, CheckpointError> {
        let mut staged = self.stage.take_all();
        staged.truncate(frames);
        // They came out of it, and nobody else adds to it during a cut.
        self.stage.inherit(staged.clone());
        // The heir counts time from here: a guest may not have asked for it for long.
        self.encoder.advance_clock(self.clock.now());
        self.machine
            .save(Pages::Uncopied, self.encoder.base(), staged)
    }

    /// From here on every entry goes to this sink.
    fn begin_log(&mut self, sink: S) -> Result<(), RecordError> {
        self.machine.end_copy();
        self.outlet.begin_log();
        self.applied = Seq::ZERO;
        self.posted = Seq::ZERO;
        match &mut self.intervals {
            Some(intervals) => intervals.begin_log(sink, self.encoder.base()),
            None => {
                self.encoder.speak(sink.version());
                self.sink = sink;
                // Its reader was sent none before.
                self.told = None;
                self.unwritten = None;
            }
        }
        self.next_memory_check = self
            .options
            .memory_check
            .map(|every| Instant::now() + every);
        if self.options.preempt {
            // The new backup has all that was written before.
            self.machine.track_changes()?;
            drop(self.machine.take_changed()?);
        }
        Ok(())
    }
}
