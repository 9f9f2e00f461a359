//! virtio-mmio, version 2 (virtio 1.2, sections 2.7 and 4.2): the transport, and the three devices of the machine.
//!
//! Interrupts are not asked for: the guest looks after each halt. A notification is an exit; `platform::halt` is
//! one for all queues, so a guest about to halt needs no other.

mod block;
mod entropy;
mod network;
mod queue;

pub use block::{BLOCK, Block, Finished};
pub use entropy::Entropy;
pub use network::{Network, ReceiveToken, TransmitToken};

use core::arch::asm;
use core::fmt;
use queue::Queue;

/// Why a device cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenError {
    /// The window holds no such device.
    Absent,
    /// The device refused the features that the driver needs.
    Refused,
    /// There is no memory for its queues.
    OutOfMemory,
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Absent => "no such virtio device",
            Self::Refused => "the virtio device refused our features",
            Self::OutOfMemory => "no memory for virtqueues",
        })
    }
}

impl core::error::Error for OpenError {}

const MAGIC_VALUE: usize = 0x000;
const VERSION: usize = 0x004;
const DEVICE_ID: usize = 0x008;
const DEVICE_FEATURES: usize = 0x010;
const DEVICE_FEATURES_SELECT: usize = 0x014;
const DRIVER_FEATURES: usize = 0x020;
const DRIVER_FEATURES_SELECT: usize = 0x024;
const QUEUE_SELECT: usize = 0x030;
const QUEUE_SIZE_MAX: usize = 0x034;
const QUEUE_SIZE: usize = 0x038;
const QUEUE_READY: usize = 0x044;
const QUEUE_NOTIFY: usize = 0x050;
const STATUS: usize = 0x070;
const QUEUE_DESCRIPTORS: usize = 0x080;
const QUEUE_DRIVER: usize = 0x090;
const QUEUE_DEVICE: usize = 0x0a0;
const CONFIGURATION: usize = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

const VERSION_1: u64 = 1 << 32;

/// A device's window of registers.
#[derive(Clone, Copy, Debug)]
struct Window(usize);

impl Window {
    /// Resets the device of this kind at `base` and agrees on features: `VERSION_1` and what it has of `wanted`.
    fn open(base: usize, device_id: u32, wanted: u64) -> Result<(Self, u64), OpenError> {
        let window = Self(base);
        if window.read(MAGIC_VALUE) != u32::from_le_bytes(*b"virt")
            || window.read(VERSION) != 2
            || window.read(DEVICE_ID) != device_id
        {
            return Err(OpenError::Absent);
        }
        window.write(STATUS, 0);
        window.write(STATUS, ACKNOWLEDGE | DRIVER);
        let mut offered = 0;
        for half in 0..2 {
            window.write(DEVICE_FEATURES_SELECT, half);
            offered |= u64::from(window.read(DEVICE_FEATURES)) << (32 * half);
        }
        let accepted = offered & (wanted | VERSION_1);
        for half in 0..2 {
            window.write(DRIVER_FEATURES_SELECT, half);
            window.write(DRIVER_FEATURES, (accepted >> (32 * half)) as u32);
        }
        window.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if accepted & VERSION_1 == 0 || window.read(STATUS) & FEATURES_OK == 0 {
            return Err(OpenError::Refused);
        }
        Ok((window, accepted))
    }

    /// Tells the device where a queue lies.
    fn set_queue(self, number: u32, queue: &Queue) -> Result<(), OpenError> {
        self.select(number, queue.size(), queue.addresses())
    }

    /// Tells the device of a queue with so many places, whose descriptors, available and used ring lie there.
    fn select(self, number: u32, size: u16, addresses: [u64; 3]) -> Result<(), OpenError> {
        self.write(QUEUE_SELECT, number);
        if self.read(QUEUE_SIZE_MAX) < u32::from(size) {
            return Err(OpenError::Refused);
        }
        self.write(QUEUE_SIZE, u32::from(size));
        let registers = [QUEUE_DESCRIPTORS, QUEUE_DRIVER, QUEUE_DEVICE];
        for (register, address) in registers.into_iter().zip(addresses) {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
        Ok(())
    }

    /// The device forgets the driver and its queues.
    fn reset(self) {
        self.write(STATUS, 0);
    }

    /// The driver is ready: the device may work.
    fn start(self) {
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    fn notify(self, queue: u32) {
        self.write(QUEUE_NOTIFY, queue);
    }

    fn read(self, register: usize) -> u32 {
        let value: u32;
        // SAFETY: the window is mapped, and a device changes no memory but the queues and buffers given to it,
        // which `asm!` without `nomem` lets the compiler expect.
        unsafe {
            asm!("mov {:e}, dword ptr [{}]", out(reg) value, in(reg) self.0 + register, options(nostack, preserves_flags));
        }
        value
    }

    fn write(self, register: usize, value: u32) {
        // SAFETY: as in `read`.
        unsafe {
            asm!("mov dword ptr [{}], {:e}", in(reg) self.0 + register, in(reg) value, options(nostack, preserves_flags));
        }
    }

    fn configuration(self, offset: usize) -> u8 {
        let value: u8;
        // SAFETY: as in `read`.
        unsafe {
            asm!("mov {}, byte ptr [{}]", out(reg_byte) value, in(reg) self.0 + CONFIGURATION + offset, options(nostack, preserves_flags));
        }
        value
    }
}
