//! The board at a reset.
#![forbid(unsafe_code)]

use super::serial::Serial;
use super::{Devices, DevicesConfig};

impl Devices {
    /// Brings every device into its power-on state, as its guest, or its operator, resets the machine. What stays is what the world has of
    /// them: outputs that nobody took, requests under way to the disk, how much was printed. Clocks go on: they show guest time.
    pub fn reset(&mut self, config: &DevicesConfig) {
        let fresh = Self::new(config).board;
        let board = &mut self.board;
        let sent = board.serial.sent();
        (board.pic, board.pit, board.cmos) = (fresh.pic, fresh.pit, fresh.cmos);
        (board.events, board.clock_page) = (fresh.events, fresh.clock_page);
        board.serial = Serial::after(sent);
        board.net.reset();
        board.rng.reset();
        if let Some(blk) = &mut board.blk {
            blk.reset();
        }
        (board.awaiting, board.happened) = (None, false);
    }
}
