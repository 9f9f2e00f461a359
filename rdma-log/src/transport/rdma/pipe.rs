//! One queue pair with its accounting, and the slots that blocks are sent from.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::block::{BLOCK, Block, From};
use super::error::ConnectError;
use super::flow::Window;
use crate::control::PAGE;
use crate::entry::Nonce;
use crate::region::Region;
use crate::transport::WriteView;
use crate::verbs::RdmaError;
use crate::verbs::abi::{Completion, RUNG};
use crate::verbs::{Device, Queue, Registered, Remote, Write, Writes};

/// Requests in flight that a queue pair is asked to hold. With pieces of 32 KiB they cover 8 MiB, as much as a lane.
const REQUESTS: u32 = 256;
/// Places of it that lanes leave to blocks.
pub(super) const RESERVED: u32 = 16;
/// Receives posted: there is never more than one ring on its way (`Alarm`), and one is posted again before the next alarm.
const RECEIVES: u32 = 4;
/// Bytes that go with the request: enough for most of a guest's entries, and no more than devices give without cutting down
/// on requests.
const INLINE: u32 = 256;
/// Completions taken at once.
const TAKEN: usize = 16;

/// A queue pair, and what is in flight by it.
#[derive(Debug)]
pub(super) struct Pipe<T> {
    pub(super) queue: Queue,
    window: Window<T>,
    /// Where completions are taken to. Not made anew for each look: most find none.
    completions: [Completion; TAKEN],
}

/// What taking completions brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Taken {
    /// There were some.
    pub(super) any: bool,
    /// The peer rang.
    pub(super) rung: bool,
}

impl<T> Pipe<T> {
    pub(super) fn new(device: &Arc<Device>) -> Result<Pipe<T>, RdmaError> {
        let queue = Queue::new(device, REQUESTS, RECEIVES, INLINE)?;
        let window = Window::new(queue.limits().requests);
        Ok(Pipe {
            queue,
            window,
            completions: [Completion::default(); TAKEN],
        })
    }

    /// Receives that are posted from the start, once the queue is connected.
    pub(super) fn start(&mut self) -> Result<(), RdmaError> {
        self.queue.expect(RECEIVES)?;
        self.queue.arm()
    }

    /// Places for writes, less those that are left to blocks.
    pub(super) fn room_for_lanes(&self) -> u32 {
        self.window.room().saturating_sub(RESERVED)
    }

    pub(super) fn room(&self) -> u32 {
        self.window.room()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.window.is_empty()
    }

    /// Posts writes for which there is room.
    pub(super) fn post<'m>(
        &mut self,
        writes: impl IntoIterator<Item = Write<'m>>,
        what: T,
    ) -> Result<(), RdmaError> {
        let posted = self.queue.post(writes, self.window.next_id())?;
        self.window.post(posted, what);
        Ok(())
    }

    /// Takes in what was completed, and hands it on in order. What had succeeded before a failure is handed on as well.
    #[inline]
    pub(super) fn take(&mut self, done: impl FnMut(T)) -> Result<Taken, RdmaError> {
        // Who spins for a commit looks here again and again: the fewer instructions, the sooner it is seen.
        let got = self.queue.poll(&mut self.completions)?;
        if got == 0 {
            return Ok(Taken::default());
        }
        self.take_found(got, done)
    }

    #[inline(never)]
    fn take_found(&mut self, mut got: usize, mut done: impl FnMut(T)) -> Result<Taken, RdmaError> {
        let mut taken = Taken {
            any: true,
            rung: false,
        };
        loop {
            for completion in &self.completions[..got] {
                if completion.status != 0 {
                    return Err(RdmaError::of_status(completion.status, completion.vendor));
                }
                if completion.kind == RUNG {
                    taken.rung = true;
                    self.queue.expect(1)?;
                    continue;
                }
                let found = completion.id;
                let what = self.window.complete(found);
                done(what.map_err(|expected| RdmaError::Completion { expected, found })?);
            }
            if got < TAKEN {
                return Ok(taken);
            }
            got = self.queue.poll(&mut self.completions)?;
        }
    }
}

/// Blocks of which this many may be in flight.
const SLOTS: u64 = 8;

/// Where blocks are sent from, and where to. A slot is filled again when its write was completed.
#[derive(Debug)]
pub(super) struct Slots {
    memory: Registered,
    view: WriteView,
    to: Remote,
    from: From,
    nonce: Nonce,
    posted: u64,
}

impl Slots {
    pub(super) fn new(
        device: &Arc<Device>,
        to: Remote,
        nonce: Nonce,
        from: From,
    ) -> Result<Slots, ConnectError> {
        let region = memory(PAGE)?;
        let memory = Registered::new(device, &region, Writes::Own)?;
        let [view, _] = region.write_views(0, [SLOTS as usize * BLOCK, 0]);
        Ok(Slots {
            memory,
            view,
            to,
            from,
            nonce,
            posted: 0,
        })
    }

    /// Posts a block, when so many of the blocks before it were completed. False if no slot or no place is free; the next
    /// completion makes one.
    pub(super) fn post<T>(
        &mut self,
        pipe: &mut Pipe<T>,
        block: Block,
        ring: bool,
        what: T,
        done: u64,
    ) -> Result<bool, RdmaError> {
        if self.posted.saturating_sub(done) >= SLOTS || pipe.room() == 0 {
            return Ok(false);
        }
        let at = (self.posted % SLOTS) as usize * BLOCK;
        let bytes = block.to_bytes(&self.nonce, self.from);
        self.view.bytes_mut(at, BLOCK).copy_from_slice(&bytes);
        let mut write = self.memory.write(at, BLOCK, self.to, 0);
        if ring {
            write.ring();
        }
        pipe.post([write], what)?;
        self.posted += 1;
        Ok(true)
    }
}

/// Memory for the device.
pub(super) fn memory(len: usize) -> Result<Region, ConnectError> {
    Region::locked(len).map_err(|error| ConnectError::Memory {
        what: "map memory for the RDMA device",
        error,
    })
}
