//! Taking a checkpoint.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::CheckpointError;
use super::format::{self, Scope, State};
use super::patch::{Remembered, Told};
use crate::entry::Base;
use crate::machine::{Machine, Phase};
use crate::memory::{DirtyPages, GuestRam, PAGE_SIZE, PageNumber};

static ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Which pages a checkpoint carries. Those that were written are asked for when the last exit's instruction is complete: it may
/// write memory, as one that reads a port into it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// All that hold anything.
    All,
    /// Those written since the last such checkpoint, or since [`Machine::track_changes`] began.
    Changed,
    /// Those written since they were last swept: [`Machine::track_for_copy`].
    Uncopied,
}

/// A checkpoint that was taken: all that it is of, and nothing of it put into words yet. So the guest need not stand for that.
#[derive(Debug)]
pub struct Capture {
    scope: Scope,
    ram_pages: u64,
    state: State,
    zeros: Vec<Range<u64>>,
    told: Told,
    contents: Vec<u8>,
}

impl Capture {
    /// Pages that it names.
    #[must_use]
    pub fn pages(&self) -> usize {
        let cleared: u64 = self.zeros.iter().map(|run| run.end - run.start).sum();
        self.told.whole.len() + cleared as usize
    }

    /// Pages of the RAM that it is of.
    #[must_use]
    pub fn ram_pages(&self) -> u64 {
        self.ram_pages
    }

    /// Its bytes where all pages go whole, without the checksum.
    #[must_use]
    pub fn bytes(&self) -> usize {
        format::head_length(&self.state, &self.zeros, &self.told) + self.contents.len()
    }

    fn head(&self) -> Vec<u8> {
        let Self {
            scope,
            ram_pages,
            state,
            zeros,
            told,
            ..
        } = self;
        format::head(*scope, *ram_pages, state, zeros, told)
    }

    /// The checkpoint.
    #[must_use]
    pub fn sealed(self) -> Vec<u8> {
        format::sealed(self.head(), &self.contents)
    }

    /// The checkpoint in two pieces, what is before the pages and what they hold. A [`super::Seal`] over both ends it.
    #[must_use]
    pub fn pieces(self) -> [Vec<u8>; 2] {
        [self.head(), self.contents]
    }

    /// Tells pages that the other side has by what has changed in them, if anything, and notes what it will have. For deltas that go to it one after
    /// the other, none left out. `spare` is a buffer to use; the one that this one was in is given back in its place.
    ///
    /// Where the other side `runs` the guest, pages that are as they were are told as well: there they need not be.
    ///
    /// What comes back are pages that need not have been written since they were sent last.
    pub fn patch(
        &mut self,
        other: &mut Remembered,
        spare: &mut Vec<u8>,
        runs: bool,
    ) -> Vec<PageNumber> {
        if self.scope == Scope::Full {
            return Vec::new();
        }
        let zeros = || self.zeros.iter().cloned().flatten();
        other.forget(zeros());
        self.told = other.tell(&self.told.whole, &self.contents, spare, runs);
        std::mem::swap(&mut self.contents, spare);
        let mut unwritten = std::mem::take(&mut self.told.unwritten);
        unwritten.extend(zeros().map(PageNumber));
        unwritten
    }
}

/// Pages as they are copied out, each read once.
#[derive(Default)]
struct Copied {
    contents: Vec<u8>,
    filled: Vec<PageNumber>,
    zeros: Vec<Range<u64>>,
}

impl Copied {
    /// Copies a page, if it holds anything, and says whether it does.
    fn page(&mut self, ram: &GuestRam, page: PageNumber) -> Result<bool, CheckpointError> {
        let at = self.contents.len();
        self.contents.resize(at + PAGE_SIZE, 0);
        let content = self.contents[at..]
            .first_chunk_mut()
            .expect("room was made for a page");
        ram.read_page(page, content)?;
        let holds = *content != ZEROS;
        if holds {
            self.filled.push(page);
        } else {
            self.contents.truncate(at);
        }
        Ok(holds)
    }

    /// All pages that hold anything.
    fn all(&mut self, ram: &GuestRam) -> Result<(), CheckpointError> {
        let mut from = PageNumber(0);
        while let Some(run) = ram.next_touched(from)? {
            for page in run.clone().map(PageNumber) {
                self.page(ram, page)?;
            }
            from = PageNumber(run.end);
        }
        Ok(())
    }

    /// Written pages: those that are zero now in runs, and the others.
    fn written(&mut self, ram: &GuestRam, dirty: &DirtyPages) -> Result<(), CheckpointError> {
        self.contents.reserve(dirty.len() * PAGE_SIZE);
        // KVM's bitmap is rounded up to whole words.
        for page in dirty.iter().filter(|page| page.0 < ram.pages()) {
            if self.page(ram, page)? {
                continue;
            }
            match self.zeros.last_mut().filter(|run| run.end == page.0) {
                Some(run) => run.end += 1,
                None => self.zeros.push(page.0..page.0 + 1),
            }
        }
        Ok(())
    }
}

impl Machine {
    /// Takes a checkpoint here: at a sync point at which the guest could run on or waits in HLT, or after a kick.
    ///
    /// `base` is where the log stands, and `staged` what was read from the world and not given to the guest.
    ///
    /// # Errors
    /// [`CheckpointError::NotReady`] and [`CheckpointError::Outputs`] where none can be taken, [`CheckpointError::Machine`]
    /// if KVM fails.
    pub fn save(
        &mut self,
        pages: Pages,
        base: Base,
        staged: Vec<Vec<u8>>,
    ) -> Result<Vec<u8>, CheckpointError> {
        if !matches!(self.phase(), Phase::Ready | Phase::HltInstruction) {
            return Err(CheckpointError::NotReady {
                phase: self.phase(),
            });
        }
        Ok(self.capture(pages, base, staged, Vec::new())?.sealed())
    }

    /// Takes a checkpoint that need not go on exactly as this machine does: at the places of [`Machine::save`], where the guest
    /// has turned itself off, and where it waits in HALT. There it stands before the instruction, as the machine that is made
    /// of it makes that exit again. `spare` is a buffer to use.
    ///
    /// # Errors
    /// As for [`Machine::save`].
    pub fn capture(
        &mut self,
        pages: Pages,
        base: Base,
        staged: Vec<Vec<u8>>,
        spare: Vec<u8>,
    ) -> Result<Capture, CheckpointError> {
        if self.has_outputs() {
            return Err(CheckpointError::Outputs);
        }
        let (cpus, devices) = match self.phase() {
            Phase::Ready | Phase::HltInstruction => (self.settled_cpus()?, self.save_devices()),
            // It never runs again: whether the last instruction is complete is nobody's business. It may have been turned off while it waited.
            Phase::Off(_) | Phase::Halted => {
                (self.cpus_at_exit()?, self.save_devices_before_access())
            }
            phase @ (Phase::Needs(_) | Phase::Reset | Phase::Crashed) => {
                return Err(CheckpointError::NotReady { phase });
            }
        };
        let written = match pages {
            Pages::All => None,
            Pages::Changed => Some(self.take_changed()?),
            Pages::Uncopied => Some(self.take_uncopied()?),
        };
        let state = State {
            position: self.position(),
            digest: self.digest(),
            injectable: self.injectable(),
            halted: self.phase() == Phase::HltInstruction,
            off: match self.phase() {
                Phase::Off(status) => Some(status),
                _ => None,
            },
            base,
            cpu: cpus,
            devices,
            staged,
        };
        let ram = self.ram();
        let mut copied = Copied {
            contents: spare,
            ..Copied::default()
        };
        copied.contents.clear();
        let scope = match written {
            None => {
                copied.all(ram)?;
                Scope::Full
            }
            Some(written) => {
                copied.written(ram, &written)?;
                Scope::Delta
            }
        };
        let Copied {
            contents,
            filled,
            zeros,
        } = copied;
        Ok(Capture {
            scope,
            ram_pages: ram.pages(),
            state,
            zeros,
            told: Told {
                whole: filled,
                ..Told::default()
            },
            contents,
        })
    }
}
