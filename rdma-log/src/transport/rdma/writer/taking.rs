//! What was completed, what the reader returns, and what is due by it.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::time::Instant;

use super::{BEAT, End, LINGER, LanePipe, Sent, Shared, lock};
use crate::entry::{Lane, Seq};
use crate::lane::{Counter, WriteError};
use crate::poll::wait;
use crate::sync::Ordering;
use crate::transport::rdma::block::{BLOCK, Block, From};
use crate::transport::rdma::hello::Mode;
use crate::transport::rdma::pipe::Taken;
use crate::transport::writing::take_over;

impl Shared {
    /// Takes in what was completed of a lane, unless somebody else is about it.
    #[inline]
    pub(super) fn take(&self, lane: Lane) {
        if let Ok(mut pipe) = self.pipes[lane.index()].try_lock() {
            self.take_from(lane, &mut pipe);
        }
    }

    #[inline]
    pub(super) fn take_from(&self, lane: Lane, pipe: &mut LanePipe) {
        let state = self.lane(lane);
        let taken = pipe.pipe.take(|sent| match sent {
            Sent::Lane(piece) => {
                state.complete.store(piece.to, Ordering::Release);
                state.completed.store(piece.seq.0, Ordering::Release);
            }
            Sent::Block => {
                self.blocks_done.fetch_add(1, Ordering::Release);
            }
        });
        match taken {
            Ok(Taken { any: false, .. }) => {}
            Ok(Taken { rung, .. }) => {
                state.fired.store(true, Ordering::Release);
                if rung {
                    self.was_rung.store(true, Ordering::Release);
                }
            }
            Err(error) => {
                // What the reader said last tells a fence from a death.
                self.hear();
                self.failed(error);
                state.fired.store(true, Ordering::Release);
            }
        }
    }

    /// Looks at the reader's block, unless somebody else is about it.
    pub(super) fn hear(&self) {
        let Ok(mut heard) = self.heard.try_lock() else {
            return;
        };
        let mut bytes = [0; BLOCK];
        heard.view.copy_out(0, &mut bytes);
        if bytes == heard.last {
            return;
        }
        let Some(block) = Block::from_bytes(&bytes, &self.nonce, From::Reader) else {
            return;
        };
        heard.last = bytes;
        if let Err(error) = self.apply(&block) {
            self.end(End::Counter(error));
            return;
        }
        self.reader_alarm.fetch_max(block.alarm, Ordering::AcqRel);
        if block.fenced {
            self.end(End::Fenced);
        }
        for lane in &self.lanes {
            lane.bell().ring();
        }
    }

    /// Checks the reader's numbers and takes them over: none goes back, none passes what was posted.
    pub(super) fn apply(&self, block: &Block) -> Result<(), WriteError> {
        for lane in Lane::ALL {
            let (state, found) = (self.lane(lane), block.lanes[lane.index()]);
            let posted = state.posted.load(Ordering::Acquire);
            let last = state.last.load(Ordering::Acquire);
            let said = [
                (Counter::Consumed, &state.consumed, posted, found.consumed),
                (Counter::Received, &state.received, last, found.received),
                (Counter::Replayed, &state.replayed, last, found.replayed),
            ];
            take_over(lane, said)?;
        }
        Ok(())
    }

    /// Takes in what there is, sends what can be sent, and does what is due.
    pub(super) fn turn(&self) -> Result<(), WriteError> {
        let mut came = false;
        loop {
            let told = match self.device.quiet() {
                Ok(told) => told,
                Err(error) => {
                    self.failed(error);
                    false
                }
            };
            let fired = self
                .lanes
                .each_ref()
                .map(|lane| lane.fired.swap(false, Ordering::AcqRel));
            // Each arming is a system call on some devices, so only where it is needed. Told of something that nobody has
            // taken: by which queue, is not known.
            let any = fired[0] || fired[1];
            came |= any;
            for lane in Lane::ALL {
                if fired[lane.index()] || (told && !any) {
                    self.arm(lane);
                }
            }
            // With the locks, not only if they are free: whoever took something that came before the arming has said so
            // by then, and what comes later makes the descriptor readable.
            for lane in Lane::ALL {
                self.take_from(lane, &mut lock(&self.pipes[lane.index()]));
            }
            if self.end.get().is_some() || !self.has_fired() {
                break;
            }
        }
        self.hear();
        self.flush();
        self.do_what_is_due(came);
        self.check(Lane::Events)
    }

    pub(super) fn has_fired(&self) -> bool {
        self.lanes
            .iter()
            .any(|lane| lane.fired.load(Ordering::Acquire))
    }

    pub(super) fn arm(&self, lane: Lane) {
        if let Err(error) = lock(&self.pipes[lane.index()]).pipe.queue.arm() {
            self.failed(error);
        }
    }

    pub(super) fn do_what_is_due(&self, came: bool) {
        if self.end.get().is_some() {
            return;
        }
        let mut control = lock(&self.control);
        if self.was_rung.swap(false, Ordering::AcqRel) {
            control.alarm.rang();
        }
        let waits = self.lanes.iter().any(|lane| {
            let open = Seq(lane.last.load(Ordering::Acquire)) > lane.committed(self.mode);
            lane.waiting.load(Ordering::Relaxed) != 0 || (open && self.mode == Mode::Ack)
        });
        let alarm = waits && control.alarm.set();
        let ring = came && self.claim_alarm();
        if alarm || ring || control.due || control.said_at.elapsed() >= BEAT {
            self.say(&mut control, ring);
        }
    }

    pub(super) fn has_backlog(&self) -> bool {
        self.lanes
            .iter()
            .any(|lane| lane.pending.load(Ordering::Acquire))
    }

    /// Waits a little for what was posted to arrive.
    pub(super) fn linger(&self) {
        let until = Instant::now() + LINGER;
        while Instant::now() < until {
            let _ = self.turn();
            let idle = self.pipes.iter().all(|pipe| lock(pipe).pipe.is_idle());
            if self.end.get().is_some() || (idle && !self.has_backlog()) {
                return;
            }
            let limit = until.saturating_duration_since(Instant::now());
            if wait([(self.device.as_fd(), false)], Some(limit)).is_err() {
                return;
            }
        }
    }
}
