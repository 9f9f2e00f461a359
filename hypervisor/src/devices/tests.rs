//! The board as a guest and a recorder see it.

mod board;
mod driver;
mod hostile;
mod virtio;
