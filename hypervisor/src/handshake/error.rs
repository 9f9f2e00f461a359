//! Why there is no pair, each with what to do.
#![forbid(unsafe_code)]

use std::io::ErrorKind;

use rdma_log::fdpass::FdPassError;
use rdma_log::transport::{rdma, shm, tcp};

use super::PATIENCE;
use crate::backends::PortError;
use crate::checkpoint::clone::CloneError;
use crate::config::Transport;
use crate::kvm::{CpuModel, Difference};
use crate::machine::SpecError;
use crate::version::Versions;

/// Why there is no pair.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The connection broke.
    #[error("the other side closed the connection, or did not answer within {} s: {source}", PATIENCE.as_secs())]
    Connection {
        /// What the kernel said.
        source: std::io::Error,
    },
    /// It says something else than a doppel does.
    #[error(
        "whoever is at the other end does not speak as a doppel does: is the address right, and is what listens there one?"
    )]
    NotDoppel,
    /// One side has a secret and the other has none.
    #[error(
        "{}: give both sides a copy of the same secret (--secret, pair.secret; `doppel secret FILE` makes one), or neither, if both are \
         processes of one host",
        if *ours { "this side has a secret and the other has none" } else { "the other side has a secret and this one has none" }
    )]
    Proof {
        /// Whether this side has one.
        ours: bool,
    },
    /// The secrets differ.
    #[error(
        "the other side does not prove that it holds this side's secret: copy one file, made by `doppel secret`, to both hosts; \
         if it is the same, somebody between the two changes what they say"
    )]
    Secret,
    /// Another user's process.
    #[error(
        "the process at the other end belongs to user {theirs}, this one to user {ours}: over a Unix socket both sides run as the \
         same user; between users use a transport over the network with a secret"
    )]
    User {
        /// Its user.
        theirs: u32,
        /// This one's.
        ours: u32,
    },
    /// A sealed message does not open.
    #[error(
        "a message was not said by the peer that proved itself, or was changed on its way: somebody between the two sides \
         meddles, or the network damages what TCP does not notice; this connection is dropped"
    )]
    Forged,
    /// The log is to go by other ways.
    #[error(
        "the primary's log goes by transport {theirs:?}, this backup's by {:?}: give both the same --transport (pair.transport)",
        ours.name()
    )]
    Transport {
        /// The primary's.
        theirs: String,
        /// The backup's.
        ours: Transport,
    },
    /// The port that was handed over.
    #[error("the network port that the primary handed over is of no use here: {0}")]
    Port(#[from] PortError),
    /// A message that makes no sense.
    #[error("the other side sent no {expected}: {why}; is it a doppel of the same version?")]
    Malformed {
        /// What was expected.
        expected: &'static str,
        /// What is wrong.
        why: String,
    },
    /// There is no version that both sides speak.
    #[error(
        "the other side speaks {theirs}, this one {ours}: {} is too old for the other one; upgrade it, one release at a time \
         (docs/formats.md)",
        if theirs.newest() < ours.newest() { "the other side" } else { "this side" }
    )]
    Version {
        /// What it speaks.
        theirs: Versions,
        /// What this side speaks.
        ours: Versions,
    },
    /// The CPUs differ.
    #[error(
        "the other side's CPU is {} {:#x}, this one's {} {:#x}: replay needs the same vendor, family, model and stepping on both",
        theirs.vendor, theirs.signature, ours.vendor, ours.signature
    )]
    Cpu {
        /// The other side's CPU.
        theirs: CpuModel,
        /// This one's.
        ours: CpuModel,
    },
    /// The CPUs are of one model, and a guest finds different things on the two.
    #[error(
        "both hosts have the same CPU, and yet this one cannot tell a guest what it was told on the other: by CPUID {0}. A backup's kernel, microcode and \
         firmware settings must offer all that its primary's offer: bring this host's up to those of the other, or start the machine on this one"
    )]
    Told(Difference),
    /// The machine has another name.
    #[error(
        "the primary's machine is {theirs:?}, this backup is for {ours:?}: give both the same --name"
    )]
    Name {
        /// The primary's.
        theirs: String,
        /// The backup's.
        ours: String,
    },
    /// The machine is another one of the same name.
    #[error(
        "the primary's machine is another {name:?} than this backup's ({theirs:?}, {ours:?}): one of them was deleted; end what is left of that"
    )]
    Instance {
        /// The name of both.
        name: String,
        /// The primary's.
        theirs: String,
        /// The backup's.
        ours: String,
    },
    /// The machine is replicated in another way.
    #[error(
        "the primary replicates by {theirs:?}, this backup by {ours:?}: give both the same --replicate"
    )]
    Replication {
        /// The primary's.
        theirs: String,
        /// The backup's.
        ours: &'static str,
    },
    /// The other side said no.
    #[error("the other side refused: {0}")]
    Refused(String),
    /// The record does not entitle this backup.
    #[error("the pair's record does not entitle this backup: {0}")]
    NotEntitled(String),
    /// The machine's description.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The machine that it describes cannot be built here.
    #[error("the backup cannot build the machine: {0}")]
    Machine(String),
    /// Descriptors.
    #[error("cannot pass a descriptor: {0}")]
    Pass(#[from] FdPassError),
    /// The ring.
    #[error("cannot set up the ring: {0}")]
    Ring(#[from] shm::ConnectError),
    /// The ring over TCP.
    #[error("cannot set up the ring: {0}")]
    Stream(#[from] tcp::ConnectError),
    /// The ring over RDMA.
    #[error("cannot set up the ring: {0}")]
    Rdma(#[from] rdma::ConnectError),
    /// The backup offers a ring in which entries do not fit.
    #[error(
        "the backup offers an {lane} lane whose entries have at most {has} bytes: too small for this machine"
    )]
    TinyLane {
        /// The lane.
        lane: &'static str,
        /// Bytes.
        has: usize,
    },
    /// The copy does not follow the log.
    #[error("the copy that was made here is of no use: {0}")]
    Unfit(String),
    /// The copy of a machine that runs.
    #[error("the machine could not be copied: {0}")]
    Copy(#[from] CloneError),
    /// The two sides' disks.
    #[error(transparent)]
    Disk(#[from] DiskMisfit),
    /// Descriptors cannot be passed over this connection.
    #[error("{what} needs a pair on one host: use pair.transport \"shm\"")]
    NotHere {
        /// What was wanted.
        what: &'static str,
    },
}

/// Why a backup's disk image cannot follow its primary's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskMisfit {
    /// The backup has none.
    #[error(
        "the machine has a disk, and this backup no image for it: give it one with the same content (--disk)"
    )]
    NoneHere,
    /// The machine has none.
    #[error(
        "the machine has no disk, and this backup an image for one: start both with --disk, or neither"
    )]
    NoneThere,
    /// Of another size or kind.
    #[error(
        "the primary's disk image has {} sectors{}, this backup's {}{}: give both sides images of one size, used alike",
        theirs.0, if theirs.1 { ", read-only" } else { "" }, ours.0, if ours.1 { ", read-only" } else { "" }
    )]
    Shape {
        /// Sectors, and whether it is read-only.
        theirs: (u64, bool),
        /// The same of this side's.
        ours: (u64, bool),
    },
    /// Another machine's.
    #[error(
        "the machine runs, so its disk is copied over this backup's image, which belongs to the machine {0:?}: give it another image, or remove that one's mark and empty it"
    )]
    Foreign(String),
    /// Nobody knows whose.
    #[error(
        "the machine runs, so its disk is copied over this backup's image, which carries no mark of this machine and is not empty: give it an empty image of that size (truncate), or one that this machine had"
    )]
    NotEmpty,
    /// One side shares it, the other does not.
    #[error(
        "the primary's disk is {}, this backup's {}: give both the same arrangement (--disk FILE,shared or FILE)",
        if *shared { "shared" } else { "an image of its own" }, if *shared { "an image of its own" } else { "shared" }
    )]
    Arrangement {
        /// The primary's is.
        shared: bool,
    },
    /// The process of the primary, with which the disk is shared.
    #[error(
        "the primary's process cannot be held on to, so that nothing could be known of its end: {0}; a shared disk needs both sides in one PID \
         namespace, and a kernel with pidfd_open (5.3)"
    )]
    NoProcess(String),
    /// A shared image that the primary does not have.
    #[error("{0}")]
    NotThePrimarys(String),
    /// The content differs.
    #[error(
        "the two disk images differ: copy the primary's here while neither side runs (the image alone, not its mark)"
    )]
    Content,
}

impl From<std::io::Error> for HandshakeError {
    fn from(source: std::io::Error) -> Self {
        match source.kind() {
            ErrorKind::InvalidData => Self::Forged,
            _ => Self::Connection { source },
        }
    }
}
