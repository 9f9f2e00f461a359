//! What came of requests to the disk: in parts into the inputs lane, then to the stage.
#![forbid(unsafe_code)]

use std::sync::Arc;

use rdma_log::{Marks, Seq, WriteError};

use super::{Stager, tell};
use crate::backends::disk::Disk;
use crate::disk::Done;
use crate::ring_log::INPUT_DONE;

/// The most bytes of a part: an eighth of the usual lane, so that frames find room beside it.
const PART: usize = 64 << 10;

/// Bytes of an entry before those of its part: the kind, and 1 if it is the last.
const HEAD: usize = 2;

/// Something on its way into the lane.
#[derive(Debug)]
pub(super) struct Outgoing {
    done: Done,
    bytes: Vec<u8>,
    sent: usize,
}

impl Outgoing {
    fn new(done: Done) -> Self {
        Self {
            bytes: done.encode(),
            done,
            sent: 0,
        }
    }

    /// Another lane has nothing of it.
    pub(super) fn begin_again(&mut self) {
        self.sent = 0;
    }
}

impl Stager {
    /// From now on what comes of requests to this disk is taken in.
    pub(in crate::session) fn serve_disk(&mut self, disk: Option<Arc<Disk>>) {
        self.disk = disk;
    }

    /// Of a machine that is replicated by checkpoints: nobody else's guest is told what came of requests.
    pub(in crate::session) fn keep_done(&mut self) {
        self.told = false;
    }

    /// The disk.
    pub(in crate::session) fn disk(&self) -> Option<&Arc<Disk>> {
        self.disk.as_ref()
    }

    /// What the disk said as it failed, while nobody has decided whether the guest is told.
    pub(in crate::session) fn disk_failure(&self) -> Option<&str> {
        self.failed.as_ref()?.failure.as_deref()
    }

    /// The guest is told that its disk failed.
    pub(in crate::session) fn tell_failure(&mut self) {
        let failed = self.failed.take();
        self.outgoing = failed.map(|outcome| Outgoing::new(outcome.done));
    }

    /// Takes in what came of requests, as far as there is room. Stops at a failure.
    pub(in crate::session) fn pump_done(&mut self) {
        while !self.lane_over && !self.paused && self.failed.is_none() {
            if let Some(outgoing) = self.outgoing.take() {
                self.send(outgoing);
                if self.outgoing.is_some() {
                    return;
                }
            }
            let Some(outcome) = self.disk.as_ref().and_then(|disk| disk.outcome()) else {
                return;
            };
            if outcome.failure.is_some() {
                self.failed = Some(outcome);
            } else {
                self.outgoing = Some(Outgoing::new(outcome.done));
            }
        }
    }

    /// Sends as much of it as there is room for; what is left is for later.
    fn send(&mut self, mut outgoing: Outgoing) {
        let Some(lane) = self.lane.as_mut().filter(|_| self.told) else {
            self.stage.push_done(Seq::ZERO, outgoing.done);
            return;
        };
        let most = PART.min(lane.max_payload() - HEAD);
        let marks = Marks {
            epoch: self.epoch,
            ..Marks::default()
        };
        loop {
            let rest = &outgoing.bytes[outgoing.sent..];
            let part = &rest[..rest.len().min(most)];
            let last = part.len() == rest.len();
            let mut payload = Vec::with_capacity(HEAD + part.len());
            payload.extend_from_slice(&[INPUT_DONE, last.into()]);
            payload.extend_from_slice(part);
            match lane.append(&payload, marks) {
                Ok(seq) => {
                    self.published = seq;
                    outgoing.sent += part.len();
                    tell(lane, self.committed.as_deref());
                    if last {
                        self.stage.push_done(seq, outgoing.done);
                        return;
                    }
                }
                Err(WriteError::Full { .. }) => {
                    self.lane_full = true;
                    break;
                }
                Err(error) => {
                    self.lane_over = true;
                    if !matches!(error, WriteError::Fenced | WriteError::Closed) {
                        self.unusable = Some(error.to_string());
                    }
                    break;
                }
            }
        }
        self.outgoing = Some(outgoing);
    }
}
