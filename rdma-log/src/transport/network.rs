//! What a thread that waits for many things holds of a ring over a network, whichever carries it.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};

use super::{Counters, rdma, tcp};
use crate::entry::Seq;
use crate::lane::WriteError;

/// The writer's end: see [`tcp::Watch`] and [`rdma::Watch`]. Clones are the same.
#[derive(Clone, Debug)]
pub enum Watch {
    /// A socket.
    Tcp(tcp::Watch),
    /// Completions.
    Rdma(rdma::Watch),
}

impl Watch {
    /// Takes in what came, and sends what found no room before, without waiting. To be called whenever the descriptor is
    /// ready, and several times a second besides.
    ///
    /// # Errors
    /// When the connection is of no more use; [`committed`](Watch::committed) still says what had committed.
    pub fn turn(&self) -> Result<(), WriteError> {
        match self {
            Watch::Tcp(watch) => watch.turn(),
            Watch::Rdma(watch) => watch.turn(),
        }
    }

    /// Whether answers are in memory, where a lane that is asked finds them without a system call.
    pub fn is_memory(&self) -> bool {
        matches!(self, Watch::Rdma(_))
    }

    /// Whether to wait for room in the descriptor as well.
    pub fn wants_write(&self) -> bool {
        match self {
            Watch::Tcp(watch) => watch.wants_write(),
            // A completion makes room.
            Watch::Rdma(_) => false,
        }
    }

    /// How far both lanes got, by what was taken in last. Every number was checked.
    pub fn counters(&self) -> [Counters; 2] {
        match self {
            Watch::Tcp(watch) => watch.counters(),
            Watch::Rdma(watch) => watch.counters(),
        }
    }

    /// The highest entry of either lane that has committed, by what was taken in last.
    pub fn committed(&self) -> [Seq; 2] {
        self.counters().map(|counters| counters.committed)
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Watch::Tcp(watch) => watch.as_fd(),
            Watch::Rdma(watch) => watch.as_fd(),
        }
    }
}

/// Why nothing more comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// The peer is gone; nothing else is known to be wrong.
    pub gone: bool,
    /// What happened, and what to do.
    pub reason: String,
}

/// The reader's end: see [`tcp::Link`] and [`rdma::Link`].
#[derive(Clone, Debug)]
pub enum Link {
    /// A socket.
    Tcp(tcp::Link),
    /// Queue pairs.
    Rdma(rdma::Link),
}

impl Link {
    /// Why nothing more comes, if that is so. What had arrived stays to be read.
    pub fn broken(&self) -> Option<Broken> {
        match self {
            Link::Tcp(link) => link.broken().map(|error| Broken {
                gone: error == tcp::StreamError::Closed,
                reason: error.to_string(),
            }),
            Link::Rdma(link) => link.broken().map(|error| Broken {
                gone: error.is_peer_gone(),
                reason: error.to_string(),
            }),
        }
    }
}
