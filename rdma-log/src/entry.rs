//! The framing of entries: pure functions from values to bytes and back.
//!
//! An entry is a 32-byte header and its payload. In a ring it starts on a cache line ([`LINE`] bytes), so a payload
//! of up to 32 bytes costs one line; it never straddles the end of the ring, a *pad* fills the rest of the lap.
//! All numbers are little-endian.
//!
//! | offset | type | field |
//! | --- | --- | --- |
//! | 0 | u32 | length of the payload in bytes (of a pad: bytes left in the lap after this header) |
//! | 4 | u32 | CRC-32C over the header with this field zero, then the payload; starts from a seed made of the nonce |
//! | 8 | u64 | sequence number, per lane, from 1 (of a pad: that of the entry after it) |
//! | 16 | u32 | stamp: lane, lap and kind, scrambled by the nonce |
//! | 20 | u32 | epoch |
//! | 24 | u32 | committed lag |
//! | 28 | u32 | released lag |
//!
//! The lags are the primary's watermarks in the *events* lane, as this entry's sequence number minus the mark,
//! `u32::MAX` when it is further back than that. An entry of the inputs lane has `u32::MAX` in both: it carries none.
//!
//! The nonce keeps apart what belongs to this connection and what memory or an old file happens to hold. It is no
//! proof of who wrote the bytes: whoever can write the ring knows it.
#![forbid(unsafe_code)]

use std::fmt;
use std::mem::{offset_of, size_of};

use thiserror::Error;

use crate::crc;

/// Size of a cache line in bytes: the alignment of every entry in a ring.
pub const LINE: usize = 64;

/// Size of an entry's header in bytes.
pub const HEADER_LEN: usize = size_of::<Header>();

/// The longest payload any lane or file may carry, in bytes: 16 MiB less one header.
///
/// It bounds what a reader allocates for a length that a peer or a file claims.
pub const MAX_PAYLOAD: usize = 16 * 1024 * 1024 - HEADER_LEN;

/// The two lanes of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Lane {
    /// Small entries, written by the vCPU's thread.
    Events = 0,
    /// Bytes of frames and disk reads staged ahead, written by the I/O thread.
    Inputs = 1,
}

impl Lane {
    /// Both lanes, in the order of their indices.
    pub const ALL: [Lane; 2] = [Lane::Events, Lane::Inputs];

    /// 0 for events, 1 for inputs: the index in arrays that hold one value per lane.
    pub fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Lane::Events => "events",
            Lane::Inputs => "inputs",
        })
    }
}

/// The number of an entry in its lane: 1 is the first of a connection, 0 stands before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Seq(pub u64);

impl Seq {
    /// Before the first entry.
    pub const ZERO: Seq = Seq(0);

    /// The number of the following entry.
    #[must_use]
    pub fn next(self) -> Seq {
        Seq(self.0 + 1)
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One reign: the number of claims won so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u32);

/// Sixteen random bytes that seed the stamps and checksums of one connection or file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Nonce(pub [u8; 16]);

impl Nonce {
    /// A nonce from the kernel's random number generator.
    ///
    /// # Errors
    /// What the kernel says; on any supported one it does not fail.
    pub fn random() -> std::io::Result<Nonce> {
        crate::region::random().map(Nonce)
    }
}

/// What the primary says in every entry besides the payload.
///
/// Both watermarks are lower bounds: where one is too far back for the header, the reader is given less, never more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// The reign in which the entry was written.
    pub epoch: Epoch,
    /// The highest entry of the events lane that the primary knows to be committed: below this entry's own number.
    /// Not carried by the inputs lane, where a reader sees [`Seq::ZERO`].
    pub committed: Seq,
    /// The highest entry of the events lane whose outputs were released to the world; not above `committed`.
    /// Not carried by the inputs lane, where a reader sees [`Seq::ZERO`].
    pub released: Seq,
}

/// The header as it lies in memory. Fields are host-endian here and little-endian in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Header {
    /// Bytes of payload that follow.
    pub len: u32,
    /// CRC-32C, see the module's text.
    pub crc: u32,
    /// Sequence number in the lane.
    pub seq: u64,
    /// Lane, lap and kind, scrambled ([`Keys::stamp`]).
    pub stamp: u32,
    /// The primary's epoch.
    pub epoch: u32,
    /// Own sequence number minus the committed mark, saturating.
    pub committed_lag: u32,
    /// Own sequence number minus the released mark, saturating.
    pub released_lag: u32,
}

/// Which of the header's words holds the stamp, in its lower half.
pub(crate) const STAMP_WORD: usize = offset_of!(Header, stamp) / size_of::<u64>();

const _: () = {
    assert!(size_of::<Header>() == 32);
    assert!(STAMP_WORD == 2);
    assert!(size_of::<Header>() * 2 == LINE);
    assert!(offset_of!(Header, len) == 0);
    assert!(offset_of!(Header, crc) == 4);
    assert!(offset_of!(Header, seq) == 8);
    assert!(offset_of!(Header, stamp) == 16);
    assert!(offset_of!(Header, epoch) == 20);
    assert!(offset_of!(Header, committed_lag) == 24);
    assert!(offset_of!(Header, released_lag) == 28);
};

impl Header {
    /// The bytes on the wire.
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut b = [0; HEADER_LEN];
        let (words, _) = b.as_chunks_mut::<8>();
        for (to, word) in words.iter_mut().zip(self.words()) {
            *to = word.to_le_bytes();
        }
        b
    }

    /// Reads the bytes of the wire; every pattern is a header, its meaning is for [`Keys::check`].
    pub fn from_bytes(b: &[u8; HEADER_LEN]) -> Header {
        let (words, _) = b.as_chunks::<8>();
        let word = |i: usize| u64::from_le_bytes(words[i]);
        let low = |i: usize| word(i) as u32;
        let high = |i: usize| (word(i) >> 32) as u32;
        Header {
            len: low(0),
            crc: high(0),
            seq: word(1),
            stamp: low(STAMP_WORD),
            epoch: high(STAMP_WORD),
            committed_lag: low(3),
            released_lag: high(3),
        }
    }

    /// The words on the wire, each to be laid down little-endian.
    pub(crate) fn words(&self) -> [u64; 4] {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        [
            pair(self.len, self.crc),
            self.seq,
            pair(self.stamp, self.epoch),
            pair(self.committed_lag, self.released_lag),
        ]
    }
}

/// What a stamp marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An entry.
    Entry,
    /// Filler up to the end of the lap.
    Pad,
}

/// A stamp taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The lane it was written for.
    pub lane: Lane,
    /// How many times the lane had wrapped, modulo 2^30.
    pub lap: u32,
    /// Entry or pad.
    pub kind: Kind,
}

/// Laps are counted modulo this.
pub const LAPS: u32 = 1 << 30;

/// Everything an entry says besides its payload; with it an entry can be built again ([`encode`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The lane.
    pub lane: Lane,
    /// How many times the lane had wrapped, modulo [`LAPS`].
    pub lap: u32,
    /// The number in the lane.
    pub seq: Seq,
    /// Epoch and watermarks.
    pub marks: Marks,
}

/// A field of an entry, or of what frames it, that was not as it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// The stamp: other lane, other lap, other connection, or no entry at all.
    Stamp,
    /// The payload's length, in bytes.
    Length,
    /// The sequence number.
    Sequence,
    /// The checksum.
    Checksum,
    /// The committed watermark's lag.
    CommittedLag,
    /// The released watermark's lag.
    ReleasedLag,
    /// The lane's tail (bytes since the start of the connection).
    Tail,
    /// A later entry, which says that this one has committed (the sequence number it says so for).
    Committed,
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Field::Stamp => "stamp",
            Field::Length => "length",
            Field::Sequence => "sequence number",
            Field::Checksum => "checksum",
            Field::CommittedLag => "committed lag",
            Field::ReleasedLag => "released lag",
            Field::Tail => "tail",
            Field::Committed => "committed watermark of a later entry",
        })
    }
}

/// One field that differs from what it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{field}: expected {expected:#x}, found {found:#x}")]
pub struct Fault {
    /// Which field.
    pub field: Field,
    /// The value, or for a length or tail the bound, it should have.
    pub expected: u64,
    /// The value found.
    pub found: u64,
}

impl Fault {
    pub(crate) fn new(field: Field, expected: impl Into<u64>, found: impl Into<u64>) -> Fault {
        Fault {
            field,
            expected: expected.into(),
            found: found.into(),
        }
    }
}

/// The nonce, prepared for making and checking stamps and checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keys {
    seed: u32,
    whiten: [u32; 2],
}

// The 32-bit finaliser of MurmurHash3 (public domain): every input bit reaches every output bit, and each step can
// be undone, so that a stamp found in a file tells its lane.
const MIX: [u32; 2] = [0x85eb_ca6b, 0xc2b2_ae35];
const UNMIX: [u32; 2] = [inverse(MIX[0]), inverse(MIX[1])];

/// The inverse of an odd number modulo 2^32, by Newton's iteration (each round doubles the correct bits).
const fn inverse(odd: u32) -> u32 {
    let mut x = odd;
    let mut round = 0;
    while round < 5 {
        x = x.wrapping_mul(2u32.wrapping_sub(odd.wrapping_mul(x)));
        round += 1;
    }
    x
}

fn mix(mut v: u32) -> u32 {
    v ^= v >> 16;
    v = v.wrapping_mul(MIX[0]);
    v ^= v >> 13;
    v = v.wrapping_mul(MIX[1]);
    v ^ v >> 16
}

fn unmix(mut v: u32) -> u32 {
    v ^= v >> 16;
    v = v.wrapping_mul(UNMIX[1]);
    v ^= (v >> 13) ^ (v >> 26);
    v = v.wrapping_mul(UNMIX[0]);
    v ^ v >> 16
}

impl Keys {
    /// Derives the seeds from a connection's or a file's nonce.
    pub fn new(nonce: &Nonce) -> Keys {
        let word = |i: usize| {
            let b = &nonce.0;
            u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]])
        };
        Keys {
            seed: crate::crc32c(&nonce.0),
            whiten: [mix(word(0) ^ word(8)), mix(word(4) ^ word(12))],
        }
    }

    /// The stamp of an entry or pad.
    pub fn stamp(&self, stamp: Stamp) -> u32 {
        let plain = (stamp.lap % LAPS) << 2
            | u32::from(stamp.kind == Kind::Pad) << 1
            | u32::from(stamp.lane == Lane::Inputs);
        mix(mix(plain ^ self.whiten[0]) ^ self.whiten[1])
    }

    /// What a stamp says, if it is one: any 32 bits say something.
    pub fn unstamp(&self, stamp: u32) -> Stamp {
        let plain = unmix(unmix(stamp) ^ self.whiten[1]) ^ self.whiten[0];
        Stamp {
            lane: Lane::ALL[(plain & 1) as usize],
            lap: plain >> 2,
            kind: if plain & 2 == 0 {
                Kind::Entry
            } else {
                Kind::Pad
            },
        }
    }

    #[inline]
    fn checksum(&self, header: &Header, payload: &[&[u8]]) -> u32 {
        let bare = Header { crc: 0, ..*header };
        crc::checksum(self.seed, bare.words(), payload)
    }

    /// The header that goes before a payload given in pieces.
    ///
    /// The watermarks are made lower bounds that a reader accepts: *committed* below the entry's own number,
    /// *released* not above *committed*.
    pub fn seal(&self, head: &Head, payload: &[&[u8]]) -> Header {
        let (lane, lap) = (head.lane, head.lap);
        let kind = Kind::Entry;
        self.seal_stamped(head, self.stamp(Stamp { lane, lap, kind }), payload)
    }

    /// [`seal`](Keys::seal), for who has the stamp at hand: it is the same for a whole lap.
    #[inline]
    pub(crate) fn seal_stamped(&self, head: &Head, stamp: u32, payload: &[&[u8]]) -> Header {
        let (committed_lag, released_lag) = lags(head);
        let mut header = Header {
            len: payload.iter().map(|part| part.len()).sum::<usize>() as u32,
            crc: 0,
            seq: head.seq.0,
            stamp,
            epoch: head.marks.epoch.0,
            committed_lag,
            released_lag,
        };
        header.crc = self.checksum(&header, payload);
        header
    }

    /// The header of a pad that fills `len` bytes after itself, up to the end of the lap.
    pub fn pad(&self, lane: Lane, lap: u32, next: Seq, len: u32) -> Header {
        let kind = Kind::Pad;
        let mut header = Header {
            len,
            crc: 0,
            seq: next.0,
            stamp: self.stamp(Stamp { lane, lap, kind }),
            epoch: 0,
            committed_lag: u32::MAX,
            released_lag: u32::MAX,
        };
        header.crc = self.checksum(&header, &[]);
        header
    }

    /// Checks the checksum. Of a pad, the payload is empty.
    ///
    /// # Errors
    /// [`Field::Checksum`] when the bytes are not those that were sealed with this nonce.
    #[inline]
    pub fn check(&self, header: &Header, payload: &[u8]) -> Result<(), Fault> {
        let expected = self.checksum(header, &[payload]);
        if header.crc == expected {
            return Ok(());
        }
        Err(Fault::new(Field::Checksum, expected, header.crc))
    }
}

#[inline]
fn lags(head: &Head) -> (u32, u32) {
    if head.lane == Lane::Inputs {
        return (u32::MAX, u32::MAX);
    }
    let lag = |mark: Seq| u32::try_from(head.seq.0.saturating_sub(mark.0)).unwrap_or(u32::MAX);
    let committed = lag(head.marks.committed).max(1);
    (committed, lag(head.marks.released).max(committed))
}

/// The head that a header of this lane and lap stands for.
///
/// # Errors
/// A number that is not `expected`, or watermarks that no writer puts there: *committed* not below the entry's own
/// number, *released* above *committed*, marks in the inputs lane.
#[inline]
pub fn head(header: &Header, stamp: Stamp, expected: Seq) -> Result<Head, Fault> {
    if header.seq != expected.0 {
        return Err(Fault::new(Field::Sequence, expected.0, header.seq));
    }
    let least = match stamp.lane {
        Lane::Events => 1,
        Lane::Inputs => u32::MAX,
    };
    if header.committed_lag < least {
        let found = header.committed_lag;
        return Err(Fault::new(Field::CommittedLag, least, found));
    }
    if header.released_lag < header.committed_lag {
        let (expected, found) = (header.committed_lag, header.released_lag);
        return Err(Fault::new(Field::ReleasedLag, expected, found));
    }
    let mark = |lag: u32| match stamp.lane {
        Lane::Events => Seq(header.seq.saturating_sub(u64::from(lag))),
        Lane::Inputs => Seq::ZERO,
    };
    Ok(Head {
        lane: stamp.lane,
        lap: stamp.lap,
        seq: expected,
        marks: Marks {
            epoch: Epoch(header.epoch),
            committed: mark(header.committed_lag),
            released: mark(header.released_lag),
        },
    })
}

/// Header and payload in one piece: what the wire and the file carry.
///
/// With the [`Head`] of an entry that was read, and another payload, this makes the entry that the primary would have
/// written instead.
pub fn encode(keys: &Keys, head: &Head, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
    bytes.extend_from_slice(&keys.seal(head, &[payload]).to_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// An entry, checked, in memory that is the reader's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    pub(crate) head: Head,
    pub(crate) raw: &'a [u8],
}

impl<'a> Entry<'a> {
    /// The lane it came by.
    pub fn lane(&self) -> Lane {
        self.head.lane
    }

    /// Its number in the lane.
    pub fn seq(&self) -> Seq {
        self.head.seq
    }

    /// Epoch and watermarks.
    pub fn marks(&self) -> Marks {
        self.head.marks
    }

    /// Everything but the payload, for [`encode`].
    pub fn head(&self) -> Head {
        self.head
    }

    /// The payload.
    pub fn payload(&self) -> &'a [u8] {
        &self.raw[HEADER_LEN..]
    }

    /// Header and payload as they came, for a log file.
    pub fn raw(&self) -> &'a [u8] {
        self.raw
    }
}

#[cfg(test)]
mod tests;
