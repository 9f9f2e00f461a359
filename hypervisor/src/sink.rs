//! Where a recorder's entries go: a ring, or nowhere.
#![forbid(unsafe_code)]

use std::time::Duration;

use rdma_log::Seq;

use crate::disk::Done;
use crate::entry::Base;
use crate::gate::Committed;
use crate::machine::Machine;
use crate::version::Version;

/// Why an entry was not taken.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The reader is behind: wait for room.
    #[error("the ring is full")]
    Full,
    /// Another side took over.
    #[error("it was fenced: another side has taken over")]
    Fenced,
    /// The connection is over, and the I/O thread knows: the protocol decides how to go on.
    #[error("the connection to the backup is over")]
    Closed,
    /// The backup's end of the log breaks the rules: the backup is to be given up, as one that is lost.
    #[error("the backup's end of the log is of no use: {0}")]
    Unusable(String),
    /// The ring is of no further use, and there is no backup to give up.
    #[error("{0}")]
    Broken(String),
}

/// Takes entries of the events lane.
pub trait Sink {
    /// Posts one entry.
    ///
    /// # Errors
    /// See [`SinkError`].
    fn post(&mut self, payload: &[u8]) -> Result<Seq, SinkError>;
    /// Posts one entry that lies in pieces, one after the other.
    ///
    /// # Errors
    /// See [`SinkError`].
    fn post_pieces(&mut self, pieces: &[&[u8]]) -> Result<Seq, SinkError> {
        self.post(&pieces.concat())
    }
    /// How far the log has committed.
    fn committed(&mut self) -> Committed;
    /// Tells the sink how far outputs were released; the next entry carries it.
    fn released(&mut self, released: Seq);
    /// Wakes the reader if it sleeps, and sends what gathered. Comes after the outputs were released. Unless it is `urgent`, as
    /// when outputs wait or the guest halts, it may gather with what follows.
    fn notify(&mut self, urgent: bool);
    /// Whether the reader is too far behind for the guest to run on.
    fn is_behind(&mut self) -> bool;
    /// Waits until there may be room.
    fn wait_for_room(&mut self, longest: Duration);
    /// Whether entries go anywhere.
    fn keeps(&self) -> bool {
        true
    }
    /// In which version entries are written: whoever follows must know it.
    fn version(&self) -> Version {
        Version::NEWEST
    }
    /// Whether whoever reads has all entries from the first on: then a checkpoint can be told by what has changed since the one before.
    fn is_read_whole(&self) -> bool {
        true
    }
    /// The longest entry, in bytes.
    fn max_payload(&self) -> usize {
        // Fits every lane.
        rdma_log::MIN_LANE / 8
    }
    /// From now on entries go nowhere and everything counts as committed.
    fn detach(&mut self);
    /// This frame is given to the guest; the next entry says so. For a log without a lane for inputs.
    fn frame(&mut self, _: &[u8]) {}
    /// The guest is told what came of this request to the disk, as for a frame.
    fn done(&mut self, _: &Done) {}
    /// The guest stands between two steps; with a base, at a sync point from which it is about to run on, where all that was given
    /// to it and came from it has been posted. For a log that takes checkpoints by itself.
    fn attend(&mut self, _: &mut Machine, _: Option<Base>) {}
}

/// No log at all: `doppel run`.
#[derive(Debug, Default)]
pub struct NoLog {
    posted: u64,
}

impl Sink for NoLog {
    fn post(&mut self, _: &[u8]) -> Result<Seq, SinkError> {
        self.posted += 1;
        Ok(Seq(self.posted))
    }

    fn committed(&mut self) -> Committed {
        Committed::EVERYTHING
    }

    fn released(&mut self, _: Seq) {}

    fn notify(&mut self, _: bool) {}

    fn is_behind(&mut self) -> bool {
        false
    }

    fn keeps(&self) -> bool {
        false
    }

    fn wait_for_room(&mut self, _: Duration) {}

    fn detach(&mut self) {}
}
