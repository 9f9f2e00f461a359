//! Doppel: a fault-tolerant hypervisor on KVM.
//!
//! ```text
//!  guest ──exit──▶ machine (kvm, memory, devices) ──▶ record ──▶ ring_log ══▶ replay ──▶ machine of the backup
//!                     ▲                                 │  ▲                    │
//!                   stage ◀── session's I/O thread      │  └── commit           └── outputs, until released
//!                     ▲          (backends)             ▼
//!                   world  ◀──────────────────── outlet, gate
//! ```
//! `docs/architecture.md` says what each module knows and which must not know which.

// The command line speaks of the library as whoever uses it from outside does.
extern crate self as hypervisor;

pub mod agent;
pub mod arbiter;
pub mod backends;
pub mod boot;
pub mod checkpoint;
pub mod cli;
pub mod clock;
pub mod config;
pub mod control;
pub mod courier;
mod credentials;
pub mod debug;
pub mod demo;
pub mod desk;
pub mod devices;
pub mod digest;
pub mod disk;
pub mod divergence;
pub mod doctor;
pub mod entry;
pub mod event;
pub mod file_log;
pub mod flight;
pub mod gate;
mod guarded;
pub mod handshake;
pub mod intervals;
pub mod journal;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod meter;
pub mod orders;
pub mod outlet;
pub mod panics;
pub mod position;
pub mod preempt;
pub mod prepare;
pub mod protocol;
pub mod record;
pub mod replay;
pub mod ring_log;
pub mod sandbox;
pub mod scheduling;
pub mod session;
pub mod sink;
pub mod slurm;
pub mod spool;
pub mod stage;
pub mod version;
pub mod world;
