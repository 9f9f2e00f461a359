//! What lanes and other threads hold of the reader's end, and the fence.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::Shared;
use crate::entry::{Lane, Seq};
use crate::fence::{FenceError, Fenced};
use crate::lane::ReadError;
use crate::region::ReadView;
use crate::sync::Ordering;
use crate::transport::rdma::hello::Mode;
use crate::transport::rdma::pipe::Pipe;
use crate::transport::reading::{End, LanePort, Reading};
use crate::transport::{AckPort, FenceKey, FencePort, Limit, ReadPort};
use crate::verbs::{RdmaError, Registered};

/// The state of a connection's reading end.
#[derive(Clone, Debug)]
pub struct Link(Arc<Shared>);

impl Link {
    pub(in crate::transport::rdma) fn of(shared: &Arc<Shared>) -> Link {
        Link(shared.clone())
    }

    /// Why nothing more comes, if that is known. What had arrived stays to be read.
    pub fn broken(&self) -> Option<RdmaError> {
        self.0.broken.get().cloned()
    }
}

/// The port of the reader that walks along behind the device: it says how far it got, and nothing else.
#[derive(Debug)]
pub(super) struct Finder {
    pub(super) lane: Lane,
    pub(super) shared: Arc<Shared>,
    pub(super) view: ReadView,
}

impl ReadPort for Finder {
    fn limit(&mut self) -> Result<Limit, ReadError> {
        Ok(Limit::Unknown { fenced: false })
    }

    fn copy_out(&self, at: usize, to: &mut [u8]) {
        self.view.copy_out(at, to);
    }

    fn release(&mut self, consumed: u64) {
        self.shared.found[self.lane.index()].store(consumed, Ordering::Release);
    }

    fn push(&mut self) -> Result<(), ReadError> {
        Ok(())
    }

    fn arm(&mut self) -> u32 {
        0
    }

    fn sleep(&mut self, _: u32, _: Duration) -> bool {
        false
    }

    fn disarm(&mut self) {}
}

/// Where its acknowledgements would go, if it made any.
#[derive(Debug)]
pub(super) struct Nobody;

impl AckPort for Nobody {
    fn received(&self, _: Lane, _: Seq) {}

    fn replayed(&self, _: Lane, _: Seq) {}
}

/// One lane, for its reader.
pub(in crate::transport::rdma) type RdmaReader = LanePort<Shared>;

impl End for Shared {
    fn reading(&self) -> &Reading {
        &self.reading
    }

    fn limit(&self, _: Lane) -> Limit {
        // Acquire: whoever sees the fence sees every byte that came before it.
        let fenced = self.reading.fenced.load(Ordering::Acquire);
        Limit::Unknown { fenced }
    }
}

#[derive(Debug)]
pub(in crate::transport::rdma) struct RdmaAcks(pub(in crate::transport::rdma) Arc<Shared>);

impl AckPort for RdmaAcks {
    /// In mode `ack` it was acknowledged when it was found.
    fn received(&self, lane: Lane, seq: Seq) {
        if self.0.mode == Mode::Nic {
            let reading = &self.0.reading;
            let before = reading
                .lane(lane)
                .received
                .fetch_max(seq.0, Ordering::AcqRel);
            if seq.0 > before {
                reading.attend();
            }
        }
    }

    fn replayed(&self, lane: Lane, seq: Seq) {
        let state = self.0.reading.lane(lane);
        state.replayed.fetch_max(seq.0, Ordering::AcqRel);
    }
}

/// Takes the registration of the ring back; when that is done nothing arrives any more. Dropped, it does so as well.
#[derive(Debug)]
pub(in crate::transport::rdma) struct RdmaFence {
    pub(super) shared: Arc<Shared>,
    pub(super) ring: Registered,
    pub(super) thread: Option<JoinHandle<[Pipe<()>; 2]>>,
    /// What the thread left, and could not be destroyed yet: until it is, what it leads to may be written to.
    pub(super) left: Vec<Pipe<()>>,
}

impl RdmaFence {
    /// The other way: without its queue pairs nothing arrives either.
    fn destroy(&mut self) -> Result<(), RdmaError> {
        self.shared.reading.retire();
        // A thread that panicked has dropped them.
        if let Some(Ok(pipes)) = self.thread.take().map(JoinHandle::join) {
            self.left.extend(pipes);
        }
        while let Some(pipe) = self.left.last_mut() {
            pipe.queue.destroy()?;
            self.left.pop();
        }
        Ok(())
    }
}

impl FencePort for RdmaFence {
    fn fence(&mut self) -> Result<Fenced, FenceError> {
        if let Err(first) = self.ring.deregister() {
            self.destroy().map_err(|second| FenceError::Transport {
                reason: format!("{first}; and {second}"),
            })?;
        }
        let reading = &self.shared.reading;
        reading.end();
        reading.retire();
        Ok(Fenced::attest(FenceKey(()), reading.nonce, [None; 2]))
    }
}

impl Drop for RdmaFence {
    fn drop(&mut self) {
        // What the writer hears first is that it may not write, not that nobody is there. Errors have nobody to hear them.
        let _ = self.ring.deregister();
        let _ = self.destroy();
    }
}
