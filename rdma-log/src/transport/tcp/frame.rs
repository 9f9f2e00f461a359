//! What goes over the socket, as bytes: pure functions.
//!
//! Writer to reader, a *frame*: a header of 48 bytes, then a piece of one lane's bytes. All numbers are little-endian.
//!
//! | offset | type | field |
//! | --- | --- | --- |
//! | 0 | 16 bytes | nonce of the connection |
//! | 16 | u64 | where the piece starts, in bytes since the start of the connection |
//! | 24 | u64 | number of the last entry that is whole with this piece; the tail moves when it is a new one |
//! | 32 | u32 | length of the piece in bytes: a multiple of a line, at most [`MAX_PIECE`] |
//! | 36 | u32 | CRC-32C over the piece, then the header with this field zero |
//! | 40 | u8 | lane |
//! | 41 | 7 bytes | zero |
//!
//! Reader to writer, an *answer* of 72 bytes: nonce, flags (u32; bit 0: fenced), CRC-32C (u32, as above), and for either
//! lane consumed bytes, the last entry received, the last replayed (u64 each). A later answer replaces an earlier one.
//!
//! TCP's own checksum misses one damaged segment in 65,536; with this one nothing damaged is ever acknowledged.
#![forbid(unsafe_code)]

use std::fmt;

use super::StreamError;
use crate::entry::{LINE, Lane, Nonce, Seq};

/// Bytes of a frame's header.
pub(super) const HEADER: usize = 48;

/// The longest piece in bytes. It bounds what a receiver keeps of a frame that is not whole, and how long a small entry of
/// one lane waits behind a large one of the other: 64 KiB are 50 µs at 10 Gb/s.
pub(super) const MAX_PIECE: usize = 64 << 10;

/// Bytes of an answer.
pub(super) const ANSWER: usize = 72;

const FENCED: u32 = 1;

/// A field of a frame or an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The connection's nonce (its first eight bytes are shown).
    Nonce,
    /// The lane.
    Lane,
    /// The length of the piece.
    Length,
    /// Where the piece starts.
    Position,
    /// Where the piece ends: beyond what was taken out, plus the lane.
    Credit,
    /// The number of the last whole entry.
    Sequence,
    /// Bytes that must be zero, or bits that mean nothing.
    Reserved,
    /// The checksum.
    Checksum,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Nonce => "nonce",
            Part::Lane => "lane",
            Part::Length => "length",
            Part::Position => "position",
            Part::Credit => "end",
            Part::Sequence => "entry number",
            Part::Reserved => "reserved bits",
            Part::Checksum => "checksum",
        })
    }
}

pub(super) fn bad(part: Part, expected: u64, found: u64) -> StreamError {
    StreamError::Refused {
        part,
        expected,
        found,
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut le = [0; 8];
    le.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(le)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut le = [0; 4];
    le.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(le)
}

fn check_nonce(bytes: &[u8], nonce: &Nonce) -> Result<(), StreamError> {
    if bytes[..16] != nonce.0 {
        let expected = u64_at(&nonce.0, 0);
        return Err(bad(Part::Nonce, expected, u64_at(bytes, 0)));
    }
    Ok(())
}

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) lane: Lane,
    pub(super) from: u64,
    pub(super) seq: Seq,
    pub(super) len: usize,
    /// As read; not used when written.
    pub(super) crc: u32,
}

impl Frame {
    /// The header over a piece with this checksum.
    pub(super) fn to_bytes(self, nonce: &Nonce, piece_crc: u32) -> [u8; HEADER] {
        let mut b = [0; HEADER];
        b[..16].copy_from_slice(&nonce.0);
        b[16..24].copy_from_slice(&self.from.to_le_bytes());
        b[24..32].copy_from_slice(&self.seq.0.to_le_bytes());
        b[32..36].copy_from_slice(&(self.len as u32).to_le_bytes());
        b[40] = self.lane as u8;
        let crc = crate::crc32c_append(piece_crc, &b);
        b[36..40].copy_from_slice(&crc.to_le_bytes());
        b
    }

    /// Reads a header of this connection; everything but position, credit, number and checksum is checked.
    pub(super) fn from_bytes(b: &[u8; HEADER], nonce: &Nonce) -> Result<Frame, StreamError> {
        check_nonce(b, nonce)?;
        let lane = match b[40] {
            0 => Lane::Events,
            1 => Lane::Inputs,
            other => return Err(bad(Part::Lane, 1, u64::from(other))),
        };
        let reserved = u64_at(b, 40) >> 8;
        if reserved != 0 {
            return Err(bad(Part::Reserved, 0, reserved));
        }
        let len = u32_at(b, 32) as usize;
        if len == 0 || len > MAX_PIECE || !len.is_multiple_of(LINE) {
            return Err(bad(Part::Length, MAX_PIECE as u64, len as u64));
        }
        Ok(Frame {
            lane,
            from: u64_at(b, 16),
            seq: Seq(u64_at(b, 24)),
            len,
            crc: u32_at(b, 36),
        })
    }

    /// Checks the piece.
    pub(super) fn check(&self, header: &[u8; HEADER], piece: &[u8]) -> Result<(), StreamError> {
        let mut zeroed = *header;
        zeroed[36..40].fill(0);
        let crc = crate::crc32c_append(crate::crc32c(piece), &zeroed);
        if crc != self.crc {
            return Err(bad(Part::Checksum, u64::from(crc), u64::from(self.crc)));
        }
        Ok(())
    }
}

/// What the reader returns of one lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LaneAnswer {
    pub(super) consumed: u64,
    pub(super) received: u64,
    pub(super) replayed: u64,
}

/// What the reader returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) fenced: bool,
    pub(super) lanes: [LaneAnswer; 2],
}

impl Answer {
    pub(super) fn to_bytes(self, nonce: &Nonce) -> [u8; ANSWER] {
        let mut b = [0; ANSWER];
        b[..16].copy_from_slice(&nonce.0);
        let flags = if self.fenced { FENCED } else { 0 };
        b[16..20].copy_from_slice(&flags.to_le_bytes());
        let words = self
            .lanes
            .map(|lane| [lane.consumed, lane.received, lane.replayed]);
        for (to, word) in b[24..].chunks_exact_mut(8).zip(words.as_flattened()) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        let crc = crate::crc32c(&b);
        b[20..24].copy_from_slice(&crc.to_le_bytes());
        b
    }

    pub(super) fn from_bytes(b: &[u8; ANSWER], nonce: &Nonce) -> Result<Answer, StreamError> {
        check_nonce(b, nonce)?;
        let mut zeroed = *b;
        zeroed[20..24].fill(0);
        let (crc, found) = (crate::crc32c(&zeroed), u32_at(b, 20));
        if crc != found {
            return Err(bad(Part::Checksum, u64::from(crc), u64::from(found)));
        }
        let flags = u32_at(b, 16);
        if flags & !FENCED != 0 {
            return Err(bad(Part::Reserved, u64::from(FENCED), u64::from(flags)));
        }
        let lane = |at| LaneAnswer {
            consumed: u64_at(b, at),
            received: u64_at(b, at + 8),
            replayed: u64_at(b, at + 16),
        };
        Ok(Answer {
            fenced: flags & FENCED != 0,
            lanes: [lane(24), lane(48)],
        })
    }
}
