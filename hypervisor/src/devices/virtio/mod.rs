//! The virtio devices (virtio 1.2): a transport, split virtqueues, and what works them.
//!
//! ```text
//! guest access ──▶ mmio::Mmio<D> ──notify──▶ D: Device (net, rng, blk) ──▶ queue::VirtQueue ──▶ guest RAM
//!                      └──▶ Line: what happens to the device's interrupt line
//! ```
#![forbid(unsafe_code)]

pub mod blk;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;

use crate::event::Output;
use crate::memory::GuestRam;

use queue::{QueueFault, VirtQueue};

/// What happens to a device's interrupt line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Line {
    /// Nothing.
    Same,
    /// A fresh rising edge.
    Raise,
    /// It falls.
    Lower,
}

/// Whether work on a queue calls for an interrupt: buffers were used and the driver wants to hear of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Interrupt(pub bool);

/// What stands behind a transport.
pub trait Device {
    /// The device's type (virtio 1.2, section 5).
    const ID: u32;

    /// The features it offers, besides `VIRTIO_F_VERSION_1`.
    fn features(&self) -> u64;

    /// The driver has chosen these.
    fn agreed(&mut self, _features: u64) {}

    /// Its configuration space.
    fn config(&self) -> &[u8];

    /// Works through queue `index`, which the driver has set up and says it has put buffers into.
    ///
    /// # Errors
    /// What is wrong with the queue: the transport then asks the driver for a reset.
    fn notify(
        &mut self,
        index: usize,
        queue: &mut VirtQueue,
        ram: &GuestRam,
        outputs: &mut Vec<Output>,
    ) -> Result<Interrupt, QueueFault>;

    /// Forgets everything that a driver caused.
    fn reset(&mut self);
}
