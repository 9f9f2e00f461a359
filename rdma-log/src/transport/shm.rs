//! Transport `shm`: one host, memory shared by file descriptor.
//!
//! The log lies in a memfd that the reader makes and the writer maps: a control page (`LogWords` in `control.rs`), then
//! the two lanes. What the reader returns lies in a page that the writer makes (`ReturnWords`). Each side maps
//! read-only what only the other writes: the reader the lanes, the writer the return page.
//!
//! An entry is committed when the compare-exchange that moves the lane's tail over it has succeeded: from then on it
//! is in memory of the reader's that outlives the writer. The fence sets a bit in the tail, so that the next exchange,
//! which expects the bit to be clear, fails: an entry is either before the fence and will be read, or its writer is
//! told that it never committed.
//!
//! # Who looks at what
//!
//! A cache line that one processor writes and another reads costs a transfer each time, some tens to hundreds of
//! nanoseconds. So an entry of one line crosses in one transfer, and its answer in one:
//!
//! - The reader polls the stamp of the entry that is to come, not the tail. The writer stores the word with the stamp
//!   last, with release order, after everything else of the range; the reader loads it with acquire order, and copies
//!   the rest after that. So an entry whose stamp is there is whole, by the memory model alone, and the checksum stands
//!   against damage and hostile peers, as it did.
//! - Old bytes pass for an entry only if they hold the stamp of this lap (32 bits, scrambled by the nonce), the
//!   very number that is next (64 bits) and the checksum seeded by the nonce (32 bits). Memory starts zeroed; what a lap
//!   leaves behind has the stamps of that lap. Payload that somebody outside chose (frames) can stand where a header
//!   will be looked for, but he does not know the nonce, and has one chance in 2^64 with each.
//! - The tail stays in the writer's cache, where the exchange is cheap. The reader asks for it before it sleeps, after the
//!   fence, and once in a while when it finds nothing: what has committed by the tail and is not whole is corrupt, and that
//!   shows nowhere else. The tail may stand before the last range that the reader took, and before no other: the writer
//!   begins a range when the one before has committed.
//! - What the lane's reader acknowledges is stored, not exchanged, in one line that the writer polls.
#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::control::{
    AckWords, Acked, FENCE, LogLane, LogWords, ReturnLane, ReturnWords, data_bell, room_bell,
};
use crate::entry::{Lane, Nonce, Seq};
use crate::fdpass::FdPassError;
use crate::fence::{FenceError, Fenced};
use crate::lane::{Geometry, ReadError, WriteError};
use crate::region::{ReadView, Region, Words};
use crate::ring::{Acks, BadSize, RingConfig, RingReader, RingWriter};
use crate::sync::{AtomicU64, Ordering};
use crate::transport::{
    AckPort, Counters, FenceKey, FencePort, Limit, OpenSlot, ProgressPort, Range, ReadPort,
    WritePort, WriteView,
};

#[cfg(not(loom))]
mod connect;
#[cfg(not(loom))]
pub use connect::{accept, connect};

/// Why a ring could not be set up between two processes.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The lanes' sizes.
    #[error(transparent)]
    Size(#[from] BadSize),
    /// The peer says something else than this version of the protocol.
    #[error(
        "the peer does not speak rdma-log version {expected} ({what}); run the same build on both sides"
    )]
    Protocol {
        /// The version spoken here.
        expected: u32,
        /// What was not understood.
        what: &'static str,
    },
    /// The message with the descriptor did not get across.
    #[error("cannot exchange memory with the peer: {0}")]
    Pass(#[from] FdPassError),
    /// Memory could not be made, checked or mapped.
    #[error("cannot {what}: {error}")]
    Memory {
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
}

/// Both sides of a ring in one process, on the heap: for tests, measurements and a rehearsal.
///
/// # Errors
/// A size that cannot be, or no random numbers from the kernel.
pub fn pair(config: &RingConfig) -> Result<(RingWriter, RingReader), ConnectError> {
    let geometries = config.geometries()?;
    let nonce = Nonce::random().map_err(|error| ConnectError::Memory {
        what: "draw a random nonce",
        error,
    })?;
    let lanes = Region::heap(config.events + config.inputs);
    let sizes = [config.events, config.inputs];
    let words = Shared {
        log: Words::heap(),
        back: Words::heap(),
    };
    let read = lanes.read_views(0, sizes);
    let write = lanes.write_views(0, sizes);
    Ok((
        writer(nonce, geometries, words.clone(), write),
        reader(nonce, geometries, words, read),
    ))
}

/// The control words of both sides.
#[derive(Clone)]
struct Shared {
    log: Words<LogWords>,
    back: Words<ReturnWords>,
}

impl Shared {
    fn lane(&self, lane: Lane) -> (&LogLane, &ReturnLane) {
        (self.log.lane(lane), self.back.lane(lane))
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("shm")
    }
}

fn writer(
    nonce: Nonce,
    geometries: [Geometry; 2],
    words: Shared,
    views: [WriteView; 2],
) -> RingWriter {
    let committed = [(); 2].map(|()| Arc::new(AtomicU64::new(0)));
    let port = |lane: Lane| -> Box<dyn WritePort> {
        Box::new(ShmWriter {
            lane,
            words: words.clone(),
            committed: committed[lane.index()].clone(),
        })
    };
    let progress = Box::new(ShmProgress {
        words: words.clone(),
        committed: committed.clone(),
    });
    RingWriter::assemble(nonce, geometries, views, port, progress)
}

fn reader(
    nonce: Nonce,
    geometries: [Geometry; 2],
    words: Shared,
    views: [ReadView; 2],
) -> RingReader {
    let ends = Arc::new([(); 2].map(|()| AtomicU64::new(OPEN)));
    let acks = Acks::new(Arc::new(ShmAcks {
        words: words.clone(),
    }));
    let port = |lane, view| -> (Box<dyn ReadPort>, Acks) {
        let reader = ShmReader {
            lane,
            words: words.clone(),
            view,
            ends: ends.clone(),
        };
        // Not shared with anyone.
        let acks = Acks::new(Arc::new(ShmLaneAcks {
            words: words.clone(),
            said: Acked::default(),
        }));
        (Box::new(reader), acks)
    };
    let fence = Box::new(ShmFence {
        nonce,
        words: words.clone(),
        ends: ends.clone(),
    });
    RingReader::assemble(nonce, geometries, views, port, acks, fence)
}

#[derive(Debug)]
struct ShmWriter {
    lane: Lane,
    words: Shared,
    committed: Arc<AtomicU64>,
}

impl ShmWriter {
    fn words(&self) -> (&LogLane, &ReturnLane) {
        self.words.lane(self.lane)
    }
}

impl WritePort for ShmWriter {
    fn post(&mut self, _: &WriteView, range: Range) -> Result<(), WriteError> {
        let (log, _) = self.words();
        // Release: whoever sees the tail sees the bytes. Acquire: nothing after it is done before it is decided.
        log.tail
            .0
            .compare_exchange(range.from, range.to, Ordering::AcqRel, Ordering::Acquire)
            .map_err(|found| match found & FENCE {
                0 => WriteError::Tail {
                    lane: self.lane,
                    expected: range.from,
                    found,
                },
                _ => WriteError::Fenced,
            })?;
        self.committed.store(range.seq.0, Ordering::Release);
        Ok(())
    }

    fn push(&mut self, _: &WriteView) -> Result<(), WriteError> {
        let (log, back) = self.words();
        data_bell(log, back).ring();
        Ok(())
    }

    fn consumed(&mut self) -> Result<u64, WriteError> {
        // Acquire: the reader's loads of these bytes are over before they are overwritten.
        Ok(self.words().1.consumed.0.load(Ordering::Acquire))
    }

    fn committed(&mut self) -> Result<Seq, WriteError> {
        Ok(Seq(self.committed.load(Ordering::Relaxed)))
    }

    fn fenced(&mut self) -> bool {
        self.words().0.tail.0.load(Ordering::Acquire) & FENCE != 0
    }

    fn mark_open(&mut self, slot: Option<OpenSlot>) {
        let open = &self.words().0.open.0;
        open.at.store(0, Ordering::Release);
        if let Some(slot) = slot {
            open.len.store(slot.len, Ordering::Release);
            open.at.store(slot.at + 1, Ordering::Release);
        }
    }

    fn arm(&mut self) -> u32 {
        let (log, back) = self.words();
        room_bell(log, back).arm()
    }

    fn sleep(&mut self, armed: u32, limit: Duration) -> bool {
        let (log, back) = self.words();
        room_bell(log, back).sleep(armed, limit)
    }

    fn disarm(&mut self) {
        let (log, back) = self.words();
        room_bell(log, back).disarm();
    }
}

#[derive(Debug)]
struct ShmProgress {
    words: Shared,
    committed: [Arc<AtomicU64>; 2],
}

impl ProgressPort for ShmProgress {
    fn poll(&mut self) -> Result<[Counters; 2], WriteError> {
        Ok(Lane::ALL.map(|lane| {
            let (log, back) = self.words.lane(lane);
            let AckWords {
                lane: by_lane,
                others,
            } = &back.acks.0;
            let most = |a: &AtomicU64, b: &AtomicU64| {
                Seq(a.load(Ordering::Acquire).max(b.load(Ordering::Acquire)))
            };
            // In the other order than they are told, or what was replayed could seem ahead of what was received.
            let replayed = most(&by_lane.replayed, &others.replayed);
            Counters {
                fenced: log.tail.0.load(Ordering::Acquire) & FENCE != 0,
                committed: Seq(self.committed[lane.index()].load(Ordering::Acquire)),
                received: most(&by_lane.received, &others.received),
                replayed,
            }
        }))
    }
}

/// In place of a lane's end while it is not fenced. No position, being no multiple of a line.
const OPEN: u64 = u64::MAX;

#[derive(Debug)]
struct ShmReader {
    lane: Lane,
    words: Shared,
    view: ReadView,
    /// The ends that the fence found. A hostile writer can clear its bit, but not move these.
    ends: Arc<[AtomicU64; 2]>,
}

impl ShmReader {
    fn words(&self) -> (&LogLane, &ReturnLane) {
        self.words.lane(self.lane)
    }
}

impl ReadPort for ShmReader {
    fn limit(&mut self) -> Result<Limit, ReadError> {
        let end = self.ends[self.lane.index()].load(Ordering::Acquire);
        if end != OPEN {
            return Ok(Limit::Tail {
                at: end,
                fenced: true,
            });
        }
        let tail = self.words().0.tail.0.load(Ordering::Acquire);
        Ok(Limit::Tail {
            at: tail & !FENCE,
            fenced: tail & FENCE != 0,
        })
    }

    fn known(&mut self) -> Result<Limit, ReadError> {
        Ok(match self.ends[self.lane.index()].load(Ordering::Acquire) {
            OPEN => Limit::Unknown { fenced: false },
            at => Limit::Tail { at, fenced: true },
        })
    }

    fn word(&self, at: usize) -> u64 {
        self.view.load(at)
    }

    fn copy_out(&self, at: usize, to: &mut [u8]) {
        self.view.copy_out(at, to);
    }

    fn release(&mut self, consumed: u64) {
        // Release: the loads of these bytes are over.
        let (_, back) = self.words();
        back.consumed.0.store(consumed, Ordering::Release);
    }

    fn push(&mut self) -> Result<(), ReadError> {
        let (log, back) = self.words();
        room_bell(log, back).ring();
        Ok(())
    }

    fn open_slot(&self) -> Option<OpenSlot> {
        let open = &self.words().0.open.0;
        let at = open.at.load(Ordering::Acquire).checked_sub(1)?;
        let len = open.len.load(Ordering::Acquire);
        Some(OpenSlot { at, len })
    }

    fn arm(&mut self) -> u32 {
        let (log, back) = self.words();
        data_bell(log, back).arm()
    }

    fn sleep(&mut self, armed: u32, limit: Duration) -> bool {
        let (log, back) = self.words();
        data_bell(log, back).sleep(armed, limit)
    }

    fn disarm(&mut self) {
        let (log, back) = self.words();
        data_bell(log, back).disarm();
    }
}

/// For any thread.
#[derive(Debug)]
struct ShmAcks {
    words: Shared,
}

impl ShmAcks {
    fn words(&self, lane: Lane) -> &Acked {
        &self.words.back.lane(lane).acks.0.others
    }
}

impl AckPort for ShmAcks {
    fn received(&self, lane: Lane, seq: Seq) {
        self.words(lane).received.fetch_max(seq.0, Ordering::AcqRel);
    }

    fn replayed(&self, lane: Lane, seq: Seq) {
        self.words(lane).replayed.fetch_max(seq.0, Ordering::AcqRel);
    }
}

/// For the lane's reader alone: one thread, so a store will do, and what it stored last is known here.
///
/// An exchange reads the line before it writes it, and the writer, which polls it, has it: one more way between the cores.
#[derive(Debug)]
struct ShmLaneAcks {
    words: Shared,
    said: Acked,
}

impl ShmLaneAcks {
    fn say(said: &AtomicU64, word: &AtomicU64, seq: Seq) {
        if seq.0 > said.load(Ordering::Relaxed) {
            said.store(seq.0, Ordering::Relaxed);
            word.store(seq.0, Ordering::Release);
        }
    }
}

impl AckPort for ShmLaneAcks {
    fn received(&self, lane: Lane, seq: Seq) {
        let words = &self.words.back.lane(lane).acks.0.lane;
        ShmLaneAcks::say(&self.said.received, &words.received, seq);
    }

    fn replayed(&self, lane: Lane, seq: Seq) {
        let words = &self.words.back.lane(lane).acks.0.lane;
        ShmLaneAcks::say(&self.said.replayed, &words.replayed, seq);
    }
}

#[derive(Debug)]
struct ShmFence {
    nonce: Nonce,
    words: Shared,
    ends: Arc<[AtomicU64; 2]>,
}

impl FencePort for ShmFence {
    fn fence(&mut self) -> Result<Fenced, FenceError> {
        let ends = Lane::ALL.map(|lane| {
            let (log, _) = self.words.lane(lane);
            // One order of all changes of the word: an exchange came before and is in this value, or it fails.
            let end = log.tail.0.fetch_or(FENCE, Ordering::AcqRel) & !FENCE;
            self.ends[lane.index()].store(end, Ordering::Release);
            Some(end)
        });
        for lane in Lane::ALL {
            let (log, back) = self.words.lane(lane);
            data_bell(log, back).word.bump();
            room_bell(log, back).word.bump();
        }
        Ok(Fenced::attest(FenceKey(()), self.nonce, ends))
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
