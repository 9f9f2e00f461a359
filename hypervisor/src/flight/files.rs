//! The files of a recording, version 1. All numbers are little-endian.
//!
//! ```text
//!  machine              head | the machine's description (`machine/spec.rs`)
//!  NNNNNNNN.checkpoint  head | a copy of a machine (`checkpoint/clone.rs`): pages, then a checkpoint; every message has its checksum
//!  NNNNNNNN.log         a log file (`rdma_log::file`) whose description is a `LogHead`, in JSON
//!
//!  head:  0 magic (8)       8 version (u32)   12 CRC-32C of the other bytes of the head (u32)
//!        16 recording (u64) 24 number of the segment (u64), 0 in `machine`
//!        32 bytes of the body (u64), 0 where its end shows     40 CRC-32C of the body (u32), 0 as well     44 zero (u32)
//! ```
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// Grows with every change of a layout.
pub(super) const VERSION: u32 = 1;

/// Bytes of a head.
pub(super) const HEAD: usize = 48;

/// The first bytes of a file say what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The machine's description.
    Machine,
    /// A checkpoint.
    Checkpoint,
}

impl Kind {
    fn magic(self) -> [u8; 8] {
        match self {
            Self::Machine => *b"DOPLFLTM",
            Self::Checkpoint => *b"DOPLFLTC",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Machine => "description of a recorded machine",
            Self::Checkpoint => "checkpoint of a recording",
        }
    }
}

/// What a head says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// Drawn when the recording began: its files belong together.
    pub(super) recording: u64,
    /// Of the segment.
    pub(super) segment: u64,
    /// Bytes that follow; 0 where their end shows.
    pub(super) length: u64,
    /// Their checksum; 0 where they have checksums of their own.
    pub(super) checksum: u32,
}

impl Head {
    pub(super) fn encode(&self, kind: Kind) -> [u8; HEAD] {
        let mut bytes = [0; HEAD];
        bytes[..8].copy_from_slice(&kind.magic());
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.recording.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.segment.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.length.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.checksum.to_le_bytes());
        let checksum = checksum(&bytes);
        bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads one; an error says what is wrong, for people.
    pub(super) fn decode(kind: Kind, bytes: &[u8]) -> Result<Self, String> {
        let short = || format!("this is no {}: it has {} bytes", kind.name(), bytes.len());
        let bytes: &[u8; HEAD] = bytes.first_chunk().ok_or_else(short)?;
        if bytes[..8] != kind.magic() {
            return Err(format!(
                "this is no {}: it does not begin as one",
                kind.name()
            ));
        }
        let word32 =
            |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let word =
            |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        if word32(8) != VERSION {
            return Err(format!(
                "it has version {}, this program reads {VERSION}: replay it with the version that wrote it",
                word32(8)
            ));
        }
        let found = checksum(bytes);
        if word32(12) != found || word32(44) != 0 {
            return Err(format!(
                "its head is damaged: checksum {found:08x}, where it says {:08x}",
                word32(12)
            ));
        }
        Ok(Self {
            recording: word(16),
            segment: word(24),
            length: word(32),
            checksum: word32(40),
        })
    }
}

fn checksum(head: &[u8; HEAD]) -> u32 {
    rdma_log::crc32c_append(rdma_log::crc32c(&head[..12]), &head[16..])
}

/// What stands at the head of a segment's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LogHead {
    /// As in the other files.
    pub(super) recording: u64,
    /// Of the segment.
    pub(super) segment: u64,
    /// Where it begins: the last sync point before its first entry.
    pub(super) position: u64,
    /// It begins at power-on, and has no checkpoint.
    pub(super) at_power_on: bool,
    /// Entries of the events lane in the log before this one.
    pub(super) before: u64,
}

impl LogHead {
    pub(super) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain fields always encode")
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(bytes).map_err(|error| {
            format!("this log is of no recording: its description is none: {error}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_survives_and_every_flipped_bit_is_noticed() {
        let head = Head {
            recording: 0x0123_4567_89ab_cdef,
            segment: 9,
            length: 4096,
            checksum: 77,
        };
        let bytes = head.encode(Kind::Checkpoint);
        assert_eq!(Head::decode(Kind::Checkpoint, &bytes), Ok(head));
        assert!(Head::decode(Kind::Machine, &bytes).is_err());
        for cut in 0..HEAD {
            assert!(
                Head::decode(Kind::Checkpoint, &bytes[..cut]).is_err(),
                "{cut}"
            );
        }
        for bit in 0..HEAD * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Head::decode(Kind::Checkpoint, &bad).is_err(), "bit {bit}");
        }
    }
}
