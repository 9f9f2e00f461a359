//! The entropy device (virtio 1.2, section 5.4).

use super::queue::{Queue, Writer};
use super::{OpenError, Window};

const BASE: usize = 0xd000_2000;
const DEVICE_ID: u32 = 4;
const QUEUE: u32 = 0;
const BUFFER: usize = 4096;

/// The entropy device: one request at a time, of up to 4096 bytes.
#[derive(Debug)]
pub struct Entropy {
    window: Window,
    queue: Queue,
    pending: bool,
}

impl Entropy {
    /// Opens the device.
    ///
    /// # Errors
    /// There is no such device, it refuses the driver, or there is no memory for its queue.
    pub fn open() -> Result<Self, OpenError> {
        let (window, _) = Window::open(BASE, DEVICE_ID, 0)?;
        let queue = Queue::new(1, BUFFER, Writer::Device).ok_or(OpenError::OutOfMemory)?;
        window.set_queue(QUEUE, &queue)?;
        window.start();
        Ok(Self {
            window,
            queue,
            pending: false,
        })
    }

    /// Asks for random bytes, unless a request is under way. The device hears of it at the next `platform::halt`, or
    /// at once (one exit) if `notify` is set.
    pub fn request(&mut self, notify: bool) {
        if !self.pending {
            self.queue.offer(0, BUFFER);
            self.pending = true;
        }
        if notify {
            self.window.notify(QUEUE);
        }
    }

    /// The bytes that came for the last request, once.
    pub fn poll(&mut self) -> Option<&[u8]> {
        let returned = self.queue.take()?;
        self.pending = false;
        Some(&self.queue.buffer(0)[..returned.length])
    }
}
