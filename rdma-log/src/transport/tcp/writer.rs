//! The writer's end of the stream: what gathers, what is sent, and what the reader answers.
//!
//! Ranges are copied into the outbox as they are posted, so pieces go out in the order in which they were posted, whichever
//! lane they belong to and whoever pushes: an entry of the events lane never overtakes the input that it applies. The
//! credits bound the outbox: it holds at most both lanes' bytes and their frames' headers.
//!
//! Answers are taken in by whoever holds the [`Watch`], or by a thread of this connection's own; a lane asked for
//! *committed* looks for itself, too.
#![forbid(unsafe_code)]

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::StreamError;
use super::frame::{ANSWER, Answer, Frame, HEADER, MAX_PIECE};
use super::stall::{ABSENT, Still};
use crate::entry::{Lane, Nonce, Seq};
use crate::futex::{Bell, FutexWord};
use crate::lane::{Counter, WriteError};
use crate::locks::lock;
use crate::poll::wait;
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use crate::transport::writing::take_over;
use crate::transport::{Counters, ProgressPort, Range, WritePort, WriteView};

/// Bytes that gather before they are sent without a push: one system call's worth, so that gathering never costs latency to
/// save calls that are amortised already.
const GATHERED: usize = MAX_PIECE;

/// How old a look for the reader's fence may be that an answer to [`WritePort::fenced`] rests on. Whoever asks wants to know whether
/// this process was frozen and another took over meanwhile, which takes longer; and to look is a system call, for each frame.
const FRESH: Duration = Duration::from_millis(1);

/// Why nothing more commits.
#[derive(Clone, Debug)]
enum End {
    Fenced,
    Stream(StreamError),
    Counter(WriteError),
}

impl End {
    fn for_lane(&self, lane: Lane) -> WriteError {
        match self {
            End::Fenced => WriteError::Fenced,
            End::Stream(StreamError::Closed) => WriteError::Closed,
            End::Stream(error) => WriteError::Transport {
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
    /// Bytes and number of the last posted entry.
    posted: AtomicU64,
    last: AtomicU64,
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

    fn counters(&self, fenced: bool) -> Counters {
        // In the other order than they are taken over, or what was replayed could seem ahead of what was received.
        let replayed = Seq(self.replayed.load(Ordering::Acquire));
        let received = Seq(self.received.load(Ordering::Acquire));
        Counters {
            committed: received,
            received,
            replayed,
            fenced,
        }
    }
}

/// Frames on their way.
#[derive(Debug, Default)]
struct Outbox {
    bytes: Vec<u8>,
    /// The kernel has taken these.
    sent: usize,
    open: Option<Open>,
}

/// The last frame, which may still grow: its header is not written yet.
#[derive(Clone, Copy, Debug)]
struct Open {
    at: usize,
    lane: Lane,
    from: u64,
    seq: Seq,
    crc: u32,
}

impl Outbox {
    fn is_empty(&self) -> bool {
        self.bytes.len() == self.sent
    }

    /// Adds a piece that ends with the whole entry `seq`, or with a part of the one after it.
    fn add(&mut self, nonce: &Nonce, lane: Lane, from: u64, seq: Seq, piece: &[u8]) {
        if let Some(open) = &mut self.open {
            let len = self.bytes.len() - open.at - HEADER;
            let follows = open.lane == lane && open.from + len as u64 == from;
            if follows && len + piece.len() <= MAX_PIECE {
                open.seq = seq;
                open.crc = crate::crc32c_append(open.crc, piece);
                self.bytes.extend_from_slice(piece);
                return;
            }
        }
        self.seal(nonce);
        self.open = Some(Open {
            at: self.bytes.len(),
            lane,
            from,
            seq,
            crc: crate::crc32c(piece),
        });
        self.bytes.extend_from_slice(&[0; HEADER]);
        self.bytes.extend_from_slice(piece);
    }

    /// Writes the header of the last frame: it does not grow any more.
    fn seal(&mut self, nonce: &Nonce) {
        let Some(open) = self.open.take() else { return };
        let header = Frame {
            lane: open.lane,
            from: open.from,
            seq: open.seq,
            len: self.bytes.len() - open.at - HEADER,
            crc: 0,
        };
        self.bytes[open.at..open.at + HEADER].copy_from_slice(&header.to_bytes(nonce, open.crc));
    }

    /// Forgets what was sent, so that the memory stays bounded by what was not.
    fn compact(&mut self) {
        if self.is_empty() {
            self.bytes.clear();
            self.sent = 0;
        } else if self.sent > self.bytes.len() / 2 {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
    }
}

/// Answers on their way in.
#[derive(Debug)]
struct Inbox {
    bytes: [u8; 16 * ANSWER],
    have: usize,
}

#[derive(Debug)]
pub(super) struct Shared {
    stream: TcpStream,
    nonce: Nonce,
    outbox: Mutex<Outbox>,
    inbox: Mutex<Inbox>,
    lanes: [LaneState; 2],
    still: Mutex<Still>,
    end: OnceLock<End>,
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
            // The peer hears of it; if it cannot, it is gone.
            let _ = self.stream.shutdown(Shutdown::Both);
            for lane in &self.lanes {
                lane.bell().ring();
            }
        }
    }

    fn counters(&self) -> [Counters; 2] {
        let fenced = self.fenced();
        self.lanes.each_ref().map(|lane| lane.counters(fenced))
    }

    /// Takes the range over; sends it if enough has gathered.
    fn post(&self, lane: Lane, view: &WriteView, range: Range) -> Result<(), WriteError> {
        self.check(lane)?;
        let state = self.lane(lane);
        // Before it can be sent, so that no true answer exceeds them.
        state.posted.store(range.to, Ordering::Release);
        state.last.store(range.seq.0, Ordering::Release);
        let size = view.len() as u64;
        let mut outbox = lock(&self.outbox);
        if range.to - range.from > MAX_PIECE as u64 || gathered(&outbox, range) > MAX_PIECE {
            // No frame holds a whole entry and a part of another: its number would not say where that ends.
            outbox.seal(&self.nonce);
        }
        let mut from = range.from;
        while from < range.to {
            let offset = from % size;
            let len = (range.to - from).min(size - offset).min(MAX_PIECE as u64);
            let done = from + len == range.to;
            let seq = Seq(range.seq.0 - u64::from(!done));
            let piece = view.bytes(offset as usize, len as usize);
            outbox.add(&self.nonce, lane, from, seq, piece);
            from += len;
        }
        if outbox.bytes.len() - outbox.sent >= GATHERED {
            self.send(&mut outbox);
        }
        Ok(())
    }

    /// Sends what gathered, as far as the kernel takes it.
    fn flush(&self) {
        self.send(&mut lock(&self.outbox));
    }

    fn send(&self, outbox: &mut Outbox) {
        outbox.seal(&self.nonce);
        while !outbox.is_empty() && self.end.get().is_none() {
            match (&self.stream).write(&outbox.bytes[outbox.sent..]) {
                Ok(sent) => outbox.sent += sent,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    // What the reader said last tells a fence from a death.
                    self.take_answers();
                    self.end(End::Stream(error.into()));
                }
            }
        }
        outbox.compact();
    }

    /// Takes in the answers that have come.
    fn take_answers(&self) {
        let mut inbox = lock(&self.inbox);
        let inbox = &mut *inbox;
        while self.end.get().is_none() {
            let room = &mut inbox.bytes[inbox.have..];
            let space = room.len();
            match (&self.stream).read(room) {
                Ok(0) => self.end(End::Stream(StreamError::Closed)),
                Ok(got) => {
                    inbox.have += got;
                    self.take_in(inbox);
                    if got < space {
                        return;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => self.end(End::Stream(error.into())),
            }
        }
    }

    fn take_in(&self, inbox: &mut Inbox) {
        let (answers, rest) = inbox.bytes[..inbox.have].as_chunks::<ANSWER>();
        let left = rest.len();
        for bytes in answers {
            let taken = Answer::from_bytes(bytes, &self.nonce)
                .map_err(End::Stream)
                .and_then(|answer| self.apply(answer).map_err(End::Counter).map(|()| answer));
            match taken {
                Ok(answer) if answer.fenced => return self.end(End::Fenced),
                Ok(_) => {}
                Err(end) => return self.end(end),
            }
        }
        let have = inbox.have;
        inbox.bytes.copy_within(have - left..have, 0);
        inbox.have = left;
        for lane in &self.lanes {
            lane.bell().ring();
        }
    }

    /// Believes an answer only where it goes on from the last one and stays within what was posted.
    fn apply(&self, answer: Answer) -> Result<(), WriteError> {
        for lane in Lane::ALL {
            let (state, found) = (self.lane(lane), answer.lanes[lane.index()]);
            let (posted, last) = (
                state.posted.load(Ordering::Acquire),
                state.last.load(Ordering::Acquire),
            );
            let said = [
                (Counter::Consumed, &state.consumed, posted, found.consumed),
                (Counter::Received, &state.received, last, found.received),
                (
                    Counter::Replayed,
                    &state.replayed,
                    found.received,
                    found.replayed,
                ),
            ];
            take_over(lane, said)?;
        }
        Ok(())
    }

    fn look_for_a_stall(&self) {
        let received = |lane: &LaneState| lane.received.load(Ordering::Acquire);
        let under_way = self
            .lanes
            .iter()
            .any(|lane| received(lane) < lane.last.load(Ordering::Acquire));
        let received = self.lanes.each_ref().map(received);
        if lock(&self.still).look(Instant::now(), received, under_way) {
            self.end(End::Stream(StreamError::Stalled));
        }
    }

    fn has_backlog(&self) -> bool {
        !lock(&self.outbox).is_empty()
    }
}

fn gathered(outbox: &Outbox, range: Range) -> usize {
    let open = outbox
        .open
        .map_or(0, |open| outbox.bytes.len() - open.at - HEADER);
    open + (range.to - range.from) as usize
}

/// The connection's writing end; with the last port of it the stream is closed.
#[derive(Debug)]
pub(super) struct Writer {
    shared: Arc<Shared>,
    driver: Option<JoinHandle<()>>,
}

impl Writer {
    /// Takes over a stream whose set-up is done. Without `driven` by a watch it starts a thread that takes in answers.
    pub(super) fn new(stream: TcpStream, nonce: Nonce, driven: bool) -> io::Result<Writer> {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            stream,
            nonce,
            outbox: Mutex::default(),
            inbox: Mutex::new(Inbox {
                bytes: [0; 16 * ANSWER],
                have: 0,
            }),
            lanes: Default::default(),
            still: Mutex::new(Still::new(Instant::now())),
            end: OnceLock::new(),
        });
        let mut writer = Writer {
            shared: shared.clone(),
            driver: None,
        };
        if !driven {
            let drive = move || drive(&Watch { shared });
            let thread = std::thread::Builder::new().name("tcp-log".into());
            writer.driver = Some(thread.spawn(drive)?);
        }
        Ok(writer)
    }

    pub(super) fn watch(&self) -> Watch {
        Watch {
            shared: self.shared.clone(),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.flush();
        self.shared.end(End::Stream(StreamError::Closed));
        if let Some(driver) = self.driver.take() {
            // It ends with the stream, and a panic of its has nobody left to tell.
            let _ = driver.join();
        }
    }
}

fn drive(watch: &Watch) {
    while watch.shared.end.get().is_none() {
        let socket = (watch.as_fd(), watch.wants_write());
        // A stream that is held up has nothing to wake for, so somebody has to look.
        if let Err(error) = wait([socket], Some(ABSENT / 2)) {
            watch.shared.end(End::Stream(error.into()));
        }
        // What is wrong, the lanes say.
        let _ = watch.turn();
    }
}

/// The socket of a connection's writer, for a thread that waits for other things as well.
///
/// Whenever the descriptor is ready, and now and then besides, the holder calls [`turn`](Watch::turn): only by that do
/// credits and commits come in while no lane asks for them. Clones are the same.
#[derive(Clone, Debug)]
pub struct Watch {
    shared: Arc<Shared>,
}

impl Watch {
    /// Takes in the reader's answers and sends what gathered or found no room before, without waiting.
    ///
    /// # Errors
    /// When the connection is of no more use; [`committed`](Watch::committed) still says what had committed.
    pub fn turn(&self) -> Result<(), WriteError> {
        self.shared.take_answers();
        self.shared.flush();
        self.shared.look_for_a_stall();
        self.shared.check(Lane::Events)
    }

    /// Whether there is something to send that the kernel did not take: wait for room in the socket as well.
    pub fn wants_write(&self) -> bool {
        self.shared.has_backlog()
    }

    /// How far both lanes got, by the last answer that was taken in. Every number was checked.
    pub fn counters(&self) -> [Counters; 2] {
        self.shared.counters()
    }

    /// The highest entry of either lane that has committed, by the last answer that was taken in.
    pub fn committed(&self) -> [Seq; 2] {
        self.counters().map(|counters| counters.committed)
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.stream.as_fd()
    }
}

/// One lane's end of the connection.
#[derive(Debug)]
pub(super) struct TcpWriter {
    lane: Lane,
    writer: Arc<Writer>,
    /// When this lane last took in answers to see whether it is fenced.
    looked: Option<Instant>,
}

impl TcpWriter {
    pub(super) fn new(lane: Lane, writer: Arc<Writer>) -> TcpWriter {
        TcpWriter {
            lane,
            writer,
            looked: None,
        }
    }

    fn shared(&self) -> &Shared {
        &self.writer.shared
    }

    fn state(&self) -> &LaneState {
        self.shared().lane(self.lane)
    }
}

impl WritePort for TcpWriter {
    fn post(&mut self, view: &WriteView, range: Range) -> Result<(), WriteError> {
        self.shared().post(self.lane, view, range)
    }

    fn push(&mut self, _: &WriteView) -> Result<(), WriteError> {
        self.shared().flush();
        self.shared().check(self.lane)
    }

    fn consumed(&mut self) -> Result<u64, WriteError> {
        self.shared().check(self.lane)?;
        Ok(self.state().consumed.load(Ordering::Acquire))
    }

    fn committed(&mut self) -> Result<Seq, WriteError> {
        self.shared().take_answers();
        let committed = Seq(self.state().received.load(Ordering::Acquire));
        if committed.0 < self.state().last.load(Ordering::Relaxed) {
            self.shared().check(self.lane)?;
        }
        Ok(committed)
    }

    fn fenced(&mut self) -> bool {
        let now = Instant::now();
        if self.looked.is_none_or(|looked| now - looked > FRESH) {
            // From before the look: it may be frozen in the middle of it.
            self.looked = Some(now);
            self.shared().take_answers();
        }
        self.shared().fenced()
    }

    fn arm(&mut self) -> u32 {
        let armed = self.state().bell().arm();
        // Room comes only from what the reader has got.
        self.shared().flush();
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
pub(super) struct TcpProgress(pub(super) Arc<Writer>);

impl ProgressPort for TcpProgress {
    fn poll(&mut self) -> Result<[Counters; 2], WriteError> {
        let shared = &self.0.shared;
        if !shared.fenced() {
            shared.check(Lane::Events)?;
        }
        Ok(shared.counters())
    }
}
