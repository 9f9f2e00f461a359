//! Checkpoints: a machine's whole state as bytes, taken between two instructions and put in place whole.
//!
//! ```text
//!  Machine::save ──▶ bytes ──parts──▶ log, socket ──▶ Shadow ──▶ Image::parse ──▶ Machine::restore
//!   (sync point,      format.rs                        whole,      checked         vCPU, pages, devices:
//!    or kicked)                                        or not at all               all of it at once
//! ```
//! A checkpoint is *full* (every page that it does not name is zero) or a *delta* (every other page is as it was). What it
//! needs of the machine it is put into: the same RAM size and devices, and for a delta every page that differs from the
//! saved machine's among those that the delta names. A superset of the pages that changed is right. Where the machine it is put into has
//! had all deltas before, pages can be told by what has changed in them ([`Capture::patch`]).
//!
//! A machine that runs is copied in rounds, by [`clone`]; the checkpoint at their end is a delta. A machine that is replicated by
//! checkpoints sends one at the end of each [`interval`].
//!
//! It is taken where the vCPU is between two instructions: at a sync point at which the guest could run on (KVM
//! completes the exit's instruction first), or after a kick, anywhere. At a kick it takes a place between two sync points:
//! its position is that of the last one, and what it says holds after that one's inputs.
#![forbid(unsafe_code)]

pub mod clone;
mod format;
pub mod interval;
mod patch;
mod restore;
mod save;
mod shadow;

#[cfg(test)]
pub(crate) use format::DEVICES_MAX;
pub use format::{FormatError, Image, STAGED_MAX, Scope, Seal, State};
pub use interval::{Interval, IntervalError};
pub use patch::{Patch, Remembered};
pub use restore::{Adopted, Restored};
pub use save::{Capture, Pages};
pub use shadow::{PART_BYTES, Shadow, ShadowError};

use crate::devices::BadDevices;
use crate::kvm::KvmError;
use crate::machine::{BadProcessors, MachineError, Phase};

/// Why a checkpoint cannot be taken or put in place.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The machine, KVM or memory. After a failed restore the machine is of no further use.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The bytes.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The parts they came in.
    #[error(transparent)]
    Shadow(#[from] ShadowError),
    /// The interval that it ends.
    #[error(transparent)]
    Interval(#[from] IntervalError),
    /// The state of the CPUs in it.
    #[error(transparent)]
    Cpu(#[from] BadProcessors),
    /// The devices' state in it.
    #[error(transparent)]
    Devices(#[from] BadDevices),
    /// The guest waits for an input: give it first.
    #[error(
        "no checkpoint can be taken here: the guest is {phase:?}; give it what it waits for first"
    )]
    NotReady {
        /// What it waits for.
        phase: Phase,
    },
    /// Outputs wait to be taken.
    #[error("no checkpoint can be taken here: outputs were not taken")]
    Outputs,
}

impl CheckpointError {
    /// Whether the guest is as it was, and one can be taken at another of its exits.
    pub(crate) fn is_mid_instruction(&self) -> bool {
        let Self::Machine(MachineError::Kvm(error)) = self else {
            return false;
        };
        matches!(error, KvmError::MidInstruction)
    }
}

impl From<crate::memory::MemoryError> for CheckpointError {
    fn from(error: crate::memory::MemoryError) -> Self {
        Self::Machine(error.into())
    }
}

impl From<KvmError> for CheckpointError {
    fn from(error: KvmError) -> Self {
        Self::Machine(error.into())
    }
}
