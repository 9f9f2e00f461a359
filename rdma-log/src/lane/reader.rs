//! The reading half of a lane.
#![forbid(unsafe_code)]

use std::time::Duration;

use thiserror::Error;

use crate::entry::{
    self, Entry, Fault, Field, HEADER_LEN, Head, Header, Keys, Kind, LINE, Lane, Marks, Nonce, Seq,
    Stamp,
};
use crate::fence::Fenced;
use crate::lane::Geometry;
use crate::ring::Acks;
use crate::transport::{Limit, OpenSlot, ReadPort};

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
    last: Seq,
    marks: Marks,
    /// The entry in hand: copied here first, then checked.
    copy: Vec<u8>,
}

/// An entry that lies, checked, in the private copy and was not taken yet.
#[derive(Clone, Copy, Debug)]
struct Found {
    head: Head,
    len: usize,
}

/// What stands at a position.
enum At {
    Entry(Found),
    /// A pad, of so many bytes with its header.
    Pad(u64),
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
        self.cursor += Geometry::span(found.len);
        self.last = found.head.seq;
        self.marks = found.head.marks;
        self.port.release(self.cursor);
        Ok(Some(Entry {
            head: found.head,
            raw: &self.copy[..HEADER_LEN + found.len],
        }))
    }

    /// Whether a fenced lane was read to its end.
    ///
    /// # Errors
    /// [`ReadError::ForeignProof`]; [`ReadError::Corrupt`] also when the end is not one: on a transport without a tail
    /// when a later entry says that the unreadable one has committed.
    pub fn at_end(&mut self, proof: &Fenced) -> Result<bool, ReadError> {
        if !proof.covers(&self.nonce) {
            return Err(ReadError::ForeignProof);
        }
        match proof.end(self.lane) {
            Some(end) if self.cursor > end => {
                Err(self.corrupt(Fault::new(Field::Tail, end, self.cursor)))
            }
            Some(end) => Ok(self.cursor == end),
            None if self.look()?.is_some() => Ok(false),
            None => self.refuse_committed_gap().map(|()| true),
        }
    }

    /// The payload area of the slot that the writer was filling when it died, if it had reserved one for salvage:
    /// as long as it had reserved.
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
            Limit::Tail { at, fenced } => fenced || at != self.cursor,
            Limit::Unknown { fenced } => {
                // The header is enough: the rest is on its way, and whoever waits spins again.
                fenced || self.stamp(self.header_at(self.cursor)).is_some()
            }
        })
    }

    /// The next entry, copied and checked but not taken. Goes past a pad before it.
    fn look(&mut self) -> Result<Option<Found>, ReadError> {
        let limit = self.port.limit()?;
        let mut padded = false;
        loop {
            let (available, certain) = self.available(limit)?;
            if available == 0 {
                return Ok(None);
            }
            let pad = match self.look_at(available, padded) {
                Ok(Ok(At::Entry(found))) => return Ok(Some(found)),
                Ok(Ok(At::Pad(len))) => len,
                Ok(Err(_)) if !certain => return Ok(None),
                Ok(Err(fault)) | Err(fault) => return Err(self.corrupt(fault)),
            };
            self.cursor += pad;
            self.port.release(self.cursor);
            padded = true;
        }
    }

    /// Bytes that may be looked at, and whether they are certain to be whole.
    fn available(&self, limit: Limit) -> Result<(u64, bool), ReadError> {
        match limit {
            Limit::Unknown { .. } => Ok((self.geometry.size(), false)),
            Limit::Tail { at, .. } => {
                let most = self.cursor + self.geometry.size();
                if at < self.cursor || at > most || !at.is_multiple_of(LINE as u64) {
                    return Err(self.corrupt(Fault::new(Field::Tail, self.cursor, at)));
                }
                Ok((at - self.cursor, true))
            }
        }
    }

    /// What stands at the cursor. The inner error says that it is no whole entry, or not yet; the outer one that it
    /// is one, sealed with this connection's nonce, and yet wrong.
    fn look_at(&mut self, available: u64, padded: bool) -> Result<Result<At, Fault>, Fault> {
        let at = self.cursor;
        let header = self.header_at(at);
        let Some(stamp) = self.stamp(header) else {
            let expected = self.keys.stamp(self.expected(Kind::Entry));
            return Ok(Err(Fault::new(Field::Stamp, expected, header.stamp)));
        };
        let len = u64::from(header.len);
        let to_end = self.geometry.to_end(at);
        let room = available.min(to_end) - HEADER_LEN as u64;
        let (most, wrong) = match stamp.kind {
            Kind::Entry => {
                let most = room.min(self.geometry.max_payload() as u64);
                (most, len > most)
            }
            // A pad fills its lap exactly, and an entry follows it.
            Kind::Pad => {
                let exactly = to_end - HEADER_LEN as u64;
                (exactly, padded || len != exactly || len > room)
            }
        };
        if wrong {
            return Ok(Err(Fault::new(Field::Length, most, len)));
        }
        let payload = match stamp.kind {
            Kind::Entry => header.len as usize,
            Kind::Pad => 0,
        };
        if let Err(fault) = self.copy_and_check(at, header, payload) {
            return Ok(Err(fault));
        }
        if stamp.kind == Kind::Pad {
            return Ok(Ok(At::Pad(len + HEADER_LEN as u64)));
        }
        let head = entry::head(&header, stamp, self.last.next())?;
        Ok(Ok(At::Entry(Found { head, len: payload })))
    }

    /// Copies the payload to where it cannot change and checks it together with the header, a copy already.
    fn copy_and_check(&mut self, at: u64, header: Header, len: usize) -> Result<(), Fault> {
        let from = self.geometry.offset(at) + HEADER_LEN;
        let (head, payload) = self.copy.split_at_mut(HEADER_LEN);
        head.copy_from_slice(&header.to_bytes());
        self.port.copy_out(from, &mut payload[..len]);
        self.keys.check(&header, &payload[..len])
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
        let header = self.header_at(at);
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
        self.copy_and_check(at, header, len).ok()?;
        let head = entry::head(&header, stamp, Seq(header.seq)).ok()?;
        (head.marks.committed >= missing).then_some(head.seq)
    }

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
