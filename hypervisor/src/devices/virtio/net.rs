//! The network device (virtio 1.2, section 5.1), without offloads.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::event::Output;
use crate::memory::GuestRam;

use super::queue::{Chain, Direction, QueueFault, VirtQueue};
use super::{Device, Interrupt};

/// The queue of buffers for received frames.
pub const RECEIVE: usize = 0;
/// The queue of frames to send.
pub const TRANSMIT: usize = 1;

/// An Ethernet header.
pub const ETHERNET_HEADER: usize = 14;
/// The longest frame that passes, either way: the largest MTU there is, and its header.
pub const MAX_FRAME: usize = 65_535 + ETHERNET_HEADER;

/// `virtio_net_hdr` as version 1 has it, before every frame; all zero but for `num_buffers`.
const HEADER: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;

/// The network device.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Net {
    mtu: u16,
    /// `virtio_net_config`: address, status, queue pairs, MTU.
    config: [u8; 12],
}

impl Net {
    /// A device with this Ethernet address and MTU.
    #[must_use]
    pub fn new(mac: [u8; 6], mtu: u16) -> Self {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&mac);
        config[10..].copy_from_slice(&mtu.to_le_bytes());
        Self { mtu, config }
    }

    /// The longest frame that a network with this MTU carries.
    #[must_use]
    pub fn longest_frame(&self) -> usize {
        usize::from(self.mtu) + ETHERNET_HEADER
    }

    /// The longest frame that the next receive buffer takes; 0 without one.
    #[must_use]
    pub fn room(queue: &VirtQueue, ram: &GuestRam) -> usize {
        match queue.peek_len(ram, Direction::Writable) {
            Ok(Some(len)) => room_in(len),
            // The driver hears of a broken queue when it next notifies.
            Ok(None) | Err(_) => 0,
        }
    }

    /// Puts a frame into the next receive buffer; `None`, and nothing is done, if there is no [`room`](Self::room) for it.
    ///
    /// # Errors
    /// What is wrong with the queue.
    pub fn receive(
        queue: &mut VirtQueue,
        ram: &GuestRam,
        frame: &[u8],
    ) -> Result<Option<Interrupt>, QueueFault> {
        let mut next = *queue;
        let fits = |chain: &Chain| (1..=room_in(chain.len())).contains(&frame.len().max(1));
        // The driver hears of a broken queue when it next notifies.
        let Some(chain) = next
            .pop(ram, Direction::Writable)
            .ok()
            .flatten()
            .filter(fits)
        else {
            return Ok(None);
        };
        *queue = next;
        let written = chain.write(ram, &[&HEADER, frame])?;
        queue.push(ram, &chain, written)?;
        Ok(Some(Interrupt(queue.wants_interrupt(ram))))
    }

    fn transmit(
        queue: &mut VirtQueue,
        ram: &GuestRam,
        outputs: &mut Vec<Output>,
    ) -> Result<Interrupt, QueueFault> {
        const SHORTEST: usize = HEADER.len() + ETHERNET_HEADER;
        const LONGEST: usize = HEADER.len() + MAX_FRAME;
        let mut used = false;
        for _ in 0..queue.size {
            let Some(chain) = queue.pop(ram, Direction::Readable)? else {
                break;
            };
            // What is no frame is dropped, as a switch would.
            if (SHORTEST..=LONGEST).contains(&chain.len()) {
                outputs.push(Output::Frame(chain.read_after(ram, HEADER.len())?));
            }
            queue.push(ram, &chain, 0)?;
            used = true;
        }
        Ok(Interrupt(used && queue.wants_interrupt(ram)))
    }
}

/// The longest frame for a buffer of this length.
fn room_in(len: usize) -> usize {
    len.saturating_sub(HEADER.len()).min(MAX_FRAME)
}

impl Device for Net {
    const ID: u32 = 1;

    fn features(&self) -> u64 {
        F_MAC | F_MTU
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn notify(
        &mut self,
        index: usize,
        queue: &mut VirtQueue,
        ram: &GuestRam,
        outputs: &mut Vec<Output>,
    ) -> Result<Interrupt, QueueFault> {
        if index == TRANSMIT {
            return Self::transmit(queue, ram, outputs);
        }
        // New receive buffers: nothing to do before a frame comes, but this is when a driver hears of a bad one.
        queue.peek_len(ram, Direction::Writable)?;
        Ok(Interrupt(false))
    }

    fn reset(&mut self) {}
}
