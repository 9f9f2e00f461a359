//! The words of a ring that both sides look at, and where they lie.
//!
//! [`LogWords`] is the first page of the reader's memory, which the writer fills; [`ReturnWords`] is a page of the
//! writer's memory, by which the reader answers. Every word that one side writes often has cache lines of its own.
//! All zero is the valid state of a new connection.
#![forbid(unsafe_code)]

use crate::entry::Lane;
use crate::futex::{Bell, FutexWord};
use crate::sync::{AtomicU32, AtomicU64};

/// Size and alignment of a page in bytes: what a mapping is made of.
pub(crate) const PAGE: usize = 4096;

/// Set in a tail word: nothing commits to the lane any more.
pub(crate) const FENCE: u64 = 1 << 63;

/// Two cache lines: processors fetch them in pairs, so a word that shares the pair would be dragged along.
#[derive(Debug, Default)]
#[repr(C, align(128))]
pub(crate) struct Apart<T>(pub(crate) T);

/// A slot that a dying writer may leave filled and unpublished.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct OpenSlot {
    /// Where its entry starts, in bytes since the start of the connection, plus one; 0 for none.
    pub(crate) at: AtomicU64,
    /// Bytes of its payload area. Written before `at`.
    pub(crate) len: AtomicU64,
}

/// What a sleeper reads and a ringer writes, and the other way round for the other direction.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct BellWords {
    /// The other side sleeps on this one.
    pub(crate) word: FutexWord,
    /// This side sleeps, on the other side's word.
    pub(crate) waiting: AtomicU32,
}

/// One lane's words in the reader's memory.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct LogLane {
    /// Bytes committed since the start of the connection, and [`FENCE`].
    pub(crate) tail: Apart<AtomicU64>,
    pub(crate) open: Apart<OpenSlot>,
    /// The reader sleeps on its word; its flag says that the writer waits for room.
    pub(crate) bell: Apart<BellWords>,
}

/// The first page of the reader's memory.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct LogWords {
    lanes: [LogLane; 2],
    /// On the robust list of a thread of the writer's: the kernel marks it when that thread dies.
    #[cfg(not(loom))]
    robust: Apart<FutexWord>,
}

/// What the reader acknowledged, in one line. What counts is the larger of the two.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct AckWords {
    /// By the lane's reader, which is one thread and so stores without asking what was there.
    pub(crate) lane: Acked,
    /// By any other thread, by an exchange.
    pub(crate) others: Acked,
}

/// Highest sequence numbers.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct Acked {
    pub(crate) received: AtomicU64,
    pub(crate) replayed: AtomicU64,
}

/// One lane's words in the writer's memory.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct ReturnLane {
    /// Bytes that the reader has taken out since the start of the connection: the writer's credit.
    pub(crate) consumed: Apart<AtomicU64>,
    pub(crate) acks: Apart<AckWords>,
    /// The writer sleeps on its word; its flag says that the reader waits for entries.
    pub(crate) bell: Apart<BellWords>,
}

/// The page in the writer's memory.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct ReturnWords {
    lanes: [ReturnLane; 2],
}

#[cfg(not(loom))]
const _: () = {
    use std::mem::{offset_of, size_of};
    assert!(size_of::<LogWords>() <= PAGE && size_of::<ReturnWords>() <= PAGE);
    assert!(offset_of!(LogWords, robust) == 768);
    assert!(size_of::<LogLane>() == 384 && size_of::<ReturnLane>() == 384);
    assert!(offset_of!(LogLane, tail) == 0);
    assert!(offset_of!(LogLane, open) == 128);
    assert!(offset_of!(LogLane, bell) == 256);
    assert!(offset_of!(ReturnLane, consumed) == 0);
    assert!(offset_of!(ReturnLane, acks) == 128);
    assert!(offset_of!(AckWords, others) == 16 && size_of::<AckWords>() == 32);
    assert!(offset_of!(Acked, received) == 0 && offset_of!(Acked, replayed) == 8);
    assert!(offset_of!(ReturnLane, bell) == 256);
    assert!(offset_of!(BellWords, word) == 0 && offset_of!(BellWords, waiting) == 4);
    assert!(offset_of!(OpenSlot, at) == 0 && offset_of!(OpenSlot, len) == 8);
};

impl LogWords {
    pub(crate) fn lane(&self, lane: Lane) -> &LogLane {
        &self.lanes[lane.index()]
    }

    #[cfg(not(loom))]
    pub(crate) fn robust(&self) -> &Apart<FutexWord> {
        &self.robust
    }
}

impl ReturnWords {
    pub(crate) fn lane(&self, lane: Lane) -> &ReturnLane {
        &self.lanes[lane.index()]
    }
}

/// The bell that wakes the lane's reader.
pub(crate) fn data_bell<'a>(log: &'a LogLane, back: &'a ReturnLane) -> Bell<'a> {
    Bell {
        waiting: &back.bell.0.waiting,
        word: &log.bell.0.word,
    }
}

/// The bell that wakes the lane's writer.
pub(crate) fn room_bell<'a>(log: &'a LogLane, back: &'a ReturnLane) -> Bell<'a> {
    Bell {
        waiting: &log.bell.0.waiting,
        word: &back.bell.0.word,
    }
}
