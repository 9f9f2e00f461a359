//! Doppel: a fault-tolerant hypervisor on KVM.

pub mod arbiter;
pub mod backends;
pub mod boot;
pub mod clock;
pub mod config;
pub mod devices;
pub mod digest;
pub mod divergence;
pub mod entry;
pub mod event;
pub mod file_log;
pub mod gate;
pub mod handshake;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod orders;
pub mod position;
pub mod protocol;
pub mod record;
pub mod replay;
pub mod ring_log;
pub mod session;
pub mod sink;
pub mod stage;
pub mod world;
