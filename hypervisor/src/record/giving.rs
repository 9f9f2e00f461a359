//! The recorder's part of what the guest waits for: the clock, random bytes.
#![forbid(unsafe_code)]

use std::io::Read;

use super::{RecordError, Recorder};
use crate::entry::LoggedInput;
use crate::event::{Input, Need};
use crate::sink::Sink;

/// Random bytes that one entry carries: a guest can ask for 1 MiB of them at one exit, and an entry must fit the smallest lane.
const RANDOM_AT_ONCE: usize = 8 << 10;

impl<S: Sink> Recorder<S> {
    /// Supplies what the entropy device waits for, in as many entries as it takes.
    pub(super) fn give_random(&mut self) -> Result<(), RecordError> {
        let mut gathered = 0;
        while let Some(need) = self.machine.pending() {
            self.give(need)?;
            if let Need::Random(count) = need {
                gathered += count;
            }
            if gathered >= RANDOM_AT_ONCE {
                gathered = 0;
                self.post_step()?;
            }
        }
        Ok(())
    }

    /// Supplies an input that the guest waits for.
    pub(super) fn give(&mut self, need: Need) -> Result<(), RecordError> {
        match need {
            Need::Clock => {
                let now = self.clock.now();
                self.machine.supply(&Input::Clock(now))?;
                self.step.inputs.push(LoggedInput::Clock(now));
            }
            Need::Random(count) => {
                let mut bytes = vec![0; count];
                self.random
                    .read_exact(&mut bytes)
                    .map_err(RecordError::Random)?;
                let input = Input::Random(bytes);
                self.machine.supply(&input)?;
                if let Input::Random(bytes) = input {
                    self.step.inputs.push(LoggedInput::Random(bytes));
                }
            }
        }
        Ok(())
    }
}
