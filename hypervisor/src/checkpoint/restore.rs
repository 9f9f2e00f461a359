//! Putting a checkpoint in place.
#![forbid(unsafe_code)]

use super::format::{Image, Scope};
use super::{CheckpointError, FormatError};
use std::time::Duration;

use crate::devices::Devices;
use crate::entry::Base;
use crate::machine::{Machine, MachineError, Phase, Processors};
use crate::memory::{GuestRam, MemoryError, PAGE_SIZE, PageNumber};

static ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// What a checkpoint holds besides the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Where the log stands.
    pub base: Base,
    /// Frames that were read from the world and not given to the guest, oldest first.
    pub staged: Vec<Vec<u8>>,
}

/// What is still to be done for a checkpoint that was adopted: KVM does not have the CPU's state yet.
#[derive(Debug)]
pub struct Adopted {
    /// Where the log stands.
    pub base: Base,
    /// The state of the CPU, or of all of them.
    pub cpus: Processors,
}

impl Machine {
    /// Becomes the machine that was saved. Everything is checked before anything is changed.
    ///
    /// # Errors
    /// What is wrong with the checkpoint, and the machine is as it was; or [`CheckpointError::Machine`] if KVM refuses the
    /// state, and the machine is of no further use.
    pub fn restore(&mut self, checkpoint: &[u8]) -> Result<Restored, CheckpointError> {
        self.restore_image(Image::parse(checkpoint, self.ram().pages())?)
    }

    /// The same of a checkpoint that was parsed, for a machine with as much RAM.
    ///
    /// # Errors
    /// As for [`Machine::restore`].
    pub fn restore_image(&mut self, image: Image<'_>) -> Result<Restored, CheckpointError> {
        // They are for what was sent before, and this machine's memory may have gone on since.
        if let Some(patch) = image.patches().first() {
            let page = patch.page().0;
            return Err(FormatError::Patched { page }.into());
        }
        let (cpus, devices) = self.checked(&image)?;
        // The vCPU first: completing the instruction that it stands at may write memory.
        self.restore_cpus(&cpus, Duration::ZERO)?;
        self.put_in_place(&image, devices)?;
        Ok(Restored {
            base: image.state.base,
            staged: image.state.staged,
        })
    }

    /// Becomes the machine that was saved, but for the vCPU, which must not have run: it takes its state only when it is to run,
    /// as many a checkpoint may come before. Everything is checked before anything is changed.
    ///
    /// # Errors
    /// What is wrong with the checkpoint, and the machine is as it was.
    pub fn adopt(&mut self, checkpoint: &[u8]) -> Result<Adopted, CheckpointError> {
        let image = Image::parse(checkpoint, self.ram().pages())?;
        let (cpus, devices) = self.checked(&image)?;
        self.put_in_place(&image, devices)?;
        Ok(Adopted {
            base: image.state.base,
            cpus,
        })
    }

    /// Gives KVM the state of the CPUs that was adopted last, so long ago: several CPUs have their time from KVM, and it is to go on.
    ///
    /// # Errors
    /// [`MachineError::Kvm`] if KVM refuses it, and the machine is of no further use.
    pub fn settle(&mut self, cpus: &Processors, passed: Duration) -> Result<(), MachineError> {
        self.restore_cpus(cpus, passed)
    }

    fn checked(&self, image: &Image<'_>) -> Result<(Processors, Devices), CheckpointError> {
        let cpus = self.processors(&image.state.cpu)?;
        let devices = self.restored_devices(&image.state.devices)?;
        patched(self.ram(), image, |_, _| Ok(()))?;
        if image.scope == Scope::Delta && image.state.position < self.position() {
            return Err(FormatError::Limit {
                field: "distance to go back",
                found: self.position().0 - image.state.position.0,
                limit: 0,
            }
            .into());
        }
        Ok((cpus, devices))
    }

    fn put_in_place(&mut self, image: &Image<'_>, devices: Devices) -> Result<(), CheckpointError> {
        let ram = self.ram();
        match image.scope {
            Scope::Full => fill(ram, image)?,
            Scope::Delta => renew(ram, image)?,
        }
        let state = &image.state;
        let phase = match (state.off, state.halted) {
            (Some(status), _) => Phase::Off(status),
            (None, true) => Phase::HltInstruction,
            (None, false) => Phase::Ready,
        };
        self.restore_rest(
            state.position,
            state.digest,
            state.injectable,
            phase,
            devices,
        );
        Ok(())
    }
}

fn renew(ram: &GuestRam, image: &Image<'_>) -> Result<(), CheckpointError> {
    patched(ram, image, |page, content| {
        ram.write(page.address(), content)
    })?;
    for page in image.zeros().iter().cloned().flatten() {
        ram.write(PageNumber(page).address(), &ZEROS)?;
    }
    for (page, content) in image.pages() {
        ram.write(page.address(), content)?;
    }
    Ok(())
}

/// What the patches make of this machine's pages, each of which must be what their sender has.
fn patched(
    ram: &GuestRam,
    image: &Image<'_>,
    put: impl Fn(PageNumber, &[u8]) -> Result<(), MemoryError>,
) -> Result<(), CheckpointError> {
    let mut content = [0; PAGE_SIZE];
    for patch in image.patches() {
        ram.read_page(patch.page(), &mut content)?;
        if !patch.apply(&mut content) {
            let page = patch.page().0;
            return Err(FormatError::Patched { page }.into());
        }
        put(patch.page(), &content)?;
    }
    Ok(())
}

/// Writes what is named and clears what is not, as far as it holds anything.
fn fill(ram: &GuestRam, image: &Image<'_>) -> Result<(), MemoryError> {
    let mut pages = image.pages().peekable();
    let mut before = [0; PAGE_SIZE];
    let mut from = PageNumber(0);
    while let Some(run) = ram.next_touched(from)? {
        for page in run.clone().map(PageNumber) {
            while let Some((page, content)) = pages.next_if(|(named, _)| *named < page) {
                ram.write(page.address(), content)?;
            }
            if let Some((page, content)) = pages.next_if(|(named, _)| *named == page) {
                ram.write(page.address(), content)?;
                continue;
            }
            ram.read_page(page, &mut before)?;
            if before != ZEROS {
                ram.write(page.address(), &ZEROS)?;
            }
        }
        from = PageNumber(run.end);
    }
    for (page, content) in pages {
        ram.write(page.address(), content)?;
    }
    Ok(())
}
