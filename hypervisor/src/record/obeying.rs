//! The recorder's part of orders: what is obeyed wherever the vCPU thread is.
#![forbid(unsafe_code)]

use super::{Ended, RecordError, Recorder};
use crate::gate::Committed;
use crate::orders::Order;
use crate::sink::Sink;

impl<S: Sink> Recorder<S> {
    pub(super) fn obey(&mut self) -> Result<Option<Ended>, RecordError> {
        let mid_run = self.mid_run;
        while let Some(order) = self
            .orders
            .take_if(|order| !mid_run || order != Order::StopAtSyncPoint)
        {
            if !self.obey_one(order) {
                return Ok(Some(Ended::Stopped));
            }
        }
        Ok(None)
    }

    /// Obeys an order; false if this recording ends by it.
    pub(super) fn obey_one(&mut self, order: Order) -> bool {
        match order {
            Order::Stop | Order::StopAtSyncPoint => false,
            Order::Attend => {
                self.attend();
                true
            }
            Order::HandOver(_) | Order::PowerOff(_) | Order::Reset | Order::Share(_) => {
                self.deeds.push_back(order);
                true
            }
            Order::BeginLog => {
                self.begins = true;
                true
            }
            Order::Resume => {
                self.forget_hand_over();
                self.forget_stand();
                self.outlet.open();
                self.release();
                true
            }
            Order::RunUnprotected => {
                self.forget_hand_over();
                self.forget_stand();
                self.sink.detach();
                if let Some(intervals) = &mut self.intervals {
                    intervals.leave_log(&self.outlet);
                }
                self.next_memory_check = None;
                self.outlet.open();
                self.outlet.release(Committed::EVERYTHING);
                true
            }
            Order::Freeze => {
                self.outlet.shut();
                self.orders.resting();
                loop {
                    match self.orders.wait_out_freeze() {
                        deed if deed.is_deed() => self.deeds.push_back(deed),
                        order => return self.obey_one(order),
                    }
                }
            }
        }
    }

    fn forget_hand_over(&mut self) {
        self.deeds
            .retain(|deed| !matches!(deed, Order::HandOver(_)));
    }
}
