//! The guest's memory: the RAM itself, which pages changed, and a hash of it all.
//!
//! ```text
//! GuestRam ──take_dirty()──▶ DirtyPages ──┐   (with KVM's own log merged in)
//!    └────────pages' content────────────▶ MemoryHash::update
//! ```
//! RAM is one piece from guest-physical address 0, backed by a memfd, so that another process can be handed
//! the same bytes. KVM logs what the guest writes; what *this process* writes (virtqueues, loading) it does
//! not see, so every write through [`GuestRam`] marks its pages as well.

mod dirty;
mod hash;
mod memfd;
mod ram;

pub use dirty::{Consumer, DirtyLedger, DirtyPages, PageNumber};
pub use hash::MemoryHash;
pub use ram::{GuestRam, MAX_RAM_MIB, MIN_RAM_MIB, MemoryError};

/// Bytes in a page: the unit of dirty tracking, checkpoints and the hash.
pub const PAGE_SIZE: usize = 4096;
