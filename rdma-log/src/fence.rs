//! The proof that a connection is fenced.
//!
//! Going live needs it, and only a transport's [`FencePort::fence`](crate::transport::FencePort::fence) can make it:
//! a [`FenceKey`] cannot be had elsewhere. So a caller cannot drain, and go live, without having fenced.
#![forbid(unsafe_code)]

use thiserror::Error;

use crate::entry::{Lane, Nonce};
use crate::transport::FenceKey;

/// Proof that nothing more can commit to one connection.
///
/// Not to be copied: whoever holds it alone may drain the lanes to their end and go live.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a fenced connection is to be drained, then its machine goes live or is given up"]
pub struct Fenced {
    nonce: Nonce,
    ends: [Option<u64>; 2],
}

impl Fenced {
    /// States that the connection of `nonce` is fenced, with the lanes' ends where the transport knows them.
    pub(crate) fn attest(_: FenceKey, nonce: Nonce, ends: [Option<u64>; 2]) -> Fenced {
        Fenced { nonce, ends }
    }

    /// Whether this is the proof for the connection with that nonce.
    pub fn covers(&self, nonce: &Nonce) -> bool {
        self.nonce == *nonce
    }

    /// Where what has committed ends in the lane, in bytes since the start of the connection; `None` when the transport
    /// has no tail, and the end is the first entry that is not whole.
    ///
    /// The reader may have taken one entry beyond it, that had not committed yet: see the crate's text.
    pub fn end(&self, lane: Lane) -> Option<u64> {
        self.ends[lane.index()]
    }
}

/// Why a connection could not be fenced.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FenceError {
    /// The proof was given already; there is one per connection.
    #[error("this connection is fenced already and its proof was handed out: use that one")]
    Already,
    /// The transport could not do it. Nothing is proved: do not go live, try again.
    #[error(
        "cannot fence: {reason}; the old primary may still commit, so fence again before going live"
    )]
    Transport {
        /// What the transport said.
        reason: String,
    },
}
