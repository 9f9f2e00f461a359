//! The block device (virtio 1.2, section 5.2): several requests at a time, each of one block.
//!
//! ```text
//! read(n), write(n), flush(n) ──▶ three descriptors of request n: header │ data │ status ──▶ device
//! poll() ◀── n, as the device is done with it
//! ```
//! Unsafe for the same reason as `queue.rs`: memory shared with a device that touches it only at exits.

use super::{OpenError, Window};
use alloc::alloc::{alloc_zeroed, dealloc};
use core::alloc::Layout;
use core::ptr;

const BASE: usize = 0xd000_3000;
const DEVICE_ID: u32 = 2;
const REQUESTS: u32 = 0;
const FEATURE_FLUSH: u64 = 1 << 9;
const CONFIGURATION_CAPACITY: usize = 0;

/// Bytes of a block.
pub const BLOCK: usize = 4096;
/// Bytes of a sector, in which the device counts.
pub const SECTOR: usize = 512;

const KIND_READ: u32 = 0;
const KIND_WRITE: u32 = 1;
const KIND_FLUSH: u32 = 4;

const FLAG_NEXT: u16 = 1;
const FLAG_DEVICE_WRITES: u16 = 2;
const NO_INTERRUPT: u16 = 1;
/// A status that no device gives.
const NOT_YET: u8 = 0xff;

const DESCRIPTOR_BYTES: usize = 16;
/// Header and status of a request, in a piece of memory of their own.
const AROUND: usize = 32;
const STATUS: usize = 16;

/// The block device.
#[derive(Debug)]
pub struct Block {
    window: Window,
    memory: *mut u8,
    layout: Layout,
    size: u16,
    requests: u16,
    available: usize,
    used: usize,
    around: usize,
    data: usize,
    next_available: u16,
    next_used: u16,
    sectors: u64,
}

/// A request that the device is done with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Its number.
    pub request: u16,
    /// The device's word: 0 if it was done.
    pub status: u8,
}

impl Block {
    /// Opens the device for so many requests at a time, at most 64.
    ///
    /// # Errors
    /// There is no such device, it refuses the driver, or there is no memory for its queue.
    pub fn open(requests: u16) -> Result<Self, OpenError> {
        let (window, features) = Window::open(BASE, DEVICE_ID, FEATURE_FLUSH)?;
        if features & FEATURE_FLUSH == 0 {
            return Err(OpenError::Refused);
        }
        let capacity =
            core::array::from_fn(|byte| window.configuration(CONFIGURATION_CAPACITY + byte));
        let size = (3 * requests.clamp(1, 64)).next_power_of_two();
        let entries = usize::from(size);
        let available = entries * DESCRIPTOR_BYTES;
        let used = (available + 6 + 2 * entries).next_multiple_of(64);
        let around = (used + 6 + 8 * entries).next_multiple_of(64);
        let data = (around + usize::from(requests) * AROUND).next_multiple_of(BLOCK);
        let bytes = data + usize::from(requests) * BLOCK;
        let layout = Layout::from_size_align(bytes, BLOCK).map_err(|_| OpenError::OutOfMemory)?;
        // SAFETY: the size is not zero.
        let memory = unsafe { alloc_zeroed(layout) };
        if memory.is_null() {
            return Err(OpenError::OutOfMemory);
        }
        let block = Self {
            window,
            memory,
            layout,
            size,
            requests,
            available,
            used,
            around,
            data,
            next_available: 0,
            next_used: 0,
            sectors: u64::from_le_bytes(capacity),
        };
        block.put::<u16>(available, NO_INTERRUPT);
        window.select(
            REQUESTS,
            size,
            [0, available, used].map(|at| block.at(at) as u64),
        )?;
        window.start();
        Ok(block)
    }

    /// The disk's size in blocks.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.sectors / (BLOCK / SECTOR) as u64
    }

    /// Asks for a block; the data are in [`data`](Self::data) once the request is finished.
    pub fn read(&mut self, request: u16, block: u64) {
        self.ask(request, KIND_READ, block, Some(FLAG_DEVICE_WRITES));
    }

    /// Has a block written with what is in [`data_mut`](Self::data_mut).
    pub fn write(&mut self, request: u16, block: u64) {
        self.ask(request, KIND_WRITE, block, Some(0));
    }

    /// Has everything that was written made durable.
    pub fn flush(&mut self, request: u16) {
        self.ask(request, KIND_FLUSH, 0, None);
    }

    /// The device hears of new requests at the next `platform::halt`, or by this (one exit).
    pub fn notify(&mut self) {
        self.window.notify(REQUESTS);
    }

    /// The next request that the device is done with.
    pub fn poll(&mut self) -> Option<Finished> {
        if self.get::<u16>(self.used + 2) == self.next_used {
            return None;
        }
        let slot = usize::from(self.next_used & (self.size - 1));
        let head: u32 = self.get(self.used + 4 + 8 * slot);
        self.next_used = self.next_used.wrapping_add(1);
        let request = (head / 3) as u16;
        assert!(request < self.requests, "virtio: no such request");
        Some(Finished {
            request,
            status: self.get(self.around_of(request) + STATUS),
        })
    }

    /// The data of a request that is the driver's own.
    #[must_use]
    pub fn data(&self, request: u16) -> &[u8] {
        assert!(request < self.requests);
        // SAFETY: inside the allocation, initialised, and not written by the device while it is the driver's.
        unsafe { core::slice::from_raw_parts(self.at(self.data_of(request)), BLOCK) }
    }

    /// The same, to fill.
    pub fn data_mut(&mut self, request: u16) -> &mut [u8] {
        assert!(request < self.requests);
        // SAFETY: as in `data`, and borrowed mutably with the device.
        unsafe { core::slice::from_raw_parts_mut(self.at(self.data_of(request)), BLOCK) }
    }

    fn ask(&mut self, request: u16, kind: u32, block: u64, data: Option<u16>) {
        assert!(request < self.requests);
        let around = self.around_of(request);
        self.put(around, kind);
        self.put(around + 4, 0u32);
        self.put(around + 8, block * (BLOCK / SECTOR) as u64);
        self.put(around + STATUS, NOT_YET);
        let head = 3 * request;
        let status = head + if data.is_some() { 2 } else { 1 };
        self.describe(head, around, 16, FLAG_NEXT, head + 1);
        if let Some(flags) = data {
            self.describe(
                head + 1,
                self.data_of(request),
                BLOCK as u32,
                flags | FLAG_NEXT,
                head + 2,
            );
        }
        self.describe(status, around + STATUS, 1, FLAG_DEVICE_WRITES, 0);
        let slot = usize::from(self.next_available & (self.size - 1));
        self.next_available = self.next_available.wrapping_add(1);
        self.put(self.available + 4 + 2 * slot, head);
        self.put(self.available + 2, self.next_available);
    }

    fn describe(&self, index: u16, buffer: usize, length: u32, flags: u16, next: u16) {
        let at = usize::from(index) * DESCRIPTOR_BYTES;
        self.put(at, self.at(buffer) as u64);
        self.put(at + 8, length);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    fn around_of(&self, request: u16) -> usize {
        self.around + usize::from(request) * AROUND
    }

    fn data_of(&self, request: u16) -> usize {
        self.data + usize::from(request) * BLOCK
    }

    fn put<T>(&self, offset: usize, value: T) {
        // SAFETY: callers keep to the layout that `open` computed, in which every field is aligned; volatile, because the device
        // reads it.
        unsafe { ptr::write_volatile(self.at(offset).cast::<T>(), value) };
    }

    fn get<T: Copy>(&self, offset: usize) -> T {
        // SAFETY: as in `put`; volatile, because the device writes it. Only integers are read.
        unsafe { ptr::read_volatile(self.at(offset).cast::<T>()) }
    }

    fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset < self.layout.size());
        // SAFETY: callers keep to the layout that `open` computed.
        unsafe { self.memory.add(offset) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.window.reset();
        // SAFETY: allocated in `open` with this layout, and the device has forgotten it.
        unsafe { dealloc(self.memory, self.layout) };
    }
}
