//! The network side of the key-value guest: TCP connections between smoltcp and the engine.
//!
//! ```text
//! frame ──▶ segment ──▶ flows ──▶ connection ──▶ session (kv-engine) ──▶ output ──▶ frames
//!           whose is it  index     one socket
//! ```
//! Every connection's socket is alone in a socket set of its own, and a frame is given to the set it belongs to: the
//! cost of a frame does not grow with the number of connections, as it does when smoltcp searches one large
//! set. No socket listens in advance: one is made for each SYN that arrives.
//!
//! The crate knows neither device nor clock: both are handed in.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod connection;
mod flows;
mod segment;
mod server;
#[cfg(test)]
mod tests;

pub use server::{Server, Settings, Turn};
