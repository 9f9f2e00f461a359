//! Preparing Linux for replay: what reads the time-stamp counter is made to ask the hypervisor instead, or no longer asks.
//!
//! ```text
//!  bzImage ──unpack──▶ vmlinux ──▶ symbols ──▶ functions ─┐
//!                         └──────▶ alternatives ──────────┤
//!  modules ──▶ symbols, alternatives ─────────────────────┼──▶ decode ──▶ sites ──▶ patches, report
//!  initramfs, root directory ──▶ programs ──▶ unwind ─────┘
//!                                             tables
//! ```
//! Stock KVM cannot trap RDTSC, and an x86-64 Linux executes it however much CPUID hides it. So the kernel's and its modules' sites
//! become `IN EAX, TSC_PORT`, which is as long and exits, and is logged as any input is. A program may not use ports: its sites
//! become `MOV EAX, EDX`, as long, which changes no flag and yields what registers hold. So do the kernel's own in the reader of KVM's
//! clock page, which gets another body that counts its reads (`clock_reader`, `devices/pvclock.rs`). What else is of the family needs a CPU that
//! has it by CPUID, which the template of replay hides; it is reported and left.
//!
//! Nothing is searched for by its bytes (`code`): functions start where symbols, the kernel's own table of them and the tables for
//! unwinding say. Preparing twice changes nothing the second time, and equal inputs give equal outputs.
#![forbid(unsafe_code)]

mod alternatives;
mod bzimage;
mod clock_reader;
mod code;
mod cpio;
mod eh_frame;
mod elf;
mod error;
mod initramfs;
mod kallsyms;
mod kernel;
mod module;
mod program;
mod report;
mod rewrite;
mod symbols;
mod tree;
mod unpack;

pub use error::PrepareError;
pub use initramfs::initramfs;
pub use kernel::{kernel, system_map, vmlinux};
pub use module::module;
pub use program::program;
pub use report::{Change, Count, FileReport, Gap, Instruction, Kind, Outcome, Report, Site};
pub use tree::{apart, modules, root};

/// The port whose four-byte read stands for RDTSC in a prepared kernel: the machine answers EAX with the counter's lower half and
/// sets RDX to its upper half. No PC has anything at 0xe4 to 0xe7, and no read of it by this form of IN is in Debian's kernel
/// ([`FileReport::prepared`] counts them).
pub const TSC_PORT: u8 = crate::devices::tsc::PORT as u8;

/// Whether this kernel's reads of KVM's clock page are counted, so that it needs no preemption to see time go on: it was prepared, by a
/// release that does so.
#[must_use]
pub fn counts_clock_reads(vmlinux: &[u8]) -> bool {
    const BODY: &[u8] = &clock_reader::BODY;
    let Ok(elf) = elf::Elf::parse(vmlinux) else {
        return false;
    };
    let mut code = elf.sections.iter().filter(|section| section.is_code());
    code.any(|section| {
        let mut places = elf.bytes_of(section).windows(BODY.len());
        // The first word decides nearly always, and quickly: a kernel has 14 MB of code.
        places.any(|at| at[..4] == BODY[..4] && at == BODY)
    })
}

/// How much a preparation takes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes that one compressed piece may unpack to.
    pub unpacked: usize,
}

impl Default for Limits {
    /// A kernel unpacks to 70 MB, a distribution's initramfs to some hundreds; beyond 2 GiB it is no guest's but a bomb.
    fn default() -> Self {
        Self { unpacked: 2 << 30 }
    }
}

/// Something prepared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// The new file.
    pub bytes: Vec<u8>,
    /// What was found in it.
    pub report: Report,
}

#[cfg(test)]
mod tests;
