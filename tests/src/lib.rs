//! What Doppel promises, and the harness that shows it.
//!
//! Every promise is a file in [`promises`]: `cargo test` runs its short form, `scripts/prove NAME` either form, with its
//! figures. The promises drive the real program, real KVM and real clients; the harness starts, kills and freezes them.

pub mod harness;
pub mod lab;
pub mod lab_pair;
pub mod lab_site;
pub mod lab_slurm;
pub mod linux_guest;
pub mod promise;
pub mod promises;
pub mod protocol_model;
pub mod redis_compat;
pub mod simulator;
