//! The entropy device (virtio 1.2, section 5.4).
//!
//! It has no randomness of its own: a request makes it wait for so many bytes, and they come as an input.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::event::Output;
use crate::memory::GuestRam;

use super::queue::{Direction, QueueFault, VirtQueue};
use super::{Device, Interrupt};

/// The queue of requests.
pub const REQUESTS: usize = 0;

/// The most bytes that one request gets.
pub const MAX_REQUEST: usize = 4096;

/// The entropy device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rng {
    /// How many bytes the oldest request waits for.
    waiting: Option<usize>,
}

impl Rng {
    /// How many bytes the oldest request waits for: 1 to [`MAX_REQUEST`].
    #[must_use]
    pub fn waiting(&self) -> Option<usize> {
        self.waiting
    }

    /// Whether this device can be in this state.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.waiting
            .is_none_or(|count| (1..=MAX_REQUEST).contains(&count))
    }

    /// Answers the request that waits, and looks for the next.
    ///
    /// # Errors
    /// What is wrong with the queue.
    pub fn supply(
        &mut self,
        queue: &mut VirtQueue,
        ram: &GuestRam,
        bytes: &[u8],
    ) -> Result<Interrupt, QueueFault> {
        self.waiting = None;
        // The guest may have run since it asked, and changed what it asked for: look again.
        let Some(chain) = queue.pop(ram, Direction::Writable)? else {
            return Ok(Interrupt(false));
        };
        let written = chain.write(ram, &[bytes])?;
        queue.push(ram, &chain, written)?;
        self.look(queue, ram)?;
        Ok(Interrupt(queue.wants_interrupt(ram)))
    }

    /// Finds the next request that wants bytes; those that want none are done at once. Says whether there were any.
    fn look(&mut self, queue: &mut VirtQueue, ram: &GuestRam) -> Result<bool, QueueFault> {
        let mut used = false;
        self.waiting = None;
        for _ in 0..queue.size {
            let Some(chain) = queue.peek(ram, Direction::Writable)? else {
                break;
            };
            if !chain.is_empty() {
                self.waiting = Some(chain.len().min(MAX_REQUEST));
                break;
            }
            queue.pop(ram, Direction::Writable)?;
            queue.push(ram, &chain, 0)?;
            used = true;
        }
        Ok(used)
    }
}

impl Device for Rng {
    const ID: u32 = 4;

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn notify(
        &mut self,
        _index: usize,
        queue: &mut VirtQueue,
        ram: &GuestRam,
        _outputs: &mut Vec<Output>,
    ) -> Result<Interrupt, QueueFault> {
        let used = self.look(queue, ram)?;
        Ok(Interrupt(used && queue.wants_interrupt(ram)))
    }

    fn reset(&mut self) {
        self.waiting = None;
    }
}
