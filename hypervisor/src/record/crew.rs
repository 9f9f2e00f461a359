//! The recorder's part of a machine whose vCPUs run by themselves: there are no sync points, and nothing of its steps is logged. It
//! gives inputs while they run, takes outputs, and has them stand for the end of an interval, an order, or a cut.
//!
//! ```text
//!  vCPUs     ─ run ─────────────────────── kicked ┐ stand ┌─ run ──
//!               │ output: rings                   │       │
//!  recorder  ───┴▶ wait ▶ inputs ▶ interval over? ┘  copy └▶ courier
//! ```
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Ended, Intervals, RecordError, Recorder};
use crate::clock::GuestClock;
use crate::event::GuestTime;
use crate::machine::{Company, Phase};
use crate::orders::Order;
use crate::sink::Sink;
use crate::stage::Stage;

/// Longest wait; only a safety net, every reason to wake rings the bell.
const LOOK: Duration = Duration::from_millis(100);

/// Whom the vCPUs turn to.
struct Owner {
    clock: GuestClock,
    stage: Arc<Stage>,
    random: File,
}

impl Company for Owner {
    fn now(&self) -> GuestTime {
        self.clock.now()
    }

    fn random(&self, bytes: &mut [u8]) {
        // Only guests of ours have that register, and none of them runs here. Whoever reads it gets what a broken source gives: zeros.
        let _ = (&self.random).read_exact(bytes);
    }

    fn call(&self) {
        self.stage.bell().ring();
    }

    fn waits_for_room(&self) -> bool {
        self.stage.has_frames()
    }
}

impl<S: Sink> Recorder<S> {
    /// Has the vCPUs run until the guest is gone or an order ends it; they stand when this returns.
    pub(super) fn run_crew(&mut self) -> Result<Ended, RecordError> {
        let owner = Owner {
            clock: self.clock,
            stage: Arc::clone(&self.stage),
            random: self.random.try_clone().map_err(RecordError::Random)?,
        };
        self.machine.accompany(Arc::new(owner));
        let ended = self.lead_crew();
        self.machine.stand()?;
        ended
    }

    fn lead_crew(&mut self) -> Result<Ended, RecordError> {
        loop {
            self.machine.check_crew()?;
            if let Some(ended) = self.obey_crew()? {
                return Ok(ended);
            }
            self.give_random()?;
            if !self.is_paused() {
                self.gather()?;
            }
            self.take_made()?;
            match self.machine.phase() {
                Phase::Off(status) => {
                    self.stand_crew()?;
                    return self.wait_for_power_off(status);
                }
                Phase::Crashed => {
                    self.stand_crew()?;
                    return Ok(self.see_off()?.unwrap_or(Ended::Crashed));
                }
                _ => {}
            }
            if let Some(ended) = self.end_crew_interval()? {
                return Ok(ended);
            }
            self.wait_for_crew();
        }
    }

    /// Has them stand, and takes what they made until they did. False if the guest has crashed: of that nothing can be saved.
    fn stand_crew(&mut self) -> Result<bool, RecordError> {
        self.machine.stand()?;
        self.take_made()?;
        Ok(self.machine.phase() != Phase::Crashed)
    }

    /// What was given and made since the last look goes where it belongs.
    fn take_made(&mut self) -> Result<(), RecordError> {
        if self.machine.has_outputs() || !self.step.inputs.is_empty() {
            self.post_step()?;
        }
        Ok(())
    }

    /// Does what was ordered. A copy's rounds go on while the guest runs; for all else it stands.
    fn obey_crew(&mut self) -> Result<Option<Ended>, RecordError> {
        while self
            .orders
            .take_if(|order| order == Order::Attend)
            .is_some()
        {
            self.attend();
        }
        if self.orders.waiting() {
            if !self.stand_crew()? {
                return Ok(None);
            }
            if let Some(ended) = self.obey()? {
                return Ok(Some(ended));
            }
        }
        if !self.deeds.is_empty() {
            if !self.stand_crew()? {
                return Ok(None);
            }
            if let Some(ended) = self.do_deeds()? {
                return Ok(Some(ended));
            }
        }
        if self.cut.is_some() {
            if !self.stand_crew()? {
                return Ok(None);
            }
            self.cut_if_wanted()?;
        }
        Ok(None)
    }

    /// Ends the interval, if it is to end. A guest whose interval is as long as it may be stands until the one before has been
    /// carried.
    fn end_crew_interval(&mut self) -> Result<Option<Ended>, RecordError> {
        let now = Instant::now();
        match &self.intervals {
            Some(intervals) if intervals.wants_end(now) => {}
            _ => return Ok(None),
        }
        // What they sent before they stood is of this interval.
        if !self.stand_crew()? || matches!(self.machine.phase(), Phase::Off(_)) {
            return Ok(None);
        }
        self.keep_intervals()
    }

    /// Has them run, and waits until there is something to do.
    fn wait_for_crew(&mut self) {
        if self.is_paused() {
            // The order for that had them stand.
            return self.rest_while_paused();
        }
        self.machine.go();
        if let Some(intervals) = &mut self.intervals {
            intervals.entering();
        }
        let ends = self.intervals.as_ref().and_then(Intervals::ends);
        let left = ends.map(|ends| ends.saturating_duration_since(Instant::now()));
        let longest = left.map_or(LOOK, |left| left.min(LOOK));
        self.sink.notify(true);
        let (machine, stage, orders) = (&self.machine, &self.stage, &self.orders);
        let intervals = self.intervals.as_ref();
        orders.resting();
        stage.bell().wait(longest, || {
            orders.waiting()
                || stage.has_done()
                || stage.has_frames() && machine.can_receive()
                || stage.has_typed() && machine.console_room() > 0
                || machine.has_outputs()
                || machine.pending().is_some()
                || machine.is_over()
                || intervals.is_some_and(Intervals::calls)
        });
        orders.working(self.machine.position());
    }
}
