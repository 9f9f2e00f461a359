//! Where a replayer gets its log: a ring, a file, a flight recorder's directory.
#![forbid(unsafe_code)]

use std::time::Duration;

use rdma_log::{Marks, Seq};

use crate::disk::Done;
use crate::flight::Tape;

/// Whether the staged inputs that an entry applies have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inputs {
    /// They have; or they must have, and whoever takes them is told what is wrong.
    Here,
    /// They may still come: over some networks the lanes are not in step.
    Coming,
    /// They never will: the log's writer met its end before they had committed, and so let nothing out that came of the entry.
    Lost,
}

/// Where a replayer gets its log.
pub trait LogSource {
    /// The next entry of the events lane, if it has come. The payload is valid until the next call.
    ///
    /// # Errors
    /// [`LogError`]: the log is unusable from here on.
    fn next(&mut self) -> Result<Option<Arrived<'_>>, LogError>;

    /// Whether so many staged inputs of either kind, which an entry that has come applies, are there to be taken.
    ///
    /// # Errors
    /// [`LogError`].
    fn inputs(&mut self, frames: u32, dones: u32) -> Result<Inputs, LogError> {
        let _ = (frames, dones);
        Ok(Inputs::Here)
    }

    /// The next staged frame. An entry that applies it is replayed after [`inputs`](Self::inputs) said that it is there.
    ///
    /// # Errors
    /// [`LogError`], also if it is not there.
    fn frame(&mut self) -> Result<Vec<u8>, LogError>;

    /// What came of the next request to the disk. As for a frame, it must be there.
    ///
    /// # Errors
    /// [`LogError`], also if it is not there.
    fn done(&mut self) -> Result<Done, LogError>;

    /// Puts the next staged inputs, so many of either kind, on a tape, without taking them.
    ///
    /// # Errors
    /// [`LogError`].
    fn show(&mut self, frames: u32, dones: u32, to: &Tape) -> Result<(), LogError> {
        let _ = (frames, dones, to);
        Err(LogError("a log of this kind is not recorded".into()))
    }

    /// So many staged frames, the next ones, are in the checkpoint that was put in place: nobody is given them any more.
    ///
    /// # Errors
    /// [`LogError`].
    fn cover(&mut self, frames: u32) -> Result<(), LogError> {
        let _ = frames;
        Err(LogError("a log of this kind carries no intervals".into()))
    }

    /// Says that everything up to this entry has been replayed.
    fn replayed(&mut self, seq: Seq);

    /// Whether nothing can come any more: a file's end, or a fenced ring that has been read to its end.
    ///
    /// # Errors
    /// [`LogError`] if the log ends where it must not.
    fn is_over(&mut self) -> Result<bool, LogError>;

    /// Waits until something may have come.
    fn wait(&mut self, longest: Duration);

    /// The same for staged inputs.
    fn wait_for_inputs(&mut self, longest: Duration) {
        self.wait(longest);
    }
}

/// An entry that has come.
#[derive(Debug)]
pub struct Arrived<'a> {
    /// Its number.
    pub seq: Seq,
    /// What its writer said of itself.
    pub marks: Marks,
    /// What it says.
    pub payload: &'a [u8],
}

/// Why a log is unusable.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct LogError(pub String);
