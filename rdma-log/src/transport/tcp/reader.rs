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
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::StreamError;
use super::frame::{ANSWER, Answer, Frame, HEADER, LaneAnswer, MAX_PIECE, Part, bad};
use crate::entry::{LINE, Lane, Nonce, Seq};
use crate::fence::{FenceError, Fenced};
use crate::poll::wait;
use crate::sync::{AtomicU64, Ordering, fence};
use crate::transport::reading::{End, LanePort, Reading};
use crate::transport::{AckPort, FenceKey, FencePort, Limit, WriteView};

/// How long an answer that nothing waits for may gather. Short against the lag that a writer allows its reader, long
/// against the cost of an answer; a lane is seldom so full that a writer waits for it.
const ANSWER_WITHIN: Duration = Duration::from_millis(1);

/// Bytes read at once.
const READ_AT_ONCE: usize = 2 * (HEADER + MAX_PIECE);

/// What the landing thread and the reader's handles share.
#[derive(Debug)]
pub(super) struct Landing {
    reading: Reading,
    /// Bytes of whole entries that have landed, of each lane. The number of the last of them is what was received.
    tails: [AtomicU64; 2],
    broken: OnceLock<StreamError>,
}

impl Landing {
    fn tail(&self, lane: Lane) -> &AtomicU64 {
        &self.tails[lane.index()]
    }

    fn answer(&self) -> Answer {
        Answer {
            fenced: false,
            lanes: self.reading.lanes.each_ref().map(|lane| {
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
        self.tails.iter().zip(answer.lanes).any(|(tail, said)| {
            let replays = said.replayed > 0;
            said.consumed < tail.load(Ordering::Relaxed)
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
    let sizes = views.each_ref().map(|view| view.len() as u64);
    let (reading, woken) = Reading::new(nonce, sizes)?;
    let landing = Arc::new(Landing {
        reading,
        tails: Default::default(),
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
        let fenced = self.landing.reading.retired.load(Ordering::Acquire);
        let mut answer = self.landing.answer();
        answer.fenced = fenced;
        self.unsent
            .extend_from_slice(&answer.to_bytes(&self.landing.reading.nonce));
        let _ = (&self.stream).write(&self.unsent);
        let _ = self.stream.shutdown(Shutdown::Both);
        self.landing.reading.ring_all();
    }

    /// Lands what comes, until the connection is retired or of no more use.
    fn land(&mut self) -> Result<(), StreamError> {
        let mut came = Instant::now();
        loop {
            if self.landing.reading.retired.load(Ordering::Acquire) {
                return self.land_the_rest();
            }
            let room = self.buffer.len() - self.have;
            let got = self.take()?;
            if got > 0 {
                came = Instant::now();
            }
            // What filled less than the room was all: to ask for more would be a system call for nothing, and the wait tells.
            let all = got < room;
            if all && came.elapsed() < self.spin {
                std::hint::spin_loop();
            } else if all {
                self.rest()?;
            }
            self.answer_if_due()?;
        }
    }

    /// What has come already was posted before the fence. It was not acknowledged, so taking it is a kindness, and bounded:
    /// a writer in its right mind cannot have more than its lanes under way.
    fn land_the_rest(&mut self) -> Result<(), StreamError> {
        let mut left = self.landing.reading.sizes.iter().sum::<u64>() * 2;
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
            landing.reading.parked.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if landing.answer() != self.said || landing.reading.retired.load(Ordering::Relaxed) {
                landing.reading.parked.store(false, Ordering::Relaxed);
                return Ok(());
            }
        }
        let socket = (self.stream.as_fd(), full);
        let [_, woken] = wait([socket, (self.wake.as_fd(), false)], limit)?;
        landing.reading.parked.store(false, Ordering::Relaxed);
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
            now.lanes[i].consumed - self.said.lanes[i].consumed >= self.landing.reading.sizes[i] / 2
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
            .extend_from_slice(&answer.to_bytes(&self.landing.reading.nonce));
        self.said = answer;
        self.said_at = Instant::now();
        for (lane, said) in self.landing.reading.lanes.iter().zip(answer.lanes) {
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
            self.landing.reading.ring_all();
        }
        landed.map(|()| got)
    }

    /// Lands the frame that starts there in the buffer; its length, or `None` if it is not whole yet.
    fn land_one(&mut self, at: usize) -> Result<Option<usize>, StreamError> {
        let Some((header, rest)) = self.buffer[at..self.have].split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let frame = Frame::from_bytes(header, &self.landing.reading.nonce)?;
        let Some(piece) = rest.get(..frame.len) else {
            return Ok(None);
        };
        frame.check(header, piece)?;
        let lane = self.landing.reading.lane(frame.lane);
        let tail = self.landing.tail(frame.lane);
        let (index, size) = (
            frame.lane.index(),
            self.landing.reading.sizes[frame.lane.index()],
        );
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
        let fit = (end - tail.load(Ordering::Relaxed)) / LINE as u64;
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
            tail.store(end, Ordering::Release);
        }
        Ok(Some(HEADER + frame.len))
    }
}

/// One lane, for its reader.
pub(super) type TcpReader = LanePort<Landing>;

impl End for Landing {
    fn reading(&self) -> &Reading {
        &self.reading
    }

    fn limit(&self, lane: Lane) -> Limit {
        // In this order: a tail that is read after the fence is the last.
        let fenced = self.reading.fenced.load(Ordering::Acquire);
        let at = self.tail(lane).load(Ordering::Acquire);
        Limit::Tail { at, fenced }
    }
}

#[derive(Debug)]
pub(super) struct TcpAcks(pub(super) Arc<Landing>);

impl AckPort for TcpAcks {
    /// It was acknowledged when it landed.
    fn received(&self, _: Lane, _: Seq) {}

    fn replayed(&self, lane: Lane, seq: Seq) {
        let state = self.0.reading.lane(lane);
        state.replayed.fetch_max(seq.0, Ordering::AcqRel);
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
        self.landing.reading.retire();
        self.thread.take().map_or(Ok(()), JoinHandle::join)
    }
}

impl FencePort for TcpFence {
    fn fence(&mut self) -> Result<Fenced, FenceError> {
        // A thread that panicked lands as little as one that ended.
        let _ = self.retire();
        self.landing.reading.end();
        let ends = Lane::ALL.map(|lane| Some(self.landing.tail(lane).load(Ordering::Acquire)));
        Ok(Fenced::attest(
            FenceKey(()),
            self.landing.reading.nonce,
            ends,
        ))
    }
}

impl Drop for TcpFence {
    fn drop(&mut self) {
        let _ = self.retire();
    }
}
