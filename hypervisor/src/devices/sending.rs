//! Frames from the guest, until they are taken.
#![forbid(unsafe_code)]

use super::Devices;
use super::virtio::net::MAX_FRAME;
use super::virtio::queue::MAX_SIZE;
use crate::event::Output;

/// Bytes of frames that may wait to be [taken](Devices::outputs); those beyond are lost, as in a network card whose queue is full. Only
/// vCPUs that run by themselves can make so many, while nobody finds the time to take them.
pub(super) const FRAMES_MOST: usize = 32 << 20;

// Where they are taken at each exit none is lost: a replay must not depend on it.
const _: () = assert!(MAX_SIZE as usize * MAX_FRAME < FRAMES_MOST);

impl Devices {
    /// Loses what is too much of the frames among the outputs from this one on.
    pub(super) fn bound_frames(&mut self, made: usize) {
        let bytes = |output: &Output| match output {
            Output::Frame(frame) => frame.len(),
            _ => 0,
        };
        let more: usize = self.outputs[made..].iter().map(bytes).sum();
        if self.frame_bytes + more <= FRAMES_MOST {
            self.frame_bytes += more;
            return;
        }
        for output in self.outputs.split_off(made) {
            let more = bytes(&output);
            if more == 0 || self.frame_bytes + more <= FRAMES_MOST {
                self.frame_bytes += more;
                self.outputs.push(output);
            }
        }
    }
}
