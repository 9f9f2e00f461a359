//! Why a ring cannot be set up.
#![forbid(unsafe_code)]

use std::io;

use thiserror::Error;

use crate::ring::BadSize;
use crate::verbs::RdmaError;

/// Why a ring could not be set up over RDMA.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The device, the library or its memory.
    #[error(transparent)]
    Rdma(#[from] RdmaError),
    /// The lanes' sizes.
    #[error(transparent)]
    Size(#[from] BadSize),
    /// The peer says something that cannot be.
    #[error(
        "what the peer said of its RDMA side is refused: {what}; run the same build on both sides"
    )]
    Protocol {
        /// What was wrong.
        what: &'static str,
    },
    /// The sides are set up in different ways.
    #[error("the two sides do not fit: {what} here is {here}, there {there}; set both the same")]
    Differs {
        /// Which setting.
        what: &'static str,
        /// Here.
        here: String,
        /// There.
        there: String,
    },
    /// The stream broke, or the peer was too slow: a time limit set on the stream comes as `WouldBlock`.
    #[error("cannot set up the ring with the peer: {0}")]
    Stream(#[from] io::Error),
    /// Memory could not be had or mapped.
    #[error("cannot {what}: {error}")]
    Memory {
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
}
