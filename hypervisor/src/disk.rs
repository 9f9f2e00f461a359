//! The words between a guest's disk and the image behind it: what the device asks, and what came of it.
//!
//! ```text
//!  devices/virtio/blk ── Request (an output) ──▶ backends/disk ──▶ image
//!          ▲                                          │
//!          └── Done (a logged input, staged ahead) ◀──┘
//! ```
//! A *done* crosses the log's inputs lane in parts, which follow each other:
//! 1 if it is the last (1) | bytes; the bytes of all parts together: number (8) | status (1) | data.
#![forbid(unsafe_code)]

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bytes of a sector, in which disks are counted.
pub const SECTOR: u64 = 512;

/// The most data of one request, in bytes. Larger ones are refused.
pub const DATA_MAX: usize = 512 << 10;

/// Bytes before the data of a [`Done`].
const DONE_HEAD: usize = 9;

/// Bytes of a request in an interval before its data.
pub const REQUEST_HEAD: usize = 17;

/// A request's number, from 1 in the order in which they were made.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct RequestNumber(pub u64);

/// Bytes that go to or come from a disk. Written as hexadecimal digits where the devices' state is text.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Data(pub Vec<u8>);

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl Serialize for Data {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let digit = |value: u8| char::from_digit(value.into(), 16).unwrap_or('0');
        let text: String = self
            .0
            .iter()
            .flat_map(|byte| [digit(byte >> 4), digit(byte & 15)])
            .collect();
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Data {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let pair = |pair: &[u8]| match *pair {
            [high, low] => Some((digit(high)? << 4 | digit(low)?) as u8),
            _ => None,
        };
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(pair).collect();
        bytes
            .map(Self)
            .ok_or_else(|| serde::de::Error::custom("these are no hexadecimal bytes"))
    }
}

/// What is asked of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Operation {
    /// Read so many bytes from this sector on.
    Read {
        /// The first sector.
        sector: u64,
        /// Bytes: whole sectors, at most [`DATA_MAX`].
        length: u32,
    },
    /// Write these bytes from this sector on.
    Write {
        /// The first sector.
        sector: u64,
        /// The bytes as they were when the guest asked: whole sectors, at most [`DATA_MAX`].
        data: Data,
        /// Done only once it survives the loss of power.
        durable: bool,
    },
    /// Let everything that was written before survive the loss of power.
    Flush,
}

/// One request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Request {
    /// Its number.
    pub number: RequestNumber,
    /// What is asked.
    pub operation: Operation,
}

impl Request {
    /// Bytes of data that it moves.
    #[must_use]
    pub fn length(&self) -> usize {
        match &self.operation {
            Operation::Read { length, .. } => *length as usize,
            Operation::Write { data, .. } => data.0.len(),
            Operation::Flush => 0,
        }
    }

    /// What it writes; nothing unless it is a write.
    #[must_use]
    pub fn written(&self) -> &[u8] {
        match &self.operation {
            Operation::Write { data, .. } => &data.0,
            Operation::Read { .. } | Operation::Flush => &[],
        }
    }

    /// Everything but the data, in a fixed number of bytes: for checksums.
    #[must_use]
    pub fn head(&self) -> [u8; 21] {
        let (kind, sector) = match self.operation {
            Operation::Read { sector, .. } => (0, sector),
            Operation::Write {
                sector,
                durable: false,
                ..
            } => (1, sector),
            Operation::Write { sector, .. } => (3, sector),
            Operation::Flush => (2, 0),
        };
        let mut head = [kind; 21];
        head[1..9].copy_from_slice(&self.number.0.to_le_bytes());
        head[9..17].copy_from_slice(&sector.to_le_bytes());
        head[17..].copy_from_slice(&(self.length() as u32).to_le_bytes());
        head
    }

    /// The request as an interval of checkpoints carries it: number (8), kind (1: 1 write, 2 durable write, 3 flush), sector (8), data. A read
    /// changes nothing, and has no such form.
    #[must_use]
    pub fn encode(&self) -> Option<Vec<u8>> {
        let (kind, sector) = match self.operation {
            Operation::Read { .. } => return None,
            Operation::Write {
                sector, durable, ..
            } => (1 + u8::from(durable), sector),
            Operation::Flush => (3, 0),
        };
        let mut bytes = Vec::with_capacity(REQUEST_HEAD + self.written().len());
        bytes.extend_from_slice(&self.number.0.to_le_bytes());
        bytes.push(kind);
        bytes.extend_from_slice(&sector.to_le_bytes());
        bytes.extend_from_slice(self.written());
        Some(bytes)
    }

    /// Reads what [`Request::encode`] wrote; nothing if no such bytes were.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (head, data) = bytes.split_at_checked(REQUEST_HEAD)?;
        let word = |at: usize| head[at..at + 8].try_into().map(u64::from_le_bytes).ok();
        let whole = !data.is_empty() && data.len() <= DATA_MAX;
        let sector = word(9)?;
        let operation = match head[8] {
            kind @ (1 | 2) if whole && (data.len() as u64).is_multiple_of(SECTOR) => {
                Operation::Write {
                    sector,
                    data: Data(data.to_vec()),
                    durable: kind == 2,
                }
            }
            3 if data.is_empty() && sector == 0 => Operation::Flush,
            _ => return None,
        };
        Some(Self {
            number: RequestNumber(word(0)?),
            operation,
        })
    }

    /// Where it works; none for a flush.
    #[must_use]
    pub fn extent(&self) -> Option<Extent> {
        let (sector, writes) = match self.operation {
            Operation::Read { sector, .. } => (sector, false),
            Operation::Write { sector, .. } => (sector, true),
            Operation::Flush => return None,
        };
        Some(Extent::new(sector, self.length(), writes))
    }
}

/// A part of a disk that a request works at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    from: u64,
    to: u64,
    writes: bool,
}

impl Extent {
    /// So many bytes from this sector on.
    #[must_use]
    pub fn new(sector: u64, length: usize, writes: bool) -> Self {
        let from = sector.saturating_mul(SECTOR);
        let to = from.saturating_add(length as u64);
        Self { from, to, writes }
    }

    /// Whether the outcome depends on which of the two is done first.
    #[must_use]
    pub fn conflicts(self, other: Self) -> bool {
        (self.writes || other.writes) && self.from < other.to && other.from < self.to
    }

    /// Whether it is whole sectors of a disk of so many.
    #[must_use]
    pub fn is_within(self, sectors: u64) -> bool {
        (self.to - self.from).is_multiple_of(SECTOR) && self.to <= sectors.saturating_mul(SECTOR)
    }
}

/// How a request came out, as the guest's driver is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// It was done.
    Good,
    /// The disk failed.
    Error,
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// The request's number.
    pub number: RequestNumber,
    /// How it came out.
    pub status: Status,
    /// What was read.
    pub data: Data,
}

/// Why bytes are no [`Done`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadDone {
    /// Too few or too many.
    #[error("what came of a disk request has {found} bytes")]
    Length {
        /// How many.
        found: usize,
    },
    /// A value that nobody writes.
    #[error("what came of a disk request has {field} {found}")]
    Value {
        /// The field.
        field: &'static str,
        /// The value.
        found: u8,
    },
}

impl Done {
    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(DONE_HEAD + self.data.0.len());
        bytes.extend_from_slice(&self.number.0.to_le_bytes());
        bytes.push(match self.status {
            Status::Good => 0,
            Status::Error => 1,
        });
        bytes.extend_from_slice(&self.data.0);
        bytes
    }

    /// Reads what [`Done::encode`] wrote.
    ///
    /// # Errors
    /// [`BadDone`].
    pub fn decode(bytes: &[u8]) -> Result<Self, BadDone> {
        let length = BadDone::Length { found: bytes.len() };
        let (head, data) = bytes.split_first_chunk::<DONE_HEAD>().ok_or(length)?;
        if data.len() > DATA_MAX {
            return Err(length);
        }
        let [number @ .., status] = *head;
        Ok(Self {
            number: RequestNumber(u64::from_le_bytes(number)),
            status: match status {
                0 => Status::Good,
                1 => Status::Error,
                found => {
                    return Err(BadDone::Value {
                        field: "status",
                        found,
                    });
                }
            },
            data: Data(data.to_vec()),
        })
    }
}

/// Puts together what came in parts.
#[derive(Debug, Default)]
pub struct Assembler {
    bytes: Vec<u8>,
}

impl Assembler {
    /// Takes the next part; the whole with the last one.
    ///
    /// # Errors
    /// [`BadDone`]; the assembler is then of no further use.
    pub fn part(&mut self, part: &[u8]) -> Result<Option<Done>, BadDone> {
        let Some((&last, bytes)) = part.split_first() else {
            return Err(BadDone::Length { found: 0 });
        };
        let found = self.bytes.len() + bytes.len();
        if found > DONE_HEAD + DATA_MAX {
            return Err(BadDone::Length { found });
        }
        self.bytes.extend_from_slice(bytes);
        match last {
            0 => Ok(None),
            1 => {
                let done = Done::decode(&self.bytes)?;
                self.bytes.clear();
                Ok(Some(done))
            }
            found => Err(BadDone::Value {
                field: "mark of the last part",
                found,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(operation: Operation) -> Request {
        Request {
            number: RequestNumber(7),
            operation,
        }
    }

    fn write(sector: u64, sectors: usize) -> Request {
        request(Operation::Write {
            sector,
            data: Data(vec![1; sectors * 512]),
            durable: false,
        })
    }

    fn read(sector: u64, sectors: u32) -> Request {
        request(Operation::Read {
            sector,
            length: sectors * 512,
        })
    }

    #[test]
    fn only_overlapping_requests_of_which_one_writes_conflict() {
        let conflict = |a: &Request, b: &Request| match (a.extent(), b.extent()) {
            (Some(a), Some(b)) => a.conflicts(b) && b.conflicts(a),
            _ => false,
        };
        assert!(conflict(&write(8, 2), &write(9, 1)));
        assert!(conflict(&write(8, 2), &read(9, 4)));
        assert!(conflict(&read(0, 9), &write(8, 1)));
        assert!(!conflict(&write(8, 2), &write(10, 1)));
        assert!(!conflict(&read(8, 2), &read(8, 2)));
        assert!(!conflict(&write(8, 2), &request(Operation::Flush)));
        assert!(!conflict(&write(u64::MAX, 1), &write(0, 1)));
    }

    #[test]
    fn an_extent_is_whole_sectors_of_the_disk() {
        assert!(Extent::new(7, 512, true).is_within(8));
        assert!(!Extent::new(7, 1024, true).is_within(8));
        assert!(!Extent::new(0, 100, false).is_within(8));
        assert!(!Extent::new(u64::MAX, 512, false).is_within(8));
        assert!(!Extent::new(u64::MAX / 512 + 1, 512, false).is_within(u64::MAX / 512));
    }

    #[test]
    fn a_done_survives_in_parts_of_any_size() {
        let done = Done {
            number: RequestNumber(u64::MAX),
            status: Status::Good,
            data: Data((0..2000u32).map(|n| n as u8).collect()),
        };
        let bytes = done.encode();
        for size in [1, 8, 9, 500, bytes.len()] {
            let mut assembler = Assembler::default();
            let parts = bytes.chunks(size);
            let count = parts.len();
            for (n, part) in parts.enumerate() {
                let mut message = vec![u8::from(n + 1 == count)];
                message.extend_from_slice(part);
                let whole = assembler.part(&message).unwrap();
                assert_eq!(whole, (n + 1 == count).then(|| done.clone()));
            }
        }
    }

    #[test]
    fn what_nobody_writes_is_refused() {
        let bad = |parts: &[&[u8]]| {
            let mut assembler = Assembler::default();
            let mut outcome = Ok(None);
            for part in parts {
                outcome = assembler.part(part);
            }
            outcome.unwrap_err()
        };
        assert_eq!(bad(&[&[]]), BadDone::Length { found: 0 });
        assert_eq!(bad(&[&[1, 0, 0]]), BadDone::Length { found: 2 });
        assert!(matches!(bad(&[&[2]]), BadDone::Value { found: 2, .. }));
        let status = [1, 0, 0, 0, 0, 0, 0, 0, 0, 9];
        assert!(matches!(bad(&[&status]), BadDone::Value { found: 9, .. }));
        let long = vec![0; DATA_MAX + 1];
        assert!(matches!(bad(&[&long, &long]), BadDone::Length { .. }));
    }

    #[test]
    fn data_survives_as_text_and_other_text_is_refused() {
        let data = Data(vec![0, 0xff, 0x1a]);
        let text = serde_json::to_string(&data).unwrap();
        assert_eq!(text, "\"00ff1a\"");
        assert_eq!(serde_json::from_str::<Data>(&text).unwrap(), data);
        for bad in ["\"0\"", "\"0g\"", "\"0é\"", "[1]"] {
            serde_json::from_str::<Data>(bad).unwrap_err();
        }
    }

    #[test]
    fn heads_tell_requests_apart() {
        let all = [
            write(8, 2),
            request(Operation::Write {
                sector: 8,
                data: Data(vec![1; 1024]),
                durable: true,
            }),
            read(8, 2),
            read(8, 3),
            read(9, 2),
            request(Operation::Flush),
        ];
        for (n, one) in all.iter().enumerate() {
            for other in &all[n + 1..] {
                assert_ne!(one.head(), other.head());
            }
        }
    }
}
