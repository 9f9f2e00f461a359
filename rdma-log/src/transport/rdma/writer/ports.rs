//! What lanes and other threads hold of the writer's end.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use super::{End, LaneState, Shared, Writer};
use crate::entry::{Lane, Seq};
use crate::lane::WriteError;
use crate::sync::Ordering;
use crate::transport::rdma::hello::Mode;
use crate::transport::{Counters, ProgressPort, Range, WritePort, WriteView};
use crate::verbs::RdmaError;

/// The completions of a connection's writer, for a thread that waits for other things as well, or spins.
///
/// Whenever the descriptor is ready, and several times a second besides, the holder calls [`turn`](Watch::turn): only by
/// that is the reader rung for, and the end of an idle connection noticed. Clones are the same.
#[derive(Clone, Debug)]
pub struct Watch {
    pub(super) shared: Arc<Shared>,
}

impl Watch {
    /// Takes in completions and what the reader returned, and sends what found no room before, without waiting.
    ///
    /// # Errors
    /// When the connection is of no more use; [`committed`](Watch::committed) still says what had committed.
    pub fn turn(&self) -> Result<(), WriteError> {
        self.shared.turn()
    }

    /// How far both lanes got, by what was taken in last. Every number of the reader's was checked.
    pub fn counters(&self) -> [Counters; 2] {
        self.shared.counters()
    }

    /// The highest entry of either lane that has committed, by what was taken in last.
    pub fn committed(&self) -> [Seq; 2] {
        self.counters().map(|counters| counters.committed)
    }

    /// Why the connection failed, if it did by the device's word.
    pub fn broken(&self) -> Option<RdmaError> {
        match self.shared.end.get() {
            Some(End::Failed(error)) => Some(error.clone()),
            _ => None,
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.device.as_fd()
    }
}

/// One lane's end of the connection.
#[derive(Debug)]
pub(in crate::transport::rdma) struct RdmaWriter {
    lane: Lane,
    writer: Arc<Writer>,
    looks: u32,
}

/// Looks for an acknowledgement between two at the completions.
const LOOKS: u32 = 8;

impl RdmaWriter {
    pub(in crate::transport::rdma) fn new(lane: Lane, writer: Arc<Writer>) -> RdmaWriter {
        RdmaWriter {
            lane,
            writer,
            looks: 0,
        }
    }

    fn shared(&self) -> &Shared {
        &self.writer.shared
    }

    fn state(&self) -> &LaneState {
        self.shared().lane(self.lane)
    }
}

impl WritePort for RdmaWriter {
    fn post(&mut self, _: &WriteView, range: Range) -> Result<(), WriteError> {
        self.shared().post(self.lane, range)
    }

    fn push(&mut self, _: &WriteView) -> Result<(), WriteError> {
        self.shared().flush();
        self.shared().check(self.lane)
    }

    fn consumed(&mut self) -> Result<u64, WriteError> {
        self.shared().take(self.lane);
        self.shared().hear();
        self.shared().check(self.lane)?;
        let state = self.state();
        let consumed = state.consumed.load(Ordering::Acquire);
        Ok(consumed.min(state.complete.load(Ordering::Acquire)))
    }

    fn committed(&mut self) -> Result<Seq, WriteError> {
        let last = Seq(self.state().last.load(Ordering::Relaxed));
        self.looks = self.looks.wrapping_add(1);
        let shared = self.shared();
        if shared.mode == Mode::Ack {
            // It is in this side's memory; completions, which a commit does not wait for here, are a call of the device's. They make
            // room and tell of errors: now and then is soon enough.
            shared.hear();
            let committed = self.state().committed(shared.mode);
            if committed == last {
                return Ok(last);
            }
            if !self.looks.is_multiple_of(LOOKS) {
                shared.check(self.lane)?;
                return Ok(committed);
            }
        }
        shared.take(self.lane);
        let committed = self.state().committed(shared.mode);
        if committed < last {
            shared.check(self.lane)?;
        }
        Ok(committed)
    }

    fn fenced(&mut self) -> bool {
        self.shared().hear();
        self.shared().fenced()
    }

    fn arm(&mut self) -> u32 {
        let armed = self.state().bell().arm();
        // Room comes only from what the reader has got.
        self.shared().flush();
        self.shared().set_alarm();
        armed
    }

    fn sleep(&mut self, armed: u32, limit: Duration) -> bool {
        self.state().bell().sleep(armed, limit)
    }

    fn disarm(&mut self) {
        self.state().bell().disarm();
    }
}

#[derive(Debug)]
pub(in crate::transport::rdma) struct RdmaProgress(pub(in crate::transport::rdma) Arc<Writer>);

impl ProgressPort for RdmaProgress {
    fn poll(&mut self) -> Result<[Counters; 2], WriteError> {
        let shared = &self.0.shared;
        for lane in Lane::ALL {
            shared.take(lane);
        }
        shared.hear();
        if !shared.fenced() {
            shared.check(Lane::Events)?;
        }
        Ok(shared.counters())
    }
}
