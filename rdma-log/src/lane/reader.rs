//! The reading half of a lane.
#![forbid(unsafe_code)]

use std::time::Duration;

use thiserror::Error;

use crate::entry::{
    self, Entry, Fault, Field, HEADER_LEN, Head, Header, Keys, Kind, LINE, Lane, Marks, Nonce,
    STAMP_WORD, Seq, Stamp,
};
use crate::fence::Fenced;
use crate::lane::Geometry;
use crate::ring::Acks;
use crate::transport::{Limit, OpenSlot, ReadPort};

/// Of so many looks in a row that find nothing one asks for the tail: some microseconds of a reader that spins. It finds
/// what has committed and yet is not whole; whatever is whole is found without it.
const LOOK_AT_TAIL: u32 = if cfg!(loom) { 2 } else { 64 };

/// Why a lane cannot be read on.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ReadError {
    /// Bytes that must be an entry are none. This side must not go live; it needs a new copy of the machine.
    #[error(
        "the {lane} lane is corrupt at entry {seq}, byte {offset}: {field}: expected {expected:#x}, found \
         {found:#x}; do not go live, make a new copy of the machine"
    )]
    Corrupt {
        /// The lane.
        lane: Lane,
        /// The number of the entry that should be there.
        seq: Seq,
        /// Where it starts, in bytes since the start of the connection.
        offset: u64,
        /// The first field that differs.
        field: Field,
        /// The value, or the bound, that the field should have.
        expected: u64,
        /// The value found.
        found: u64,
    },
    /// The proof belongs to another connection.
    #[error("the proof of fencing is not for this connection")]
    ForeignProof,
    /// There are committed entries still to be read.
    #[error("the {lane} lane is not drained: read on from entry {next} first")]
    NotDrained {
        /// The lane.
        lane: Lane,
        /// The next entry.
        next: Seq,
    },
    /// An answer for an entry that was not read yet.
    #[error("entry {seq} of the {lane} lane cannot be acknowledged: the last one read is {last}")]
    AckAhead {
        /// The lane.
        lane: Lane,
        /// The number to be acknowledged.
        seq: Seq,
        /// The last entry read.
        last: Seq,
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

/// What it means that an entry is not there which was published before one of the other lane that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// It has to be there: this transport keeps the order of the lanes, and the next look says what is wrong with it.
    Damaged,
    /// It may still come: each lane has a way of its own.
    Coming,
    /// It does not come any more: its writer's end came first, and neither of the two has had an effect.
    Lost,
}

/// What a transport puts together for the reader of a lane.
pub(crate) struct ReaderParts {
    pub(crate) lane: Lane,
    pub(crate) nonce: Nonce,
    pub(crate) geometry: Geometry,
    pub(crate) port: Box<dyn ReadPort>,
    pub(crate) acks: Acks,
}

/// The reading half of a lane. One thread at a time; the two lanes' readers are independent.
///
/// Whatever the memory holds, no method panics or reads beyond it.
#[derive(Debug)]
pub struct LaneReader {
    lane: Lane,
    nonce: Nonce,
    keys: Keys,
    geometry: Geometry,
    port: Box<dyn ReadPort>,
    acks: Acks,
    cursor: u64,
    /// The tail as it was seen last: all before it has committed.
    certain: u64,
    /// Where the range starts whose entry was taken last, or whose pad was.
    range: u64,
    /// The pad of a range was taken, and its entry is next.
    past_pad: bool,
    /// Looks in a row that found nothing.
    idle: u32,
    stamps: Stamps,
    last: Seq,
    marks: Marks,
    /// The entry in hand: copied here first, then checked.
    copy: Vec<u8>,
}

/// The stamps of one lap, which are compared with every time that the reader looks.
#[derive(Clone, Copy, Debug)]
struct Stamps {
    lap: u32,
    entry: u32,
    pad: u32,
}

impl Stamps {
    fn new(keys: &Keys, lane: Lane, lap: u32) -> Stamps {
        let of = |kind| keys.stamp(Stamp { lane, lap, kind });
        Stamps {
            lap,
            entry: of(Kind::Entry),
            pad: of(Kind::Pad),
        }
    }
}

/// An entry that lies, checked, in the private copy and was not taken yet.
#[derive(Clone, Copy, Debug)]
struct Found {
    head: Head,
    len: usize,
}

/// What stands at the cursor.
enum At {
    Entry(Found),
    /// A pad, of so many bytes with its header.
    Pad(u64),
    /// No whole entry, or not yet.
    Nothing(Fault),
    /// An entry that is whole, sealed with this connection's nonce, and yet wrong.
    Wrong(Fault),
}

impl LaneReader {
    pub(crate) fn new(parts: ReaderParts) -> LaneReader {
        LaneReader {
            lane: parts.lane,
            nonce: parts.nonce,
            keys: Keys::new(&parts.nonce),
            geometry: parts.geometry,
            port: parts.port,
            acks: parts.acks,
            cursor: 0,
            certain: 0,
            range: 0,
            past_pad: false,
            idle: 0,
            stamps: Stamps::new(&Keys::new(&parts.nonce), parts.lane, 0),
            last: Seq::ZERO,
            marks: Marks::default(),
            copy: vec![0; HEADER_LEN + parts.geometry.max_payload()],
        }
    }

    /// The lane.
    pub fn lane(&self) -> Lane {
        self.lane
    }

    /// The nonce of the connection, for the header of a log file.
    pub fn nonce(&self) -> Nonce {
        self.nonce
    }

    /// The number of the last entry that was read.
    pub fn last(&self) -> Seq {
        self.last
    }

    /// Epoch and watermarks of the last entry that was read. An entry of the events lane that cannot be read, at or
    /// below *committed*, is corruption, not the end of the log.
    pub fn marks(&self) -> Marks {
        self.marks
    }

    /// The next entry, copied out and checked; `None` when nothing more has arrived, and after the fence when nothing
    /// more will.
    ///
    /// Over `shm` it comes as soon as it is whole, which may be just before it commits. There, `None` also stands for an
    /// entry that has committed and is damaged, until a few dozen calls have found nothing, or one after
    /// [`wait`](LaneReader::wait), which asks, or after the fence.
    ///
    /// The credit for the entry's bytes goes back at once.
    ///
    /// # Errors
    /// [`ReadError::Corrupt`], again on every call, or a failure of the transport.
    #[expect(
        clippy::should_implement_trait,
        reason = "the entry borrows the reader's buffer, which an Iterator cannot say"
    )]
    pub fn next(&mut self) -> Result<Option<Entry<'_>>, ReadError> {
        let Some(found) = self.look()? else {
            return Ok(None);
        };
        if !self.past_pad {
            self.range = self.cursor;
        }
        self.past_pad = false;
        self.idle = 0;
        self.cursor += Geometry::span(found.len);
        self.last = found.head.seq;
        self.marks = found.head.marks;
        self.port.release(self.cursor);
        Ok(Some(Entry {
            head: found.head,
            raw: &self.copy[..HEADER_LEN + found.len],
        }))
    }

    /// Whether a fenced lane was read to its end: every entry that has committed, and perhaps one more.
    ///
    /// # Errors
    /// [`ReadError::ForeignProof`]; [`ReadError::Corrupt`] also when the end is not one: on a transport without a tail
    /// when a later entry says that the unreadable one has committed.
    pub fn at_end(&mut self, proof: &Fenced) -> Result<bool, ReadError> {
        if !proof.covers(&self.nonce) {
            return Err(ReadError::ForeignProof);
        }
        match proof.end(self.lane) {
            Some(end) if self.cursor > end && !self.is_before_last(end) => {
                Err(self.corrupt(Fault::new(Field::Tail, end, self.cursor)))
            }
            Some(end) => Ok(self.cursor >= end),
            None if self.look()?.is_some() => Ok(false),
            None => self.refuse_committed_gap().map(|()| true),
        }
    }

    /// The payload area of the slot that the writer was filling when it died, if it had reserved one for salvage:
    /// as long as it had reserved. Behind what was zeroed and written lies what an earlier lap left.
    ///
    /// The bytes are **not verified**, perhaps not all there, and perhaps were never meant to be sent. They are of
    /// use only where the data prove themselves, as network frames do (a damaged one is dropped, a missing one
    /// repeated). A writer that is frozen, not dead, may still be filling the slot.
    ///
    /// # Errors
    /// [`ReadError::NotDrained`] before the end was reached, else as for [`at_end`](LaneReader::at_end).
    pub fn salvage(&mut self, proof: &Fenced) -> Result<Option<Vec<u8>>, ReadError> {
        if !self.at_end(proof)? {
            return Err(ReadError::NotDrained {
                lane: self.lane,
                next: self.last.next(),
            });
        }
        let Some(OpenSlot { at, len }) = self.port.open_slot() else {
            return Ok(None);
        };
        let Ok(len) = usize::try_from(len) else {
            return Ok(None);
        };
        if len > self.geometry.max_payload()
            || at != self.cursor + self.geometry.pad(self.cursor, len)
        {
            return Ok(None);
        }
        let mut bytes = vec![0; len];
        self.port
            .copy_out(self.geometry.offset(at) + HEADER_LEN, &mut bytes);
        Ok(Some(bytes))
    }

    /// Sleeps until there is something to read, the lane is fenced, or the time ran out. False for the last;
    /// true may come early, for instance when a signal came.
    ///
    /// # Errors
    /// A failure of the transport.
    pub fn wait(&mut self, limit: Duration) -> Result<bool, ReadError> {
        let armed = self.port.arm();
        match self.has_something() {
            Ok(false) => Ok(self.port.sleep(armed, limit)),
            ready => {
                self.port.disarm();
                ready
            }
        }
    }

    /// Wakes a writer that waits for room, and sends credits that a transport gathered. To be called after a batch.
    ///
    /// # Errors
    /// A failure of the transport.
    pub fn notify(&mut self) -> Result<(), ReadError> {
        self.port.push()
    }

    /// What it means if [`next`](LaneReader::next), called after this, has nothing that an entry of the other lane relies on.
    ///
    /// # Errors
    /// A failure of the transport.
    pub fn missing(&mut self) -> Result<Missing, ReadError> {
        Ok(match self.port.limit()? {
            Limit::Tail { .. } => Missing::Damaged,
            Limit::Unknown { fenced: false } => Missing::Coming,
            Limit::Unknown { fenced: true } => Missing::Lost,
        })
    }

    /// Tells the writer that all up to `seq` was received.
    ///
    /// # Errors
    /// [`ReadError::AckAhead`].
    pub fn set_received(&self, seq: Seq) -> Result<(), ReadError> {
        self.check_ack(seq)?;
        self.acks.received(self.lane, seq);
        Ok(())
    }

    /// Tells the writer that all up to `seq` was replayed.
    ///
    /// # Errors
    /// [`ReadError::AckAhead`].
    pub fn set_replayed(&self, seq: Seq) -> Result<(), ReadError> {
        self.check_ack(seq)?;
        self.acks.replayed(self.lane, seq);
        Ok(())
    }

    fn check_ack(&self, seq: Seq) -> Result<(), ReadError> {
        if seq > self.last {
            return Err(ReadError::AckAhead {
                lane: self.lane,
                seq,
                last: self.last,
            });
        }
        Ok(())
    }

    fn has_something(&mut self) -> Result<bool, ReadError> {
        Ok(match self.port.limit()? {
            Limit::Tail { at, fenced } => {
                self.see(at)?;
                fenced || at > self.cursor
            }
            Limit::Unknown { fenced } => {
                // The header is enough: the rest is on its way, and whoever waits spins again.
                fenced || self.stamp(self.header_at(self.cursor)).is_some()
            }
        })
    }

    /// The next entry, copied and checked but not taken. Goes past a pad before it.
    #[inline(always)]
    fn look(&mut self) -> Result<Option<Found>, ReadError> {
        loop {
            let limit = if self.certain > self.cursor {
                None
            } else {
                Some(self.port.known()?)
            };
            let (available, certain) = match limit {
                None => (self.certain - self.cursor, true),
                Some(Limit::Unknown { .. }) => (self.geometry.size(), false),
                Some(Limit::Tail { at, .. }) => {
                    self.see(at)?;
                    if at <= self.cursor {
                        return Ok(None);
                    }
                    continue;
                }
            };
            let pad = match self.look_at(available) {
                At::Entry(found) => return Ok(Some(found)),
                At::Pad(len) => len,
                At::Nothing(_) if !certain && !self.is_overdue()? => return Ok(None),
                At::Nothing(_) if !certain => continue,
                At::Nothing(fault) | At::Wrong(fault) => return Err(self.corrupt(fault)),
            };
            self.range = self.cursor;
            self.past_pad = true;
            self.cursor += pad;
            self.port.release(self.cursor);
        }
    }

    /// Whether what is not there has committed all the same. Asks now and then: to look at the tail takes its line from
    /// the writer, which then pays for it in the next commit.
    #[inline(never)]
    fn is_overdue(&mut self) -> Result<bool, ReadError> {
        self.idle = self.idle.wrapping_add(1);
        if !self.idle.is_multiple_of(LOOK_AT_TAIL) {
            return Ok(false);
        }
        match self.port.limit()? {
            Limit::Unknown { .. } => Ok(false),
            Limit::Tail { at, .. } => self.see(at).map(|()| at > self.cursor),
        }
    }

    /// Takes note of a tail, if it is one that can be.
    ///
    /// A writer moves it over a range after the range is whole, and begins the next one after that. So it may stand
    /// before the last range that was taken, and not before any other, and where it has been it does not go back.
    #[inline(never)]
    fn see(&mut self, tail: u64) -> Result<(), ReadError> {
        let least = self.certain.max(self.cursor);
        let most = self.cursor + self.geometry.size();
        let can_be = (least..=most).contains(&tail) && tail.is_multiple_of(LINE as u64);
        if can_be {
            self.certain = tail;
        } else if !self.is_before_last(tail) {
            return Err(self.corrupt(Fault::new(Field::Tail, least, tail)));
        }
        Ok(())
    }

    /// Whether the tail stands before the last range that was taken: that was read before it committed.
    fn is_before_last(&self, tail: u64) -> bool {
        tail == self.range && tail >= self.certain
    }

    /// Looks at what stands at the cursor.
    #[inline(always)]
    fn look_at(&mut self, available: u64) -> At {
        let at = self.cursor;
        let offset = self.geometry.offset(at);
        let lap = self.geometry.lap(at);
        if self.stamps.lap != lap {
            self.stamps = Stamps::new(&self.keys, self.lane, lap);
        }
        let Stamps { entry, pad, .. } = self.stamps;
        let stamp = self.port.word(offset + STAMP_WORD * size_of::<u64>()) as u32;
        let kind = match stamp {
            stamp if stamp == entry => Kind::Entry,
            stamp if stamp == pad => Kind::Pad,
            _ => return At::Nothing(Fault::new(Field::Stamp, entry, stamp)),
        };
        let header = self.copy_line(offset);
        if header.stamp != stamp {
            return At::Nothing(Fault::new(Field::Stamp, stamp, header.stamp));
        }
        let len = u64::from(header.len);
        let to_end = self.geometry.to_end(at);
        let room = available.min(to_end) - HEADER_LEN as u64;
        let (most, wrong) = match kind {
            Kind::Entry => {
                let most = room.min(self.geometry.max_payload() as u64);
                (most, len > most)
            }
            // A pad fills its lap exactly, where the longest entry would not fit, and an entry follows it.
            Kind::Pad => {
                let exactly = to_end - HEADER_LEN as u64;
                let idle = to_end >= Geometry::span(self.geometry.max_payload());
                (
                    exactly,
                    self.past_pad || idle || len != exactly || len > room,
                )
            }
        };
        if wrong {
            return At::Nothing(Fault::new(Field::Length, most, len));
        }
        let payload = match kind {
            Kind::Entry => header.len as usize,
            Kind::Pad => 0,
        };
        if let Err(fault) = self.copy_and_check(offset, header, payload) {
            return At::Nothing(fault);
        }
        if kind == Kind::Pad {
            return At::Pad(len + HEADER_LEN as u64);
        }
        let stamp = Stamp {
            lane: self.lane,
            lap,
            kind,
        };
        match entry::head(&header, stamp, self.last.next()) {
            Ok(head) => At::Entry(Found { head, len: payload }),
            Err(fault) => At::Wrong(fault),
        }
    }

    /// Copies the line at this offset to where it cannot change; the header in it.
    #[inline(always)]
    fn copy_line(&mut self, offset: usize) -> Header {
        let (line, _) = self.copy.split_at_mut(LINE);
        self.port.copy_out(offset, line);
        let (header, _) = line.split_first_chunk().expect("a line has a header");
        Header::from_bytes(header)
    }

    /// Copies the rest of an entry whose first line was copied, and checks it.
    #[inline(always)]
    fn copy_and_check(&mut self, offset: usize, header: Header, len: usize) -> Result<(), Fault> {
        let whole = HEADER_LEN + len;
        if whole > LINE {
            self.port
                .copy_out(offset + LINE, &mut self.copy[LINE..whole]);
        }
        self.keys.check(&header, &self.copy[HEADER_LEN..whole])
    }

    fn header_at(&self, at: u64) -> Header {
        let mut bytes = [0; HEADER_LEN];
        self.port.copy_out(self.geometry.offset(at), &mut bytes);
        Header::from_bytes(&bytes)
    }

    fn expected(&self, kind: Kind) -> Stamp {
        Stamp {
            lane: self.lane,
            lap: self.geometry.lap(self.cursor),
            kind,
        }
    }

    /// The stamp, if it is one for the cursor's lap of this lane.
    fn stamp(&self, header: Header) -> Option<Stamp> {
        let stamp = self.keys.unstamp(header.stamp);
        (stamp == self.expected(stamp.kind)).then_some(stamp)
    }

    /// At the end of a log without a tail: looks through the rest of the ring for an entry which says that the one
    /// missing here has committed.
    fn refuse_committed_gap(&mut self) -> Result<(), ReadError> {
        let missing = self.last.next();
        let end = self.cursor + self.geometry.size();
        let mut at = self.cursor + LINE as u64;
        while at < end {
            if let Some(seq) = self.covered_by(at, missing) {
                return Err(self.corrupt(Fault::new(Field::Committed, missing.0, seq.0)));
            }
            at += LINE as u64;
        }
        Ok(())
    }

    /// The number of a whole entry at this position that says `missing` has committed.
    fn covered_by(&mut self, at: u64, missing: Seq) -> Option<Seq> {
        let offset = self.geometry.offset(at);
        let header = self.copy_line(offset);
        let stamp = self.keys.unstamp(header.stamp);
        let wanted = Stamp {
            lane: self.lane,
            lap: self.geometry.lap(at),
            kind: Kind::Entry,
        };
        let len = header.len as usize;
        if stamp != wanted
            || len > self.geometry.max_payload()
            || Geometry::span(len) > self.geometry.to_end(at)
        {
            return None;
        }
        self.copy_and_check(offset, header, len).ok()?;
        let head = entry::head(&header, stamp, Seq(header.seq)).ok()?;
        (head.marks.committed >= missing).then_some(head.seq)
    }

    #[cold]
    fn corrupt(&self, fault: Fault) -> ReadError {
        ReadError::Corrupt {
            lane: self.lane,
            seq: self.last.next(),
            offset: self.cursor,
            field: fault.field,
            expected: fault.expected,
            found: fault.found,
        }
    }
}
