//! The reader's end of the stream: a thread that lands what comes, and answers.
//!
//! The thread is the only one that writes to the ring's memory and the only one that writes to the socket. It lands a frame
//! beyond the tail, where no reader looks, and then moves the tail; so *received* needs no reader to be awake, and the
//! time to commit does not depend on what the replaying thread does. What comes in the events lane is answered at once;
//! credits, what was replayed, and inputs that nothing waits for yet go with the next answer, at the latest
//! [`ANSWER_WITHIN`] later: the writer is not woken for each of them.
#![forbid(unsafe_code)]

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::StreamError;
use super::frame::{ANSWER, Answer, Frame, HEADER, LaneAnswer, MAX_PIECE, Part, bad};
use crate::entry::{LINE, Lane, Nonce, Seq};
use crate::fence::{FenceError, Fenced};
use crate::futex::{Bell, FutexWord};
use crate::lane::ReadError;
use crate::poll::wait;
use crate::region::ReadView;
use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};
use crate::transport::{AckPort, FenceKey, FencePort, Limit, ReadPort, WriteView};

/// How long an answer that nothing waits for may gather. Short against the lag that a writer allows its reader, long
/// against the cost of an answer; a lane is seldom so full that a writer waits for it.
const ANSWER_WITHIN: Duration = Duration::from_millis(1);

/// Bytes read at once.
const READ_AT_ONCE: usize = 2 * (HEADER + MAX_PIECE);

/// One lane's numbers.
#[derive(Debug, Default)]
struct LaneState {
    /// Bytes of whole entries that have landed.
    tail: AtomicU64,
    /// Number of the last of them.
    received: AtomicU64,
    /// Bytes that the reader has copied out.
    consumed: AtomicU64,
    /// The last entry that it says it replayed.
    replayed: AtomicU64,
    /// `consumed` in the last answer.
    credited: AtomicU64,
    /// Where a reader sleeps that waits for entries.
    waiting: AtomicU32,
    data: FutexWord,
}

impl LaneState {
    fn bell(&self) -> Bell<'_> {
        Bell {
            waiting: &self.waiting,
            word: &self.data,
        }
    }
}

/// What the landing thread and the reader's handles share.
#[derive(Debug)]
pub(super) struct Landing {
    nonce: Nonce,
    sizes: [u64; 2],
    lanes: [LaneState; 2],
    /// The landing thread is to end.
    retired: AtomicBool,
    fenced: AtomicBool,
    /// The landing thread waits without a time limit.
    parked: AtomicBool,
    /// Ends its wait.
    wake: UnixStream,
    broken: OnceLock<StreamError>,
}

impl Landing {
    fn lane(&self, lane: Lane) -> &LaneState {
        &self.lanes[lane.index()]
    }

    fn wake(&self) {
        // It fails only when it is readable already, or nobody waits any more.
        let _ = (&self.wake).write(&[0]);
    }

    /// Sees to it that what changed is answered, if the landing thread does not know that it may have.
    fn answer_soon(&self) {
        // Pairs with the one before the thread parks: either it sees the change, or this sees that it parks.
        fence(Ordering::SeqCst);
        let starved = |(lane, size): (&LaneState, &u64)| {
            let consumed = lane.consumed.load(Ordering::Relaxed);
            consumed.saturating_sub(lane.credited.load(Ordering::Relaxed)) >= size / 2
        };
        if self.parked.load(Ordering::Relaxed) && self.parked.swap(false, Ordering::Relaxed)
            || self.lanes.iter().zip(&self.sizes).any(starved)
        {
            self.wake();
        }
    }

    fn answer(&self) -> Answer {
        Answer {
            fenced: false,
            lanes: self.lanes.each_ref().map(|lane| {
                let received = lane.received.load(Ordering::Relaxed);
                LaneAnswer {
                    consumed: lane.consumed.load(Ordering::Acquire),
                    received,
                    replayed: lane.replayed.load(Ordering::Acquire).min(received),
                }
            }),
        }
    }

    /// Whether the reader has still to take out, or to replay, what has landed.
    fn is_behind(&self) -> bool {
        let answer = self.answer();
        self.lanes.iter().zip(answer.lanes).any(|(lane, said)| {
            let replays = said.replayed > 0;
            said.consumed < lane.tail.load(Ordering::Relaxed)
                || (replays && said.replayed < said.received)
        })
    }
}

/// The state of a connection's reading end.
#[derive(Clone, Debug)]
pub struct Link(Arc<Landing>);

impl Link {
    pub(super) fn of(landing: &Arc<Landing>) -> Link {
        Link(landing.clone())
    }

    /// Why nothing more comes, if that is so: the peer is gone, or sent what cannot be. What had landed stays to be read.
    pub fn broken(&self) -> Option<StreamError> {
        self.0.broken.get().cloned()
    }
}

/// The thread that lands.
struct Receiver {
    landing: Arc<Landing>,
    stream: TcpStream,
    wake: UnixStream,
    views: [WriteView; 2],
    /// Where the next piece of each lane starts.
    landed: [u64; 2],
    buffer: Vec<u8>,
    have: usize,
    /// The last answer, and when it was made.
    said: Answer,
    said_at: Instant,
    /// The rest of it that the kernel did not take.
    unsent: Vec<u8>,
    /// How long to look for more after something came, before sleeping.
    spin: Duration,
}

/// Starts landing what comes from the stream.
pub(super) fn start(
    stream: TcpStream,
    nonce: Nonce,
    views: [WriteView; 2],
    spin: Duration,
    at_start: impl FnOnce() + Send + 'static,
) -> io::Result<(Arc<Landing>, TcpFence)> {
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    let (wake, woken) = UnixStream::pair()?;
    wake.set_nonblocking(true)?;
    woken.set_nonblocking(true)?;
    let landing = Arc::new(Landing {
        nonce,
        sizes: views.each_ref().map(|view| view.len() as u64),
        lanes: Default::default(),
        retired: AtomicBool::new(false),
        fenced: AtomicBool::new(false),
        parked: AtomicBool::new(false),
        wake,
        broken: OnceLock::new(),
    });
    let receiver = Receiver {
        landing: landing.clone(),
        stream,
        wake: woken,
        views,
        landed: [0; 2],
        buffer: vec![0; READ_AT_ONCE],
        have: 0,
        said: Answer::default(),
        said_at: Instant::now(),
        unsent: Vec::with_capacity(ANSWER),
        spin,
    };
    let thread = std::thread::Builder::new().name("tcp-landing".into());
    let thread = thread.spawn(move || {
        at_start();
        receiver.run();
    })?;
    let fence = TcpFence {
        landing: landing.clone(),
        thread: Some(thread),
    };
    Ok((landing, fence))
}

impl Receiver {
    fn run(mut self) {
        let ended = self.land();
        if let Err(error) = ended {
            let _ = self.landing.broken.set(error);
        }
        // What landed at last is said as well, with the fence if it is one. If it does not get through, it did not commit.
        let fenced = self.landing.retired.load(Ordering::Acquire);
        let mut answer = self.landing.answer();
        answer.fenced = fenced;
        self.unsent
            .extend_from_slice(&answer.to_bytes(&self.landing.nonce));
        let _ = (&self.stream).write(&self.unsent);
        let _ = self.stream.shutdown(Shutdown::Both);
        for lane in &self.landing.lanes {
            lane.bell().ring();
        }
    }

    /// Lands what comes, until the connection is retired or of no more use.
    fn land(&mut self) -> Result<(), StreamError> {
        let mut came = Instant::now();
        loop {
            if self.landing.retired.load(Ordering::Acquire) {
                return self.land_the_rest();
            }
            if self.take()? > 0 {
                came = Instant::now();
            } else if came.elapsed() < self.spin {
                std::hint::spin_loop();
            } else {
                self.rest()?;
            }
            self.answer_if_due()?;
        }
    }

    /// What has come already was posted before the fence. It was not acknowledged, so taking it is a kindness, and bounded:
    /// a writer in its right mind cannot have more than its lanes under way.
    fn land_the_rest(&mut self) -> Result<(), StreamError> {
        let mut left = self.landing.sizes.iter().sum::<u64>() * 2;
        while left > 0 {
            let got = self.take()? as u64;
            if got == 0 {
                break;
            }
            left = left.saturating_sub(got);
        }
        Ok(())
    }

    /// Sleeps until something comes or is to be answered.
    fn rest(&mut self) -> Result<(), StreamError> {
        let landing = &self.landing;
        let mut limit = None;
        let full = !self.unsent.is_empty();
        if full {
            // The socket tells when there is room for more.
        } else if landing.answer() != self.said || landing.is_behind() {
            let due = self.said_at + ANSWER_WITHIN;
            let left = due.saturating_duration_since(Instant::now());
            // With nothing new to say when the time is over, whoever has something says so.
            if !left.is_zero() {
                limit = Some(left);
            }
        }
        if limit.is_none() && !full {
            landing.parked.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if landing.answer() != self.said || landing.retired.load(Ordering::Relaxed) {
                landing.parked.store(false, Ordering::Relaxed);
                return Ok(());
            }
        }
        let socket = (self.stream.as_fd(), full);
        let [_, woken] = wait([socket, (self.wake.as_fd(), false)], limit)?;
        landing.parked.store(false, Ordering::Relaxed);
        if woken.read {
            let mut bytes = [0; 64];
            // It is readable, and how often it was written to says nothing.
            let _ = (&self.wake).read(&mut bytes);
        }
        Ok(())
    }

    fn answer_if_due(&mut self) -> Result<(), StreamError> {
        if !self.unsent.is_empty() {
            return self.send();
        }
        let now = self.landing.answer();
        if now == self.said {
            return Ok(());
        }
        let events = Lane::Events.index();
        let starved = Lane::ALL.into_iter().any(|lane| {
            let i = lane.index();
            now.lanes[i].consumed - self.said.lanes[i].consumed >= self.landing.sizes[i] / 2
        });
        if now.lanes[events].received != self.said.lanes[events].received
            || starved
            || self.said_at.elapsed() >= ANSWER_WITHIN
        {
            self.say(now)?;
        }
        Ok(())
    }

    fn say(&mut self, answer: Answer) -> Result<(), StreamError> {
        self.unsent
            .extend_from_slice(&answer.to_bytes(&self.landing.nonce));
        self.said = answer;
        self.said_at = Instant::now();
        for (lane, said) in self.landing.lanes.iter().zip(answer.lanes) {
            lane.credited.store(said.consumed, Ordering::Relaxed);
        }
        self.send()
    }

    fn send(&mut self) -> Result<(), StreamError> {
        while !self.unsent.is_empty() {
            match (&self.stream).write(&self.unsent) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Whatever came before is still to be landed; the next read says that it is over.
                Err(_) => {
                    self.unsent.clear();
                    break;
                }
            }
        }
        Ok(())
    }

    /// Reads once and lands what is whole; how many bytes came.
    fn take(&mut self) -> Result<usize, StreamError> {
        let got = match self.stream.read(&mut self.buffer[self.have..]) {
            Ok(0) => return Err(StreamError::Closed),
            Ok(got) => got,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(0),
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(0),
            Err(error) => return Err(error.into()),
        };
        self.have += got;
        let mut at = 0;
        let landed = loop {
            match self.land_one(at) {
                Ok(Some(len)) => at += len,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        self.buffer.copy_within(at..self.have, 0);
        self.have -= at;
        if at > 0 {
            // The commit first: outputs wait for it. Then whoever replays.
            self.answer_if_due()?;
            for lane in &self.landing.lanes {
                lane.bell().ring();
            }
        }
        landed.map(|()| got)
    }

    /// Lands the frame that starts there in the buffer; its length, or `None` if it is not whole yet.
    fn land_one(&mut self, at: usize) -> Result<Option<usize>, StreamError> {
        let Some((header, rest)) = self.buffer[at..self.have].split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let frame = Frame::from_bytes(header, &self.landing.nonce)?;
        let Some(piece) = rest.get(..frame.len) else {
            return Ok(None);
        };
        frame.check(header, piece)?;
        let lane = self.landing.lane(frame.lane);
        let (index, size) = (frame.lane.index(), self.landing.sizes[frame.lane.index()]);
        let from = self.landed[index];
        if frame.from != from {
            return Err(bad(Part::Position, from, frame.from));
        }
        let end = from + frame.len as u64;
        // Acquire: the reader's loads of what is overwritten are over.
        let most = lane.consumed.load(Ordering::Acquire) + size;
        if end > most {
            return Err(bad(Part::Credit, most, end));
        }
        let last = lane.received.load(Ordering::Relaxed);
        let fit = (end - lane.tail.load(Ordering::Relaxed)) / LINE as u64;
        let new = frame.seq.0.checked_sub(last);
        let Some(new) = new.filter(|new| *new <= fit) else {
            return Err(bad(Part::Sequence, last + fit, frame.seq.0));
        };
        let offset = (from % size) as usize;
        let (first, second) = piece.split_at(piece.len().min(size as usize - offset));
        for (at, piece) in [(offset, first), (0, second)] {
            self.views[index]
                .bytes_mut(at, piece.len())
                .copy_from_slice(piece);
        }
        self.landed[index] = end;
        if new > 0 {
            lane.received.store(frame.seq.0, Ordering::Relaxed);
            // Release: whoever sees the tail sees the bytes.
            lane.tail.store(end, Ordering::Release);
        }
        Ok(Some(HEADER + frame.len))
    }
}

/// One lane, for its reader.
#[derive(Debug)]
pub(super) struct TcpReader {
    pub(super) lane: Lane,
    pub(super) landing: Arc<Landing>,
    pub(super) view: ReadView,
}

impl TcpReader {
    fn state(&self) -> &LaneState {
        self.landing.lane(self.lane)
    }
}

impl ReadPort for TcpReader {
    /// A broken stream is no error here: what has landed is still to be read, and nothing more is in the ring.
    fn limit(&mut self) -> Result<Limit, ReadError> {
        // In this order: a tail that is read after the fence is the last.
        let fenced = self.landing.fenced.load(Ordering::Acquire);
        let at = self.state().tail.load(Ordering::Acquire);
        Ok(Limit::Tail { at, fenced })
    }

    fn copy_out(&self, at: usize, to: &mut [u8]) {
        self.view.copy_out(at, to);
    }

    fn release(&mut self, consumed: u64) {
        // Release: the loads of these bytes are over.
        self.state().consumed.store(consumed, Ordering::Release);
    }

    fn push(&mut self) -> Result<(), ReadError> {
        self.landing.answer_soon();
        Ok(())
    }

    fn arm(&mut self) -> u32 {
        let armed = self.state().bell().arm();
        self.landing.answer_soon();
        armed
    }

    fn sleep(&mut self, armed: u32, limit: Duration) -> bool {
        self.state().bell().sleep(armed, limit)
    }

    fn disarm(&mut self) {
        self.state().bell().disarm();
    }
}

#[derive(Debug)]
pub(super) struct TcpAcks(pub(super) Arc<Landing>);

impl AckPort for TcpAcks {
    /// It was acknowledged when it landed.
    fn received(&self, _: Lane, _: Seq) {}

    fn replayed(&self, lane: Lane, seq: Seq) {
        self.0
            .lane(lane)
            .replayed
            .fetch_max(seq.0, Ordering::AcqRel);
    }
}

/// Ends the landing thread; when that is done nothing lands any more. Dropped, it does so as well.
#[derive(Debug)]
pub(super) struct TcpFence {
    landing: Arc<Landing>,
    thread: Option<JoinHandle<()>>,
}

impl TcpFence {
    fn retire(&mut self) -> std::thread::Result<()> {
        self.landing.retired.store(true, Ordering::SeqCst);
        self.landing.wake();
        self.thread.take().map_or(Ok(()), JoinHandle::join)
    }
}

impl FencePort for TcpFence {
    fn fence(&mut self) -> Result<Fenced, FenceError> {
        // A thread that panicked lands as little as one that ended.
        let _ = self.retire();
        self.landing.fenced.store(true, Ordering::Release);
        for lane in &self.landing.lanes {
            lane.data.bump();
        }
        let ends = Lane::ALL.map(|lane| Some(self.landing.lane(lane).tail.load(Ordering::Acquire)));
        Ok(Fenced::attest(FenceKey(()), self.landing.nonce, ends))
    }
}

impl Drop for TcpFence {
    fn drop(&mut self) {
        let _ = self.retire();
    }
}
