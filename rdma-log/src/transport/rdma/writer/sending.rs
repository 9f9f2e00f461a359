//! What gathers, and what is posted.
#![forbid(unsafe_code)]

use std::time::Instant;

use super::{CHAIN, Control, GATHERED, LanePipe, Sent, Shared, lock};
use crate::entry::Lane;
use crate::lane::WriteError;
use crate::sync::Ordering;
use crate::transport::Range;
use crate::transport::rdma::block::{Block, LaneWords};
use crate::verbs::RdmaError;

impl Shared {
    pub(super) fn post(&self, lane: Lane, range: Range) -> Result<(), WriteError> {
        self.check(lane)?;
        let state = self.lane(lane);
        // Before it can be sent, so that no true answer exceeds them.
        state.posted.store(range.to, Ordering::Release);
        state.last.store(range.seq.0, Ordering::Release);
        let mut pipe = lock(&self.pipes[lane.index()]);
        pipe.gather.add(range);
        state.pending.store(true, Ordering::Release);
        if pipe.gather.len() >= GATHERED {
            self.send(lane, &mut pipe);
        }
        Ok(())
    }

    /// Sends what gathered in either lane: what was posted first is sent first, so an entry seldom overtakes an input that
    /// it applies. Where it does, its reader waits for the input.
    pub(super) fn flush(&self) {
        for lane in [Lane::Inputs, Lane::Events] {
            if self.lane(lane).pending.load(Ordering::Acquire) {
                self.send(lane, &mut lock(&self.pipes[lane.index()]));
            }
        }
    }

    /// Sends what gathered, as far as there is room in the queue; the completions that make room send the rest.
    pub(super) fn send(&self, lane: Lane, pipe: &mut LanePipe) {
        self.hear();
        while !pipe.gather.is_empty() && self.end.get().is_none() {
            let mut room = pipe.pipe.room_for_lanes();
            if room == 0 {
                self.take_from(lane, pipe);
                room = pipe.pipe.room_for_lanes();
            }
            if room == 0 {
                return;
            }
            if let Err(error) = self.send_chain(lane, pipe, room.min(CHAIN)) {
                self.failed(error);
            }
        }
        let done = pipe.gather.is_empty();
        self.lane(lane).pending.store(!done, Ordering::Release);
    }

    pub(super) fn send_chain(
        &self,
        lane: Lane,
        pipe: &mut LanePipe,
        most: u32,
    ) -> Result<(), RdmaError> {
        let i = lane.index();
        let start = i * self.sizes[0] as usize;
        let LanePipe { pipe, gather } = pipe;
        let count = gather.len().min(most as usize);
        let last = gather.get(count - 1);
        let ring = gather.len() == count && self.claim_alarm();
        let writes = gather.take(count).map(|piece| {
            let offset = piece.from % self.sizes[i];
            let (from, to) = (start + offset as usize, self.starts[i] + offset);
            let mut write = self.source.write(from, piece.len as usize, self.ring, to);
            if ring && piece == last {
                write.ring();
            }
            write
        });
        pipe.post(writes, Sent::Lane(last))
    }

    /// Whether the reader set an alarm that nobody has rung for; who gets true rings.
    pub(super) fn claim_alarm(&self) -> bool {
        let alarm = self.reader_alarm.load(Ordering::Acquire);
        self.rung.fetch_max(alarm, Ordering::AcqRel) < alarm
    }

    /// Sends the writer's block: an alarm of this side's, a ring for the reader, or a sign of life.
    pub(super) fn say(&self, control: &mut Control, ring: bool) {
        if self.end.get().is_some() {
            return;
        }
        let block = Block {
            lanes: [LaneWords::default(); 2],
            alarm: control.alarm.number(),
            fenced: false,
        };
        let mut pipe = lock(&self.pipes[Lane::Events.index()]);
        let done = self.blocks_done.load(Ordering::Acquire);
        control.ring_due |= ring;
        let ring = control.ring_due;
        match control
            .slots
            .post(&mut pipe.pipe, block, ring, Sent::Block, done)
        {
            Ok(posted) => {
                control.due = !posted;
                control.ring_due &= !posted;
            }
            Err(error) => self.failed(error),
        }
        if !control.due {
            control.said_at = Instant::now();
        }
    }

    /// Asks the reader to ring when it returns something.
    pub(super) fn set_alarm(&self) {
        let mut control = lock(&self.control);
        if control.alarm.set() {
            self.say(&mut control, false);
        }
    }
}
