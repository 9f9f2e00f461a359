//! Reads the guest's frames ahead: from the port straight into the inputs lane, then to the stage. What came of requests to the
//! disk goes the same way.
#![forbid(unsafe_code)]

mod done;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rdma_log::{Epoch, LaneWriter, Marks, Seq, WriteError};

use crate::backends::disk::{Disk, Outcome};
use crate::backends::{NetPort, longest_frame};
use crate::orders::Samples;
use crate::ring_log::{FRAME_HEAD, INPUT_FRAME};
use crate::session::host::MTU;
use crate::session::io::InputLane;
use crate::stage::{Stage, StagedFrame};
use done::Outgoing;

/// Frames read in one go, so that heartbeats are never late because of a busy port.
const AT_ONCE: usize = 64;

/// Frames that are sent together where the log is a stream: a send costs several times what it costs to read a frame. More would keep
/// the guest waiting for the first of them, and lose more with this process; eight take some ten microseconds to read.
const TOGETHER: usize = 8;

/// Bytes of a slot: the kind, then the longest frame.
const SLOT: usize = 1 + longest_frame(MTU as usize);

/// Moves frames from the port into the log and the stage.
pub(super) struct Stager {
    port: Option<NetPort>,
    lane: Option<LaneWriter>,
    epoch: Epoch,
    /// Where to tell what has committed, unless the log tells it by itself.
    committed: Option<Arc<AtomicU64>>,
    stage: Arc<Stage>,
    samples: Arc<Samples>,
    /// Where a frame is read to without a lane.
    buffer: Vec<u8>,
    /// Frames that are in the lane, and not sent and not staged yet.
    read: Vec<StagedFrame>,
    /// The lane was full: wait for the reader instead of asking the port.
    lane_full: bool,
    /// The lane takes nothing more, and who goes on is being decided. Until then the port is left alone: a frame read here
    /// would be lost to the side that took over, and cost its sender a timeout.
    lane_over: bool,
    /// Why it takes nothing more, if that is the reader's doing and the recorder may not meet it.
    unusable: Option<String>,
    /// A new log is about to begin, and what is read now would be in neither; or the machine is handed over, and its heir reads.
    paused: bool,
    /// The latest input in the lane.
    published: Seq,
    disk: Option<Arc<Disk>>,
    /// What comes of requests goes into the lane: the other side's guest is told the same.
    told: bool,
    /// What came of a request, on its way into the lane.
    outgoing: Option<Outgoing>,
    /// What the disk could not do; whether the guest is told is for the role to say.
    failed: Option<Outcome>,
}

impl Stager {
    /// Without a lane, frames only go to the stage.
    pub(super) fn new(port: Option<NetPort>, stage: Arc<Stage>, samples: Arc<Samples>) -> Self {
        Self {
            port,
            lane: None,
            epoch: Epoch::default(),
            committed: None,
            stage,
            samples,
            buffer: vec![0; SLOT],
            read: Vec::with_capacity(TOGETHER),
            lane_full: false,
            lane_over: false,
            unusable: None,
            paused: false,
            published: Seq::ZERO,
            disk: None,
            told: true,
            outgoing: None,
            failed: None,
        }
    }

    /// Why the lane is of no use; told once.
    pub(super) fn take_unusable(&mut self) -> Option<String> {
        self.unusable.take()
    }

    /// The port, if frames should be read from it now.
    pub(super) fn wants(&self) -> Option<&NetPort> {
        if self.lane_full || self.lane_over || self.paused || !self.stage.has_room(0) {
            return None;
        }
        self.port.as_ref()
    }

    /// The port.
    pub(super) fn port(&self) -> Option<&NetPort> {
        self.port.as_ref()
    }

    /// From now on without a lane.
    pub(super) fn detach(&mut self) {
        self.lane = None;
        self.lane_full = false;
        self.lane_over = false;
        self.unusable = None;
        self.paused = false;
        self.published = Seq::ZERO;
        if let Some(outgoing) = &mut self.outgoing {
            outgoing.begin_again();
        }
    }

    /// Reads nothing until there is a new lane, or none.
    pub(super) fn pause(&mut self) {
        self.paused = true;
    }

    /// Reads on.
    pub(super) fn resume(&mut self) {
        self.paused = false;
    }

    /// The number of the latest input that was put into the lane.
    pub(super) fn published(&self) -> Seq {
        self.published
    }

    /// From now on what is read goes into this lane.
    pub(super) fn attach(&mut self, (lane, epoch, committed): InputLane) {
        self.detach();
        self.lane = Some(lane);
        self.epoch = epoch;
        self.committed = committed;
    }

    /// The log is over: reads no more until it is given up.
    pub(super) fn stop(&mut self) {
        self.lane_over = true;
    }

    /// Tries a full lane again.
    pub(super) fn retry(&mut self) {
        self.lane_full = false;
    }

    /// Reads what waits at the port, up to a bound.
    ///
    /// # Errors
    /// The port's error; the port is then closed.
    pub(super) fn pump(&mut self) -> io::Result<()> {
        let together = match (&self.lane, &self.committed) {
            (Some(_), None) => TOGETHER,
            // In the other side's memory it is there at once, and the guest may as well begin.
            _ => 1,
        };
        let mut ended = Ok(());
        for _ in 0..AT_ONCE {
            if self.lane_over || self.paused || !self.stage.has_room(self.read.len()) {
                break;
            }
            match self.read_one() {
                Ok(true) if self.read.len() < together => {}
                Ok(true) => self.hand_over(),
                Ok(false) => break,
                Err(error) => {
                    self.port = None;
                    ended = Err(error);
                    break;
                }
            }
        }
        self.hand_over();
        ended
    }

    /// Sends and stages what was read.
    fn hand_over(&mut self) {
        if self.read.is_empty() {
            return;
        }
        if let Some(lane) = &mut self.lane {
            tell(lane, self.committed.as_deref());
        }
        for frame in self.read.drain(..) {
            // There was room when it was read, and this is the only thread that adds.
            let _ = self.stage.push(frame);
        }
    }

    /// One frame; false if none waits or there is no room for it.
    fn read_one(&mut self) -> io::Result<bool> {
        let Some(port) = &self.port else {
            return Ok(false);
        };
        let Some(lane) = &mut self.lane else {
            let Some(length) = port.read_into(&mut self.buffer)? else {
                return Ok(false);
            };
            let frame = self.stage.frame(Seq::ZERO, &self.buffer[..length]);
            self.read.push(frame);
            self.samples.meter().frame(length);
            return Ok(true);
        };
        let mut slot = match lane.reserve_for_salvage(SLOT, FRAME_HEAD) {
            Ok(slot) => slot,
            Err(WriteError::Full { .. }) => {
                self.lane_full = true;
                return Ok(false);
            }
            // The recorder meets the same, or the connection's end tells. Frames stay in the kernel's queue.
            Err(WriteError::Fenced | WriteError::Closed) => {
                self.lane_over = true;
                return Ok(false);
            }
            Err(error) => {
                self.lane_over = true;
                self.unusable = Some(error.to_string());
                return Ok(false);
            }
        };
        // This process may have been frozen since it last looked, and the port may have a new reader.
        if slot.is_fenced() {
            self.lane_over = true;
            return Ok(false);
        }
        let payload = slot.payload();
        payload[0] = INPUT_FRAME;
        let Some(length) = port.read_into(&mut payload[1..])? else {
            return Ok(false);
        };
        let mut frame = self.stage.frame(Seq::ZERO, &payload[1..=length]);
        let marks = Marks {
            epoch: self.epoch,
            ..Marks::default()
        };
        let seq = match slot.publish(1 + length, marks) {
            Ok(seq) => seq,
            Err(error) => {
                self.lane_over = true;
                if !matches!(error, WriteError::Fenced | WriteError::Closed) {
                    self.unusable = Some(error.to_string());
                }
                return Ok(false);
            }
        };
        self.published = seq;
        frame.seq = seq;
        self.read.push(frame);
        self.samples.meter().frame(length);
        Ok(true)
    }
}

/// Something was written into the lane.
fn tell(lane: &mut LaneWriter, committed: Option<&AtomicU64>) {
    match committed {
        // A sleeping reader is woken by the event that applies it; only that decides anything.
        Some(told) => {
            if let Ok(committed) = lane.committed() {
                told.store(committed.0, Ordering::Release);
            }
        }
        // Over a stream it is lost with this process until it is sent, and the thread that applies it, once woken, may take this
        // one's CPU: so it is sent first. An error shows at the next entry.
        None => {
            let _ = lane.notify();
        }
    }
}

#[cfg(test)]
mod tests;
