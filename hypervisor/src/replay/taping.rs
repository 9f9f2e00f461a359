//! The replayer's part of the flight recorder: what comes goes onto its tape before it is run, so that what a machine died of is there.
#![forbid(unsafe_code)]

use super::late::applied;
use super::{LogSource, ReplayError, Replayer};
use crate::entry::{Base, Entry};
use crate::flight::Tape;

/// A tape, and the entry that came last.
#[derive(Debug)]
pub(super) struct Taping {
    tape: Tape,
    payload: Vec<u8>,
}

impl Taping {
    pub(super) fn keep(&mut self, payload: &[u8]) {
        self.payload.clear();
        self.payload.extend_from_slice(payload);
    }
}

impl<L: LogSource> Replayer<L> {
    /// With a flight recorder's tape.
    #[must_use]
    pub fn taped(mut self, tape: Option<Tape>) -> Self {
        self.taping = tape.map(|tape| Taping {
            tape,
            payload: Vec::new(),
        });
        self
    }

    /// Answers the recorder, between two entries.
    pub(super) fn attend(&mut self) {
        if let Some(taping) = &mut self.taping {
            taping.tape.attend(&mut self.machine);
        }
    }

    /// Puts an entry on the tape, and the inputs that it applies before it. If it belongs to a later sync point than the machine
    /// stands at, nothing more is given to the guest here: that is where a checkpoint is taken, if one is wanted.
    pub(super) fn tape(&mut self, entry: &Entry, base: Base) -> Result<(), ReplayError> {
        let Some(taping) = &mut self.taping else {
            return Ok(());
        };
        if entry.position > self.machine.position() && self.shadow.is_empty() {
            let cut = taping.tape.cut(&mut self.machine, base);
            // Completing an instruction swallows the kick that comes with an order.
            if cut && self.orders.waiting() {
                self.orders.kick();
            }
        }
        let (frames, dones) = applied(entry);
        if frames > 0 || dones > 0 {
            self.source.show(frames, dones, &taping.tape)?;
        }
        taping.tape.entry(&taping.payload);
        Ok(())
    }

    /// Nothing more is recorded.
    pub(super) fn end_tape(&mut self) {
        if let Some(mut taping) = self.taping.take() {
            taping.tape.forget(&mut self.machine);
        }
    }
}
