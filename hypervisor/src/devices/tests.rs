//! The board as a guest and a recorder see it.

mod blk;
mod board;
mod driver;
mod hostile;
mod virtio;
