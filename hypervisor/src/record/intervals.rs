//! The recorder's part of replication by checkpoints: nothing of a step is logged, and now and then the interval ends, with a
//! checkpoint that the courier carries while the guest runs on.
//!
//! ```text
//!  guest  ─ runs ───────────── output ┐ stop ┌─ runs ────────────────────────────┐ stop ┌─
//!           frames, ticks, time are   │ copy │  the courier carries the copy;    │ copy │
//!           given, and not logged     └──────┘  at its commit the output leaves  └──────┘
//! ```
//! An interval ends where an output waits and the courier is free, at the latest when it is as long as it may be. What the guest
//! sends while the courier is busy leaves with the next one. A guest that waits changes nothing, and makes none.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use rdma_log::Seq;

use super::{Ended, RecordError, Recorder};
use crate::backends::disk::FOLLOW_BYTES;
use crate::checkpoint::Pages;
use crate::courier::{AT_ONCE, Courier, Parcel};
use crate::disk::{Operation, Request};
use crate::entry::{Base, LoggedInput};
use crate::event::Output;
use crate::gate::Committed;
use crate::intervals::{Ends, Lengths};
use crate::machine::Phase;
use crate::orders::{Order, Stop};
use crate::outlet::{FRAMES_WAITING, Outlet, frame_length};
use crate::sink::Sink;

/// Bytes of frames in one interval, at which it ends: a quarter of what may wait in the gate, so that none is lost for it.
const FRAMES_MOST: usize = FRAMES_WAITING / 4;

/// Bytes written to the disk in one interval, at which it ends: half of what a backup's image may be behind with.
const ASKED_MOST: usize = FOLLOW_BYTES / 2;

/// Between two looks whether the courier is free; only a safety net, it rings.
const STAND: Duration = Duration::from_millis(10);

/// The interval that runs, and who carries the one before.
pub struct Intervals<S> {
    courier: Courier<S>,
    lengths: Lengths,
    /// There is a log.
    protected: bool,
    outputs: Vec<Output>,
    frame_bytes: usize,
    /// What the guest has asked of its disk in it, but for reads.
    asked: Vec<Request>,
    asked_bytes: usize,
    /// The same of a shared disk: outputs.
    requests: Vec<Request>,
    made: Vec<Instant>,
    frames: u32,
    /// Since when the guest has run in it.
    began: Option<Instant>,
    /// When this one ends, where all have one length.
    beat: Instant,
}

impl<S: Sink> Intervals<S> {
    /// Intervals of these lengths, carried by this courier, which has no log yet.
    #[must_use]
    pub fn new(courier: Courier<S>, lengths: Lengths) -> Self {
        Self {
            courier,
            lengths,
            protected: false,
            outputs: Vec::new(),
            frame_bytes: 0,
            asked: Vec::new(),
            asked_bytes: 0,
            requests: Vec::new(),
            made: Vec::new(),
            frames: 0,
            began: None,
            beat: Instant::now(),
        }
    }

    /// From here on the log is this one, in which positions are counted from there. Whoever reads it has the machine as it is.
    pub fn begin_log(&mut self, log: S, base: Base) {
        self.courier.begin(log, base);
        self.protected = true;
        self.frames = 0;
        self.began = None;
        self.forget_asked();
    }

    /// The image that a backup has, or will have, has it.
    fn forget_asked(&mut self) {
        self.asked.clear();
        self.asked_bytes = 0;
    }

    /// Whether there is a log.
    pub(super) fn are_kept(&self) -> bool {
        self.protected
    }

    /// There is nobody any more who waits for intervals: what was held for their commits waits for nothing.
    pub(super) fn leave_log(&mut self, outlet: &Outlet) {
        if !self.protected {
            return;
        }
        self.protected = false;
        self.courier.leave();
        for request in self.requests.drain(..) {
            outlet.hold_request(AT_ONCE, Seq::ZERO, request);
        }
        for output in self.outputs.drain(..) {
            outlet.hold(AT_ONCE, Seq::ZERO, output);
        }
        self.frame_bytes = 0;
        self.made.clear();
        self.forget_asked();
    }

    /// When the interval that runs ends at the latest; none if the guest has not run in it.
    pub(super) fn ends(&self) -> Option<Instant> {
        let began = self.began.filter(|_| self.protected)?;
        Some(match self.lengths.ends {
            Ends::Output => began + self.lengths.length,
            Ends::Fixed => self.beat,
        })
    }

    /// Whether it is as long as it may be.
    fn is_over(&self, now: Instant) -> bool {
        self.frame_bytes >= FRAMES_MOST
            || self.asked_bytes >= ASKED_MOST
            || self.ends().is_some_and(|ends| now >= ends)
    }

    /// Whether it is to end as soon as it can be carried.
    fn should_end(&self, now: Instant) -> bool {
        self.is_over(now) || self.has_urgent_outputs()
    }

    /// Whether the guest is to stand because it ends, or because nobody carries it any more.
    pub(super) fn wants_end(&self, now: Instant) -> bool {
        let ends = || self.should_end(now) && (self.courier.is_free() || self.is_over(now));
        self.protected && (self.courier.has_failed() || ends())
    }

    /// Whether something changed that a waiting vCPU thread is to look at.
    pub(super) fn calls(&self) -> bool {
        self.protected
            && (self.courier.has_failed() || self.has_urgent_outputs() && self.courier.is_free())
    }

    /// Whether outputs wait that end the interval.
    fn has_urgent_outputs(&self) -> bool {
        self.lengths.ends == Ends::Output && self.has_outputs()
    }

    fn has_outputs(&self) -> bool {
        !self.outputs.is_empty() || !self.requests.is_empty()
    }

    /// The guest is about to run.
    pub(super) fn entering(&mut self) {
        if !self.protected {
            return;
        }
        if self.began.is_none() {
            let now = Instant::now();
            self.began = Some(now);
            // The beat of fixed intervals goes on while the guest waits.
            let passed = now.saturating_duration_since(self.beat);
            let beats = passed.as_nanos() / self.lengths.length.as_nanos().max(1) + 1;
            self.beat += self.lengths.length * u32::try_from(beats).unwrap_or(u32::MAX);
        }
        if self.has_urgent_outputs() {
            self.courier.await_in_guest();
        }
    }
}

impl<S: Sink> Recorder<S> {
    /// Takes in what a step came to, in place of logging it; and lets its outputs out where nobody waits for a log.
    pub(super) fn note_step(&mut self) {
        let Some(intervals) = &mut self.intervals else {
            return;
        };
        for input in self.step.inputs.drain(..) {
            if let LoggedInput::Frames { count, .. } = input {
                intervals.frames += count;
            }
        }
        if !self.machine.has_outputs() {
            return;
        }
        let mut gated = false;
        let shared = self.disk.as_ref().is_some_and(|disk| disk.is_shared());
        for output in self.machine.outputs() {
            if let Output::Disk(request) = output {
                let reads = matches!(request.operation, Operation::Read { .. });
                if shared && !reads {
                    gated = true;
                    if intervals.protected {
                        intervals.requests.push(request);
                    } else {
                        self.outlet.hold_request(AT_ONCE, Seq::ZERO, request);
                    }
                    continue;
                }
                if intervals.protected && !reads {
                    intervals.asked_bytes += request.length();
                    intervals.asked.push(request.clone());
                }
                // This side's image may run ahead of the other's as memory does: whoever takes over has its own.
                if let Some(disk) = &self.disk {
                    disk.serve(request);
                }
                continue;
            }
            gated = true;
            if intervals.protected {
                // vCPUs that run by themselves may have made many more before they stood: lost, as what the gate has no room for.
                let bytes = frame_length(&output);
                if bytes == 0 || intervals.frame_bytes + bytes <= FRAMES_WAITING {
                    intervals.frame_bytes += bytes;
                    intervals.outputs.push(output);
                }
            } else {
                self.outlet.hold(AT_ONCE, Seq::ZERO, output);
            }
        }
        if intervals.protected && gated {
            intervals.made.push(Instant::now());
        } else if gated {
            self.outlet.release(Committed::EVERYTHING);
        }
    }

    /// Ends the interval here, if it is to end and this is a place. A guest whose interval is as long as it may be stands until
    /// the one before has been carried.
    pub(super) fn keep_intervals(&mut self) -> Result<Option<Ended>, RecordError> {
        loop {
            let Some(intervals) = &self.intervals else {
                return Ok(None);
            };
            if !intervals.protected {
                return Ok(None);
            }
            if intervals.courier.has_failed() {
                // The I/O thread knows: the protocol gives the order that ends this.
                if !self.obey_one(Order::Freeze) {
                    return Ok(Some(Ended::Stopped));
                }
                continue;
            }
            let now = Instant::now();
            let off = matches!(self.machine.phase(), Phase::Off(_));
            let last = off && intervals.has_outputs();
            let place = !self.machine.has_outputs() && self.step.inputs.is_empty();
            if !place || !last && !intervals.should_end(now) {
                return Ok(None);
            }
            if intervals.courier.is_free() {
                self.end_interval()?;
                return Ok(None);
            }
            if !intervals.is_over(now) {
                return Ok(None);
            }
            if self.orders.waiting()
                && let Some(ended) = self.obey()?
            {
                return Ok(Some(ended));
            }
            self.stand();
        }
    }

    /// Waits for the courier.
    fn stand(&self) {
        let Some(intervals) = &self.intervals else {
            return;
        };
        let (orders, courier) = (&self.orders, &intervals.courier);
        orders.resting();
        self.stage.bell().wait(STAND, || {
            courier.is_free() || courier.has_failed() || orders.waiting()
        });
        orders.working(self.machine.position());
    }

    fn end_interval(&mut self) -> Result<(), RecordError> {
        let Some(intervals) = &mut self.intervals else {
            return Ok(());
        };
        let began = Instant::now();
        let position = self.machine.position();
        // The heir counts time from here.
        let base = Base::new(position, self.clock.now());
        let spare = intervals.courier.spare();
        if let Some(unwritten) = intervals.courier.unwritten() {
            self.machine.leave_open(unwritten);
        }
        let captured = self
            .machine
            .capture(Pages::Changed, base, Vec::new(), spare);
        let capture = match captured {
            // The interval ends at the next exit.
            Err(error) if error.is_mid_instruction() => return Ok(()),
            captured => captured?,
        };
        self.samples.interval(Stop {
            took: began.elapsed() + self.machine.stand_took(),
            pages: capture.pages(),
            bytes: capture.bytes(),
        });
        intervals.courier.carry(Parcel {
            position,
            outputs: std::mem::take(&mut intervals.outputs),
            requests: std::mem::take(&mut intervals.requests),
            asked: std::mem::take(&mut intervals.asked),
            made: std::mem::take(&mut intervals.made),
            frames: std::mem::take(&mut intervals.frames),
            capture: Some(Box::new(capture)),
        });
        intervals.began = None;
        intervals.frame_bytes = 0;
        intervals.asked_bytes = 0;
        Ok(())
    }

    /// Waits until everything that was handed to the courier has left, or somebody orders something else. For a guest that
    /// crashed: what it sent in its last interval is lost with it, as nobody could show the state that it came from.
    pub(super) fn see_off(&mut self) -> Result<Option<Ended>, RecordError> {
        while let Some(intervals) = &self.intervals
            && intervals.protected
            && (!intervals.courier.is_free() || self.outlet.waiting() > 0)
        {
            if intervals.courier.has_failed() && !self.obey_one(Order::Freeze) {
                return Ok(Some(Ended::Stopped));
            }
            if self.orders.waiting()
                && let Some(ended) = self.obey()?
            {
                return Ok(Some(ended));
            }
            let orders = &self.orders;
            self.stage
                .bell()
                .wait(Duration::from_millis(1), || orders.waiting());
        }
        Ok(None)
    }
}
