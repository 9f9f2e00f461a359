//! The replayer's part of a debugger: it is asked wherever the guest stands because of it.
#![forbid(unsafe_code)]

use super::{LogSource, ReplayError, Replayer};
use crate::debug::DebugError;
use crate::machine::{Machine, Stepped};

/// Why the guest stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Nothing has run yet.
    Begun,
    /// At a breakpoint, or after one step.
    Debugged,
    /// The debugger wants to speak.
    Wanted,
    /// The replay is over; why, for people.
    Over(String),
}

/// How it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Go {
    /// As the machine was told: to the next breakpoint, or for one step.
    On,
    /// Without a debugger.
    Alone,
    /// Not at all.
    End,
}

/// Looks at a machine that is replayed, and says where it is to stop next.
pub trait Debugger {
    /// The guest stands. Returns when it may go on; the machine has been told where to stop.
    ///
    /// # Errors
    /// [`DebugError`].
    fn stopped(&mut self, machine: &mut Machine, why: &Stop) -> Result<Go, DebugError>;

    /// Whether the debugger wants to speak while the guest runs.
    fn wants_to_speak(&mut self) -> bool;
}

impl<L: LogSource> Replayer<L> {
    /// With a debugger, which is asked at once. False if it wants no replay.
    ///
    /// # Errors
    /// [`ReplayError::Debug`].
    pub fn debugged(&mut self, debugger: Box<dyn Debugger + Send>) -> Result<bool, ReplayError> {
        self.debugger = Some(debugger);
        self.stop(&Stop::Begun)
    }

    /// The replay is over: the debugger may look at the machine once more.
    ///
    /// # Errors
    /// [`ReplayError::Debug`].
    pub fn show_end(&mut self, why: String) -> Result<(), ReplayError> {
        self.stop(&Stop::Over(why)).map(drop)
    }

    /// The guest stands at no sync point. False if the replay is to end.
    pub(super) fn consult(&mut self, stepped: Stepped) -> Result<bool, ReplayError> {
        let wanted = |debugger: &mut Box<dyn Debugger + Send>| debugger.wants_to_speak();
        match stepped {
            Stepped::Debugged => self.stop(&Stop::Debugged),
            Stepped::Kicked if self.debugger.as_mut().is_some_and(wanted) => {
                self.stop(&Stop::Wanted)
            }
            Stepped::Kicked | Stepped::SyncPoint => Ok(true),
        }
    }

    fn stop(&mut self, why: &Stop) -> Result<bool, ReplayError> {
        let Some(debugger) = &mut self.debugger else {
            return Ok(true);
        };
        match debugger.stopped(&mut self.machine, why)? {
            Go::On => Ok(true),
            Go::Alone => {
                self.debugger = None;
                Ok(true)
            }
            Go::End => Ok(false),
        }
    }
}
