//! A ring: two lanes, what the reader returns, and the handles of either side.
//!
//! Each side gets a struct of independent handles, to be moved to the threads that need them.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;

use thiserror::Error;

use crate::entry::{Keys, Lane, Nonce, Seq};
use crate::fence::{FenceError, Fenced};
use crate::lane::{
    Counter, Geometry, LaneReader, LaneWriter, MAX_LANE, MIN_LANE, ReaderParts, WriteError,
    WriterParts,
};
use crate::region::{ReadView, WriteView};
#[cfg(not(loom))]
use crate::robust::{DeathWatch, RobustKey};
use crate::sync::{AtomicU64, Ordering};
use crate::transport::{AckPort, Counters, FencePort, ProgressPort, ReadPort, WritePort};

/// Default size of the events lane in bytes.
///
/// At 64 bytes an entry it holds 65,536, some seconds of a busy guest's exits: far more than the lag that the
/// throttle allows. Too small, and the vCPU stops on [`WriteError::Full`].
pub const EVENTS_LANE: usize = 4 << 20;

/// Default size of the inputs lane in bytes.
///
/// Some five thousand frames of 1500 bytes. Too small, and inputs wait in the kernel while the backup is behind.
pub const INPUTS_LANE: usize = 8 << 20;

/// Sizes of the lanes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingConfig {
    /// The events lane: a power of two, from [`MIN_LANE`] to [`MAX_LANE`].
    pub events: usize,
    /// The inputs lane: likewise.
    pub inputs: usize,
}

impl Default for RingConfig {
    fn default() -> Self {
        RingConfig {
            events: EVENTS_LANE,
            inputs: INPUTS_LANE,
        }
    }
}

/// A lane's size that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "the {lane} lane cannot have {size} bytes: choose a power of two from {MIN_LANE} to {MAX_LANE}"
)]
pub struct BadSize {
    /// The lane.
    pub lane: Lane,
    /// The size asked for, in bytes.
    pub size: usize,
}

impl RingConfig {
    pub(crate) fn geometries(&self) -> Result<[Geometry; 2], BadSize> {
        let of = |lane, size| Geometry::new(size).ok_or(BadSize { lane, size });
        Ok([
            of(Lane::Events, self.events)?,
            of(Lane::Inputs, self.inputs)?,
        ])
    }
}

/// The writer's side of a ring (the primary).
#[derive(Debug)]
pub struct RingWriter {
    /// For the vCPU's thread.
    pub events: LaneWriter,
    /// For the I/O thread.
    pub inputs: LaneWriter,
    /// For the thread that opens the gate.
    pub progress: Progress,
    /// For the thread whose death the reader is to learn at once, where the transport has that.
    #[cfg(not(loom))]
    pub robust: Option<RobustKey>,
    /// The connection's nonce.
    pub nonce: Nonce,
}

impl RingWriter {
    /// The handles around a transport's ports, one for each lane.
    pub(crate) fn assemble(
        nonce: Nonce,
        geometries: [Geometry; 2],
        views: [WriteView; 2],
        port: impl Fn(Lane) -> Box<dyn WritePort>,
        progress: Box<dyn ProgressPort>,
    ) -> RingWriter {
        let posted = [(); 2].map(|()| Arc::new(AtomicU64::new(0)));
        let lane = |lane: Lane, view| {
            LaneWriter::new(WriterParts {
                lane,
                keys: Keys::new(&nonce),
                geometry: geometries[lane.index()],
                view,
                port: port(lane),
                posted: posted[lane.index()].clone(),
            })
        };
        let [events, inputs] = views;
        RingWriter {
            events: lane(Lane::Events, events),
            inputs: lane(Lane::Inputs, inputs),
            progress: Progress::new(progress, posted.clone()),
            #[cfg(not(loom))]
            robust: None,
            nonce,
        }
    }
}

/// The reader's side of a ring (the backup).
#[derive(Debug)]
pub struct RingReader {
    /// For the thread that replays.
    pub events: LaneReader,
    /// For the thread that takes in what was staged.
    pub inputs: LaneReader,
    /// For any thread that acknowledges.
    pub acks: Acks,
    /// For the thread that takes over.
    pub fencer: Fencer,
    /// For a thread that waits for the writer's death, where the transport tells it.
    #[cfg(not(loom))]
    pub robust: Option<DeathWatch>,
    /// The connection's nonce.
    pub nonce: Nonce,
}

impl RingReader {
    /// The handles around a transport's ports, one for each lane with what that lane's own reader acknowledges by.
    pub(crate) fn assemble(
        nonce: Nonce,
        geometries: [Geometry; 2],
        views: [ReadView; 2],
        port: impl Fn(Lane, ReadView) -> (Box<dyn ReadPort>, Acks),
        acks: Acks,
        fence: Box<dyn FencePort>,
    ) -> RingReader {
        let lane = |lane: Lane, view| {
            let (port, acks) = port(lane, view);
            LaneReader::new(ReaderParts {
                lane,
                nonce,
                geometry: geometries[lane.index()],
                port,
                acks,
            })
        };
        let [events, inputs] = views;
        RingReader {
            events: lane(Lane::Events, events),
            inputs: lane(Lane::Inputs, inputs),
            acks,
            fencer: Fencer::new(fence),
            #[cfg(not(loom))]
            robust: None,
            nonce,
        }
    }
}

/// How far one lane got. Every number was checked: none goes back, none passes what was posted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneProgress {
    /// The highest entry that has committed.
    pub committed: Seq,
    /// The highest entry that the reader received.
    pub received: Seq,
    /// The highest entry that the reader replayed. Never ahead of what it received, if it says that first.
    pub replayed: Seq,
    /// The reader has fenced the lane: nothing more commits than is said here. Ask again once after seeing it, the
    /// last commit may have come between.
    pub fenced: bool,
}

/// How far both lanes got, seen from the writer's side by a thread that writes neither.
#[derive(Debug)]
pub struct Progress {
    port: Box<dyn ProgressPort>,
    posted: [Arc<AtomicU64>; 2],
    /// The counters as they came last, and what was made of them.
    last: [Counters; 2],
    seen: [LaneProgress; 2],
}

impl Progress {
    pub(crate) fn new(port: Box<dyn ProgressPort>, posted: [Arc<AtomicU64>; 2]) -> Progress {
        Progress {
            port,
            posted,
            last: Default::default(),
            seen: Default::default(),
        }
    }

    /// Looks, without waiting, how far both lanes got: events first, then inputs ([`Lane::index`]).
    ///
    /// # Errors
    /// [`WriteError::Counter`] when the reader's numbers cannot be; else what the transport says.
    pub fn poll(&mut self) -> Result<[LaneProgress; 2], WriteError> {
        let now = self.port.poll()?;
        // Whoever waits for an answer polls: that has to be quick while there is none.
        if now == self.last {
            return Ok(self.seen);
        }
        for lane in Lane::ALL {
            let i = lane.index();
            // After the counters, so that it covers them.
            let posted = self.posted[i].load(Ordering::Relaxed);
            self.seen[i] = check(lane, self.seen[i], now[i], Seq(posted))?;
        }
        self.last = now;
        Ok(self.seen)
    }
}

#[inline]
fn check(
    lane: Lane,
    seen: LaneProgress,
    now: Counters,
    posted: Seq,
) -> Result<LaneProgress, WriteError> {
    let within = |counter, least: Seq, found: Seq| {
        if found < least || found > posted {
            return Err(WriteError::Counter {
                lane,
                counter,
                least: least.0,
                most: posted.0,
                found: found.0,
            });
        }
        Ok(found)
    };
    Ok(LaneProgress {
        committed: within(Counter::Committed, seen.committed, now.committed)?,
        received: within(Counter::Received, seen.received, now.received)?,
        replayed: within(Counter::Replayed, seen.replayed, now.replayed)?,
        fenced: seen.fenced || now.fenced,
    })
}

/// What the reader tells the writer. Clones are the same; a number that goes back is ignored.
#[derive(Clone)]
pub struct Acks {
    port: Arc<dyn AckPort>,
}

impl Acks {
    pub(crate) fn new(port: Arc<dyn AckPort>) -> Acks {
        Acks { port }
    }

    /// All of the lane up to `seq` was received. The caller has read that far.
    pub fn received(&self, lane: Lane, seq: Seq) {
        self.port.received(lane, seq);
    }

    /// All of the lane up to `seq` was replayed. The caller has read that far.
    pub fn replayed(&self, lane: Lane, seq: Seq) {
        self.port.replayed(lane, seq);
    }
}

impl fmt::Debug for Acks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.port.fmt(f)
    }
}

/// Ends the connection for its writer.
#[derive(Debug)]
pub struct Fencer {
    port: Box<dyn FencePort>,
    done: bool,
}

impl Fencer {
    pub(crate) fn new(port: Box<dyn FencePort>) -> Fencer {
        Fencer { port, done: false }
    }

    /// Returns when nothing that the writer posts from now on can commit, in either lane. Entries that had committed
    /// are still to be read; sleeping readers wake.
    ///
    /// # Errors
    /// [`FenceError::Already`] after it has succeeded once; [`FenceError::Transport`] when it is not certain.
    pub fn fence(&mut self) -> Result<Fenced, FenceError> {
        if self.done {
            return Err(FenceError::Already);
        }
        let fenced = self.port.fence()?;
        self.done = true;
        Ok(fenced)
    }
}
