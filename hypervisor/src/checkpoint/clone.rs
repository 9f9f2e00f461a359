//! A copy of a running machine, over a stream: its pages in rounds while the guest runs on, then a checkpoint of what is left.
//!
//! ```text
//!  sender    all touched pages │ pages written meanwhile │ … fewer each round │ stop: checkpoint (delta), log goes on │
//!            ── pages, zeros ──▶ ── pages, zeros ─────────────────────────────▶ ── parts ──▶ the copy is whole
//! ```
//! Pages go straight into the receiver's memory: its machine has never run and is worth nothing before the checkpoint at the
//! end, which alone makes it one and is checked whole before anything of it is applied. Pages are read while the guest runs
//! and may be torn; each such page is in a later round.
//!
//! A message is a tag (u8), the length of its body (u32), its CRC-32C (u32) and the body:
//! pages (`P`: their numbers (u64), as many as there are pages, then their contents), zero pages (`Z`: runs of first and
//! count (u64)), a part of the checkpoint (`C`: number (u32), 1 if it is the last (u8), bytes). All little-endian. The blocks of a disk
//! (`backends/disk/copy.rs`) go before, in between and, the rest of them, before the checkpoint, in the same forms: `B` and `N`.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::ops::Range;
use std::sync::Arc;

use super::{CheckpointError, PART_BYTES, Restored, Shadow};
use crate::backends::disk::copy::{BLOCK, Blocks, Incoming};
use crate::machine::Machine;
use crate::memory::{DirtyPages, GuestRam, MemoryError, PAGE_SIZE, PageNumber};

const PAGES: u8 = b'P';
const ZEROS: u8 = b'Z';
const BLOCKS: u8 = b'B';
const NO_BLOCKS: u8 = b'N';
const PART: u8 = b'C';
const HEAD: usize = 9;
/// Pages in one message: a quarter of a MiB, large against a system call, small against a socket's buffer.
const PAGES_AT_ONCE: usize = 64;
/// Bytes that a page takes in its message.
const PAGE_BYTES: usize = 8 + PAGE_SIZE;
/// Runs of zero pages in one message.
const RUNS_AT_ONCE: usize = 1024;
const PART_HEAD: usize = 5;
/// How many times a machine's memory a copy may send. The recruiter's rounds are fewer than 60 whatever the guest writes (its
/// tests), each of everything at most; a peer that goes on for ever is refused by it.
const TIMES_MAX: u64 = 64;

const fn larger(a: usize, b: usize) -> usize {
    if a > b { a } else { b }
}

const BODY_MAX: usize = larger(PAGES_AT_ONCE * PAGE_BYTES, PART_BYTES + PART_HEAD);
const _: () = assert!(BODY_MAX >= RUNS_AT_ONCE * 16 && BODY_MAX < 1 << 20);

/// Why a machine could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum CloneError {
    /// The stream broke.
    #[error("the copy's connection broke after {bytes} bytes: {source}")]
    Stream {
        /// Bytes that had gone over it.
        bytes: u64,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A message that no sender writes.
    #[error(
        "the copy is unusable at byte {at}: {what}; is the other side a doppel of the same version?"
    )]
    Message {
        /// Where it begins.
        at: u64,
        /// What is wrong.
        what: String,
    },
    /// A page's place.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The checkpoint at the end.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// This side's disk image.
    #[error("this side's disk image fails: {0}")]
    Disk(std::io::Error),
}

/// Sends a running machine's pages.
#[derive(Debug)]
pub struct Sender<W> {
    to: W,
    ram: Arc<GuestRam>,
    bytes: u64,
    body: Vec<u8>,
}

impl<W: Write> Sender<W> {
    /// Sends this memory there.
    pub fn new(to: W, ram: Arc<GuestRam>) -> Self {
        Self {
            to,
            ram,
            bytes: 0,
            body: Vec::with_capacity(BODY_MAX),
        }
    }

    /// Bytes that have gone over the stream.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The stream.
    pub fn into_inner(self) -> W {
        self.to
    }

    /// Sends every page of these that was ever touched; returns how many.
    ///
    /// # Errors
    /// See [`CloneError`].
    pub fn touched(&mut self, pages: Range<u64>) -> Result<u64, CloneError> {
        let mut batch = Batch::default();
        let mut count = 0;
        let mut from = PageNumber(pages.start);
        while let Some(run) = self.ram.next_touched(from)? {
            for page in run.start..run.end.min(pages.end) {
                self.page(PageNumber(page), &mut batch)?;
                count += 1;
            }
            from = PageNumber(run.end);
            if from.0 >= pages.end {
                break;
            }
        }
        self.end(&mut batch)?;
        Ok(count)
    }

    /// Sends these pages; returns how many.
    ///
    /// # Errors
    /// See [`CloneError`].
    pub fn pages(&mut self, pages: &DirtyPages) -> Result<u64, CloneError> {
        let mut batch = Batch::default();
        let mut count = 0;
        let most = self.ram.pages();
        // KVM's bitmap is rounded up to whole words.
        for page in pages.iter().filter(|page| page.0 < most) {
            self.page(page, &mut batch)?;
            count += 1;
        }
        self.end(&mut batch)?;
        Ok(count)
    }

    /// Sends blocks of the disk.
    ///
    /// # Errors
    /// [`CloneError::Stream`].
    pub fn blocks(&mut self, blocks: &Blocks) -> Result<(), CloneError> {
        let numbers = blocks.numbers.chunks(PAGES_AT_ONCE);
        for (numbers, contents) in numbers.zip(blocks.contents.chunks(PAGES_AT_ONCE * BLOCK)) {
            self.body.clear();
            for number in numbers {
                self.body.extend_from_slice(&number.to_le_bytes());
            }
            self.body.extend_from_slice(contents);
            self.send(BLOCKS)?;
        }
        let mut runs: Vec<Range<u64>> = Vec::new();
        for &block in &blocks.zeros {
            match runs.last_mut().filter(|run| run.end == block) {
                Some(run) => run.end += 1,
                None => runs.push(block..block + 1),
            }
        }
        for runs in runs.chunks(RUNS_AT_ONCE) {
            self.body.clear();
            for run in runs {
                self.body.extend_from_slice(&run.start.to_le_bytes());
                let count = run.end - run.start;
                self.body.extend_from_slice(&count.to_le_bytes());
            }
            self.send(NO_BLOCKS)?;
        }
        Ok(())
    }

    /// Sends the checkpoint that ends the copy.
    ///
    /// # Errors
    /// [`CloneError::Stream`].
    pub fn checkpoint(&mut self, bytes: &[u8]) -> Result<(), CloneError> {
        let parts = bytes.chunks(PART_BYTES);
        let last = parts.len() - 1;
        for (number, part) in parts.enumerate() {
            self.body.clear();
            self.body.extend_from_slice(&(number as u32).to_le_bytes());
            self.body.push((number == last).into());
            self.body.extend_from_slice(part);
            self.send(PART)?;
        }
        self.push()
    }

    fn page(&mut self, page: PageNumber, batch: &mut Batch) -> Result<(), CloneError> {
        let mut content = [0; PAGE_SIZE];
        self.ram.read_page(page, &mut content)?;
        if content == [0; PAGE_SIZE] {
            match batch.zeros.last_mut().filter(|run| run.end == page.0) {
                Some(run) => run.end += 1,
                None => batch.zeros.push(page.0..page.0 + 1),
            }
        } else {
            batch.numbers.push(page);
            batch.contents.extend_from_slice(&content);
        }
        if batch.numbers.len() == PAGES_AT_ONCE || batch.zeros.len() == RUNS_AT_ONCE {
            self.flush(batch)?;
        }
        Ok(())
    }

    fn end(&mut self, batch: &mut Batch) -> Result<(), CloneError> {
        self.flush(batch)?;
        self.push()
    }

    /// Nothing waits in this side's buffers.
    ///
    /// # Errors
    /// [`CloneError::Stream`].
    pub fn push(&mut self) -> Result<(), CloneError> {
        let bytes = self.bytes;
        let broke = |source| CloneError::Stream { bytes, source };
        self.to.flush().map_err(broke)
    }

    fn flush(&mut self, batch: &mut Batch) -> Result<(), CloneError> {
        if !batch.zeros.is_empty() {
            self.body.clear();
            for run in batch.zeros.drain(..) {
                self.body.extend_from_slice(&run.start.to_le_bytes());
                let count = run.end - run.start;
                self.body.extend_from_slice(&count.to_le_bytes());
            }
            self.send(ZEROS)?;
        }
        if !batch.numbers.is_empty() {
            self.body.clear();
            for page in batch.numbers.drain(..) {
                self.body.extend_from_slice(&page.0.to_le_bytes());
            }
            self.body.append(&mut batch.contents);
            self.send(PAGES)?;
        }
        Ok(())
    }

    fn send(&mut self, tag: u8) -> Result<(), CloneError> {
        let mut head = [0; HEAD];
        head[0] = tag;
        head[1..5].copy_from_slice(&(self.body.len() as u32).to_le_bytes());
        head[5..].copy_from_slice(&rdma_log::crc32c(&self.body).to_le_bytes());
        let bytes = self.bytes;
        let broke = |source| CloneError::Stream { bytes, source };
        self.to.write_all(&head).map_err(broke)?;
        self.to.write_all(&self.body).map_err(broke)?;
        self.bytes += (HEAD + self.body.len()) as u64;
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Batch {
    zeros: Vec<Range<u64>>,
    numbers: Vec<PageNumber>,
    contents: Vec<u8>,
}

/// Makes of this machine, which has not run yet, the one that is being sent, and of this image that of its disk, if that is sent, too. After
/// an error they are of no further use.
///
/// # Errors
/// See [`CloneError`].
pub fn receive(
    from: impl Read,
    machine: &mut Machine,
    mut image: Option<&mut dyn Incoming>,
) -> Result<(Restored, u64), CloneError> {
    let mut shadow = Shadow::new(machine.pages());
    let mut messages = Messages {
        from,
        bytes: 0,
        body: Vec::new(),
    };
    let mut left = machine.pages().saturating_mul(TIMES_MAX);
    let blocks = image.as_ref().map_or(0, |image| image.blocks());
    let mut blocks_left = blocks.saturating_mul(TIMES_MAX);
    loop {
        let at = messages.bytes;
        let bad = |what: String| CloneError::Message { at, what };
        match messages.next()? {
            (PAGES, body) => pages(&machine.shared_ram(), body, &mut left).map_err(|e| e.at(at))?,
            (ZEROS, body) => zeros(&machine.shared_ram(), body, &mut left).map_err(|e| e.at(at))?,
            (tag @ (BLOCKS | NO_BLOCKS), body) => {
                let Some(image) = &mut image else {
                    return Err(bad("blocks of a disk that is not copied".into()));
                };
                let came = if tag == BLOCKS {
                    put_blocks(&mut **image, body, &mut blocks_left)
                } else {
                    put_zeros(&mut **image, body, &mut blocks_left)
                };
                came.map_err(|error| error.at(at))?;
            }
            (PART, body) => {
                let (head, bytes) = body
                    .split_at_checked(PART_HEAD)
                    .ok_or_else(|| bad("a part without a number".into()))?;
                let number = u32::from_le_bytes(head[..4].try_into().expect("four bytes"));
                shadow
                    .add(number, bytes)
                    .map_err(|error| CloneError::Checkpoint(error.into()))?;
                if head[4] != 0 {
                    let restored = machine.restore(&shadow.take())?;
                    return Ok((restored, messages.bytes));
                }
            }
            (tag, _) => return Err(bad(format!("a message of unknown kind {tag:#x}"))),
        }
    }
}

struct Messages<R> {
    from: R,
    bytes: u64,
    body: Vec<u8>,
}

impl<R: Read> Messages<R> {
    fn next(&mut self) -> Result<(u8, &[u8]), CloneError> {
        let at = self.bytes;
        let broke = |source| CloneError::Stream { bytes: at, source };
        let bad = |what: String| CloneError::Message { at, what };
        let mut head = [0; HEAD];
        self.from.read_exact(&mut head).map_err(broke)?;
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes"));
        let length = word(1) as usize;
        if length > BODY_MAX {
            return Err(bad(format!("{length} bytes, at most {BODY_MAX} can be")));
        }
        self.body.resize(length, 0);
        self.from.read_exact(&mut self.body).map_err(broke)?;
        let found = rdma_log::crc32c(&self.body);
        if found != word(5) {
            let expected = word(5);
            return Err(bad(format!(
                "checksum {found:08x}, where it says {expected:08x}"
            )));
        }
        self.bytes += (HEAD + length) as u64;
        Ok((head[0], &self.body))
    }
}

/// What is wrong with a message's body.
enum Bad {
    Memory(MemoryError),
    Disk(std::io::Error),
    Shape(String),
}

impl Bad {
    fn at(self, at: u64) -> CloneError {
        match self {
            Self::Memory(error) => error.into(),
            Self::Disk(error) => CloneError::Disk(error),
            Self::Shape(what) => CloneError::Message { at, what },
        }
    }
}

fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}

/// So many pages came, of those that may still come.
fn spend(left: &mut u64, came: u64) -> Result<(), Bad> {
    let over = || {
        Bad::Shape(format!(
            "more than {TIMES_MAX} times the memory, or the disk"
        ))
    };
    *left = left.checked_sub(came).ok_or_else(over)?;
    Ok(())
}

fn pages(ram: &GuestRam, body: &[u8], left: &mut u64) -> Result<(), Bad> {
    if !body.len().is_multiple_of(PAGE_BYTES) {
        return Err(Bad::Shape(format!("pages in {} bytes", body.len())));
    }
    spend(left, (body.len() / PAGE_BYTES) as u64)?;
    let (numbers, contents) = body.split_at(body.len() / PAGE_BYTES * 8);
    for (page, content) in numbers
        .chunks_exact(8)
        .zip(contents.chunks_exact(PAGE_SIZE))
    {
        write(ram, number(page), content)?;
    }
    Ok(())
}

fn zeros(ram: &GuestRam, body: &[u8], left: &mut u64) -> Result<(), Bad> {
    if !body.len().is_multiple_of(16) {
        return Err(Bad::Shape(format!("zero pages in {} bytes", body.len())));
    }
    let mut before = [0; PAGE_SIZE];
    for run in body.chunks_exact(16) {
        let (first, count) = (number(&run[..8]), number(&run[8..]));
        let end = first.checked_add(count).filter(|&end| end <= ram.pages());
        let Some(end) = end else {
            return Err(Bad::Shape(format!("{count} zero pages from {first}")));
        };
        spend(left, count)?;
        for page in first..end {
            ram.read_page(PageNumber(page), &mut before)
                .map_err(Bad::Memory)?;
            if before != [0; PAGE_SIZE] {
                write(ram, page, &[0; PAGE_SIZE])?;
            }
        }
    }
    Ok(())
}

fn put_blocks(image: &mut dyn Incoming, body: &[u8], left: &mut u64) -> Result<(), Bad> {
    const BYTES: usize = 8 + BLOCK;
    if !body.len().is_multiple_of(BYTES) {
        return Err(Bad::Shape(format!("blocks in {} bytes", body.len())));
    }
    let count = body.len() / BYTES;
    spend(left, count as u64)?;
    let (numbers, contents) = body.split_at(count * 8);
    let (contents, _) = contents.as_chunks::<BLOCK>();
    for (block, content) in numbers.chunks_exact(8).zip(contents) {
        put(image, number(block), content)?;
    }
    Ok(())
}

fn put_zeros(image: &mut dyn Incoming, body: &[u8], left: &mut u64) -> Result<(), Bad> {
    if !body.len().is_multiple_of(16) {
        return Err(Bad::Shape(format!("zero blocks in {} bytes", body.len())));
    }
    for run in body.chunks_exact(16) {
        let (first, count) = (number(&run[..8]), number(&run[8..]));
        let end = first
            .checked_add(count)
            .filter(|&end| end <= image.blocks());
        let Some(end) = end else {
            return Err(Bad::Shape(format!("{count} zero blocks from {first}")));
        };
        spend(left, count)?;
        for block in first..end {
            put(image, block, &[0; BLOCK])?;
        }
    }
    Ok(())
}

fn put(image: &mut dyn Incoming, block: u64, content: &[u8; BLOCK]) -> Result<(), Bad> {
    if block >= image.blocks() {
        return Err(Bad::Shape(format!("block {block} of {}", image.blocks())));
    }
    image.put(block, content).map_err(Bad::Disk)
}

fn write(ram: &GuestRam, page: u64, content: &[u8]) -> Result<(), Bad> {
    if page >= ram.pages() {
        return Err(Bad::Shape(format!("page {page} of {}", ram.pages())));
    }
    ram.write(PageNumber(page).address(), content)
        .map_err(Bad::Memory)
}

#[cfg(test)]
mod tests;
