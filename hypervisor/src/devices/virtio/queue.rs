//! A split virtqueue (virtio 1.2, section 2.7): plain state here, the rings in guest RAM.
//!
//! The rings are walked by the `virtio-queue` crate. Around it stand the checks that make a hostile driver
//! harmless: rings and buffers lie inside RAM, a chain has no more descriptors than the queue, every buffer
//! goes one way, and a chain that breaks off is a fault and not a short chain. Who works a queue takes at most
//! [`VirtQueue::size`] chains at a time: where a driver laid its rings over each other, our own answers make new
//! requests.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};

use crate::memory::GuestRam;

/// The largest queue that we offer.
pub const MAX_SIZE: u16 = 256;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`.
const NO_INTERRUPT: u16 = 1;

/// What a driver did wrong with a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error, Serialize, Deserialize)]
pub enum QueueFault {
    /// The rings.
    #[error("its rings are misaligned or outside RAM")]
    Rings,
    /// The available ring's index.
    #[error("its available index is ahead by more than the queue's size")]
    AvailableIndex,
    /// A chain of descriptors.
    #[error("a descriptor chain loops, is too long, or leads out of its table")]
    Chain,
    /// A buffer's address or length.
    #[error("a buffer is outside RAM")]
    Buffer,
    /// A buffer's direction.
    #[error("a buffer goes the wrong way (device-readable for device-writable, or the reverse)")]
    Direction,
}

/// Which way a chain's buffers go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device reads them.
    Readable,
    /// The device writes them.
    Writable,
}

/// A piece of guest RAM, checked to be inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Buffer {
    address: u64,
    len: usize,
}

/// A chain of buffers that the driver made available, or its part that goes one way.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Chain {
    head: u16,
    buffers: Vec<Buffer>,
    len: usize,
}

impl Chain {
    /// The length of all buffers together, in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Everything after the first `skip` bytes.
    ///
    /// # Errors
    /// [`QueueFault::Buffer`], which the checks on popping exclude.
    pub fn read_after(&self, ram: &GuestRam, skip: usize) -> Result<Vec<u8>, QueueFault> {
        let mut data = vec![0; self.len.saturating_sub(skip)];
        self.read_at(ram, skip, &mut data)?;
        Ok(data)
    }

    /// Fills `data` with what follows the first `skip` bytes, as far as it reaches.
    ///
    /// # Errors
    /// [`QueueFault::Buffer`], which the checks on popping exclude.
    pub fn read_at(&self, ram: &GuestRam, skip: usize, data: &mut [u8]) -> Result<(), QueueFault> {
        let (mut skip, mut done) = (skip, 0);
        for buffer in &self.buffers {
            let over = skip.min(buffer.len);
            skip -= over;
            let len = (buffer.len - over).min(data.len() - done);
            ram.read(buffer.address + over as u64, &mut data[done..done + len])
                .map_err(|_| QueueFault::Buffer)?;
            done += len;
        }
        Ok(())
    }

    /// Writes one byte at its last place, if it has any.
    ///
    /// # Errors
    /// [`QueueFault::Buffer`], which the checks on popping exclude.
    pub fn write_last(&self, ram: &GuestRam, byte: u8) -> Result<(), QueueFault> {
        let Some(last) = self.buffers.iter().rfind(|buffer| buffer.len > 0) else {
            return Ok(());
        };
        ram.write(last.address + last.len as u64 - 1, &[byte])
            .map_err(|_| QueueFault::Buffer)
    }

    /// Fills the buffers with `parts`, one after the other, as far as they reach; returns the bytes written.
    ///
    /// # Errors
    /// [`QueueFault::Buffer`], which the checks on popping exclude.
    pub fn write(&self, ram: &GuestRam, parts: &[&[u8]]) -> Result<u32, QueueFault> {
        let mut buffers = self.buffers.iter().copied();
        let mut space = Buffer { address: 0, len: 0 };
        let mut written = 0;
        for part in parts {
            let mut rest = *part;
            while !rest.is_empty() {
                if space.len == 0 {
                    match buffers.next() {
                        Some(buffer) => space = buffer,
                        None => return Ok(written),
                    }
                    continue;
                }
                let (now, later) = rest.split_at(rest.len().min(space.len));
                ram.write(space.address, now)
                    .map_err(|_| QueueFault::Buffer)?;
                space.address += now.len() as u64;
                space.len -= now.len();
                // A chain holds less than 4 GiB: the queue crate ends longer ones.
                written += now.len() as u32;
                rest = later;
            }
        }
        Ok(written)
    }
}

/// A queue as its driver set it up, and how far both sides have come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VirtQueue {
    /// Places, as the driver wrote it: a power of two up to [`MAX_SIZE`] once the queue is ready.
    pub size: u16,
    /// Set up and checked.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring (the driver's).
    pub available: u64,
    /// Guest-physical address of the used ring (the device's).
    pub used: u64,
    next_available: u16,
    next_used: u16,
}

impl VirtQueue {
    /// Makes the queue ready if its size and its rings are good; says whether it is.
    pub fn enable(&mut self, ram: &GuestRam) -> bool {
        self.ready = true;
        self.ready = self.open(ram).is_ok();
        self.ready
    }

    /// Takes the next chain that the driver made available, if there is one. On an error nothing was taken.
    ///
    /// # Errors
    /// What is wrong with the queue or the chain.
    pub fn pop(
        &mut self,
        ram: &GuestRam,
        direction: Direction,
    ) -> Result<Option<Chain>, QueueFault> {
        self.walk(ram, |way, _| way == direction)
            .map(|walked| walked.map(|(chain, _)| chain))
    }

    /// Takes the next chain, whose buffers for the device to read come before those for it to write, in these two parts. On
    /// an error nothing was taken.
    ///
    /// # Errors
    /// What is wrong with the queue or the chain.
    pub fn pop_request(&mut self, ram: &GuestRam) -> Result<Option<(Chain, Chain)>, QueueFault> {
        let walked = self.walk(ram, |way, before| {
            way == Direction::Writable || before != Some(Direction::Writable)
        })?;
        Ok(walked.map(|(mut readable, readable_buffers)| {
            let buffers = readable.buffers.split_off(readable_buffers);
            let len = buffers.iter().map(|buffer| buffer.len).sum();
            readable.len -= len;
            let head = readable.head;
            (readable, Chain { head, buffers, len })
        }))
    }

    /// Takes the next chain, if `fits` allows the way of each buffer after that of the one before it. Also says how many go the
    /// device's way before the first that does not.
    fn walk(
        &mut self,
        ram: &GuestRam,
        fits: impl Fn(Direction, Option<Direction>) -> bool,
    ) -> Result<Option<(Chain, usize)>, QueueFault> {
        let mut chain = Chain {
            head: 0,
            buffers: Vec::new(),
            len: 0,
        };
        let mut readable = 0;
        let head = self.visit(ram, fits, |way, buffer| {
            readable += usize::from(way == Direction::Readable);
            chain.len += buffer.len;
            chain.buffers.push(buffer);
        })?;
        let Some(head) = head else { return Ok(None) };
        chain.head = head;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some((chain, readable)))
    }

    /// Shows each buffer of the next chain, if there is one; says which one it is.
    fn visit(
        &self,
        ram: &GuestRam,
        fits: impl Fn(Direction, Option<Direction>) -> bool,
        mut each: impl FnMut(Direction, Buffer),
    ) -> Result<Option<u16>, QueueFault> {
        let mut queue = self.open(ram)?;
        let memory = ram.guest_memory();
        let mut available = queue.iter(memory).map_err(|_| QueueFault::AvailableIndex)?;
        let Some(descriptors) = available.next() else {
            return Ok(None);
        };
        let head = descriptors.head_index();
        let mut before = None;
        // The queue crate ends a bad chain as it ends a good one; a good one ends without NEXT. It follows
        // indirect tables, which we never offer: harmless, as the bound on descriptors counts theirs too.
        let mut complete = false;
        for descriptor in descriptors.take(usize::from(self.size)) {
            let way = if descriptor.is_write_only() {
                Direction::Writable
            } else {
                Direction::Readable
            };
            if !fits(way, before) {
                return Err(QueueFault::Direction);
            }
            before = Some(way);
            let buffer = Buffer {
                address: descriptor.addr().0,
                len: descriptor.len() as usize,
            };
            if !ram.contains(buffer.address, buffer.len) {
                return Err(QueueFault::Buffer);
            }
            each(way, buffer);
            complete = !descriptor.has_next();
        }
        complete.then_some(Some(head)).ok_or(QueueFault::Chain)
    }

    /// Looks at the next chain without taking it.
    ///
    /// # Errors
    /// As [`pop`](Self::pop).
    pub fn peek(&self, ram: &GuestRam, direction: Direction) -> Result<Option<Chain>, QueueFault> {
        let mut copy = *self;
        copy.pop(ram, direction)
    }

    /// The length of the next chain's buffers together.
    ///
    /// # Errors
    /// As [`pop`](Self::pop).
    pub fn peek_len(
        &self,
        ram: &GuestRam,
        direction: Direction,
    ) -> Result<Option<usize>, QueueFault> {
        let mut len = 0;
        let head = self.visit(
            ram,
            |way, _| way == direction,
            |_, buffer| len += buffer.len,
        )?;
        Ok(head.map(|_| len))
    }

    /// Gives a chain back to the driver, with `len` bytes written into it.
    ///
    /// # Errors
    /// What is wrong with the queue.
    pub fn push(&mut self, ram: &GuestRam, chain: &Chain, len: u32) -> Result<(), QueueFault> {
        let mut queue = self.open(ram)?;
        queue
            .add_used(ram.guest_memory(), chain.head, len)
            .map_err(|_| QueueFault::Rings)?;
        self.next_used = queue.next_used();
        Ok(())
    }

    /// Whether the driver wants an interrupt for used buffers.
    #[must_use]
    pub fn wants_interrupt(&self, ram: &GuestRam) -> bool {
        // A ring outside RAM is found when the queue is next used.
        ram.read_obj::<u16>(self.available)
            .is_ok_and(|flags| u16::from_le(flags) & NO_INTERRUPT == 0)
    }

    fn open(&self, ram: &GuestRam) -> Result<Queue, QueueFault> {
        let state = QueueState {
            max_size: MAX_SIZE,
            next_avail: self.next_available,
            next_used: self.next_used,
            event_idx_enabled: false,
            size: self.size,
            ready: self.ready,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        };
        let queue = Queue::try_from(state).map_err(|_| QueueFault::Rings)?;
        // The queue crate takes an available ring at 0 for one that was never set.
        if self.available != 0 && queue.is_valid(ram.guest_memory()) {
            Ok(queue)
        } else {
            Err(QueueFault::Rings)
        }
    }
}
