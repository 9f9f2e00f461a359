//! The writer's end: requests posted and completed, and what the reader returns.
//!
//! Each lane has its queue pair behind a lock of its own, held for the posting of what gathered and the taking of what was
//! completed. What waits to be sent is numbers only; the bytes stay in the lane's memory, which nobody touches before the
//! reader has returned the credit for them and their write was completed.
//!
//! Completions are taken in by whoever asks for *committed* or for room, and by whoever holds the [`Watch`], or a thread of
//! this connection's own: it also rings for a reader that has fallen asleep in the meantime (an alarm that is seen only
//! after the entry was posted is looked for once more when its write was completed: then one of the two must have seen the
//! other), and writes a block now and then, so that the end of an idle connection is noticed.
#![forbid(unsafe_code)]

mod ports;
mod sending;
mod taking;

pub use ports::Watch;
pub(super) use ports::{RdmaProgress, RdmaWriter};

use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::block::{Alarm, BLOCK};
use super::flow::{Gather, Piece};
use super::hello::Mode;
use super::pipe::{Pipe, Slots};
use crate::entry::{Lane, Nonce, Seq};
use crate::futex::{Bell, FutexWord};
use crate::lane::WriteError;
use crate::locks::lock;
use crate::poll::wait;
use crate::region::ReadView;
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use crate::transport::Counters;
use crate::verbs::RdmaError;
use crate::verbs::{Device, Registered, Remote};

/// Pieces that gather before they are sent without a push: a few full ones, so that the device is never idle while a
/// burst is being made, and a burst of small entries still shares requests.
const GATHERED: usize = 4;
/// Requests in one chain: its last one alone is signalled, so a longer chain would commit its first entries late.
const CHAIN: u32 = 16;
/// A connection with nothing to say writes a block so often. What fences or kills it is noticed by that at the latest; shorter
/// costs both hosts wake-ups for nothing.
pub(super) const BEAT: Duration = Duration::from_millis(50);
/// How long a connection that is dropped waits for what it posted to arrive.
const LINGER: Duration = Duration::from_millis(200);

/// Why nothing more commits.
#[derive(Clone, Debug)]
enum End {
    Fenced,
    Closed,
    Failed(RdmaError),
    Counter(WriteError),
}

impl End {
    fn of(error: RdmaError) -> End {
        match error {
            RdmaError::Refused { .. } => End::Fenced,
            error => End::Failed(error),
        }
    }

    fn for_lane(&self, lane: Lane) -> WriteError {
        match self {
            End::Fenced => WriteError::Fenced,
            End::Closed | End::Failed(RdmaError::PeerGone { .. }) => WriteError::Closed,
            End::Failed(error) => WriteError::Transport {
                lane,
                reason: error.to_string(),
            },
            End::Counter(error) => error.clone(),
        }
    }
}

/// One lane's numbers.
#[derive(Debug, Default)]
struct LaneState {
    /// Number of the last posted entry, and the bytes up to its end.
    last: AtomicU64,
    posted: AtomicU64,
    /// There is something gathered that was not sent.
    pending: AtomicBool,
    /// Completions were taken, so the queue is not armed any more.
    fired: AtomicBool,
    /// All before was written to the reader's memory.
    complete: AtomicU64,
    /// The last entry that was.
    completed: AtomicU64,
    /// What the reader returned, checked.
    consumed: AtomicU64,
    received: AtomicU64,
    replayed: AtomicU64,
    /// Where a writer sleeps that waits for room.
    waiting: AtomicU32,
    room: FutexWord,
}

impl LaneState {
    fn bell(&self) -> Bell<'_> {
        Bell {
            waiting: &self.waiting,
            word: &self.room,
        }
    }

    fn committed(&self, mode: Mode) -> Seq {
        Seq(match mode {
            Mode::Nic => self.completed.load(Ordering::Acquire),
            Mode::Ack => self.received.load(Ordering::Acquire),
        })
    }
}

/// What a posting carried.
#[derive(Debug)]
pub(super) enum Sent {
    Lane(Piece),
    Block,
}

/// What a lane's lock guards.
#[derive(Debug)]
struct LanePipe {
    pipe: Pipe<Sent>,
    gather: Gather,
}

/// The writer's blocks. Locked before the events lane's pipe, by which they go.
#[derive(Debug)]
struct Control {
    slots: Slots,
    alarm: Alarm,
    said_at: Instant,
    /// The block that should have gone found no slot, and whether it was to ring; the next completion makes room.
    due: bool,
    ring_due: bool,
}

/// The reader's blocks, as they come in.
#[derive(Debug)]
struct Heard {
    view: ReadView,
    last: [u8; BLOCK],
}

#[derive(Debug)]
pub(super) struct Shared {
    /// First, so that the queue pairs end before the memory that they use.
    pipes: [Mutex<LanePipe>; 2],
    nonce: Nonce,
    mode: Mode,
    device: Arc<Device>,
    source: Registered,
    ring: Remote,
    starts: [u64; 2],
    sizes: [u64; 2],
    lanes: [LaneState; 2],
    control: Mutex<Control>,
    heard: Mutex<Heard>,
    blocks_done: AtomicU64,
    /// The alarm that the reader set last, and the one that was rung for last.
    reader_alarm: AtomicU64,
    rung: AtomicU64,
    /// The thread that takes in completions is to end.
    closing: AtomicBool,
    /// The reader rang.
    was_rung: AtomicBool,
    end: OnceLock<End>,
    /// The reader's registration of the page, which ends with this.
    _returned: Registered,
}

/// What a connection is made of.
pub(super) struct Parts<T> {
    pub(super) nonce: Nonce,
    pub(super) mode: Mode,
    pub(super) device: Arc<Device>,
    pub(super) pipes: [Pipe<T>; 2],
    pub(super) slots: Slots,
    pub(super) source: Registered,
    pub(super) returned: Registered,
    pub(super) block: ReadView,
    pub(super) ring: Remote,
    pub(super) starts: [u64; 2],
    pub(super) sizes: [u64; 2],
    pub(super) driven: bool,
}

impl Shared {
    fn lane(&self, lane: Lane) -> &LaneState {
        &self.lanes[lane.index()]
    }

    fn fenced(&self) -> bool {
        matches!(self.end.get(), Some(End::Fenced))
    }

    fn check(&self, lane: Lane) -> Result<(), WriteError> {
        self.end.get().map_or(Ok(()), |end| Err(end.for_lane(lane)))
    }

    /// The first reason stays. Sleeping writers wake to hear it.
    fn end(&self, end: End) {
        if self.end.set(end).is_ok() {
            for lane in &self.lanes {
                lane.bell().ring();
            }
        }
    }

    fn failed(&self, error: RdmaError) {
        self.end(End::of(error));
    }

    fn counters(&self) -> [Counters; 2] {
        let fenced = self.fenced();
        // The one that may be behind the others is read before them, as they grow meanwhile.
        self.lanes.each_ref().map(|lane| {
            let replayed = Seq(lane.replayed.load(Ordering::Acquire));
            let received = Seq(lane.received.load(Ordering::Acquire));
            Counters {
                committed: lane.committed(self.mode),
                received,
                replayed,
                fenced,
            }
        })
    }
}

/// The connection's writing end; with the last port of it the queue pairs are destroyed.
#[derive(Debug)]
pub(super) struct Writer {
    shared: Arc<Shared>,
    driver: Option<(UnixStream, JoinHandle<()>)>,
}

impl Writer {
    pub(super) fn new(parts: Parts<Sent>) -> io::Result<Writer> {
        let mut sizes = parts.sizes.into_iter();
        let pipes = parts.pipes.map(|pipe| {
            Mutex::new(LanePipe {
                pipe,
                gather: Gather::new(sizes.next().expect("a size for each lane")),
            })
        });
        let shared = Arc::new(Shared {
            nonce: parts.nonce,
            mode: parts.mode,
            device: parts.device,
            source: parts.source,
            ring: parts.ring,
            starts: parts.starts,
            sizes: parts.sizes,
            lanes: Default::default(),
            pipes,
            control: Mutex::new(Control {
                slots: parts.slots,
                alarm: Alarm::default(),
                said_at: Instant::now(),
                due: false,
                ring_due: false,
            }),
            heard: Mutex::new(Heard {
                view: parts.block,
                last: [0; BLOCK],
            }),
            blocks_done: AtomicU64::new(0),
            closing: AtomicBool::new(false),
            reader_alarm: AtomicU64::new(0),
            rung: AtomicU64::new(0),
            was_rung: AtomicBool::new(false),
            end: OnceLock::new(),
            _returned: parts.returned,
        });
        let mut driver = None;
        if !parts.driven {
            let (wake, woken) = UnixStream::pair()?;
            let shared = shared.clone();
            let thread = std::thread::Builder::new().name("rdma-log".into());
            driver = Some((wake, thread.spawn(move || drive(&shared, &woken))?));
        }
        Ok(Writer { shared, driver })
    }

    pub(super) fn watch(&self) -> Watch {
        Watch {
            shared: self.shared.clone(),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some((wake, driver)) = self.driver.take() {
            self.shared.closing.store(true, Ordering::Release);
            // A panic of its has nobody left to tell.
            let _ = (&wake).write(&[0]);
            let _ = driver.join();
        }
        self.shared.linger();
        self.shared.end(End::Closed);
    }
}

fn drive(shared: &Shared, woken: &UnixStream) {
    while shared.end.get().is_none() && !shared.closing.load(Ordering::Acquire) {
        // What is wrong, the lanes say.
        let _ = shared.turn();
        let fds = [(shared.device.as_fd(), false), (woken.as_fd(), false)];
        if let Err(error) = wait(fds, Some(BEAT)) {
            let errno = error.raw_os_error().unwrap_or(0);
            let what = "wait for completions";
            shared.failed(RdmaError::Verb { what, errno });
        }
    }
}
