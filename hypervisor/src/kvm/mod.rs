//! Every call into KVM.
//!
//! Why unsafe lives here: ioctls without a wrapper in `kvm-ioctls` (KVM_INTERRUPT), the data area of `kvm_run`, guest
//! memory handed to the kernel, and the signal that kicks a vCPU. Nothing above this module touches any of it.

mod cpuid;
mod crew;
mod exit;
mod host_cpu;
mod msr;
mod state;
mod told;
mod vcpu;
mod vm;

pub use cpuid::{
    CLOCK_SOURCE_2, CLOCK_SOURCE_STABLE, CpuModel, deterministic as deterministic_cpuid,
};
pub use crew::{BadCrewState, CrewState, Shape};
pub use exit::Exit;
pub use state::{BadCpuState, CpuState};
pub use told::{Difference, Told};
pub use vcpu::{Kick, STOPS_MAX, Stops, Vcpu};
pub use vm::{Capabilities, Cpu, KvmSource, Vm};

/// What can go wrong between us and KVM.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` is not there.
    #[error(
        "{path} does not exist: this machine offers no KVM; load kvm_amd or kvm_intel, or enable nested virtualization"
    )]
    NoDevice {
        /// The path that was tried.
        path: String,
    },
    /// `/dev/kvm` may not be opened.
    #[error(
        "no permission to open {path}: add yourself to its group (usually `kvm`), or run as root"
    )]
    NoPermission {
        /// The path that was tried.
        path: String,
    },
    /// KVM lacks something we cannot do without.
    #[error("this KVM lacks {what}; a newer kernel has it")]
    Missing {
        /// The capability's name.
        what: &'static str,
    },
    /// It cannot run a guest with KVM's own interrupt controller.
    #[error(
        "this KVM lacks {what}, which a guest with the host's CPU needs: give it one that can be replayed (--cpu replayable, one vCPU)"
    )]
    NoControllers {
        /// What it lacks.
        what: &'static str,
    },
    /// An ioctl failed.
    #[error("KVM refused {call}: {source}")]
    Call {
        /// The ioctl's name.
        call: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A model-specific register that one side has and the other refuses.
    #[error(
        "KVM refused to {what} model-specific register {index:#x}: both hosts need the same CPU and kernel"
    )]
    Msr {
        /// Read or set.
        what: &'static str,
        /// Its number.
        index: u32,
    },
    /// The exit's instruction needs another exit before it is complete, as one does that crosses the end of a page.
    #[error("the guest is in the middle of an instruction: it can be stopped at another exit")]
    MidInstruction,
    /// The vCPU cannot go on.
    #[error("the vCPU stopped: {why}")]
    Stopped {
        /// The exit reason in words.
        why: String,
    },
}

impl KvmError {
    fn call(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Call {
            call,
            source: std::io::Error::from_raw_os_error(error.errno()),
        }
    }
}
