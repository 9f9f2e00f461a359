//! The arbiter: one record per machine and one operation, compare-and-swap of the whole record.
//!
//! [`FileArbiter`] keeps the records in a directory that both hosts see, [`EtcdArbiter`] in an etcd cluster. The decisions are made in
//! [`crate::protocol`]; this module carries its [`Request`]s out, and makes the one thing that only an arbiter may
//! make: a [`Claim`].
#![forbid(unsafe_code)]

mod etcd;
mod file;
mod place;
mod text;

pub(crate) use etcd::base64;
pub(crate) use etcd::client::{Client, Header, parse};
pub use etcd::{EtcdArbiter, EtcdError, TlsError};
pub use file::{Durability, FileArbiter};
pub use place::{BadPlace, Cluster, Endpoint, Place, TlsFiles};

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use crate::protocol::record::{Epoch, Identity, Record, State};
use crate::protocol::{Answer, Request};

/// The proof that this process won a claim: a swap to `claimed`, with itself as the owner, took effect.
///
/// Only an arbiter makes it, and going live consumes it.
#[derive(Debug)]
#[must_use = "a claim that was won must be taken live or abandoned"]
pub struct Claim {
    record: Record,
}

impl Claim {
    /// The reign that was won.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.record.epoch
    }

    /// The record as it was swapped in.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }
}

/// How a swap came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swap {
    /// The record is what was asked for: by this call, or by an earlier one of the same process whose answer got
    /// lost.
    Done,
    /// The record is not what was asked for, and was not what it was to be swapped from, but this.
    Lost(Option<Record>),
}

/// Keeps one machine's record. Calls may block for as long as a disk or a network does; make them on a thread that
/// nothing waits for.
///
/// Sealed: an arbiter can make a [`Claim`], so every one of them lives in this module.
pub trait Arbiter: sealed::Sealed + Send {
    /// Reads the record: `None` if the machine never ran.
    ///
    /// # Errors
    /// Whatever keeps the record from being known.
    fn read(&self) -> Result<Option<Record>, ArbiterError>;

    /// Replaces the record by `to` if it is `from` (`None`: if there is none). The owner of `to` is the calling
    /// process, so a record that already is `to` was written by it and counts as [`Swap::Done`].
    ///
    /// # Errors
    /// Whatever keeps the outcome from being known; [`ArbiterError::may_have_landed`] tells whether the swap may
    /// have taken effect.
    fn swap(&self, from: Option<&Record>, to: &Record) -> Result<Swap, ArbiterError>;

    /// Whether its calls make network connections, and open no files.
    fn needs_network(&self) -> bool {
        false
    }
}

/// The arbiter of `machine` at this place, for those who only look.
///
/// # Errors
/// What the place's own arbiter says when it is opened.
pub fn open(place: &Place, machine: &str) -> Result<Box<dyn Arbiter>, ArbiterError> {
    open_for(place, machine, Durability::PowerLoss)
}

/// The arbiter of `machine` at this place, whose swaps are to outlive that. (etcd has a durability of its own.)
///
/// # Errors
/// What the place's own arbiter says when it is opened.
pub fn open_for(
    place: &Place,
    machine: &str,
    durability: Durability,
) -> Result<Box<dyn Arbiter>, ArbiterError> {
    Ok(match place {
        Place::Directory(path) => Box::new(FileArbiter::open(path, machine, durability)?),
        Place::Etcd(cluster) => Box::new(EtcdArbiter::open(cluster, machine)?),
    })
}

/// The record that etcd keeps of `machine` under `doppel/machines/`, for those who only look.
///
/// # Errors
/// What is wrong with the text.
pub(crate) fn record_of(machine: &str, text: &[u8]) -> Result<Record, String> {
    text::read(machine, text)
}

fn check_name(machine: &str) -> Result<(), ArbiterError> {
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let fits = (1..=63).contains(&machine.len()) && !machine.starts_with('-');
    if !fits || !machine.bytes().all(letter) {
        return Err(ArbiterError::Name {
            name: machine.to_owned(),
        });
    }
    Ok(())
}

mod sealed {
    /// Keeps arbiters in this module.
    pub trait Sealed {}
}

/// Carries out a request of the protocol: its answer, and the claim if one was won by it.
pub fn ask(arbiter: &dyn Arbiter, request: &Request) -> (Answer, Option<Claim>) {
    let failed = |error: ArbiterError| Answer::Failed {
        may_have_landed: error.may_have_landed(),
        why: error.to_string(),
    };
    match request {
        Request::Read => match arbiter.read() {
            Ok(record) => (Answer::Read(record), None),
            Err(error) => (failed(error), None),
        },
        Request::Swap { from, to } => match arbiter.swap(Some(from), to) {
            Ok(Swap::Done) => {
                let claim = (to.state == State::Claimed).then_some(Claim { record: *to });
                (Answer::Swapped, claim)
            }
            Ok(Swap::Lost(found)) => (Answer::Lost(found), None),
            Err(error) => (failed(error), None),
        },
    }
}

/// Sixteen bytes from the kernel's random source: a process's identity, a pair's key.
///
/// # Errors
/// If `/dev/urandom` cannot be read.
pub fn random_bytes() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The identity of this process, drawn anew at each call: call it once, at the start.
///
/// # Errors
/// If `/dev/urandom` cannot be read.
pub fn random_identity() -> io::Result<Identity> {
    Ok(Identity::from_bytes(random_bytes()?))
}

/// What keeps an arbiter from answering.
#[derive(Debug, thiserror::Error)]
pub enum ArbiterError {
    /// The name cannot be a machine's.
    #[error(
        "\"{name}\" cannot name a machine: use 1 to 63 of a-z, 0-9 and -, not beginning with -"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// The directory is not there, or is none.
    #[error(
        "the arbiter's directory {path} is not there: create it, or mount it, on a file system that both hosts see"
    )]
    Missing {
        /// The directory.
        path: PathBuf,
    },
    /// The directory or a record may not be read or written.
    #[error(
        "no permission to {what} {path}: give this user read and write access to the arbiter's directory"
    )]
    Permission {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
    },
    /// Another failure of the file system.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What came of it.
        source: io::Error,
    },
    /// The file system cannot do what makes exactly one process win.
    #[error(
        "{path} is on a file system without hard links: put the arbiter's directory on one that has them"
    )]
    NoLinks {
        /// The directory.
        path: PathBuf,
    },
    /// A record cannot be what this program wrote.
    #[error(
        "the arbiter's record {path} is damaged ({problem}). Nobody changes role on it. When no process of this \
         machine runs any more, remove its directory and start the machine cold"
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Other processes kept changing the record, or the file system's view of the directory is out of date.
    #[error(
        "the arbiter's directory {path} kept changing while it was read; it will be tried again"
    )]
    Unsettled {
        /// The directory.
        path: PathBuf,
    },
    /// etcd.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    /// The record was put in place, but what was to make sure of it failed.
    #[error(
        "the arbiter's record {path} may be in place, but that could not be made sure of: {source}"
    )]
    Unsure {
        /// The file.
        path: PathBuf,
        /// What failed afterwards.
        source: Box<ArbiterError>,
    },
}

impl ArbiterError {
    /// Whether the swap that failed may have taken effect all the same. `false` only when it certainly has not.
    #[must_use]
    pub fn may_have_landed(&self) -> bool {
        match self {
            Self::Unsure { .. } => true,
            Self::Etcd(error) => error.may_have_landed(),
            _ => false,
        }
    }
}
