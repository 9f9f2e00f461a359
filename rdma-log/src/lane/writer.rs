//! The writing half of a lane.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::entry::{HEADER_LEN, Head, Header, Keys, Kind, LINE, Lane, Marks, Seq, Stamp};
use crate::lane::Geometry;
use crate::sync::{AtomicU64, Ordering};
use crate::transport::{OpenSlot, Range, WritePort, WriteView};

/// A counter that the reader returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Bytes taken out of the ring.
    Consumed,
    /// The highest entry received.
    Received,
    /// The highest entry replayed.
    Replayed,
    /// The highest entry committed, as the transport counts.
    Committed,
}

impl fmt::Display for Counter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Counter::Consumed => "consumed bytes",
            Counter::Received => "received",
            Counter::Replayed => "replayed",
            Counter::Committed => "committed",
        })
    }
}

/// Why an entry was not written.
///
/// After [`Full`](WriteError::Full), [`TooLarge`](WriteError::TooLarge) and [`Marks`](WriteError::Marks) the lane goes
/// on; any other error is final, and every later call gives it again.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WriteError {
    /// The reader has not taken out enough. Wait ([`LaneWriter::wait_for_room`]), or slow down.
    #[error(
        "the {lane} lane is full: {needed} bytes needed, {room} free; wait until the reader has caught up"
    )]
    Full {
        /// The lane.
        lane: Lane,
        /// Bytes of ring needed.
        needed: u64,
        /// Bytes of ring free.
        room: u64,
    },
    /// The payload does not fit into one entry of this lane, or not into its slot. Cut it up, or enlarge the lane.
    #[error("a payload of {len} bytes is too large for the {lane} lane or slot, which takes {max}")]
    TooLarge {
        /// The lane.
        lane: Lane,
        /// Bytes asked for.
        len: usize,
        /// Bytes that fit.
        max: usize,
    },
    /// The committed watermark is not below the entry's own number, so it belongs to another connection.
    #[error("entry {seq} cannot say that {committed} has committed; marks of another connection?")]
    Marks {
        /// The entry's number.
        seq: Seq,
        /// The mark that was to go with it.
        committed: Seq,
    },
    /// The reader fenced the lane: nothing more commits. Freeze and ask the arbiter.
    #[error(
        "fenced: the backup has cut this connection, nothing more commits; ask the arbiter who lives"
    )]
    Fenced,
    /// The connection is gone.
    #[error("the connection to the reader is closed")]
    Closed,
    /// A counter went back, or passed what was posted: the peer is broken or hostile.
    #[error(
        "the reader's counter \"{counter}\" of the {lane} lane is {found}, it must lie from {least} to {most}; \
         drop this connection"
    )]
    Counter {
        /// The lane.
        lane: Lane,
        /// Which one.
        counter: Counter,
        /// The value before.
        least: u64,
        /// What was posted.
        most: u64,
        /// The value now.
        found: u64,
    },
    /// The tail word is not what this writer, its only one, last put there.
    #[error(
        "the tail of the {lane} lane is {found:#x}, expected {expected:#x}; drop this connection"
    )]
    Tail {
        /// The lane.
        lane: Lane,
        /// The value that was put there last.
        expected: u64,
        /// The value found.
        found: u64,
    },
    /// The transport failed.
    #[error("the transport of the {lane} lane failed: {reason}")]
    Transport {
        /// The lane.
        lane: Lane,
        /// What it said.
        reason: String,
    },
}

impl WriteError {
    fn is_final(&self) -> bool {
        !matches!(
            self,
            WriteError::Full { .. } | WriteError::TooLarge { .. } | WriteError::Marks { .. }
        )
    }
}

/// What a transport puts together for the writer of a lane.
pub(crate) struct WriterParts {
    pub(crate) lane: Lane,
    pub(crate) keys: Keys,
    pub(crate) geometry: Geometry,
    pub(crate) view: WriteView,
    pub(crate) port: Box<dyn WritePort>,
    /// Shared with [`Progress`](crate::Progress): the highest number that may have been posted.
    pub(crate) posted: Arc<AtomicU64>,
}

/// The writing half of a lane. One thread at a time; the two lanes' writers are independent.
#[derive(Debug)]
pub struct LaneWriter {
    lane: Lane,
    keys: Keys,
    geometry: Geometry,
    view: WriteView,
    port: Box<dyn WritePort>,
    posted: Arc<AtomicU64>,
    cursor: u64,
    seq: Seq,
    consumed: u64,
    /// The lap of the last entry, and the stamp of its entries.
    lap: (u32, u32),
    broken: Option<WriteError>,
}

/// Where an entry goes.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Bytes of padding before it; 0 or a multiple of a line.
    pad: u64,
    /// Where it starts.
    at: u64,
}

impl LaneWriter {
    pub(crate) fn new(parts: WriterParts) -> LaneWriter {
        assert_eq!(parts.view.len() as u64, parts.geometry.size());
        let (lane, lap, kind) = (parts.lane, 0, Kind::Entry);
        LaneWriter {
            lane,
            lap: (lap, parts.keys.stamp(Stamp { lane, lap, kind })),
            keys: parts.keys,
            geometry: parts.geometry,
            view: parts.view,
            port: parts.port,
            posted: parts.posted,
            cursor: 0,
            seq: Seq::ZERO,
            consumed: 0,
            broken: None,
        }
    }

    /// The lane.
    pub fn lane(&self) -> Lane {
        self.lane
    }

    /// The longest payload that an entry can have, in bytes: a quarter of the lane less a header.
    pub fn max_payload(&self) -> usize {
        self.geometry.max_payload()
    }

    /// The number of the last entry that was published.
    pub fn last(&self) -> Seq {
        self.seq
    }

    /// Reserves the next entry with room for `max_payload` bytes, to be filled in place.
    ///
    /// # Errors
    /// [`WriteError::Full`], [`WriteError::TooLarge`], [`WriteError::Fenced`] where the transport knows already, or
    /// a final error.
    pub fn reserve(&mut self, max_payload: usize) -> Result<Slot<'_>, WriteError> {
        let place = self.place(max_payload)?;
        Ok(Slot {
            writer: self,
            place,
            max: max_payload,
            open: false,
        })
    }

    /// Like [`reserve`](LaneWriter::reserve), for bytes that would be lost with this process: a frame that the
    /// kernel hands over while the slot is being filled.
    ///
    /// The first `head` bytes of the payload area are zeroed, and the slot noted where the reader finds it
    /// ([`LaneReader::salvage`](crate::LaneReader::salvage)) if this process dies before the slot was published or
    /// dropped. Those bytes must tell whether anything was put there, and how much: behind them lies what an earlier lap left, and
    /// to zero it would be to wait for its lines from the reader's processor.
    ///
    /// # Errors
    /// As for [`reserve`](LaneWriter::reserve).
    pub fn reserve_for_salvage(
        &mut self,
        max_payload: usize,
        head: usize,
    ) -> Result<Slot<'_>, WriteError> {
        let mut slot = self.reserve(max_payload)?;
        slot.payload()[..head.min(max_payload)].fill(0);
        let note = OpenSlot {
            at: slot.place.at,
            len: max_payload as u64,
        };
        slot.writer.port.mark_open(Some(note));
        slot.open = true;
        Ok(slot)
    }

    /// Publishes an entry with this payload.
    ///
    /// # Errors
    /// As for [`reserve`](LaneWriter::reserve) and [`Slot::publish`].
    pub fn append(&mut self, payload: &[u8], marks: Marks) -> Result<Seq, WriteError> {
        self.append_gather(&[payload], marks)
    }

    /// Publishes an entry whose payload is these pieces, one after the other.
    ///
    /// # Errors
    /// As for [`reserve`](LaneWriter::reserve) and [`Slot::publish`].
    pub fn append_gather(&mut self, pieces: &[&[u8]], marks: Marks) -> Result<Seq, WriteError> {
        // The reader polls this line, so to get it takes as long as all that is to be done before it is stored to.
        self.view.claim(self.geometry.offset(self.cursor));
        let len = pieces.iter().map(|piece| piece.len()).sum();
        let place = self.place(len)?;
        self.check_marks(marks)?;
        let payload = self.geometry.offset(place.at) + HEADER_LEN;
        let mut to = payload;
        for piece in pieces {
            self.view.bytes_mut(to, piece.len()).copy_from_slice(piece);
            to += piece.len();
        }
        let head = self.head(place, marks);
        let stamp = self.stamp(head.lap);
        let header = self.keys.seal_stamped(&head, stamp, pieces);
        self.post(place, header)
    }

    /// Sends at once what a transport gathered, and wakes a reader that sleeps. With `shm` a publish is committed
    /// without it; it makes a system call only if the reader sleeps.
    ///
    /// # Errors
    /// A final error.
    pub fn notify(&mut self) -> Result<(), WriteError> {
        let pushed = self.port.push(&self.view);
        self.remember(pushed)
    }

    /// The highest entry that has committed. With `shm`, the last published.
    ///
    /// # Errors
    /// A final error of the connection.
    pub fn committed(&mut self) -> Result<Seq, WriteError> {
        self.port.committed()
    }

    /// Waits until an entry with `max_payload` bytes fits. False if the time ran out, or early, for instance when a
    /// signal came.
    ///
    /// # Errors
    /// [`WriteError::TooLarge`], or a final error.
    pub fn wait_for_room(
        &mut self,
        max_payload: usize,
        limit: Duration,
    ) -> Result<bool, WriteError> {
        if self.has_room(max_payload)? {
            return Ok(true);
        }
        let armed = self.port.arm();
        match self.has_room(max_payload) {
            Ok(false) => {
                self.port.sleep(armed, limit);
                self.has_room(max_payload)
            }
            ready => {
                self.port.disarm();
                ready
            }
        }
    }

    fn has_room(&mut self, max_payload: usize) -> Result<bool, WriteError> {
        if self.port.fenced() {
            return self.remember(Err(WriteError::Fenced));
        }
        match self.place(max_payload) {
            Ok(_) => Ok(true),
            Err(WriteError::Full { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Finds the place for an entry, if there is credit for it.
    #[inline(always)]
    fn place(&mut self, max_payload: usize) -> Result<Place, WriteError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        if max_payload > self.max_payload() {
            return Err(WriteError::TooLarge {
                lane: self.lane,
                len: max_payload,
                max: self.max_payload(),
            });
        }
        let pad = self.geometry.pad(self.cursor, max_payload);
        let needed = pad + Geometry::span(max_payload);
        if self.room() < needed {
            let credit = self.take_credit();
            self.remember(credit)?;
        }
        let room = self.room();
        if room < needed {
            let lane = self.lane;
            return Err(WriteError::Full { lane, needed, room });
        }
        Ok(Place {
            pad,
            at: self.cursor + pad,
        })
    }

    fn room(&self) -> u64 {
        self.consumed + self.geometry.size() - self.cursor
    }

    #[cold]
    fn take_credit(&mut self) -> Result<(), WriteError> {
        let found = self.port.consumed()?;
        let (least, most) = (self.consumed, self.cursor);
        if found < least || found > most || !found.is_multiple_of(LINE as u64) {
            return Err(WriteError::Counter {
                lane: self.lane,
                counter: Counter::Consumed,
                least,
                most,
                found,
            });
        }
        self.consumed = found;
        Ok(())
    }

    #[inline(always)]
    fn head(&self, place: Place, marks: Marks) -> Head {
        Head {
            lane: self.lane,
            lap: self.geometry.lap(place.at),
            seq: self.seq.next(),
            marks,
        }
    }

    #[inline(always)]
    fn stamp(&mut self, lap: u32) -> u32 {
        if self.lap.0 != lap {
            let (lane, kind) = (self.lane, Kind::Entry);
            self.lap = (lap, self.keys.stamp(Stamp { lane, lap, kind }));
        }
        self.lap.1
    }

    #[inline]
    fn check_marks(&self, marks: Marks) -> Result<(), WriteError> {
        let seq = self.seq.next();
        if self.lane == Lane::Events && marks.committed >= seq {
            let committed = marks.committed;
            return Err(WriteError::Marks { seq, committed });
        }
        Ok(())
    }

    /// Posts the entry whose payload lies in place.
    ///
    /// A reader that looks at the ring itself may take the range as soon as its first header is there, so that one is
    /// stored last.
    #[inline(always)]
    fn post(&mut self, place: Place, header: Header) -> Result<Seq, WriteError> {
        let seq = self.seq.next();
        // Before the entry can be seen, so that a reader's answer never passes what is known as posted.
        self.posted.store(seq.0, Ordering::Relaxed);
        self.put(place.at, &header);
        if place.pad > 0 {
            let lap = self.geometry.lap(self.cursor);
            let len = place.pad as usize - HEADER_LEN;
            let pad = self.keys.pad(self.lane, lap, seq, len as u32);
            self.put(self.cursor, &pad);
        }
        let range = Range {
            from: self.cursor,
            to: place.at + Geometry::span(header.len as usize),
            seq,
        };
        let posted = self.port.post(&self.view, range);
        self.remember(posted)?;
        self.cursor = range.to;
        self.seq = seq;
        Ok(seq)
    }

    #[inline(always)]
    fn put(&mut self, at: u64, header: &Header) {
        self.view.publish(self.geometry.offset(at), header.words());
    }

    fn remember<T>(&mut self, result: Result<T, WriteError>) -> Result<T, WriteError> {
        if let Err(error) = &result
            && error.is_final()
            && self.broken.is_none()
        {
            self.broken = Some(error.clone());
        }
        result
    }
}

/// The next entry of a lane, being filled. Dropped, it publishes nothing.
#[derive(Debug)]
pub struct Slot<'w> {
    writer: &'w mut LaneWriter,
    place: Place,
    max: usize,
    open: bool,
}

impl Slot<'_> {
    /// The payload's place in the ring, as long as was reserved. Unless reserved for salvage, it holds what an
    /// earlier lap left.
    pub fn payload(&mut self) -> &mut [u8] {
        let at = self.writer.geometry.offset(self.place.at) + HEADER_LEN;
        self.writer.view.bytes_mut(at, self.max)
    }

    /// Whether the lane is known to be fenced, so that publishing will fail. To be asked before the slot is filled with
    /// something that cannot be put back.
    pub fn is_fenced(&mut self) -> bool {
        self.writer.port.fenced()
    }

    /// Publishes the first `len` bytes of the payload. No allocation, no lock; with `shm` no system call.
    ///
    /// # Errors
    /// [`WriteError::TooLarge`] if `len` is more than was reserved, [`WriteError::Marks`], [`WriteError::Fenced`], or a
    /// final error. A slot reserved for salvage that meets the fence stays noted: the reader may still want it.
    pub fn publish(mut self, len: usize, marks: Marks) -> Result<Seq, WriteError> {
        if len > self.max {
            return Err(WriteError::TooLarge {
                lane: self.writer.lane,
                len,
                max: self.max,
            });
        }
        self.writer.check_marks(marks)?;
        let at = self.writer.geometry.offset(self.place.at) + HEADER_LEN;
        let head = self.writer.head(self.place, marks);
        let stamp = self.writer.stamp(head.lap);
        let payload = self.writer.view.bytes(at, len);
        let header = self.writer.keys.seal_stamped(&head, stamp, &[payload]);
        // Published, the note is behind the tail and says nothing.
        self.open = false;
        self.writer.post(self.place, header)
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        if self.open {
            self.writer.port.mark_open(None);
        }
    }
}
