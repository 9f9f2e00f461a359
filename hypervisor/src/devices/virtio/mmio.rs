//! virtio over MMIO, version 2 (virtio 1.2, section 4.2).
//!
//! ```text
//! status:  0 ─▶ ACKNOWLEDGE ─▶ DRIVER ─▶ FEATURES_OK ─▶ DRIVER_OK ──bad queue──▶ DRIVER_OK + NEEDS_RESET
//!          ▲                  features   queues are      queues are               nothing is worked
//!          │                  are chosen set up          worked                            │
//!          └──────────────────────── write of 0 (from anywhere) ◀──────────────────────────┘
//! ```
//! A bit counts only when those before it are set; bits are never taken back but by the reset. What a driver
//! writes out of turn is ignored.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::event::Output;
use crate::memory::GuestRam;

use super::queue::{MAX_SIZE, QueueFault, VirtQueue};
use super::{Device, Interrupt, Line};

/// Length of a device's window.
pub const LEN: u64 = 0x1000;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"DOPL");

/// The first offset of the configuration space.
const CONFIG: u64 = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;
const DRIVERS_BITS: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;

/// Without it a driver speaks the legacy interface, which we do not.
const F_VERSION_1: u64 = 1 << 32;

const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// The registers, by their offsets (virtio 1.2, table 4.1).
mod register {
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    /// Shared memory regions: there are none, which their length and base say by all ones.
    pub const SHARED_MEMORY: std::ops::RangeInclusive<u64> = 0x0b0..=0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
}

/// A queue that its driver broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DeviceFault {
    /// The queue's number.
    pub queue: usize,
    /// What is wrong with it.
    pub fault: QueueFault,
}

/// A device behind its registers, with `QUEUES` queues.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Mmio<D, const QUEUES: usize> {
    device: D,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    interrupt_status: u32,
    #[serde(with = "queues")]
    queues: [VirtQueue; QUEUES],
    fault: Option<DeviceFault>,
}

impl<D: Device, const QUEUES: usize> Mmio<D, QUEUES> {
    /// A device that no driver has touched.
    #[must_use]
    pub fn new(device: D) -> Self {
        Self {
            device,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            interrupt_status: 0,
            queues: [VirtQueue::default(); QUEUES],
            fault: None,
        }
    }

    /// What stands behind the registers.
    #[must_use]
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The same, to change.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// Whether a driver drives the device, and has not broken it.
    #[must_use]
    pub fn running(&self) -> bool {
        self.status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK
    }

    /// The queue, if it may be worked now.
    #[must_use]
    pub fn queue(&self, index: usize) -> Option<&VirtQueue> {
        self.queues
            .get(index)
            .filter(|queue| queue.ready && self.running())
    }

    /// What the driver broke since the last reset.
    #[must_use]
    pub fn fault(&self) -> Option<DeviceFault> {
        self.fault
    }

    /// A guest's read at `offset` of the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if offset >= CONFIG {
            let start = usize::try_from(offset - CONFIG).unwrap_or(usize::MAX);
            let config = self.device.config().get(start..).unwrap_or_default();
            if matches!(data.len(), 1 | 2 | 4 | 8) {
                data.iter_mut()
                    .zip(config)
                    .for_each(|(byte, value)| *byte = *value);
            }
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.register(offset).to_le_bytes());
        }
    }

    /// A guest's write at `offset` of the window.
    pub fn write(
        &mut self,
        ram: &GuestRam,
        offset: u64,
        data: &[u8],
        outputs: &mut Vec<Output>,
    ) -> Line {
        // The configuration spaces that we have are read-only.
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return Line::Same;
        };
        let value = u32::from_le_bytes(bytes);
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES => self.choose_features(value),
            register::QUEUE_SEL => self.queue_sel = value,
            register::QUEUE_READY => self.set_ready(ram, value),
            register::QUEUE_NOTIFY => {
                let index = usize::try_from(value).unwrap_or(usize::MAX);
                return self.notify(ram, index, outputs);
            }
            register::INTERRUPT_ACK => {
                self.interrupt_status &= !value;
                if self.interrupt_status == 0 {
                    return Line::Lower;
                }
            }
            register::STATUS if value == 0 => {
                self.reset();
                return Line::Lower;
            }
            register::STATUS => self.advance(value),
            _ => self.set_up_queue(offset, value),
        }
        Line::Same
    }

    /// Works through every queue that is ready, as if the driver had notified each.
    pub fn notify_all(&mut self, ram: &GuestRam, outputs: &mut Vec<Output>) -> Line {
        (0..QUEUES).fold(Line::Same, |line, index| {
            match self.notify(ram, index, outputs) {
                Line::Same => line,
                raised => raised,
            }
        })
    }

    /// Does `work` on a queue, if it may be worked now. A fault stops the device until its driver resets it.
    pub fn work<W>(&mut self, index: usize, work: W) -> Line
    where
        W: FnOnce(&mut D, &mut VirtQueue) -> Result<Interrupt, QueueFault>,
    {
        if self.queue(index).is_none() {
            return Line::Same;
        }
        match work(&mut self.device, &mut self.queues[index]) {
            Ok(Interrupt(false)) => Line::Same,
            Ok(Interrupt(true)) => {
                self.interrupt_status |= INTERRUPT_USED;
                Line::Raise
            }
            Err(fault) => {
                self.fault = Some(DeviceFault {
                    queue: index,
                    fault,
                });
                self.status |= NEEDS_RESET;
                self.interrupt_status |= INTERRUPT_CONFIG;
                Line::Raise
            }
        }
    }

    fn notify(&mut self, ram: &GuestRam, index: usize, outputs: &mut Vec<Output>) -> Line {
        self.work(index, |device, queue| {
            device.notify(index, queue, ram, outputs)
        })
    }

    fn register(&self, offset: u64) -> u32 {
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => D::ID,
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => match self.device_features_sel {
                0 => self.offered() as u32,
                1 => (self.offered() >> 32) as u32,
                _ => 0,
            },
            register::QUEUE_NUM_MAX if self.selected().is_some() => u32::from(MAX_SIZE),
            register::QUEUE_READY => self.selected().is_some_and(|q| q.ready).into(),
            register::INTERRUPT_STATUS => self.interrupt_status,
            register::STATUS => self.status,
            register::CONFIG_GENERATION => 0,
            offset if register::SHARED_MEMORY.contains(&offset) => u32::MAX,
            _ => 0,
        }
    }

    fn offered(&self) -> u64 {
        self.device.features() | F_VERSION_1
    }

    fn selected(&self) -> Option<&VirtQueue> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    /// As if its driver had reset it.
    pub fn reset(&mut self) {
        self.device.reset();
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.interrupt_status = 0;
        self.queues = [VirtQueue::default(); QUEUES];
        self.fault = None;
    }

    fn advance(&mut self, value: u32) {
        let mut status = self.status | value & DRIVERS_BITS;
        if status & ACKNOWLEDGE == 0 {
            status &= !DRIVER;
        }
        let features = self.driver_features;
        let acceptable = features & !self.offered() == 0 && features & F_VERSION_1 != 0;
        if status & DRIVER == 0 || !acceptable {
            status &= !FEATURES_OK;
        }
        if status & FEATURES_OK == 0 {
            status &= !DRIVER_OK;
        } else {
            self.device.agreed(features);
        }
        self.status = status;
    }

    fn choose_features(&mut self, value: u32) {
        if self.status & (DRIVER | FEATURES_OK) != DRIVER {
            return;
        }
        match self.driver_features_sel {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            _ => {}
        }
    }

    fn set_ready(&mut self, ram: &GuestRam, value: u32) {
        let may_enable = self.status & (FEATURES_OK | DRIVER_OK) == FEATURES_OK;
        let selected = usize::try_from(self.queue_sel).unwrap_or(usize::MAX);
        let Some(queue) = self.queues.get_mut(selected) else {
            return;
        };
        if value & 1 == 0 {
            *queue = VirtQueue::default();
        } else if may_enable && !queue.ready {
            queue.enable(ram);
        }
    }

    fn set_up_queue(&mut self, offset: u64, value: u32) {
        if self.status & (FEATURES_OK | DRIVER_OK) != FEATURES_OK {
            return;
        }
        let selected = usize::try_from(self.queue_sel).unwrap_or(usize::MAX);
        let Some(queue) = self.queues.get_mut(selected).filter(|q| !q.ready) else {
            return;
        };
        match offset {
            // One that we cannot have is none: the queue will not become ready.
            register::QUEUE_NUM => {
                queue.size = u16::try_from(value).unwrap_or(0);
            }
            register::QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            register::QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            register::QUEUE_DRIVER_LOW => set_low(&mut queue.available, value),
            register::QUEUE_DRIVER_HIGH => set_high(&mut queue.available, value),
            register::QUEUE_DEVICE_LOW => set_low(&mut queue.used, value),
            register::QUEUE_DEVICE_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }
}

/// serde knows arrays of fixed lengths only, not of `QUEUES`.
mod queues {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::VirtQueue;

    pub fn serialize<S: Serializer>(
        queues: &[VirtQueue],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        queues.serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>, const QUEUES: usize>(
        deserializer: D,
    ) -> Result<[VirtQueue; QUEUES], D::Error> {
        let queues = Vec::<VirtQueue>::deserialize(deserializer)?;
        let found = queues.len();
        queues
            .try_into()
            .map_err(|_| D::Error::invalid_length(found, &"as many queues as the device has"))
    }
}

fn set_low(word: &mut u64, value: u32) {
    *word = *word >> 32 << 32 | u64::from(value);
}

fn set_high(word: &mut u64, value: u32) {
    *word = u64::from(*word as u32) | u64::from(value) << 32;
}
