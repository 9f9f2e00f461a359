//! The disk's image, and the thread that works on it.
//!
//! ```text
//!  leads:   vCPU ── serve(request) ──▶ queue ──▶ thread ──▶ image        follows:  replayer ── follow(request) ──▶ queue ──▶ …
//!           I/O  ◀── done, wake ◀──────────────────┘                               nothing comes back but a failure
//! ```
//! One thread takes the requests in their order, one after the other, so an image always holds a prefix of what was asked, up to
//! the one under way. The queue of a side that leads is bounded by its guest's device; that of one that follows by
//! [`FOLLOW_BYTES`]: a backup whose disk is slower waits here, and its primary for it.
//!
//! `docs/disks.md` says when which write may happen; the steps of a side's life are in [`mark`], and [`worker`] keeps their order.
#![forbid(unsafe_code)]

pub mod copy;
mod image;
pub mod mark;
mod shared;
mod worker;

pub use image::{DiskError, Image, OpenImage, Opening, mark_beside, mark_file};
pub use worker::{CopyRead, Disk, DiskFailure, FOLLOW_BYTES, Outcome};
