//! How a recording ends: the guest turned itself off, or somebody ended the log.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use super::{Ended, RecordError, Recorder};
use crate::entry::{Body, Entry};
use crate::sink::Sink;

impl<S: Sink> Recorder<S> {
    /// The guest turned itself off: that is an output like any other, and only its release ends the machine.
    pub(super) fn wait_for_power_off(&mut self, status: u8) -> Result<Ended, RecordError> {
        while !self.outlet.powered_off() {
            if self.orders.waiting()
                && let Some(ended) = self.obey()?
            {
                return Ok(ended);
            }
            if let Some(ended) = self.keep_intervals()? {
                return Ok(ended);
            }
            self.release();
            if !self.outlet.powered_off() {
                let orders = &self.orders;
                self.stage
                    .bell()
                    .wait(Duration::from_millis(1), || orders.waiting());
            }
        }
        Ok(Ended::PoweredOff(status))
    }

    /// Ends the log on purpose: the last entry says what the whole state hashes to. `None` if the guest was stopped between
    /// two sync points, where no replay can compare.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub fn finish(&mut self) -> Result<Option<Finished>, RecordError> {
        if self.mid_run {
            return Ok(None);
        }
        // A guest that was stopped while it waits stands at an exit that was not posted, if it had nothing to say of it.
        let unlogged =
            self.options.every_exit && self.encoder.base().position() < self.machine.position();
        if unlogged || self.machine.has_outputs() || !self.step.inputs.is_empty() {
            self.post_step()?;
        }
        let memory = self.machine.memory_hash_full()?;
        let state = self.machine.final_state()?;
        let entry = Entry {
            position: self.machine.position(),
            body: Body::End {
                digest: self.machine.digest(),
                memory,
                state,
            },
        };
        self.post(&entry, Instant::now())?;
        self.sink.notify(true);
        Ok(Some(Finished {
            sync_points: self.machine.position().0,
            memory_hash: memory,
        }))
    }
}

/// What a finished recording amounts to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Sync points since the guest started.
    pub sync_points: u64,
    /// Hash of its whole memory at the end.
    pub memory_hash: u64,
}
