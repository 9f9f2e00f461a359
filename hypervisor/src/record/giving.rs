//! The recorder's part of what the guest waits for: the clock, random bytes.
#![forbid(unsafe_code)]

use std::io::Read;

use super::{RecordError, Recorder};
use crate::entry::LoggedInput;
use crate::event::{Input, Need};
use crate::machine::MachineError;
use crate::sink::Sink;

/// Random bytes that one entry carries: a guest can ask for 1 MiB of them at one exit, and an entry must fit the smallest lane.
const RANDOM_AT_ONCE: usize = 8 << 10;

/// Requests for them that are answered before anything else is looked at: as many as the queue has places. A guest with vCPUs that ask on
/// meanwhile, or one that has its rings over each other, could keep this thread for ever.
const REQUESTS_AT_ONCE: usize = 256;

impl<S: Sink> Recorder<S> {
    /// Supplies what the entropy device waits for, in as many entries as it takes.
    pub(super) fn give_random(&mut self) -> Result<(), RecordError> {
        let mut gathered = 0;
        for _ in 0..REQUESTS_AT_ONCE {
            let Some(need) = self.machine.pending() else {
                break;
            };
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
                if self.hand_in(&input)?
                    && let Input::Random(bytes) = input
                {
                    self.step.inputs.push(LoggedInput::Random(bytes));
                }
            }
        }
        Ok(())
    }

    /// Hands an input to the machine. False if it is lost: vCPUs that run by themselves may have changed their rings, or reset the
    /// device, since it was seen that there is room for it.
    pub(super) fn hand_in(&mut self, input: &Input) -> Result<bool, MachineError> {
        match self.machine.supply(input) {
            Err(MachineError::Device(_)) if self.machine.has_crew() => Ok(false),
            handed => handed.map(|()| true),
        }
    }
}
