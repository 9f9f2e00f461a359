//! The recorder's part of what is done to a machine on purpose: a switch-over, a power-off, a share of its time.
//!
//! Each is done at a sync point at which nothing is under way, and is an entry of the log there: so it happens to both sides, and
//! whoever takes over goes on with it. A guest that does not exit comes to such a point only where it is preempted by checkpoints.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use rdma_log::Seq;

use super::{Ended, RecordError, Recorder, SLEEP_MAX};
use crate::entry::{Body, Control, Entry, Wish};
use crate::orders::{Order, Pace};
use crate::sink::Sink;

/// Between two looks whether everything has left before a hand-over: short against a way to the backup and back.
const LOOK: Duration = Duration::from_micros(20);

impl<S: Sink> Recorder<S> {
    /// Does what was ordered, if this is a place for it: everything made and supplied so far has been posted.
    pub(super) fn do_deeds(&mut self) -> Result<Option<Ended>, RecordError> {
        if self.mid_run || self.machine.position().0 == 0 {
            return Ok(None);
        }
        while let Some(deed) = self.deeds.pop_front() {
            debug_assert!(!self.machine.has_outputs() && self.step.inputs.is_empty());
            let ended = match deed {
                Order::HandOver(inputs) => self.hand_over(inputs)?,
                Order::PowerOff(status) => {
                    self.post_control(Control::PowerOff(status))?;
                    self.machine.turn_off(status);
                    // An output like any other, and the machine's last.
                    self.sync_point()?
                }
                Order::Reset => {
                    self.reset(Wish::Operator)?;
                    None
                }
                Order::Share(share) => {
                    self.post_control(Control::Share(share.share()))?;
                    self.orders.set_share(share);
                    None
                }
                order => (!self.obey_one(order)).then_some(Ended::Stopped),
            };
            if ended.is_some() {
                return Ok(ended);
            }
        }
        Ok(None)
    }

    /// Lets out all that was made, says by the log's last entry that this is the place, and stands. The heir has then nothing to send
    /// again, and nothing that was read here is lost.
    fn hand_over(&mut self, inputs: Seq) -> Result<Option<Ended>, RecordError> {
        let stopped = Instant::now();
        loop {
            while let Some(order) = self.orders.take() {
                match order {
                    deed if deed.is_deed() => self.deeds.push_back(deed),
                    Order::Attend => self.attend(),
                    // The protocol has decided otherwise meanwhile.
                    other => return Ok((!self.obey_one(other)).then_some(Ended::Stopped)),
                }
            }
            if self.all_has_left(inputs) {
                break;
            }
        }
        let stood = stopped.elapsed().as_nanos() as u64;
        self.post_control(Control::HandOver { stood })?;
        if !self.sink.keeps() {
            // The backup was lost in that moment, and the order to go on without it is obeyed.
            return Ok(None);
        }
        Ok((!self.obey_one(Order::Freeze)).then_some(Ended::Stopped))
    }

    /// Whether all that was made has left, and the backup has the inputs up to this one; if not, it waits a little.
    pub(super) fn all_has_left(&mut self, inputs: Seq) -> bool {
        self.release();
        let committed = self.sink.committed();
        let all_left = self.outlet.waiting() == 0
            && committed.events >= self.posted
            && committed.inputs >= inputs;
        if !all_left {
            self.sink.notify(true);
            self.orders.resting();
            let orders = &self.orders;
            self.stage.bell().wait(LOOK, || orders.waiting());
        }
        all_left
    }

    pub(super) fn post_control(&mut self, what: Control) -> Result<(), RecordError> {
        self.sink.released(self.outlet.released());
        let entry = Entry {
            position: self.machine.position(),
            body: Body::Control {
                digest: self.machine.digest(),
                what,
            },
        };
        self.post(&entry, Instant::now())?;
        self.sink.notify(true);
        Ok(())
    }

    /// Tells a backup that joined what the guest may have of its time.
    pub(super) fn tell_share(&mut self) -> Result<(), RecordError> {
        match self.orders.share() {
            Pace::FULL => Ok(()),
            share => self.post_control(Control::Share(share.share())),
        }
    }

    /// Whether the operator leaves the guest nothing of its time.
    pub(super) fn is_paused(&self) -> bool {
        self.orders.share() == Pace::NONE
    }

    /// Stands for as long as that is so. Everything else goes on: outputs leave, a backup joins, the machine is handed over.
    pub(super) fn stand_paused(&mut self) -> Result<Option<Ended>, RecordError> {
        while self.is_paused() {
            if self.orders.waiting()
                && let Some(ended) = self.obey()?
            {
                return Ok(Some(ended));
            }
            if let Some(ended) = self.do_deeds()? {
                return Ok(Some(ended));
            }
            if let Some(ended) = self.cut_if_wanted()? {
                return Ok(Some(ended));
            }
            self.rest_while_paused();
        }
        Ok(None)
    }

    /// One look's length of it.
    pub(super) fn rest_while_paused(&mut self) {
        if self.is_paused() {
            self.release();
            self.orders.resting();
            let orders = &self.orders;
            self.stage.bell().wait(SLEEP_MAX, || orders.waiting());
        }
    }
}
