//! A log file: the very entries of the wire, behind one header.
//!
//! | offset | bytes | field |
//! | --- | --- | --- |
//! | 0 | 8 | magic `rdmalogF` |
//! | 8 | 4 | version (1) |
//! | 12 | 4 | length of the description in bytes |
//! | 16 | 16 | nonce: seeds the stamps and checksums of the entries |
//! | 32 | 4 | CRC-32C of the description |
//! | 36 | 4 | CRC-32C of bytes 0 to 35 |
//! | 40 | … | description: what the entries belong to, in the caller's words |
//! | | … | entries, header and payload as in [`entry`], without gaps or pads |
//!
//! The lanes are interleaved as they were written; the stamp tells the lane. Each lane starts at number 1 and misses
//! none. The end is the last whole entry: a file has no trailer, so that one cut anywhere is of use up to there. It
//! cannot show that whole entries are missing at its end.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use thiserror::Error;

use crate::entry::{
    self, Entry, Fault, Field, HEADER_LEN, Head, Header, Keys, Kind, LAPS, Lane, MAX_PAYLOAD,
    Marks, Nonce, Seq, Stamp, encode,
};

const MAGIC: [u8; 8] = *b"rdmalogF";

/// The version of the format.
pub const VERSION: u32 = 1;

/// The longest description in bytes: room for a kernel and its initial RAM disk.
pub const MAX_DESCRIPTION: usize = 256 << 20;

const FILE_HEADER: usize = 40;

/// Why a log file cannot be written or read.
#[derive(Debug, Error)]
pub enum LogFileError {
    /// It is no log file.
    #[error("not a log file: it does not start with \"rdmalogF\"")]
    Magic,
    /// It is one of another version.
    #[error("this log file has version {found}, this program reads version {VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// The header or the description is damaged.
    #[error("the log file's {what} is damaged: checksum {found:#x}, expected {expected:#x}")]
    Header {
        /// Header or description.
        what: &'static str,
        /// The checksum of what is there.
        expected: u32,
        /// The checksum noted.
        found: u32,
    },
    /// A description or payload that is too long for the format.
    #[error("a {what} of {len} bytes is too long for a log file, which takes {max}")]
    TooLarge {
        /// Description or payload.
        what: &'static str,
        /// Its length in bytes.
        len: u64,
        /// The bound in bytes.
        max: usize,
    },
    /// The file ends in the middle of something. What came before is good.
    #[error(
        "the log file ends at byte {end}, within what starts at byte {start}; all before that is whole"
    )]
    Cut {
        /// Where the unfinished entry, or header, starts.
        start: u64,
        /// The length of the file in bytes.
        end: u64,
    },
    /// Bytes that must be an entry are none.
    #[error("the log file is corrupt at byte {offset}: {fault}")]
    Corrupt {
        /// Where the entry starts.
        offset: u64,
        /// The first field that differs.
        fault: Fault,
    },
    /// An entry that does not follow the last one of its lane in this file.
    #[error("entry {found} of the {lane} lane cannot be written: the file's next one is {next}")]
    OutOfOrder {
        /// The lane.
        lane: Lane,
        /// The number that is due.
        next: Seq,
        /// The number given.
        found: Seq,
    },
    /// The file cannot be read or written.
    #[error("cannot {what} the log file: {error}")]
    Io {
        /// Open, read or write.
        what: &'static str,
        /// What the system said.
        error: io::Error,
    },
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> LogFileError {
    move |error| LogFileError::Io { what, error }
}

/// Writes a log file. Give it a [`BufWriter`](std::io::BufWriter): it writes entry by entry.
#[derive(Debug)]
pub struct LogFileWriter<W: Write> {
    to: W,
    keys: Keys,
    offset: u64,
    last: [Seq; 2],
}

impl<W: Write> LogFileWriter<W> {
    /// Starts a file: writes the header and the description.
    ///
    /// For the entries of a ring ([`write`](LogFileWriter::write)) the nonce is the connection's; for entries that are
    /// made here ([`append`](LogFileWriter::append)) a [random](Nonce::random) one.
    ///
    /// # Errors
    /// [`LogFileError::TooLarge`], [`LogFileError::Io`].
    pub fn create(mut to: W, nonce: Nonce, description: &[u8]) -> Result<Self, LogFileError> {
        if description.len() > MAX_DESCRIPTION {
            return Err(LogFileError::TooLarge {
                what: "description",
                len: description.len() as u64,
                max: MAX_DESCRIPTION,
            });
        }
        let mut header = [0; FILE_HEADER];
        header[0..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&(description.len() as u32).to_le_bytes());
        header[16..32].copy_from_slice(&nonce.0);
        header[32..36].copy_from_slice(&crate::crc32c(description).to_le_bytes());
        let crc = crate::crc32c(&header[..36]);
        header[36..40].copy_from_slice(&crc.to_le_bytes());
        to.write_all(&header)
            .and_then(|()| to.write_all(description))
            .map_err(failed("write"))?;
        Ok(LogFileWriter {
            to,
            keys: Keys::new(&nonce),
            offset: (FILE_HEADER + description.len()) as u64,
            last: [Seq::ZERO; 2],
        })
    }

    /// Writes an entry as it came, checked, from a ring with this file's nonce. Its stamp is looked at, which tells an entry of another
    /// nonce; its checksum was found right when it was taken out of the ring, and is not computed once more.
    ///
    /// # Errors
    /// [`LogFileError::OutOfOrder`], [`LogFileError::Corrupt`] for an entry of another nonce, [`LogFileError::Io`].
    pub fn write(&mut self, entry: &Entry<'_>) -> Result<(), LogFileError> {
        let next = self.last[entry.lane().index()].next();
        if entry.seq() != next {
            return Err(LogFileError::OutOfOrder {
                lane: entry.lane(),
                next,
                found: entry.seq(),
            });
        }
        let (header, _) = split(entry.raw());
        let (lane, lap, kind) = (entry.lane(), entry.head().lap, Kind::Entry);
        let expected = self.keys.stamp(Stamp { lane, lap, kind });
        if header.stamp != expected {
            return Err(LogFileError::Corrupt {
                offset: self.offset,
                fault: Fault::new(Field::Stamp, expected, header.stamp),
            });
        }
        self.put(lane, next, entry.raw())
    }

    /// Makes an entry with the lane's next number and writes it.
    ///
    /// # Errors
    /// [`LogFileError::TooLarge`], [`LogFileError::Io`].
    pub fn append(
        &mut self,
        lane: Lane,
        payload: &[u8],
        marks: Marks,
    ) -> Result<Seq, LogFileError> {
        if payload.len() > MAX_PAYLOAD {
            return Err(LogFileError::TooLarge {
                what: "payload",
                len: payload.len() as u64,
                max: MAX_PAYLOAD,
            });
        }
        let seq = self.last[lane.index()].next();
        let head = Head {
            lane,
            lap: 0,
            seq,
            marks,
        };
        self.put(lane, seq, &encode(&self.keys, &head, payload))?;
        Ok(seq)
    }

    fn put(&mut self, lane: Lane, seq: Seq, raw: &[u8]) -> Result<(), LogFileError> {
        self.to.write_all(raw).map_err(failed("write"))?;
        self.offset += raw.len() as u64;
        self.last[lane.index()] = seq;
        Ok(())
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.offset
    }

    /// The number of the last entry written to a lane.
    pub fn last(&self, lane: Lane) -> Seq {
        self.last[lane.index()]
    }

    /// Hands what was buffered to the system.
    ///
    /// # Errors
    /// [`LogFileError::Io`].
    pub fn flush(&mut self) -> Result<(), LogFileError> {
        self.to.flush().map_err(failed("write"))
    }

    /// Ends writing and returns what was written to, flushed.
    ///
    /// # Errors
    /// [`LogFileError::Io`].
    pub fn finish(mut self) -> Result<W, LogFileError> {
        self.flush()?;
        Ok(self.to)
    }
}

fn split(raw: &[u8]) -> (Header, &[u8]) {
    let (head, payload) = raw.split_at(HEADER_LEN);
    let mut bytes = [0; HEADER_LEN];
    bytes.copy_from_slice(head);
    (Header::from_bytes(&bytes), payload)
}

/// Reads a log file, entry by entry.
#[derive(Debug)]
pub struct LogFileReader<R: Read> {
    from: R,
    nonce: Nonce,
    keys: Keys,
    description: Vec<u8>,
    offset: u64,
    last: [Seq; 2],
    lap: [u32; 2],
    copy: Vec<u8>,
}

/// An entry and where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileEntry<'a> {
    /// Where it starts, in bytes from the start of the file.
    pub offset: u64,
    /// The entry, checked.
    pub entry: Entry<'a>,
}

impl LogFileReader<BufReader<File>> {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// As for [`new`](LogFileReader::new).
    pub fn open(path: &Path) -> Result<Self, LogFileError> {
        let file = File::open(path).map_err(failed("open"))?;
        LogFileReader::new(BufReader::new(file))
    }
}

impl<R: Read> LogFileReader<R> {
    /// Reads the header and the description.
    ///
    /// # Errors
    /// [`LogFileError::Magic`], [`LogFileError::Version`], [`LogFileError::Header`], [`LogFileError::TooLarge`],
    /// [`LogFileError::Cut`], [`LogFileError::Io`].
    pub fn new(mut from: R) -> Result<Self, LogFileError> {
        let mut bytes = Vec::with_capacity(FILE_HEADER);
        take(&mut from, &mut bytes, FILE_HEADER, 0)?;
        let u32_at =
            |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        if bytes[0..8] != MAGIC {
            return Err(LogFileError::Magic);
        }
        if u32_at(8) != VERSION {
            return Err(LogFileError::Version { found: u32_at(8) });
        }
        let damaged = |what, expected, found| {
            if expected == found {
                return Ok(());
            }
            Err(LogFileError::Header {
                what,
                expected,
                found,
            })
        };
        damaged("header", crate::crc32c(&bytes[..36]), u32_at(36))?;
        let len = u32_at(12) as usize;
        if len > MAX_DESCRIPTION {
            return Err(LogFileError::TooLarge {
                what: "description",
                len: len as u64,
                max: MAX_DESCRIPTION,
            });
        }
        let mut description = Vec::new();
        take(&mut from, &mut description, len, 0).map_err(|error| match error {
            LogFileError::Cut { start, end } => LogFileError::Cut {
                start,
                end: end + FILE_HEADER as u64,
            },
            error => error,
        })?;
        damaged("description", crate::crc32c(&description), u32_at(32))?;
        let mut nonce = Nonce([0; 16]);
        nonce.0.copy_from_slice(&bytes[16..32]);
        Ok(LogFileReader {
            from,
            nonce,
            keys: Keys::new(&nonce),
            offset: (FILE_HEADER + description.len()) as u64,
            description,
            last: [Seq::ZERO; 2],
            lap: [0; 2],
            copy: Vec::new(),
        })
    }

    /// What the entries belong to, as the caller of [`LogFileWriter::create`] put it.
    pub fn description(&self) -> &[u8] {
        &self.description
    }

    /// The file's nonce.
    pub fn nonce(&self) -> Nonce {
        self.nonce
    }

    /// Where the next entry starts, in bytes from the start of the file. After an error: where the good part ends.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The number of the last entry of a lane that was read.
    pub fn last(&self, lane: Lane) -> Seq {
        self.last[lane.index()]
    }

    /// The next entry; `None` at the end of the file.
    ///
    /// # Errors
    /// [`LogFileError::Cut`], [`LogFileError::Corrupt`], [`LogFileError::Io`]. All entries before are good; there is no
    /// going on behind it.
    #[expect(
        clippy::should_implement_trait,
        reason = "the entry borrows the reader's buffer, which an Iterator cannot say"
    )]
    pub fn next(&mut self) -> Result<Option<FileEntry<'_>>, LogFileError> {
        let offset = self.offset;
        self.copy.clear();
        match take(&mut self.from, &mut self.copy, HEADER_LEN, offset) {
            Err(LogFileError::Cut { start, end }) if start == end => return Ok(None),
            other => other?,
        }
        let corrupt = |fault| LogFileError::Corrupt { offset, fault };
        let (header, _) = split(&self.copy);
        let stamp = self.keys.unstamp(header.stamp);
        let lane = stamp.lane.index();
        // An entry is at most a quarter of its lane, so no lap is skipped.
        let follows = [self.lap[lane], (self.lap[lane] + 1) % LAPS].contains(&stamp.lap);
        if stamp.kind != Kind::Entry || !follows {
            let expected = self.keys.stamp(entry::Stamp {
                kind: Kind::Entry,
                lap: self.lap[lane],
                lane: stamp.lane,
            });
            return Err(corrupt(Fault::new(Field::Stamp, expected, header.stamp)));
        }
        if header.len as usize > MAX_PAYLOAD {
            let fault = Fault::new(Field::Length, MAX_PAYLOAD as u64, header.len);
            return Err(corrupt(fault));
        }
        take(&mut self.from, &mut self.copy, header.len as usize, offset)?;
        let payload = &self.copy[HEADER_LEN..];
        self.keys.check(&header, payload).map_err(corrupt)?;
        let next = self.last[lane].next();
        let head = entry::head(&header, stamp, next).map_err(corrupt)?;
        self.last[lane] = next;
        self.lap[lane] = stamp.lap;
        self.offset += self.copy.len() as u64;
        Ok(Some(FileEntry {
            offset,
            entry: Entry {
                head,
                raw: &self.copy,
            },
        }))
    }
}

/// Appends exactly `len` bytes to what was taken of the thing at `start`. The buffer grows with what is there, not
/// with what a length claims.
fn take(
    from: &mut impl Read,
    to: &mut Vec<u8>,
    len: usize,
    start: u64,
) -> Result<(), LogFileError> {
    let got = from
        .by_ref()
        .take(len as u64)
        .read_to_end(to)
        .map_err(failed("read"))?;
    if got < len {
        let end = start + to.len() as u64;
        return Err(LogFileError::Cut { start, end });
    }
    Ok(())
}

#[cfg(all(test, not(loom)))]
mod tests;
