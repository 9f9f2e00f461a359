//! A Redis-compatible key-value engine for a guest without an operating system.
//!
//! The engine owns no socket, no clock and no source of randomness: bytes, the time and the hash seed are handed
//! in, so what it answers is a function of its inputs alone and a replayed guest answers the same bytes.
//! Behaviour, limits and error texts are those of Redis 7.0, for the commands in `COMMAND LIST`; all values are
//! strings. Every allocation whose size a client can influence is fallible: a client that asks for more than there
//! is gets the error `OOM command not allowed when used memory > 'maxmemory'.`, and the guest goes on.
//!
//! ```text
//!  bytes ─▶ request (RESP, inline) ─▶ session ─▶ command ─▶ store ─▶ keyspace (hash table, expiry heap)
//!                                        └──────▶ output (RESP2, RESP3) ─▶ bytes
//! ```
//!
//! One [`Store`] serves any number of [`Session`]s, one for each connection:
//!
//! ```
//! use kv_engine::{Config, Limits, Now, Output, State, Store};
//!
//! let now = Now::from_micros(1_700_000_000_000_000);
//! let mut store = Store::new(Config::default(), now);
//! let mut session = store.connect(None, now);
//! let mut out = Output::new();
//!
//! // Bytes as they came from the network; what is not consumed stays with the caller.
//! let progress = session.run(&mut store, now, b"*1\r\n$4\r\nPING\r\n", &mut out, Limits::default());
//! assert_eq!((progress.consumed, progress.state), (14, State::NeedInput));
//! assert_eq!(out.pending(), b"+PONG\r\n");
//! out.consume(7);
//!
//! // When the connection is gone:
//! session.close(&mut store);
//! ```
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod command;
mod glob;
mod keyspace;
mod number;
mod output;
mod request;
mod session;
mod settings;
mod store;

pub use output::Output;
pub use session::{Limits, Peer, Progress, Session, State};
pub use store::{Config, Expired, Store};

/// An allocation failed. What was asked for was not done; nothing else changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OutOfMemory;

impl From<alloc::collections::TryReserveError> for OutOfMemory {
    fn from(_: alloc::collections::TryReserveError) -> Self {
        Self
    }
}

impl From<hashbrown::TryReserveError> for OutOfMemory {
    fn from(_: hashbrown::TryReserveError) -> Self {
        Self
    }
}

/// A reading of the clock: Unix time in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Now(u64);

impl Now {
    /// From microseconds of Unix time.
    pub const fn from_micros(micros: u64) -> Self {
        Self(micros)
    }

    /// Microseconds of Unix time.
    pub const fn micros(self) -> u64 {
        self.0
    }

    /// Milliseconds of Unix time.
    pub const fn millis(self) -> u64 {
        self.0 / 1000
    }

    /// Seconds of Unix time.
    pub const fn seconds(self) -> u64 {
        self.0 / 1_000_000
    }
}
