//! Outputs that the primary may not have released yet. How many they are is the primary's word, and it may be anybody's: what is kept here has a bound.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use rdma_log::Seq;

use super::LogError;
use crate::event::Output;
use crate::outlet::{FRAMES_WAITING, frame_length};

/// So many frames wait at most: one that a guest's network takes has 42 bytes or more, so that their bytes are at their bound before.
const FRAMES: usize = FRAMES_WAITING / 32;

/// Bytes of other outputs that may wait. A console's way out never makes them wait, and stuck frames before them do for a second (`outlet.rs`): a serial
/// port that takes a byte an exit prints less than a tenth of this meanwhile. A primary of which more waits has not told what has left.
const TEXT_WAITING: usize = FRAMES_WAITING;

/// What an output costs besides its bytes.
const EACH: usize = 64;

/// The outputs, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Unreleased {
    waiting: VecDeque<(Seq, Output)>,
    frames: usize,
    frame_bytes: usize,
    /// Of all others, with [`EACH`].
    text_bytes: usize,
}

fn text_length(output: &Output) -> usize {
    match output {
        Output::Console(bytes) => bytes.len() + EACH,
        _ => EACH,
    }
}

impl Unreleased {
    /// Keeps an output of this entry until it is known to have left. A frame for which there is no room is lost.
    ///
    /// # Errors
    /// [`LogError`]: there is more than a primary can have that lets outputs out.
    pub(super) fn keep(&mut self, of: Seq, output: Output) -> Result<(), LogError> {
        if matches!(output, Output::Frame(_)) {
            // The primary, whose way out may be full, loses frames by the same rule.
            let bytes = self.frame_bytes + frame_length(&output);
            if bytes > FRAMES_WAITING || self.frames == FRAMES {
                return Ok(());
            }
            self.frame_bytes = bytes;
            self.frames += 1;
        } else {
            let bytes = self.text_bytes + text_length(&output);
            if bytes > TEXT_WAITING {
                return Err(LogError(format!(
                    "its primary has not said of more than {} MiB of console text that it has left, which no primary keeps back that serves its machine",
                    TEXT_WAITING >> 20
                )));
            }
            self.text_bytes = bytes;
        }
        self.waiting.push_back((of, output));
        Ok(())
    }

    /// The next output that has left, if what came of the entries up to this one has.
    pub(super) fn next_of(&mut self, released: Seq) -> Option<Output> {
        let (_, output) = self.waiting.pop_front_if(|(of, _)| *of <= released)?;
        if matches!(output, Output::Frame(_)) {
            self.frames -= 1;
            self.frame_bytes -= frame_length(&output);
        } else {
            self.text_bytes -= text_length(&output);
        }
        Some(output)
    }

    /// All that may not have left.
    pub(super) fn into_outputs(self) -> Vec<Output> {
        self.waiting.into_iter().map(|(_, output)| output).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(bytes: usize) -> Output {
        Output::Console(vec![b'x'; bytes])
    }

    fn frame(bytes: usize) -> Output {
        Output::Frame(vec![0; bytes])
    }

    /// A primary that is not what it should be prints, and never says that anything has left.
    #[test]
    fn a_primary_that_lets_nothing_out_fills_no_memory() {
        for output in [text(64 << 10), text(1), text(0), Output::PowerOff(0)] {
            let mut unreleased = Unreleased::default();
            let cost = text_length(&output);
            let mut kept = 0;
            while unreleased.keep(Seq(1), output.clone()).is_ok() {
                kept += cost;
                assert!(kept <= TEXT_WAITING);
            }
            assert!(kept + cost > TEXT_WAITING, "{kept}");
            // The next one, once something has left.
            unreleased.next_of(Seq(1)).unwrap();
            unreleased.keep(Seq(2), output).unwrap();
        }
    }

    #[test]
    fn frames_beyond_the_bound_are_lost_and_make_room_as_they_leave() {
        for (length, most) in [
            (1 << 20, FRAMES_WAITING >> 20),
            (42, FRAMES_WAITING / 42),
            (0, FRAMES),
        ] {
            let mut unreleased = Unreleased::default();
            for _ in 0..most + 10 {
                unreleased.keep(Seq(1), frame(length)).unwrap();
            }
            assert_eq!(unreleased.waiting.len(), most);
            // Text has room of its own.
            unreleased.keep(Seq(2), text(9)).unwrap();
            unreleased.next_of(Seq(1)).unwrap();
            unreleased.keep(Seq(3), frame(length)).unwrap();
            assert_eq!(unreleased.waiting.len(), most + 1);
            while unreleased.next_of(Seq(2)).is_some() {}
            assert_eq!(unreleased.text_bytes, 0);
            assert_eq!(unreleased.into_outputs(), [frame(length)]);
        }
    }
}
