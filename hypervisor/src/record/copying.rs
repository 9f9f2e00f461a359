//! The recorder's part of a copy of the running machine: what the desk asks, between two steps of the guest.
#![forbid(unsafe_code)]

use std::time::Instant;

use rdma_log::Seq;

use super::{RecordError, Recorder};
use crate::checkpoint::{CheckpointError, Pages};
use crate::desk::{Answer, Ask, Cut};
use crate::machine::Phase;
use crate::sink::Sink;

impl<S: Sink> Recorder<S> {
    /// Answers what can be answered anywhere; a cut waits for a place.
    pub(super) fn attend(&mut self) {
        let Some(desk) = self.desk.clone() else {
            return;
        };
        let answer = match desk.take() {
            None => return,
            Some(Ask::Watch) => self.machine.track_for_copy().map(|()| Answer::Watching),
            Some(Ask::Changed) => self.machine.take_uncopied().map(Answer::Changed),
            Some(Ask::Cut(sink)) => {
                self.cut = Some(sink);
                return;
            }
            Some(Ask::Forget) => {
                self.cut = None;
                self.machine.end_copy();
                return;
            }
        };
        desk.answer(answer.unwrap_or_else(|error| Answer::Failed(error.to_string())));
    }

    /// Whether a cut waits for a place; a halted guest is then given the time, so that there is one.
    pub(super) fn wants_cut(&self) -> bool {
        self.cut.is_some()
    }

    /// Cuts here, if that is wanted and this is a place: the guest could run on or waits in HLT, and everything that was made
    /// and supplied so far has been posted.
    pub(super) fn cut_if_wanted(&mut self) -> Result<(), RecordError> {
        let ready = matches!(self.machine.phase(), Phase::Ready | Phase::HltInstruction)
            && !self.machine.has_outputs()
            && self.step.inputs.is_empty();
        if !ready {
            return Ok(());
        }
        let (Some(sink), Some(desk)) = (self.cut.take(), self.desk.clone()) else {
            return Ok(());
        };
        let started = Instant::now();
        match self.checkpoint_for_copy() {
            Ok(checkpoint) => {
                self.begin_log(*sink)?;
                let stopped = started.elapsed();
                desk.answer(Answer::Cut(Cut {
                    checkpoint,
                    stopped,
                }));
            }
            // The guest is as it was, and goes on as before.
            Err(error) => desk.answer(Answer::Failed(error.to_string())),
        }
        Ok(())
    }

    fn checkpoint_for_copy(&mut self) -> Result<Vec<u8>, CheckpointError> {
        let staged = self.stage.take_all();
        for frame in &staged {
            // They came out of it, and nobody else adds to it during a cut.
            let _ = self.stage.push(Seq::ZERO, frame);
        }
        let pages = Pages::Only(self.machine.take_uncopied()?);
        self.machine.save(&pages, self.encoder.base(), staged)
    }

    /// From here on every entry goes to this sink.
    fn begin_log(&mut self, sink: S) -> Result<(), RecordError> {
        self.machine.end_copy();
        self.outlet.begin_log();
        self.applied = Seq::ZERO;
        self.sink = sink;
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
