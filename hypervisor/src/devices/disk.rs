//! The board's disk: what is handed out, and what came of it.
#![forbid(unsafe_code)]

use super::place::IRQ_BLK;
use super::virtio::blk::{self, Blk, Misfit};
use super::{DeviceError, Devices};
use crate::disk::{Done, Request};
use crate::memory::GuestRam;

impl Devices {
    /// Requests to the disk of which it is not known what came of them, oldest first.
    pub fn disk_requests(&self) -> impl Iterator<Item = &Request> {
        let blk = self.board.blk.iter();
        blk.flat_map(|blk| blk.device().under_way())
    }

    /// Hands out requests to the disk that had to wait in the queue and need not any more.
    pub(super) fn go_on(&mut self, ram: &GuestRam) {
        let board = &mut self.board;
        if let Some(blk) = &mut board.blk
            && blk.device().has_more()
        {
            let line = blk.notify_all(ram, &mut self.outputs);
            board.drive(IRQ_BLK, line);
        }
    }

    pub(super) fn disk_done(&mut self, ram: &GuestRam, done: &Done) -> Result<(), DeviceError> {
        let board = &mut self.board;
        let unexpected = DeviceError::Unexpected {
            what: "what came of a disk request",
        };
        let Some(blk) = &mut board.blk else {
            return Err(unexpected);
        };
        let taken = blk.device_mut().take(done).map_err(|misfit| match misfit {
            Misfit::Unknown => unexpected,
            Misfit::Length { expected } => DeviceError::WrongData {
                expected,
                found: done.data.0.len(),
            },
        })?;
        let line = blk.work(blk::REQUESTS, |_, queue| {
            Blk::answer(queue, ram, taken, done)
        });
        board.drive(IRQ_BLK, line);
        board.happened = true;
        Ok(())
    }
}
