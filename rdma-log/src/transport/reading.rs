//! What the reading ends of transports over a network have in common: the numbers of each lane, where its reader sleeps, and how the
//! thread that speaks to the writer is woken.
#![forbid(unsafe_code)]

use std::fmt::Debug;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::{Limit, ReadPort};
use crate::entry::{Lane, Nonce};
use crate::futex::{Bell, FutexWord};
use crate::lane::ReadError;
use crate::region::ReadView;
use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// One lane's numbers.
#[derive(Debug, Default)]
pub(super) struct ReadingLane {
    /// Bytes that the reader has copied out.
    pub(super) consumed: AtomicU64,
    /// Number of the last entry received, and replayed.
    pub(super) received: AtomicU64,
    pub(super) replayed: AtomicU64,
    /// `consumed` as it was said last.
    pub(super) credited: AtomicU64,
    /// Where a reader sleeps that waits for entries.
    waiting: AtomicU32,
    data: FutexWord,
}

impl ReadingLane {
    pub(super) fn bell(&self) -> Bell<'_> {
        Bell {
            waiting: &self.waiting,
            word: &self.data,
        }
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) != 0
    }
}

/// What the transport's thread and the reader's handles share.
#[derive(Debug)]
pub(super) struct Reading {
    pub(super) nonce: Nonce,
    /// Bytes of each lane.
    pub(super) sizes: [u64; 2],
    pub(super) lanes: [ReadingLane; 2],
    /// The thread is to end.
    pub(super) retired: AtomicBool,
    pub(super) fenced: AtomicBool,
    /// The thread waits, and does not look by itself for what this side has to say.
    pub(super) parked: AtomicBool,
    /// Ends its wait.
    wake: UnixStream,
}

impl Reading {
    /// The state, and what the thread waits at to be woken.
    pub(super) fn new(nonce: Nonce, sizes: [u64; 2]) -> io::Result<(Reading, UnixStream)> {
        let (wake, woken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        let reading = Reading {
            nonce,
            sizes,
            lanes: Default::default(),
            retired: AtomicBool::new(false),
            fenced: AtomicBool::new(false),
            parked: AtomicBool::new(false),
            wake,
        };
        Ok((reading, woken))
    }

    pub(super) fn lane(&self, lane: Lane) -> &ReadingLane {
        &self.lanes[lane.index()]
    }

    fn wake(&self) {
        // It fails only when it is readable already, or nobody waits any more.
        let _ = (&self.wake).write(&[0]);
    }

    /// Has the thread end.
    pub(super) fn retire(&self) {
        self.retired.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Nothing arrives any more: readers that sleep are to hear it.
    pub(super) fn end(&self) {
        self.fenced.store(true, Ordering::Release);
        for lane in &self.lanes {
            lane.data.bump();
        }
    }

    /// Wakes whoever sleeps.
    pub(super) fn ring_all(&self) {
        for lane in &self.lanes {
            lane.bell().ring();
        }
    }

    /// Sees to it that the thread looks, if it does not do so by itself.
    pub(super) fn attend(&self) {
        // Pairs with the one before the thread parks: either it sees the change, or this sees that it parks.
        fence(Ordering::SeqCst);
        let starved = |(lane, size): (&ReadingLane, &u64)| {
            let consumed = lane.consumed.load(Ordering::Relaxed);
            consumed.saturating_sub(lane.credited.load(Ordering::Relaxed)) >= size / 2
        };
        if self.parked.load(Ordering::Relaxed) && self.parked.swap(false, Ordering::Relaxed)
            || self.lanes.iter().zip(&self.sizes).any(starved)
        {
            self.wake();
        }
    }
}

/// The reading end of a connection.
pub(super) trait End: Debug + Send + Sync {
    /// What it has in common with others.
    fn reading(&self) -> &Reading;

    /// How far a lane may be read.
    fn limit(&self, lane: Lane) -> Limit;
}

/// One lane, for its reader.
#[derive(Debug)]
pub(super) struct LanePort<E> {
    pub(super) lane: Lane,
    pub(super) end: Arc<E>,
    pub(super) view: ReadView,
}

impl<E: End> LanePort<E> {
    fn state(&self) -> &ReadingLane {
        self.end.reading().lane(self.lane)
    }
}

impl<E: End> ReadPort for LanePort<E> {
    /// A broken connection is no error here: what has arrived is still to be read, and nothing more is in the ring.
    fn limit(&mut self) -> Result<Limit, ReadError> {
        Ok(self.end.limit(self.lane))
    }

    fn copy_out(&self, at: usize, to: &mut [u8]) {
        self.view.copy_out(at, to);
    }

    fn release(&mut self, consumed: u64) {
        // Release: the loads of these bytes are over.
        self.state().consumed.store(consumed, Ordering::Release);
    }

    fn push(&mut self) -> Result<(), ReadError> {
        self.end.reading().attend();
        Ok(())
    }

    fn arm(&mut self) -> u32 {
        let armed = self.state().bell().arm();
        self.end.reading().attend();
        armed
    }

    fn sleep(&mut self, armed: u32, limit: Duration) -> bool {
        self.state().bell().sleep(armed, limit)
    }

    fn disarm(&mut self) {
        self.state().bell().disarm();
    }
}
