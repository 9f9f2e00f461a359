//! The recorder's part of the guest's disk: requests go to this side's image at once, and what came of them is an input.
#![forbid(unsafe_code)]

use std::sync::Arc;

use rdma_log::Seq;

use super::{RecordError, Recorder};
use crate::backends::disk::Disk;
use crate::entry::LoggedInput;
use crate::event::{Input, Output};
use crate::sink::Sink;

/// Answers of the disk applied at one sync point: all that a guest can have under way are several rounds.
const DONE_AT_ONCE: u32 = 16;

impl<S: Sink> Recorder<S> {
    /// With an image of this side's for the guest's disk.
    #[must_use]
    pub fn with_disk(mut self, disk: Option<Arc<Disk>>) -> Self {
        self.disk = disk;
        self
    }

    /// Hands out the outputs of the entry that was posted: the world's to the gate, the disk's to its image, which is part of
    /// this copy of the machine as its memory is, and which the world does not see. Whether the gate got any.
    pub(super) fn hand_out(&mut self, seq: Seq) -> bool {
        let mut gated = false;
        for output in self.taken.drain(..) {
            match (output, &self.disk) {
                (Output::Disk(request), Some(disk)) => disk.serve(request),
                // The guest waits for ever, as for a disk that hangs.
                (Output::Disk(_), None) => {}
                (output, _) => {
                    gated = true;
                    self.outlet.hold(seq, self.applied, output);
                }
            }
        }
        gated
    }

    /// Supplies what came of requests to the disk.
    pub(super) fn gather_done(&mut self) -> Result<(), RecordError> {
        let (mut count, mut checksum) = (0, 0);
        while count < DONE_AT_ONCE
            && let Some(staged) = self.stage.pop_done()
        {
            checksum = crc32c::crc32c_append(checksum, &staged.done.encode());
            count += 1;
            self.applied = self.applied.max(staged.seq);
            self.sink.done(&staged.done);
            self.machine.supply(&Input::Disk(staged.done))?;
        }
        if count > 0 {
            let inputs = &mut self.step.inputs;
            inputs.push(LoggedInput::Disk { count, checksum });
        }
        Ok(())
    }
}
