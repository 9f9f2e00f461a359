//! The network device (virtio 1.2, section 5.1), as a device of smoltcp.

use super::queue::{Queue, Writer};
use super::{OpenError, Window};
use alloc::vec::Vec;
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

const BASE: usize = 0xd000_1000;
const DEVICE_ID: u32 = 1;
const FEATURE_MTU: u64 = 1 << 3;
const FEATURE_MAC: u64 = 1 << 5;
const CONFIGURATION_MAC: usize = 0;
const CONFIGURATION_MTU: usize = 10;
const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
/// The virtio header before each frame: all zero to send, and nothing of interest in it when received.
const HEADER: usize = 12;
const ETHERNET_HEADER: usize = 14;
const DEFAULT_MTU: u16 = 1500;
/// What smoltcp can take at most.
const LARGEST_MTU: u16 = 9216;

/// The network device, ready to be used by smoltcp.
///
/// Frames to send are handed over at the next exit that notifies: `platform::halt`, or by itself when all buffers
/// are full.
#[derive(Debug)]
pub struct Network {
    receive: Queue,
    transmit: Transmit,
    mac: [u8; 6],
    mtu: u16,
}

/// The sending half.
#[derive(Debug)]
struct Transmit {
    window: Window,
    queue: Queue,
    /// Buffers that wait for a frame. A stack: the one used last is warm, and fewer pages get dirty.
    free: Vec<u16>,
}

impl Network {
    /// Opens the device with queues of `entries` frames each (a power of two, at most 256).
    ///
    /// # Errors
    /// There is no such device, it refuses the driver, or there is no memory for its queues.
    pub fn open(entries: u16) -> Result<Self, OpenError> {
        let (window, features) = Window::open(BASE, DEVICE_ID, FEATURE_MTU | FEATURE_MAC)?;
        if features & FEATURE_MAC == 0 {
            return Err(OpenError::Refused);
        }
        let at = |offset| window.configuration(offset);
        let mac = core::array::from_fn(|byte| at(CONFIGURATION_MAC + byte));
        let mtu = if features & FEATURE_MTU == 0 {
            DEFAULT_MTU
        } else {
            u16::from_le_bytes([at(CONFIGURATION_MTU), at(CONFIGURATION_MTU + 1)]).min(LARGEST_MTU)
        };
        let buffer = HEADER + ETHERNET_HEADER + usize::from(mtu);
        let queue = |writer| Queue::new(entries, buffer, writer).ok_or(OpenError::OutOfMemory);
        let mut receive = queue(Writer::Device)?;
        let transmit = queue(Writer::Driver)?;
        let mut free = Vec::new();
        free.try_reserve_exact(entries.into())
            .map_err(|_| OpenError::OutOfMemory)?;
        free.extend((0..entries).rev());
        (0..entries).for_each(|index| receive.offer(index, 0));
        window.set_queue(RECEIVE, &receive)?;
        window.set_queue(TRANSMIT, &transmit)?;
        window.start();
        Ok(Self {
            receive,
            transmit: Transmit {
                window,
                queue: transmit,
                free,
            },
            mac,
            mtu,
        })
    }

    /// The device's address.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// The largest IP packet, in bytes.
    #[must_use]
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// The frame that `receive` would give next.
    #[must_use]
    pub fn peek(&self) -> Option<&[u8]> {
        let returned = self.receive.peek()?;
        self.receive.buffer(returned.index)[..returned.length].get(HEADER..)
    }

    /// Has the device take the frames to send now. One exit; needless before a halt.
    pub fn flush(&mut self) {
        self.transmit.window.notify(TRANSMIT);
    }
}

impl Transmit {
    /// Makes sure that a buffer is free. If all are full, one notification has the device take them all.
    fn make_room(&mut self) -> bool {
        self.reclaim();
        if self.free.is_empty() {
            self.window.notify(TRANSMIT);
            self.reclaim();
        }
        !self.free.is_empty()
    }

    fn reclaim(&mut self) {
        while let Some(returned) = self.queue.take() {
            self.free.push(returned.index);
        }
    }
}

impl Device for Network {
    type RxToken<'a> = ReceiveToken<'a>;
    type TxToken<'a> = TransmitToken<'a>;

    fn receive(&mut self, _: Instant) -> Option<(ReceiveToken<'_>, TransmitToken<'_>)> {
        self.receive.peek()?;
        if !self.transmit.make_room() {
            return None;
        }
        Some((
            ReceiveToken(&mut self.receive),
            TransmitToken(&mut self.transmit),
        ))
    }

    fn transmit(&mut self, _: Instant) -> Option<TransmitToken<'_>> {
        if self.transmit.make_room() {
            Some(TransmitToken(&mut self.transmit))
        } else {
            None
        }
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = usize::from(self.mtu) + ETHERNET_HEADER;
        capabilities
    }
}

/// A frame that was received.
#[derive(Debug)]
pub struct ReceiveToken<'a>(&'a mut Queue);

impl RxToken for ReceiveToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let Some(returned) = self.0.take() else {
            return f(&[]);
        };
        let frame = self.0.buffer(returned.index)[..returned.length].get(HEADER..);
        let result = f(frame.unwrap_or(&[]));
        self.0.offer(returned.index, 0);
        result
    }
}

/// Room for a frame to send.
#[derive(Debug)]
pub struct TransmitToken<'a>(&'a mut Transmit);

impl TxToken for TransmitToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let index = self
            .0
            .free
            .pop()
            .expect("a token is given only for a free buffer");
        let result = f(&mut self.0.queue.buffer_mut(index)[HEADER..HEADER + length]);
        self.0.queue.offer(index, HEADER + length);
        result
    }
}
