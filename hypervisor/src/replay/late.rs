//! The replayer's part of a log whose lanes are not in step: an entry may come before the inputs that it applies, or without them.
//!
//! ```text
//!  inputs  ── 7 ────── 8 ─ ─ ─ ─ ─ ✂        8 was on its way when the primary died, and 9 has come
//!  events  ── 1 ── 2 ───── 3 (applies 8) ── 4
//! ```
//! An entry has committed when what it applies has, too. So entry 3 is waited with until 8 is there; and if 8 never comes, the log ends
//! before 3. Nothing that came of 3, or of what follows it, has left the primary's gate, which waits for both lanes.
#![forbid(unsafe_code)]

use std::time::Duration;

use rdma_log::Seq;

use super::{Inputs, LogError, LogSource, ReplayEnd, ReplayError, Replayer};
use crate::disk::{Extent, SECTOR};
use crate::entry::{Body, Entry, LoggedInput};
use crate::orders::Order;

/// Between two looks at orders while an input is on its way.
const LOOK: Duration = Duration::from_millis(10);

/// More than any recorder gives at one sync point. A log that says more is refused where they are given, and until then no more are
/// gathered for it.
const AT_ONCE: u32 = 1024;

/// Staged inputs that an entry applies: frames, answers of the disk.
pub(super) fn applied(entry: &Entry) -> (u32, u32) {
    let (mut frames, mut dones) = (0u32, 0u32);
    if let Body::Step(step) = &entry.body {
        for input in &step.inputs {
            match input {
                LoggedInput::Frames { count, .. } => frames = frames.saturating_add(*count),
                LoggedInput::Disk { count, .. } => dones = dones.saturating_add(*count),
                _ => {}
            }
        }
    }
    (frames, dones)
}

impl<L: LogSource> Replayer<L> {
    /// Waits until the inputs that this entry applies have come. If they never will, or somebody orders a stop: how the replay ends,
    /// before the entry. Meanwhile the thread counts as one that has work in hand: what never comes shows as a backup that is stuck.
    pub(super) fn await_inputs(
        &mut self,
        seq: Seq,
        entry: &Entry,
    ) -> Result<Option<ReplayEnd>, ReplayError> {
        let (frames, dones) = applied(entry);
        if frames == 0 && dones == 0 {
            return Ok(None);
        }
        let (frames, dones) = (frames.min(AT_ONCE), dones.min(AT_ONCE));
        loop {
            match self.source.inputs(frames, dones)? {
                Inputs::Here => return Ok(None),
                Inputs::Coming => {}
                Inputs::Lost => return self.end_before(seq, entry).map(Some),
            }
            if self.orders.waiting() && self.orders.take_if(|order| order == Order::Stop).is_some()
            {
                return Ok(Some(ReplayEnd::Stopped));
            }
            self.source.wait_for_inputs(LOOK);
        }
    }

    /// The log ends before this entry, as an input of its was lost with the primary. If a later entry says that something left that
    /// came of it, the input had committed, and is damaged.
    fn end_before(&mut self, seq: Seq, entry: &Entry) -> Result<ReplayEnd, ReplayError> {
        // To releases before, what was asked of a disk of one's own had left at once: there a damaged input of a machine with a disk is taken for a lost one.
        let unsure = !self.sure_of_disks
            && self
                .machine
                .disk_holds(Extent::new(0, SECTOR as usize, false));
        let leaves = |entry: &Entry| match &entry.body {
            Body::Step(step) => !unsure && step.outputs.is_some(),
            _ => false,
        };
        let mut first_out = leaves(entry).then_some(seq);
        while let Some(arrived) = self.source.next()? {
            let (later, marks) = (arrived.seq, arrived.marks);
            let entry = self.decoder.decode(arrived.payload);
            let entry = entry.map_err(|source| ReplayError::Entry {
                seq: later.0,
                source,
            })?;
            if first_out.is_none() && leaves(&entry) {
                first_out = Some(later);
            }
            self.has_left(marks.released);
        }
        match first_out {
            Some(out) if self.released >= out => Err(LogError(format!(
                "entry {seq} applies a staged input that is not there, and what came of it has left the primary (entry {out} was released)"
            ))
            .into()),
            _ => Ok(ReplayEnd::LogOver),
        }
    }
}
