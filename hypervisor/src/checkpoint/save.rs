//! Taking a checkpoint.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::CheckpointError;
use super::format::{Scope, State, Writer};
use crate::entry::Base;
use crate::machine::{Machine, Phase};
use crate::memory::{DirtyPages, GuestRam, PAGE_SIZE, PageNumber};

static ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Which pages a checkpoint carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pages {
    /// All that hold anything.
    All,
    /// These, a superset of those that changed.
    Only(DirtyPages),
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
        pages: &Pages,
        base: Base,
        staged: Vec<Vec<u8>>,
    ) -> Result<Vec<u8>, CheckpointError> {
        if !matches!(self.phase(), Phase::Ready | Phase::HltInstruction) {
            return Err(CheckpointError::NotReady {
                phase: self.phase(),
            });
        }
        if self.has_outputs() {
            return Err(CheckpointError::Outputs);
        }
        let cpu = self.settled_cpu()?.to_bytes();
        let state = State {
            position: self.position(),
            digest: self.digest(),
            injectable: self.injectable(),
            halted: self.phase() == Phase::HltInstruction,
            base,
            cpu,
            devices: self.save_devices(),
            staged,
        };
        let ram = self.ram();
        let scope = match pages {
            Pages::All => Scope::Full,
            Pages::Only(_) => Scope::Delta,
        };
        let (zeros, filled) = match pages {
            Pages::All => (Vec::new(), filled_pages(ram)?),
            Pages::Only(dirty) => sort_out(ram, dirty)?,
        };
        let mut writer = Writer::new(scope, ram.pages(), &state, &zeros, &filled);
        let mut content = [0; PAGE_SIZE];
        for page in filled {
            ram.read_page(page, &mut content)?;
            writer.page(&content);
        }
        Ok(writer.finish())
    }
}

fn filled_pages(ram: &GuestRam) -> Result<Vec<PageNumber>, CheckpointError> {
    let mut filled = Vec::new();
    let mut content = [0; PAGE_SIZE];
    let mut from = PageNumber(0);
    while let Some(run) = ram.next_touched(from)? {
        for page in run.clone().map(PageNumber) {
            ram.read_page(page, &mut content)?;
            if content != ZEROS {
                filled.push(page);
            }
        }
        from = PageNumber(run.end);
    }
    Ok(filled)
}

/// Written pages that are zero now, in runs, and those that are not.
fn sort_out(
    ram: &GuestRam,
    dirty: &DirtyPages,
) -> Result<(Vec<Range<u64>>, Vec<PageNumber>), CheckpointError> {
    let mut zeros: Vec<Range<u64>> = Vec::new();
    let mut filled = Vec::with_capacity(dirty.len());
    let mut content = [0; PAGE_SIZE];
    // KVM's bitmap is rounded up to whole words.
    for page in dirty.iter().filter(|page| page.0 < ram.pages()) {
        ram.read_page(page, &mut content)?;
        if content != ZEROS {
            filled.push(page);
        } else if let Some(run) = zeros.last_mut().filter(|run| run.end == page.0) {
            run.end += 1;
        } else {
            zeros.push(page.0..page.0 + 1);
        }
    }
    Ok((zeros, filled))
}
