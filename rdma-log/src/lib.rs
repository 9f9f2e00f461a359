//! A replicated log in a ring of the reader's memory.
//!
//! The *writer* (a primary) puts entries into memory that belongs to the *reader* (a backup). This crate knows bytes,
//! sequence numbers and epochs; it has never heard of virtual machines.
//!
//! # What "committed" promises
//!
//! An entry is committed from the moment at which the loss of the writer, its process or its host, can no longer keep
//! the reader from reading it, together with every entry before it in its lane. So a writer lets an effect of an entry
//! out into the world only after it has committed.
//!
//! - [`Slot::publish`] and [`LaneWriter::append`] return the entry's number when it is *posted*. Whether it has
//!   committed say [`LaneWriter::committed`], and for a thread that does not write the lane [`Progress::poll`]. With
//!   transport [`shm`](transport::shm) an entry that was published has committed.
//! - [`Fencer::fence`] ends it: when it has returned, no entry commits that had not committed before, whatever the
//!   writer does and however long it was frozen. The writer is told [`WriteError::Fenced`]. An entry for which
//!   publishing returned `Ok` on `shm`, or which `committed` covered, is read by the reader that drains.
//! - An entry that met `Fenced` has not committed, and its writer lets nothing out for it. **The reader may have taken it
//!   all the same**, as may one whose writer died in between: a reader takes what is whole, and commit comes after that.
//!   In a lane this is one entry, the last, and only if it was taken before the fence; none is taken after it that had not
//!   committed. Whoever drained goes on from the state after that entry, which is one that the writer was in as well, and
//!   as if the entry had committed and nobody had been told: no effect of it is out, so it is the reader's to let out.
//!   A writer that goes on instead (the reader was given up, and lets nothing out) has the same entry in its own state.
//!   On `shm` such an entry ends beyond [`Fenced::end`], which is where the *committed* ones end.
//! - The [`Fenced`] that it returns is the proof, one per connection. With it a reader asks whether the end has been
//!   reached ([`LaneReader::at_end`]) and for what died with the writer ([`LaneReader::salvage`]).
//! - The two lanes commit apart from each other. A writer whose entry in one lane relies on one in the other
//!   publishes that first, and lets nothing out before both have committed. **Its reader may have the one before it has the
//!   other**, or never get the other, where each lane has a way of its own (`rdma`): [`LaneReader::missing`] says which.
//!
//! What it does not promise: that the reader outlives the writer, that committed entries have been received or
//! replayed (those are [`LaneProgress`]'s other counters), or who the writer is. The peer is a stranger to the code
//! here: whatever it writes into shared memory, this side gets an error that names lane, entry, byte, field, expected
//! and found, and never a panic, a wild access or an entry that was not checked.
//!
//! # A map
//!
//! | file | what |
//! | --- | --- |
//! | [`entry`] | the framing: header, stamps, checksums; pure |
//! | `crc` | the checksum of an entry, quick for a short one |
//! | `lane` | one writer, one reader: cursors, pads, credits |
//! | `ring` | both lanes, the handles of either side |
//! | [`fence`] | the proof [`Fenced`] |
//! | [`transport`] | the traits; `shm`, `tcp`, `rdma`, and `sim` for tests |
//! | `verbs` | RDMA devices, by a library that is loaded at run time |
//! | [`mod@file`] | a log file: the very entries of the wire |
//! | [`fdpass`] | descriptors over a Unix socket |
//! | [`robust`] | a thread's death, told by the kernel in shared memory |
//! | `region`, `control`, `futex`, `poll` | the memory, the shared words in it, sleeping on them and on sockets |
//! | [`locks`] | a lock whose holder may have panicked; none is on the way of an entry over `shm` |
//!
//! # Threads
//!
//! Every handle may be moved to a thread of its own. Publishing and reading take no lock and make no system call;
//! [`LaneWriter::notify`] and [`LaneReader::notify`] make one if the other side sleeps.
//!
//! # Example
//!
//! ```
//! use rdma_log::{Marks, RingConfig, transport::shm};
//!
//! let (mut writer, mut reader) = shm::pair(&RingConfig::default())?;
//! let mut slot = writer.inputs.reserve(1514)?;
//! slot.payload()[..5].copy_from_slice(b"frame");
//! slot.publish(5, Marks::default())?;
//! writer.inputs.notify()?;
//!
//! let entry = reader.inputs.next()?.expect("it was published");
//! assert_eq!(entry.payload(), b"frame");
//!
//! let proof = reader.fencer.fence()?;
//! assert!(reader.inputs.at_end(&proof)?);
//! assert!(writer.inputs.append(b"too late", Marks::default()).is_err());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![deny(unsafe_code)]

mod control;
mod crc;
pub mod entry;
pub mod fdpass;
pub mod fence;
pub mod file;
mod futex;
mod lane;
#[cfg(not(loom))]
mod lend;
pub mod locks;
#[cfg(not(loom))]
mod poll;
#[cfg_attr(loom, allow(dead_code, reason = "the models map no memory"))]
mod region;
mod ring;
#[cfg(not(loom))]
pub mod robust;
mod sync;
pub mod transport;
#[cfg(not(loom))]
pub mod verbs;

pub use crc::{crc32c, crc32c_append};
pub use entry::{Entry, Epoch, Head, Lane, Marks, Nonce, Seq};
pub use fence::{FenceError, Fenced};
pub use file::{FileEntry, LogFileError, LogFileReader, LogFileWriter};
pub use lane::{
    Counter, LaneReader, LaneWriter, MAX_LANE, MIN_LANE, Missing, ReadError, Slot, WriteError,
};
#[cfg(not(loom))]
pub use lend::{LendingMutex, Lent};
pub use ring::{
    Acks, BadSize, EVENTS_LANE, Fencer, INPUTS_LANE, LaneProgress, Progress, RingConfig,
    RingReader, RingWriter,
};
