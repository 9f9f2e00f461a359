//! The reader's end: a thread that returns credits and acknowledgements, and wakes who sleeps.
//!
//! The lanes' readers find entries in their memory by themselves. The thread sends a block when what it says has changed:
//! in mode `ack` *received* of the events lane at once, the rest gathers for [`ANSWER_WITHIN`]. In mode `ack` it walks along behind
//! the device, takes every entry out and checks it, and says that; so a commit does not wait for whoever replays. In mode
//! `nic` it looks at the ring only for readers that sleep, and nothing waits for *received*: a block for each entry would be as
//! many packets the other way.
//!
//! When it has nothing to do and something to wait for, it sets an alarm ([`Alarm`]), which the writer's side answers with
//! a write that ends the sleep. It sleeps only after the alarm is known to be in the writer's memory and one more look
//! found nothing; the writer's side looks for alarms after its writes are known to be in this side's memory. So one of the
//! two sees the other.
#![forbid(unsafe_code)]

mod ports;

use ports::{Finder, Nobody};

pub use ports::Link;
pub(super) use ports::{RdmaAcks, RdmaFence, RdmaReader};

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::block::{Alarm, BLOCK, Block, From, LaneWords};
use super::hello::Mode;
use super::pipe::{Pipe, Slots};
use super::writer::BEAT;
use crate::entry::{HEADER_LEN, Header, Keys, Lane, Nonce, Stamp};
use crate::lane::{Geometry, LaneReader, ReaderParts};
use crate::poll::wait;
use crate::region::{ReadView, Region};
use crate::ring::{Acks, RingConfig};
use crate::sync::{AtomicU64, Ordering, fence};
use crate::transport::reading::{Reading, ReadingLane};
use crate::verbs::RdmaError;
use crate::verbs::{Device, Registered};

/// How long a block that nothing waits for may gather. Short against the lag that a writer allows its reader, long against
/// the cost of a block; a lane is seldom so full that a writer waits for it.
const ANSWER_WITHIN: Duration = Duration::from_millis(1);
/// How long the last block, which says that the connection is fenced, may take to arrive.
const FAREWELL: Duration = Duration::from_millis(20);
/// Looks for entries between two at everything else, while the thread looks without sleeping: the device's queues and the writer's
/// block cost several times as much, and a commit waits for the entry.
const LOOKS: usize = 8;
/// Turns without sleep between two looks at the clock: some tens of microseconds.
const UNTIMED: u32 = 16;
/// Entries that are found at once before what was found is said.
const FOUND: usize = 64;

/// What the thread and the reader's handles share.
#[derive(Debug)]
pub(super) struct Shared {
    reading: Reading,
    mode: Mode,
    /// Bytes of each lane that were found to have arrived: mode `ack` only.
    found: [AtomicU64; 2],
    broken: OnceLock<RdmaError>,
}

impl Shared {
    pub(super) fn nonce(&self) -> Nonce {
        self.reading.nonce
    }

    fn words(&self) -> [LaneWords; 2] {
        Lane::ALL.map(|which| {
            let lane = self.reading.lane(which);
            // In this order: what was replayed had been received.
            let replayed = lane.replayed.load(Ordering::Acquire);
            let received = lane.received.load(Ordering::Acquire);
            let consumed = lane.consumed.load(Ordering::Acquire);
            match self.mode {
                Mode::Nic => LaneWords {
                    consumed,
                    received,
                    replayed,
                },
                // What was not found yet must not be written over.
                Mode::Ack => LaneWords {
                    consumed: consumed.min(self.found[which.index()].load(Ordering::Acquire)),
                    received,
                    replayed: replayed.min(received),
                },
            }
        })
    }
}

/// What a connection is made of.
pub(super) struct Parts {
    pub(super) nonce: Nonce,
    pub(super) mode: Mode,
    pub(super) geometries: [Geometry; 2],
    pub(super) device: Arc<Device>,
    pub(super) pipes: [Pipe<()>; 2],
    pub(super) slots: Slots,
    pub(super) ring: Registered,
    pub(super) spin: Duration,
}

/// Looks at one lane's memory for what has arrived.
#[derive(Debug)]
enum Scan {
    /// Only for the header where a sleeping reader waits.
    Peek {
        view: ReadView,
        keys: Keys,
        geometry: Geometry,
    },
    /// For every entry; `None` once there was one that cannot be, which the lane's reader will find as well.
    Walk(Option<Box<LaneReader>>),
}

/// The thread.
struct Attendant {
    shared: Arc<Shared>,
    device: Arc<Device>,
    pipes: [Pipe<()>; 2],
    slots: Slots,
    scans: [(Lane, Scan); 2],
    /// The writer's block, and what it was last.
    block: ReadView,
    heard: [u8; BLOCK],
    /// The alarm that the writer set last, and the one that was rung for.
    writer_alarm: u64,
    rung: u64,
    alarm: Alarm,
    woken: UnixStream,
    blocks_done: u64,
    said: [LaneWords; 2],
    said_at: Instant,
    /// The block has to go though nothing in it changed.
    due: bool,
    spin: Duration,
}

/// Starts the thread.
pub(super) fn start(
    parts: Parts,
    region: &Region,
    first_lane: usize,
    ring: &RingConfig,
) -> io::Result<(Arc<Shared>, RdmaFence)> {
    let sizes = [ring.events as u64, ring.inputs as u64];
    let (reading, woken) = Reading::new(parts.nonce, sizes)?;
    let shared = Arc::new(Shared {
        reading,
        mode: parts.mode,
        found: Default::default(),
        broken: OnceLock::new(),
    });
    let [events, inputs] = region.read_views(first_lane, [ring.events, ring.inputs]);
    let scan = |lane: Lane, view| {
        (
            lane,
            scan(&shared, lane, view, parts.geometries[lane.index()]),
        )
    };
    let scans = [scan(Lane::Events, events), scan(Lane::Inputs, inputs)];
    let [block, _] = region.read_views(0, [BLOCK, 0]);
    let attendant = Attendant {
        shared: shared.clone(),
        device: parts.device,
        pipes: parts.pipes,
        slots: parts.slots,
        scans,
        block,
        heard: [0; BLOCK],
        writer_alarm: 0,
        rung: 0,
        alarm: Alarm::default(),
        woken,
        blocks_done: 0,
        said: Default::default(),
        said_at: Instant::now(),
        due: false,
        spin: parts.spin,
    };
    let thread = std::thread::Builder::new().name("rdma-reader".into());
    let thread = thread.spawn(move || attendant.run())?;
    let fence = RdmaFence {
        shared: shared.clone(),
        ring: parts.ring,
        thread: Some(thread),
        left: Vec::new(),
    };
    Ok((shared, fence))
}

fn scan(shared: &Arc<Shared>, lane: Lane, view: ReadView, geometry: Geometry) -> Scan {
    let nonce = shared.nonce();
    match shared.mode {
        Mode::Nic => Scan::Peek {
            view,
            keys: Keys::new(&nonce),
            geometry,
        },
        Mode::Ack => {
            let shared = shared.clone();
            Scan::Walk(Some(Box::new(LaneReader::new(ReaderParts {
                lane,
                nonce,
                geometry,
                port: Box::new(Finder { lane, shared, view }),
                acks: Acks::new(Arc::new(Nobody)),
            }))))
        }
    }
}

impl Attendant {
    /// Runs until it is retired or the connection is of no more use; the queue pairs end with what it returns.
    fn run(mut self) -> [Pipe<()>; 2] {
        if let Err(error) = self.attend() {
            let _ = self.shared.broken.set(error);
        } else {
            self.farewell();
        }
        self.shared.reading.ring_all();
        self.pipes
    }

    fn attend(&mut self) -> Result<(), RdmaError> {
        let mut came = Instant::now();
        let mut turns = 0u32;
        while !self.shared.reading.retired.load(Ordering::Acquire) {
            // What is found is said before anything else is looked at.
            let found = self.find_soon();
            if found && self.is_awaited() {
                self.say(false)?;
            }
            turns = turns.wrapping_add(1);
            // A look at the clock takes as long as several for entries.
            let timed = self.spin.is_zero() || turns.is_multiple_of(UNTIMED);
            if self.look()? || found {
                came = Instant::now();
            } else if !timed || came.elapsed() < self.spin {
                std::hint::spin_loop();
            } else {
                self.rest()?;
            }
            if self.is_awaited() || (timed && self.is_due()) {
                self.say(false)?;
            }
        }
        Ok(())
    }

    /// Tells the writer that it is fenced. If it does not hear it, its next write fails and says the same.
    fn farewell(&mut self) {
        self.find();
        let until = Instant::now() + FAREWELL;
        let mut said = false;
        while self.take().is_ok() && Instant::now() < until {
            if !said {
                said = self.say(true).unwrap_or(true);
            } else if self.pipes.iter().all(Pipe::is_idle) {
                return;
            }
            std::thread::yield_now();
        }
    }

    /// Takes in all that may have come; whether something had.
    fn look(&mut self) -> Result<bool, RdmaError> {
        let taken = self.take()?;
        self.hear();
        Ok(self.find() | taken)
    }

    fn take(&mut self) -> Result<bool, RdmaError> {
        let mut any = false;
        for pipe in &mut self.pipes {
            let taken = pipe.take(|()| self.blocks_done += 1)?;
            any |= taken.any;
            if taken.rung {
                self.alarm.rang();
            }
        }
        if any {
            // A block that was on its way when the writer set its alarm may have come before it, unrung: so once more. An alarm that was set
            // before this block came is in the memory here by now.
            self.hear();
            self.due |= self.writer_alarm > self.rung;
        }
        Ok(any)
    }

    fn hear(&mut self) {
        let mut bytes = [0; BLOCK];
        self.block.copy_out(0, &mut bytes);
        if bytes == self.heard {
            return;
        }
        // Nothing of it is believed but that somebody wants to be woken.
        if let Some(block) = Block::from_bytes(&bytes, &self.shared.nonce(), From::Writer) {
            self.heard = bytes;
            self.writer_alarm = self.writer_alarm.max(block.alarm);
        }
    }

    /// Looks for entries, again and again where this thread does not sleep anyway; whether there are new ones.
    fn find_soon(&mut self) -> bool {
        let looks = if self.spin.is_zero() { 1 } else { LOOKS };
        (0..looks).any(|_| self.find())
    }

    /// Looks for entries, and wakes readers that sleep where there are some; whether there are new ones.
    fn find(&mut self) -> bool {
        let mut any = false;
        for (lane, scan) in &mut self.scans {
            let state = self.shared.reading.lane(*lane);
            match scan {
                Scan::Peek {
                    view,
                    keys,
                    geometry,
                } => {
                    if state.is_waiting() && peek(state, *lane, view, keys, *geometry) {
                        state.bell().ring();
                        any = true;
                    }
                }
                Scan::Walk(walk) => any |= walk_on(state, walk),
            }
        }
        any
    }

    /// Whether there is somebody here who waits for what the writer may send.
    fn waits(&self) -> bool {
        self.shared.mode == Mode::Ack
            || self
                .shared
                .reading
                .lanes
                .iter()
                .any(ReadingLane::is_waiting)
    }

    fn has_news(&self) -> bool {
        self.due || self.shared.words() != self.said
    }

    /// Whether somebody waits for what there is to say.
    fn is_awaited(&self) -> bool {
        let now = self.shared.words();
        let events = Lane::Events.index();
        let starved = (0..2)
            .any(|i| now[i].consumed - self.said[i].consumed >= self.shared.reading.sizes[i] / 2);
        let awaited = match self.shared.mode {
            Mode::Ack => now[events].received != self.said[events].received,
            // By a writer that sleeps for want of room.
            Mode::Nic => self.writer_alarm > self.rung && now != self.said,
        };
        self.due || awaited || starved
    }

    /// Whether it is time to say what there is, or that this side lives.
    fn is_due(&self) -> bool {
        let since = self.said_at.elapsed();
        since >= BEAT || (since >= ANSWER_WITHIN && self.shared.words() != self.said)
    }

    /// Sends the block, and rings with it if the writer set an alarm; false if that must wait for a completion.
    fn say(&mut self, fenced: bool) -> Result<bool, RdmaError> {
        let lanes = self.shared.words();
        let block = Block {
            lanes,
            alarm: self.alarm.number(),
            fenced,
        };
        let news = lanes != self.said || fenced || self.due;
        let ring = news && self.writer_alarm > self.rung;
        let pipe = &mut self.pipes[Lane::Events.index()];
        let posted = self.slots.post(pipe, block, ring, (), self.blocks_done)?;
        self.due = !posted;
        if !posted {
            return Ok(false);
        }
        if ring {
            self.rung = self.writer_alarm;
        }
        self.said = lanes;
        self.said_at = Instant::now();
        for (lane, said) in self.shared.reading.lanes.iter().zip(lanes) {
            lane.credited.store(said.consumed, Ordering::Relaxed);
        }
        Ok(true)
    }

    /// Sleeps until something comes or is to be said.
    fn rest(&mut self) -> Result<(), RdmaError> {
        if self.waits() && self.alarm.set() {
            // The completion of this says that the writer's side can see it.
            self.due = true;
            return Ok(());
        }
        self.device.quiet()?;
        for pipe in &mut self.pipes {
            pipe.queue.arm()?;
        }
        let within = if self.shared.words() != self.said {
            ANSWER_WITHIN
        } else {
            self.shared.reading.parked.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            BEAT
        };
        let left = (self.said_at + within).saturating_duration_since(Instant::now());
        let awake = self.look()?
            || (within == BEAT && self.has_news())
            || (self.waits() && !self.alarm.is_set())
            || self.shared.reading.retired.load(Ordering::Acquire);
        if !awake && !left.is_zero() {
            let fds = [(self.device.as_fd(), false), (self.woken.as_fd(), false)];
            let [_, woken] = wait(fds, Some(left)).map_err(|error| RdmaError::Verb {
                what: "wait for completions",
                errno: error.raw_os_error().unwrap_or(0),
            })?;
            if woken.read {
                let mut bytes = [0; 64];
                // It is readable, and how often it was written to says nothing.
                let _ = (&self.woken).read(&mut bytes);
            }
        }
        self.shared.reading.parked.store(false, Ordering::Relaxed);
        Ok(())
    }
}

/// Whether the header of an entry lies where the reader waits for one.
fn peek(state: &ReadingLane, lane: Lane, view: &ReadView, keys: &Keys, geometry: Geometry) -> bool {
    let at = state.consumed.load(Ordering::Acquire);
    let mut bytes = [0; HEADER_LEN];
    view.copy_out(geometry.offset(at), &mut bytes);
    let stamp = keys.unstamp(Header::from_bytes(&bytes).stamp);
    let lap = geometry.lap(at);
    let kind = stamp.kind;
    stamp == Stamp { lane, lap, kind }
}

/// Takes the next entries out and checks them; whether there were some.
fn walk_on(state: &ReadingLane, walk: &mut Option<Box<LaneReader>>) -> bool {
    let Some(reader) = walk else { return false };
    let before = reader.last();
    let mut ended = false;
    for _ in 0..FOUND {
        match reader.next() {
            Ok(Some(_)) => {}
            Ok(None) => break,
            Err(_) => {
                ended = true;
                break;
            }
        }
    }
    let last = reader.last();
    if ended {
        *walk = None;
    }
    if last > before {
        state.received.store(last.0, Ordering::Release);
        state.bell().ring();
    }
    last > before || ended
}
