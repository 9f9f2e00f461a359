//! The operator's side of a role: what it says of itself while it runs, and to whom.
//!
//! ```text
//!  I/O thread ── states, events ──▶ Board ──▶ operator's thread ──▶ control socket ◀── doppel status, doppel top
//!  every thread ── plain counters ──▶ Meter ──┘   │  │  └──▶ metrics ◀── Prometheus
//!                                                 │  └──▶ log lines: changes of role, UNPROTECTED now and then
//!                                                 └──▶ hook's helper, a process of its own ──▶ the operator's command
//! ```
//! The operator's thread only reads: the threads that serve never wait for it, and take no lock that it holds. It is nicer than
//! they are, sleeps nearly always, and is confined like the rest (`sandbox.rs`). Everything that it listens at is opened before.
//!
//! Who speaks to it is not trusted: requests are short and bounded, a client that is slow or idle is dropped, the oldest gives
//! way to a new one where there are too many, and none gets more than some answers a second.

pub mod board;
mod clients;
pub mod find;
pub mod hook;
mod operator;
mod place;
mod prometheus;
pub mod status;
mod view;
mod viewers;
pub mod visit;
pub mod wire;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

pub use operator::Operator;
pub use place::default_run_dir;

/// Why a role cannot be seen.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The run directory.
    #[error(
        "the run directory {} cannot be used: {source}; name one that belongs to this user with --run-dir", directory.display()
    )]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others may write there.
    #[error(
        "the run directory {} {what}: anybody could stand in for this role there. Name one of your own with --run-dir", directory.display()
    )]
    NotOurs {
        /// The directory.
        directory: PathBuf,
        /// Whose it is.
        what: &'static str,
    },
    /// A name that is no machine's.
    #[error(
        "{name:?} is no name of a machine: use 1 to 63 of a-z, 0-9 and -, not beginning with -"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// A process listens there.
    #[error(
        "a live process listens at {}: end it, or give this role another --run-dir", path.display()
    )]
    Busy {
        /// The socket.
        path: PathBuf,
    },
    /// The socket.
    #[error("cannot listen at {}: {source}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The metrics' address.
    #[error(
        "cannot serve metrics at {address}: {source}; choose another --metrics address, or leave it out"
    )]
    Metrics {
        /// The address.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// The hook's helper.
    #[error("cannot start the process that runs the hook: {0}")]
    Hook(io::Error),
    /// Anything else.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The sandbox.
    #[error(transparent)]
    Sandbox(#[from] crate::sandbox::SandboxError),
}

/// Whether a text can be a machine's name. No such name leaves the directory that a file of its is in.
#[must_use]
pub fn is_name(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && !text.starts_with('-')
        && text
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}
