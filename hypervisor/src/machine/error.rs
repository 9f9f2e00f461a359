//! What can go wrong with a machine.
#![forbid(unsafe_code)]

use crate::boot::BootError;
use crate::devices::DeviceError;
use crate::kvm::KvmError;
use crate::memory::MemoryError;

use super::Phase;

/// What can go wrong with a machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Loading the guest.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// An input that nothing waits for here.
    #[error(
        "an input of {input} does not fit here: the guest is {phase:?}, injectable {injectable}"
    )]
    Unfit {
        /// The input's kind.
        input: &'static str,
        /// What the machine waits for.
        phase: Phase,
        /// Whether inputs nobody asked for may be handed in.
        injectable: bool,
    },
    /// A device refused an input.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The threads of several vCPUs could not be started.
    #[error("cannot start a vCPU's thread: {0}")]
    Threads(std::io::Error),
    /// vCPUs that were told to stand run on.
    #[error(
        "{standing} of {all} vCPUs stand, the others do not leave their guest: no checkpoint of it can be taken"
    )]
    Runaway {
        /// Those that stand.
        standing: usize,
        /// All.
        all: usize,
    },
}
