//! gdb on a replay: the guest's registers and memory wherever it stands, breakpoints, single steps.
//!
//! ```text
//!  gdb ── remote protocol ──▶ Gdb (gdbstub) ── what it saw last: registers, memory ──▶ View
//!                               │ where to stop next
//!                               ▼
//!  replayer ── run ──▶ machine ── KVM_EXIT_DEBUG ──▶ Debugger::stopped
//! ```
//! What is debugged has happened already, so nothing of it can be changed: registers and memory are read, and writes are refused.
//! Breakpoints of both kinds are the CPU's own debug registers, at most four, which KVM sets for the guest's time, or, on a CPU
//! whose emulation has none for guests, HLT in memory while the vCPU runs: memory has none in it, and its hash is the recorded
//! one, wherever the guest is stopped.
//!
//! A single step does show: the guest that is stepped over a PUSHF sees the trap flag in what it pushed, on a KVM that steps by that
//! flag. Such a replay differs from there on, and says so.
#![forbid(unsafe_code)]

mod pages;
mod place;
mod stub;
mod view;

use std::io;

pub use place::{Listener, Place};
pub use stub::Gdb;

use crate::machine::MachineError;

/// Why a replay cannot be debugged.
#[derive(Debug, thiserror::Error)]
pub enum DebugError {
    /// Where gdb is to connect.
    #[error("gdb cannot be waited for at {place}: {source}")]
    Listen {
        /// The address or socket.
        place: String,
        /// Why not.
        source: io::Error,
    },
    /// The connection.
    #[error("the connection to gdb broke: {0}")]
    Connection(io::Error),
    /// What gdb said.
    #[error("gdb is not understood: {0}")]
    Protocol(String),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
}
