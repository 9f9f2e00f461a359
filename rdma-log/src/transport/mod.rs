//! What carries a ring from its writer to its reader.
//!
//! A lane ([`LaneWriter`](crate::LaneWriter), [`LaneReader`](crate::LaneReader)) knows entries, cursors and credits; a
//! transport knows how bytes get across, when they are safe, and how to make sure that no more come. The lane builds
//! its entries in a [`WriteView`] laid out exactly as the reader's memory, and hands the transport ranges of it.
//!
//! | | [`shm`] | [`mod@tcp`] | `rdma` |
//! | --- | --- | --- | --- |
//! | the view is | the reader's memory | a copy to send from | a copy, registered |
//! | [`post`](WritePort::post) | moves the tail | queues for the socket | posts a WRITE, one request for the range |
//! | [`push`](WritePort::push) | wakes a sleeping reader | writes what gathered | rings the card's doorbell |
//! | [`committed`](ProgressPort::poll) | all that was posted | *received* | completions, or *received* |
//! | [`known`](ReadPort::known) | [`Limit::Unknown`] until the fence | as `limit` | as `limit` |
//! | [`limit`](ReadPort::limit) | the tail | bytes taken from the socket | none: [`Limit::Unknown`] |
//! | [`fence`](FencePort::fence) | a bit in both tails | ends the thread that lands | deregisters, destroys the queue pair |
//!
//! A range may be posted in two pieces of the ring at most: a pad to the end of the lap, and an entry at its start.
//! Nothing is asked about the order in which its bytes arrive: without a tail the reader takes an entry when its
//! stamp and its checksum say that it is whole.
//!
//! [`sim`] is a card without manners for tests: any order, any delay, cut anywhere.
#![forbid(unsafe_code)]

use std::fmt;
use std::time::Duration;

use crate::entry::{Lane, Seq};
use crate::fence::{FenceError, Fenced};
use crate::lane::{ReadError, WriteError};
pub use crate::region::WriteView;

#[cfg(all(test, not(loom)))]
#[macro_use]
mod suite;

#[cfg(not(loom))]
pub mod network;
#[cfg(not(loom))]
pub mod rdma;
mod reading;
pub mod shm;
pub mod sim;
#[cfg(not(loom))]
pub mod tcp;
#[cfg(not(loom))]
mod writing;

/// The right to make a [`Fenced`]. Only this module and those below it can construct one.
#[derive(Debug)]
pub struct FenceKey(());

/// A range of a lane, in bytes since the start of the connection. Both ends lie on cache lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first byte: where the last posted range ended.
    pub from: u64,
    /// The byte after the last.
    pub to: u64,
    /// The one entry in it. A pad may stand before it.
    pub seq: Seq,
}

/// The writer's side of one lane.
pub trait WritePort: Send + fmt::Debug {
    /// Takes over a range that lies ready in `view`, at its position modulo the view's length.
    ///
    /// The bytes stay as they are until the reader has returned the credit for them. The transport may gather
    /// ranges until [`push`](WritePort::push).
    ///
    /// # Errors
    /// [`WriteError::Fenced`] when it is certain that this range does not commit and no later one will; other errors
    /// when the connection is of no more use.
    fn post(&mut self, view: &WriteView, range: Range) -> Result<(), WriteError>;

    /// Sends what gathered, and wakes a reader that sleeps.
    ///
    /// # Errors
    /// As for [`post`](WritePort::post).
    fn push(&mut self, view: &WriteView) -> Result<(), WriteError>;

    /// Bytes that may be written over, since the start of the connection: what the reader says it has taken out, and
    /// nothing of which is still on its way. The lane checks the value.
    ///
    /// The second part matters to transports that promise no order. A reader takes an entry when header and payload
    /// are there; filler behind them may still be flying, and would fall upon an entry of the next lap. So such a
    /// transport gives no more than what its completions cover.
    ///
    /// # Errors
    /// When the connection is of no more use.
    fn consumed(&mut self) -> Result<u64, WriteError>;

    /// The highest entry of this lane that has committed.
    ///
    /// # Errors
    /// When the connection is of no more use.
    fn committed(&mut self) -> Result<Seq, WriteError>;

    /// Whether the lane is known to be fenced.
    fn fenced(&mut self) -> bool;

    /// Notes for the reader where the payload of a slot lies that is being filled; `None` when it was given up.
    /// Only memory that outlives the writer can use it, so the rest do nothing.
    fn mark_open(&mut self, slot: Option<OpenSlot>) {
        let _ = slot;
    }

    /// Announces that the writer is about to sleep until there is room; [`consumed`](WritePort::consumed) is then
    /// looked at once more.
    fn arm(&mut self) -> u32;

    /// Sleeps until the reader has rung since [`arm`](WritePort::arm) returned `armed`. False if the time ran out;
    /// true may come early.
    fn sleep(&mut self, armed: u32, limit: Duration) -> bool;

    /// Takes back the announcement of [`arm`](WritePort::arm).
    fn disarm(&mut self);
}

/// A slot that is being filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenSlot {
    /// Where its entry starts, in bytes since the start of the connection.
    pub at: u64,
    /// Bytes of its payload area.
    pub len: u64,
}

/// How far each lane got, for a thread that writes neither.
pub trait ProgressPort: Send + fmt::Debug {
    /// Looks at completions and at what the reader returned, without waiting.
    ///
    /// # Errors
    /// When the connection is of no more use.
    fn poll(&mut self) -> Result<[Counters; 2], WriteError>;
}

/// One lane's counters as the transport has them, unchecked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// The highest entry that has committed.
    pub committed: Seq,
    /// The highest entry that the reader says it received.
    pub received: Seq,
    /// The highest entry that the reader says it replayed.
    pub replayed: Seq,
    /// Nothing more commits.
    pub fenced: bool,
}

/// How far a reader may read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Everything before this many bytes since the start of the connection is whole. What is not, is corrupt.
    Tail {
        /// The tail; unchecked when a peer can write it.
        at: u64,
        /// It will not move again.
        fenced: bool,
    },
    /// Nobody knows: an entry that is not whole is one that has not arrived yet.
    Unknown {
        /// Nothing more arrives.
        fenced: bool,
    },
}

/// The reader's side of one lane.
pub trait ReadPort: Send + fmt::Debug {
    /// How far there is something to read.
    ///
    /// # Errors
    /// When the transport cannot go on; bytes that are merely not there yet are no error.
    fn limit(&mut self) -> Result<Limit, ReadError>;

    /// [`limit`](ReadPort::limit), as far as it is known without looking at what the writer writes.
    ///
    /// Where the tail costs a transfer between processors and an entry shows by itself that it is whole, this is
    /// [`Limit::Unknown`] until the fence, and the reader asks for the limit when it has found nothing for a while.
    ///
    /// # Errors
    /// As for [`limit`](ReadPort::limit).
    fn known(&mut self) -> Result<Limit, ReadError> {
        self.limit()
    }

    /// The little-endian word at `at`, a multiple of 8. Where the writer stores into this memory itself, everything that
    /// it stored before this word can be copied out after it.
    fn word(&self, at: usize) -> u64 {
        let mut bytes = [0; size_of::<u64>()];
        self.copy_out(at, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Copies out of the reader's memory from `at`, a multiple of 8 and less than its length. Never beyond its end.
    fn copy_out(&self, at: usize, to: &mut [u8]);

    /// Returns credit: all before `consumed` bytes since the start of the connection was copied out.
    fn release(&mut self, consumed: u64);

    /// Wakes a writer that waits for room, and sends credits that gathered.
    ///
    /// # Errors
    /// When the connection is of no more use.
    fn push(&mut self) -> Result<(), ReadError>;

    /// The slot that the writer said it was filling, unchecked.
    fn open_slot(&self) -> Option<OpenSlot> {
        None
    }

    /// Announces that the reader is about to sleep until there are entries; it looks once more after this.
    fn arm(&mut self) -> u32;

    /// Sleeps until the writer has rung since [`arm`](ReadPort::arm) returned `armed`. False if the time ran out; true
    /// may come early.
    fn sleep(&mut self, armed: u32, limit: Duration) -> bool;

    /// Takes back the announcement of [`arm`](ReadPort::arm).
    fn disarm(&mut self);
}

/// What the reader tells the writer, from any thread.
pub trait AckPort: Send + Sync + fmt::Debug {
    /// All up to `seq` was received. Values that go back are ignored.
    fn received(&self, lane: Lane, seq: Seq);

    /// All up to `seq` was replayed. Values that go back are ignored.
    fn replayed(&self, lane: Lane, seq: Seq);
}

/// What ends a connection for its writer.
pub trait FencePort: Send + fmt::Debug {
    /// Returns when nothing more can commit, in either lane, and wakes readers that sleep.
    ///
    /// # Errors
    /// When that is not certain.
    fn fence(&mut self) -> Result<Fenced, FenceError>;
}
