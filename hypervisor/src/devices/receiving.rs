//! Frames for the guest.
#![forbid(unsafe_code)]

use super::place::IRQ_NET;
use super::virtio::Interrupt;
use super::virtio::net::{self, Net};
use super::{DeviceError, Devices};
use crate::memory::GuestRam;

impl Devices {
    /// The longest frame that can be applied now, in bytes; 0 while the guest has no buffer for one. A frame that
    /// is longer than a room that is not 0 will never fit into that buffer: drop it.
    #[must_use]
    pub fn frame_room(&self, ram: &GuestRam) -> usize {
        let queue = self.board.net.queue(net::RECEIVE);
        queue.map_or(0, |queue| Net::room(queue, ram))
    }

    /// Whether any frame that the MTU allows can be applied now.
    #[must_use]
    pub fn can_receive(&self, ram: &GuestRam) -> bool {
        self.frame_room(ram) >= self.board.net.device().longest_frame()
    }

    pub(super) fn receive_frame(
        &mut self,
        ram: &GuestRam,
        frame: &[u8],
    ) -> Result<(), DeviceError> {
        let board = &mut self.board;
        let mut fits = false;
        let line = board.net.work(net::RECEIVE, |_, queue| {
            let received = Net::receive(queue, ram, frame).transpose();
            fits = received.is_some();
            received.unwrap_or(Ok(Interrupt(false)))
        });
        if !fits {
            return Err(DeviceError::NoRoom {
                what: "a frame",
                len: frame.len(),
                room: self.frame_room(ram),
            });
        }
        board.drive(IRQ_NET, line);
        board.happened = true;
        Ok(())
    }
}
