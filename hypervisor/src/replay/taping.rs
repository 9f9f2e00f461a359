//! The replayer's part of the flight recorder: what comes goes onto its tape before it is run, so that what a machine died of is there.
#![forbid(unsafe_code)]

use super::late::applied;
use super::{LogSource, ReplayError, Replayer};
use crate::checkpoint::PART_BYTES;
use crate::entry::{Base, Body, Encoder, Entry, Part};
use crate::flight::Tape;
use crate::position::Position;
use crate::version::Version;

/// A tape, and the entry that came last.
#[derive(Debug)]
pub(super) struct Taping {
    tape: Tape,
    payload: Vec<u8>,
    /// What the first part of the checkpoint that comes counts from.
    base: Base,
    /// Its parts, as they came.
    parts: Vec<Vec<u8>>,
}

impl Taping {
    pub(super) fn keep(&mut self, payload: &[u8]) {
        self.payload.clear();
        self.payload.extend_from_slice(payload);
    }

    /// Puts a checkpoint on the tape that has come whole, at this position. Its parts were not put there as they came: what they tell may stand on checkpoints
    /// from before the tape begins.
    pub(super) fn checkpoint(&mut self, position: Position, bytes: &[u8], version: Version) {
        self.parts.clear();
        let mut encoder = Encoder::from_base(self.base).speaking(version);
        for part in Part::all_of(bytes, PART_BYTES) {
            let body = Body::Part(part);
            self.tape.entry(encoder.encode(&Entry { position, body }));
        }
    }

    /// Puts the parts of a checkpoint there that is not whole, or of no use: a replay comes as far as this side has, and finds what it found.
    pub(super) fn torn(&mut self) {
        for part in self.parts.drain(..) {
            self.tape.entry(&part);
        }
    }
}

impl<L: LogSource> Replayer<L> {
    /// With a flight recorder's tape.
    #[must_use]
    pub fn taped(mut self, tape: Option<Tape>) -> Self {
        self.taping = tape.map(|tape| Taping {
            tape,
            payload: Vec::new(),
            base: Base::default(),
            parts: Vec::new(),
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
        if let Body::Part(part) = &entry.body {
            if part.number == 0 {
                taping.base = base;
                taping.parts.clear();
            }
            taping.parts.push(taping.payload.clone());
            return Ok(());
        }
        // In the middle of a checkpoint: it is refused, and counts from a place that the tape has not come to.
        if !self.shadow.is_empty() {
            return Ok(());
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
            taping.torn();
            taping.tape.forget(&mut self.machine);
        }
    }
}
