//! The bytes of a checkpoint, version 3, or 4 where it has patches. All numbers are little-endian.
//!
//! ```text
//!   0 magic "DOPLCKPT"         32 position              64 flags (u32)  1: inputs may be handed in, 2: halted, 4: off
//!   8 version (u32)            40 digest                68 bytes of the CPU's state (u32)
//!  12 scope (u32)              48 log base: position    72 bytes of the devices' state (u32)
//!  16 bytes in all             56 log base: clock       76 staged frames (u32)
//!  24 pages of RAM                                      80 runs of zero pages    88 pages
//!     of an off machine the flags' second byte is its status
//!     version 4:              96 patched pages          104 bytes of patches
//!  96, 112 CPU | devices | frames: length (u32), bytes | runs: first, count (u64) | page numbers (u64)
//!     | patched pages: number (u64), CRC-32C of what the page holds then (u32) | pages of 4096 bytes | patches (patch.rs)
//!  at the end: CRC-32C of everything before (u32)
//! ```
//! Runs and page numbers of either kind ascend, and no page is in two of them. Only a delta has patches. Nothing is believed that is not checked: lengths against the
//! limits and the bytes there are, pages against RAM, all of it against the checksum.
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::ops::Range;

use super::patch::{self, PATCH_MAX, Patch, Told};
use crate::devices::{DISK_BYTES_MAX, DISK_DEPTH, MAX_FRAME};
use crate::digest::Digest;
use crate::entry::Base;
use crate::event::GuestTime;
use crate::memory::{PAGE_SIZE, PageNumber};
use crate::position::Position;

const MAGIC: [u8; 8] = *b"DOPLCKPT";
/// Grows with every change of the layout.
const VERSION: u32 = 4;
/// Of one without patches, which knows nothing of them.
const WHOLE: u32 = 3;
pub(super) const HEADER: usize = 96;
/// What a header has besides where there are patches.
const PATCH_HEADER: usize = 16;
/// Bytes of a patched page's number and checksum.
const PATCHED: usize = 12;
const CHECKSUM: usize = 4;
const INJECTABLE: u32 = 1;
const HALTED: u32 = 2;
const OFF: u32 = 4;
const STATUS_SHIFT: u32 = 8;

/// Room for the CPUs' state: some 1.6 KiB today, or 7 KiB for each of several.
const CPU_MAX: u64 = 96 << 10;
/// Room for the devices' state: some 3 KiB today, and what is under way at the disk, as text: two digits for a byte that is to be written, and
/// for each request a line on each of the buffers where its answer goes, of which a chain can have 256.
pub(crate) const DEVICES_MAX: u64 =
    (256 << 10) + 2 * DISK_BYTES_MAX as u64 + DISK_DEPTH as u64 * 256 * 64;
/// Frames that can be staged: as many as the stage holds, twice over.
pub const STAGED_MAX: u64 = 1024;

/// What a checkpoint says of pages that it does not name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// They are zero.
    Full,
    /// They are as they were.
    Delta,
}

/// Everything but pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The last sync point.
    pub position: Position,
    /// The rolling hash over all exits up to there.
    pub digest: Digest,
    /// Whether inputs that nobody asked for may be handed in.
    pub injectable: bool,
    /// Whether the guest waits in HLT for an interrupt.
    pub halted: bool,
    /// The guest has turned itself off, with this status.
    pub off: Option<u8>,
    /// What the log's next entry counts from.
    pub base: Base,
    /// The CPU's state.
    pub cpu: Vec<u8>,
    /// The devices' state.
    pub devices: Vec<u8>,
    /// Frames that were read from the world and not given to the guest yet, oldest first.
    pub staged: Vec<Vec<u8>>,
}

/// Why bytes are no checkpoint of this machine.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FormatError {
    /// Not the beginning of a checkpoint.
    #[error("this is no checkpoint: it does not begin as one")]
    Foreign,
    /// Another version.
    #[error(
        "a checkpoint of version {found}, this program reads {WHOLE} and {VERSION}: run the same version on both hosts"
    )]
    Version {
        /// The version found.
        found: u32,
    },
    /// Fewer or more bytes than it says.
    #[error("the checkpoint has {found} bytes, where it says {expected}")]
    Length {
        /// Bytes it says.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// A number that cannot be.
    #[error("the checkpoint's {field} is {found}, at most {limit} can be")]
    Limit {
        /// The field.
        field: &'static str,
        /// Its value.
        found: u64,
        /// The largest it can be.
        limit: u64,
    },
    /// Another RAM.
    #[error("a checkpoint of {found} pages of RAM, this machine has {expected}")]
    Ram {
        /// Pages of this machine.
        expected: u64,
        /// Pages it says.
        found: u64,
    },
    /// Pages out of order, twice, or outside RAM.
    #[error("the checkpoint's {field} are out of order or outside RAM at page {page}")]
    Pages {
        /// The list.
        field: &'static str,
        /// The first wrong one.
        page: u64,
    },
    /// No patch, or not as many bytes of patches as it says.
    #[error("the checkpoint's patch of page {page} is none")]
    Patch {
        /// The page.
        page: u64,
    },
    /// This machine's page is not the one that the patch is for.
    #[error(
        "the checkpoint's patch of page {page} does not make what its sender has: this side's copy of the page differs"
    )]
    Patched {
        /// The page.
        page: u64,
    },
    /// The bytes are not what was written.
    #[error("the checkpoint is corrupt: its checksum is {found:08x}, where it says {expected:08x}")]
    Checksum {
        /// What it says.
        expected: u32,
        /// What its bytes have.
        found: u32,
    },
}

/// The most bytes a checkpoint of so much RAM can have.
pub(super) fn limit(ram_pages: u64) -> u64 {
    let frames = STAGED_MAX * (4 + MAX_FRAME as u64);
    HEADER as u64
        + CPU_MAX
        + DEVICES_MAX
        + frames
        + PATCH_HEADER as u64
        + ram_pages * (PAGE_SIZE as u64 + 24)
        + CHECKSUM as u64
}

/// Bytes of what stands before the content of the pages.
pub(super) fn head_length(state: &State, zeros: &[Range<u64>], told: &Told) -> usize {
    let staged: usize = state.staged.iter().map(|frame| 4 + frame.len()).sum();
    let patches = if told.patched.is_empty() {
        0
    } else {
        PATCH_HEADER + told.patched.len() * PATCHED
    };
    HEADER
        + state.cpu.len()
        + state.devices.len()
        + staged
        + zeros.len() * 16
        + told.whole.len() * size_of::<u64>()
        + patches
}

/// What stands before the content of the pages in a checkpoint that names these.
pub(super) fn head(
    scope: Scope,
    ram_pages: u64,
    state: &State,
    zeros: &[Range<u64>],
    told: &Told,
) -> Vec<u8> {
    let length = head_length(state, zeros, told);
    let in_all = length + told.whole.len() * PAGE_SIZE + told.patch_bytes + CHECKSUM;
    let patched = !told.patched.is_empty();
    let mut bytes = Vec::with_capacity(length);
    let word32 = |bytes: &mut Vec<u8>, value: u32| bytes.extend_from_slice(&value.to_le_bytes());
    let word = |bytes: &mut Vec<u8>, value: u64| bytes.extend_from_slice(&value.to_le_bytes());
    bytes.extend_from_slice(&MAGIC);
    word32(&mut bytes, if patched { VERSION } else { WHOLE });
    word32(&mut bytes, matches!(scope, Scope::Delta).into());
    word(&mut bytes, in_all as u64);
    word(&mut bytes, ram_pages);
    word(&mut bytes, state.position.0);
    word(&mut bytes, state.digest.0);
    word(&mut bytes, state.base.position().0);
    word(&mut bytes, state.base.clock().0);
    let injectable = if state.injectable { INJECTABLE } else { 0 };
    let halted = if state.halted { HALTED } else { 0 };
    let off = state
        .off
        .map_or(0, |status| OFF | u32::from(status) << STATUS_SHIFT);
    word32(&mut bytes, injectable | halted | off);
    word32(&mut bytes, state.cpu.len() as u32);
    word32(&mut bytes, state.devices.len() as u32);
    word32(&mut bytes, state.staged.len() as u32);
    word(&mut bytes, zeros.len() as u64);
    word(&mut bytes, told.whole.len() as u64);
    debug_assert_eq!(bytes.len(), HEADER);
    if patched {
        word(&mut bytes, told.patched.len() as u64);
        word(&mut bytes, told.patch_bytes as u64);
    }
    bytes.extend_from_slice(&state.cpu);
    bytes.extend_from_slice(&state.devices);
    for frame in &state.staged {
        word32(&mut bytes, frame.len() as u32);
        bytes.extend_from_slice(frame);
    }
    for run in zeros {
        word(&mut bytes, run.start);
        word(&mut bytes, run.end - run.start);
    }
    for page in &told.whole {
        word(&mut bytes, page.0);
    }
    for (page, checksum) in &told.patched {
        word(&mut bytes, page.0);
        word32(&mut bytes, *checksum);
    }
    debug_assert_eq!(bytes.len(), length);
    bytes
}

/// A checkpoint's checksum, as its bytes go by: the head, then the pages.
#[derive(Clone, Copy, Debug)]
pub struct Seal(u32);

impl Seal {
    /// Bytes of it.
    pub const BYTES: usize = CHECKSUM;

    /// Of a checkpoint that begins with this.
    #[must_use]
    pub fn begin(head: &[u8]) -> Self {
        Self(rdma_log::crc32c(head))
    }

    /// This follows.
    pub fn add(&mut self, bytes: &[u8]) {
        self.0 = rdma_log::crc32c_append(self.0, bytes);
    }

    /// What stands at the end.
    #[must_use]
    pub fn bytes(self) -> [u8; Self::BYTES] {
        self.0.to_le_bytes()
    }
}

/// A whole checkpoint: its head, its pages, its checksum.
pub(super) fn sealed(head: Vec<u8>, contents: &[u8]) -> Vec<u8> {
    let mut seal = Seal::begin(&head);
    seal.add(contents);
    let mut bytes = head;
    bytes.reserve_exact(contents.len() + CHECKSUM);
    bytes.extend_from_slice(contents);
    bytes.extend_from_slice(&seal.bytes());
    bytes
}

/// A checkpoint that was checked: nothing that it says can be out of bounds.
#[derive(Debug)]
pub struct Image<'a> {
    /// What it says of pages that it does not name.
    pub scope: Scope,
    /// Everything but pages.
    pub state: State,
    zeros: Vec<Range<u64>>,
    numbers: Cow<'a, [u8]>,
    contents: Cow<'a, [u8]>,
    patches: Vec<Patch<'a>>,
}

struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    /// The next bytes; that there are enough was checked against the length.
    fn take(&mut self, count: u64) -> Result<&'a [u8], FormatError> {
        let found = self.0.len() as u64;
        let fits = usize::try_from(count)
            .ok()
            .and_then(|count| self.0.split_at_checked(count));
        let (taken, rest) = fits.ok_or(FormatError::Length {
            expected: count,
            found,
        })?;
        self.0 = rest;
        Ok(taken)
    }

    fn word32(&mut self) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(
            self.take(4)?.try_into().expect("four bytes were taken"),
        ))
    }

    fn word(&mut self) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(
            self.take(8)?.try_into().expect("eight bytes were taken"),
        ))
    }
}

fn bounded(field: &'static str, found: u64, limit: u64) -> Result<u64, FormatError> {
    if found <= limit {
        Ok(found)
    } else {
        Err(FormatError::Limit {
            field,
            found,
            limit,
        })
    }
}

/// How many bytes the checkpoint that begins like this will have.
pub(super) fn announced(header: &[u8], ram_pages: u64) -> Result<u64, FormatError> {
    let mut rest = Bytes(header);
    if rest.take(8)? != MAGIC {
        return Err(FormatError::Foreign);
    }
    let version = rest.word32()?;
    if !(WHOLE..=VERSION).contains(&version) {
        return Err(FormatError::Version { found: version });
    }
    // Only a delta has patches.
    let scope = u64::from(rest.word32()?);
    bounded("scope", scope, 1)?;
    if version == VERSION && scope == 0 {
        return Err(FormatError::Version { found: version });
    }
    let length = bounded("length", rest.word()?, limit(ram_pages))?;
    let pages = rest.word()?;
    if pages != ram_pages {
        return Err(FormatError::Ram {
            expected: ram_pages,
            found: pages,
        });
    }
    Ok(length)
}

impl<'a> Image<'a> {
    /// Checks a checkpoint for a machine with so much RAM.
    ///
    /// # Errors
    /// See [`FormatError`].
    pub fn parse(bytes: &'a [u8], ram_pages: u64) -> Result<Self, FormatError> {
        let header = bytes.get(..HEADER).ok_or(FormatError::Length {
            expected: (HEADER + CHECKSUM) as u64,
            found: bytes.len() as u64,
        })?;
        let length = announced(header, ram_pages)?;
        let found = bytes.len() as u64;
        if length != found || bytes.len() < HEADER + CHECKSUM {
            return Err(FormatError::Length {
                expected: length,
                found,
            });
        }
        let (body, checksum) = bytes.split_at(bytes.len() - CHECKSUM);
        let expected = u32::from_le_bytes(checksum.try_into().expect("four bytes"));
        let found = rdma_log::crc32c(body);
        if found != expected {
            return Err(FormatError::Checksum { expected, found });
        }
        let scope = match header[12] {
            0 => Scope::Full,
            _ => Scope::Delta,
        };
        let mut rest = Bytes(&body[32..]);
        let position = Position(rest.word()?);
        let digest = Digest(rest.word()?);
        let base = Base::new(Position(rest.word()?), GuestTime(rest.word()?));
        let flags = rest.word32()?;
        let off = (flags & OFF != 0).then_some((flags >> STATUS_SHIFT) as u8);
        let status = if off.is_some() {
            0xff << STATUS_SHIFT
        } else {
            0
        };
        let known = INJECTABLE | HALTED | OFF | status;
        if flags & !known != 0 || off.is_some() && flags & HALTED != 0 {
            return Err(FormatError::Limit {
                field: "flags",
                found: flags.into(),
                limit: known.into(),
            });
        }
        let cpu = bounded("CPU state", rest.word32()?.into(), CPU_MAX)?;
        let devices = bounded("device state", rest.word32()?.into(), DEVICES_MAX)?;
        let frames = bounded("number of staged frames", rest.word32()?.into(), STAGED_MAX)?;
        let runs = bounded("number of runs", rest.word()?, ram_pages)?;
        let pages = bounded("number of pages", rest.word()?, ram_pages)?;
        let [patched, patch_bytes] = if header[8..12] == VERSION.to_le_bytes() {
            let most = ram_pages * PATCH_MAX as u64;
            [
                bounded("number of patched pages", rest.word()?, ram_pages)?,
                bounded("bytes of patches", rest.word()?, most)?,
            ]
        } else {
            [0, 0]
        };
        let cpu = rest.take(cpu)?.to_vec();
        let devices = rest.take(devices)?.to_vec();
        let mut staged = Vec::with_capacity(frames as usize);
        for _ in 0..frames {
            let length = bounded("frame", rest.word32()?.into(), MAX_FRAME as u64)?;
            staged.push(rest.take(length)?.to_vec());
        }
        let zeros = zero_runs(rest.take(runs * 16)?, ram_pages)?;
        let numbers = rest.take(pages * 8)?;
        let patched = rest.take(patched * PATCHED as u64)?;
        let contents = rest.take(pages * PAGE_SIZE as u64)?;
        let patches = patches(patched, rest.take(patch_bytes)?)?;
        if !rest.0.is_empty() {
            return Err(FormatError::Length {
                expected: length - rest.0.len() as u64,
                found: length,
            });
        }
        let whole = || page_numbers(numbers);
        ascends("pages", whole(), &zeros, ram_pages)?;
        let patched = patches.iter().map(Patch::page);
        ascends("patched pages", patched.clone(), &zeros, ram_pages)?;
        let mut whole = whole().peekable();
        for page in patched {
            while whole.next_if(|whole| *whole < page).is_some() {}
            if whole.peek() == Some(&page) {
                return Err(FormatError::Pages {
                    field: "patched pages",
                    page: page.0,
                });
            }
        }
        Ok(Self {
            scope,
            state: State {
                position,
                digest,
                injectable: flags & INJECTABLE != 0,
                halted: flags & HALTED != 0,
                off,
                base,
                cpu,
                devices,
                staged,
            },
            zeros,
            numbers: numbers.into(),
            contents: contents.into(),
            patches,
        })
    }

    fn numbers(&self) -> impl Iterator<Item = PageNumber> {
        page_numbers(&self.numbers)
    }

    /// Pages that are zero, in ascending runs.
    #[must_use]
    pub fn zeros(&self) -> &[Range<u64>] {
        &self.zeros
    }

    /// Pages that are told by what has changed in them, ascending. They are in no other list.
    #[must_use]
    pub fn patches(&self) -> &[Patch<'a>] {
        &self.patches
    }

    /// All other pages that it names, ascending, with what they hold.
    pub fn pages(&self) -> impl Iterator<Item = (PageNumber, &[u8])> {
        self.numbers().zip(self.contents.chunks_exact(PAGE_SIZE))
    }

    /// The same with these pages, all whole, in place of those that it names and patches: as many as there are of both, and their contents.
    pub(super) fn with_pages(self, pages: &[PageNumber], contents: Vec<u8>) -> Self {
        let numbers = pages.iter().flat_map(|page| page.0.to_le_bytes());
        Self {
            numbers: numbers.collect(),
            contents: contents.into(),
            patches: Vec::new(),
            ..self
        }
    }

    /// The checkpoint that this is.
    ///
    /// # Panics
    /// If it has patches: who has none of what they are for cannot send it on.
    #[must_use]
    pub fn sealed(&self, ram_pages: u64) -> Vec<u8> {
        assert!(self.patches.is_empty(), "a checkpoint of whole pages");
        let told = Told {
            whole: self.numbers().collect(),
            ..Told::default()
        };
        let head = head(self.scope, ram_pages, &self.state, &self.zeros, &told);
        sealed(head, &self.contents)
    }
}

/// Page numbers, as they are written.
fn page_numbers(words: &[u8]) -> impl Iterator<Item = PageNumber> {
    let (words, _) = words.as_chunks();
    words
        .iter()
        .map(|word| PageNumber(u64::from_le_bytes(*word)))
}

/// Checks page numbers: they ascend, are within RAM, and none is in a run of zero pages.
fn ascends(
    field: &'static str,
    numbers: impl Iterator<Item = PageNumber>,
    zeros: &[Range<u64>],
    ram_pages: u64,
) -> Result<(), FormatError> {
    let mut next = 0;
    let mut zeros = zeros.iter().peekable();
    for PageNumber(page) in numbers {
        while zeros.next_if(|run| run.end <= page).is_some() {}
        let both = zeros.peek().is_some_and(|run| run.contains(&page));
        if page < next || page >= ram_pages || both {
            return Err(FormatError::Pages { field, page });
        }
        next = page + 1;
    }
    Ok(())
}

/// The patches of these pages.
fn patches<'a>(patched: &[u8], mut bytes: &'a [u8]) -> Result<Vec<Patch<'a>>, FormatError> {
    let mut rest = Bytes(patched);
    let mut patches = Vec::with_capacity(patched.len() / PATCHED);
    while !rest.0.is_empty() {
        let (page, checksum) = (rest.word()?, rest.word32()?);
        let length = patch::length(bytes).ok_or(FormatError::Patch { page })?;
        let (patch, after) = bytes.split_at(length);
        bytes = after;
        patches.push(Patch {
            page: PageNumber(page),
            checksum,
            bytes: patch,
        });
    }
    if bytes.is_empty() {
        Ok(patches)
    } else {
        Err(FormatError::Limit {
            field: "bytes of patches",
            found: bytes.len() as u64,
            limit: 0,
        })
    }
}

fn zero_runs(bytes: &[u8], ram_pages: u64) -> Result<Vec<Range<u64>>, FormatError> {
    let mut rest = Bytes(bytes);
    let mut runs = Vec::with_capacity(bytes.len() / 16);
    let mut next = 0;
    while !rest.0.is_empty() {
        let (first, count) = (rest.word()?, rest.word()?);
        let end = first.checked_add(count).filter(|&end| end <= ram_pages);
        match end {
            Some(end) if first >= next && count > 0 => {
                runs.push(first..end);
                next = end;
            }
            _ => {
                return Err(FormatError::Pages {
                    field: "runs of zero pages",
                    page: first,
                });
            }
        }
    }
    Ok(runs)
}

#[cfg(test)]
pub(super) mod tests;
