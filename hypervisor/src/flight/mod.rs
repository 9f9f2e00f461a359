//! The flight recorder: the last checkpoint of a machine and the log since, in a directory of bounded size, so that a failure in
//! production was recorded.
//!
//! ```text
//!  vCPU thread                                           the recorder's thread, which nobody waits for
//!  ┌───────────────────────────┐        tape             ┌──────────────────────────────────────────────┐
//!  │ replayer of a backup, or  │── inputs, entries ─────▶│ 00000007.log                                 │
//!  │ recorder of `record`      │◀─ watch? swept? cut? ───│ 00000008.checkpoint.new: pages in rounds,    │
//!  │ runs the guest            │── pages, checkpoint ───▶│   while the guest runs; then what is left    │
//!  │                           │── CUT ─────────────────▶│ 00000008.log                                 │
//!  └───────────────────────────┘                         │ durable? rename; only then 00000007.* go     │
//!                                                        └──────────────────────────────────────────────┘
//! ```
//! A *segment* is a checkpoint and the log from there on; the first of a machine that starts has no checkpoint, as it begins at
//! power-on. Logs follow each other without a gap, so a checkpoint that was not finished is no loss: the one before is still there,
//! and the two logs are read as one. What a `kill -9` leaves is a prefix of what was written, in each file: the torn end is cut.
//!
//! It never holds up the machine: what cannot be written (a full disk, a slow one, more than the bound) ends the recording, in
//! words, and what was recorded up to there stays.
#![forbid(unsafe_code)]

mod directory;
mod files;
mod read;
mod tape;
mod writer;

use std::io;
use std::path::PathBuf;

use rdma_log::LogFileError;

pub use directory::{is_recording, usable};
pub use read::{FlightSource, Recording};
pub use tape::{Tape, TapeSink};
pub use writer::{Budget, Flight, Said, Start};

use crate::checkpoint::clone::CloneError;
use crate::machine::{MachineError, SpecError};

/// Why a flight recorder does not record, or its directory cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum FlightError {
    /// The system refused something.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another process records there.
    #[error("{0} is in use: a recorder writes there; end it first, or choose another directory")]
    InUse(PathBuf),
    /// The bound is too small for this machine.
    #[error(
        "a flight recorder of {size} bytes is too small for this machine: give it {least} or more (size=)"
    )]
    Small {
        /// Bytes that it was given.
        size: u64,
        /// Bytes that it needs.
        least: u64,
    },
    /// More than it may take.
    #[error(
        "its files have reached the {size} bytes that they may take (size=) before a new checkpoint was whole"
    )]
    Full {
        /// The bound.
        size: u64,
    },
    /// The disk does not keep up.
    #[error("the disk does not keep up: {0} bytes wait to be written")]
    Slow(usize),
    /// The vCPU thread could not give a checkpoint.
    #[error("no checkpoint could be taken: {0}")]
    NoCheckpoint(String),
    /// Nothing that can be replayed.
    #[error("{path}: nothing is recorded there that can be replayed: {why}")]
    Nothing {
        /// The directory.
        path: PathBuf,
        /// Why not.
        why: &'static str,
    },
    /// A file that no recorder wrote, or not this one, or that is damaged.
    #[error("{path}: {why}")]
    Bad {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A log.
    #[error("{path}: {source}")]
    Log {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: LogFileError,
    },
    /// The machine's description.
    #[error("{path}: {source}")]
    Spec {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: SpecError,
    },
    /// A checkpoint.
    #[error("{path}: {source}")]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: CloneError,
    },
    /// The machine that it is to be replayed in.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

impl FlightError {
    fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }

    fn log(path: impl Into<PathBuf>) -> impl FnOnce(LogFileError) -> Self {
        let path = path.into();
        move |source| Self::Log { path, source }
    }
}
