//! A bare connection between two queue pairs of one device: what a ring's figures are compared with.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::abi::{Completion, Path};
use super::{Choice, Queue, RdmaError, Registered, Verbs, Writes};
use crate::region::Region;

/// Writes from one piece of registered memory to another, by one queue pair.
#[derive(Debug)]
pub struct Bare {
    queues: [Queue; 2],
    source: Registered,
    target: Registered,
    posted: u64,
}

impl Bare {
    /// Opens the device and connects two of its queue pairs, for writes of up to `len` bytes.
    ///
    /// # Errors
    /// What the device says, or the kernel when there is no memory.
    pub fn new(verbs: &Verbs, choice: &Choice, len: usize) -> Result<Bare, RdmaError> {
        let device = Arc::new(verbs.open(choice)?);
        let queue = || Queue::new(&device, 64, 1, 256);
        let mut queues = [queue()?, queue()?];
        let numbers = [1, 0].map(|other: usize| queues[other].limits().number);
        let port = *device.port();
        for (queue, number) in queues.iter_mut().zip(numbers) {
            queue.connect(&Path {
                gid: port.gid,
                number,
                psn: 0,
                own_psn: 0,
                lid: port.lid,
                mtu: port.mtu,
                timeout: 14,
                retries: 6,
                reserved: [0; 3],
            })?;
        }
        let memory = || {
            Region::locked(len).map_err(|error| RdmaError::Verb {
                what: "map memory",
                errno: error.raw_os_error().unwrap_or(0),
            })
        };
        Ok(Bare {
            queues,
            source: Registered::new(&device, &memory()?, Writes::Own)?,
            target: Registered::new(&device, &memory()?, Writes::Peer)?,
            posted: 0,
        })
    }

    /// Posts one signalled write of `len` bytes and spins until it was completed.
    ///
    /// # Errors
    /// What the device says.
    ///
    /// # Panics
    /// If `len` is more than was asked for at first.
    pub fn write(&mut self, len: usize) -> Result<(), RdmaError> {
        let write = self.source.write(0, len, self.target.remote(), 0);
        self.posted += 1;
        self.queues[0].post([write], self.posted)?;
        let mut completions = [Completion::default()];
        while self.queues[0].poll(&mut completions)? == 0 {
            std::hint::spin_loop();
        }
        let [done] = completions;
        if done.status != 0 {
            return Err(RdmaError::of_status(done.status, done.vendor));
        }
        Ok(())
    }
}
