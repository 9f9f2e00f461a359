//! The recorder's part of the guest's disk: requests go to this side's image at once, those to a shared one through the gate, and what
//! came of them is an input.
#![forbid(unsafe_code)]

use std::sync::Arc;

use rdma_log::Seq;

use super::{RecordError, Recorder};
use crate::backends::disk::Disk;
use crate::disk::{Operation, Request};
use crate::entry::LoggedInput;
use crate::event::{Input, Output};
use crate::sink::Sink;

/// Answers of the disk applied at one sync point: all that a guest can have under way are several rounds.
const DONE_AT_ONCE: u32 = 16;

impl<S: Sink> Recorder<S> {
    /// With an image of this side's for the guest's disk.
    #[must_use]
    pub fn with_disk(mut self, disk: Option<Arc<Disk>>) -> Self {
        if let Some(disk) = disk.as_ref().filter(|disk| disk.is_shared()) {
            self.outlet.lead_to(Arc::clone(disk));
        }
        self.disk = disk;
        self
    }

    /// Whether this changes what the other side finds, who has the same image: such a request waits, as a frame does. A read changes
    /// nothing, and what it reads nobody changes before the guest has it.
    pub(super) fn is_output(&self, request: &Request) -> bool {
        let shared = self.disk.as_ref().is_some_and(|disk| disk.is_shared());
        shared && !matches!(request.operation, Operation::Read { .. })
    }

    /// Hands out the outputs of the entry that was posted: the world's to the gate, the disk's to its image, which is part of
    /// this copy of the machine as its memory is, and which the world does not see. Whether the gate got any.
    pub(super) fn hand_out(&mut self, seq: Seq) -> bool {
        let mut gated = false;
        let mut taken = std::mem::take(&mut self.taken);
        for output in taken.drain(..) {
            match (output, &self.disk) {
                (Output::Disk(request), _) if self.is_output(&request) => {
                    gated = true;
                    self.outlet.hold_request(seq, self.applied, request);
                }
                (Output::Disk(request), Some(disk)) => disk.serve(request),
                // The guest waits for ever, as for a disk that hangs.
                (Output::Disk(_), None) => {}
                (output, _) => {
                    gated = true;
                    self.outlet.hold(seq, self.applied, output);
                }
            }
        }
        self.taken = taken;
        gated
    }

    /// Supplies what came of requests to the disk.
    pub(super) fn gather_done(&mut self) -> Result<(), RecordError> {
        let (mut count, mut checksum) = (0, 0);
        while count < DONE_AT_ONCE
            && let Some(staged) = self.stage.pop_done()
        {
            checksum = rdma_log::crc32c_append(checksum, &staged.done.encode());
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
