//! A split virtqueue (virtio 1.2, section 2.7) in which descriptor *n* always describes buffer *n*.
//!
//! ```text
//! take() ◀── used ring ◀── device ◀── available ring ◀── offer(n, len)
//!    └──────── the driver's own: buffer(n), buffer_mut(n) ────────┘
//! ```
//! Unsafe, because rings and buffers are memory shared with a device. The device touches it only while the guest is
//! stopped at an exit, so the order of the driver's own accesses does not matter; that they are not moved across
//! an exit is seen to by the `asm!` of the exit, which the compiler must take to change any memory it can reach.

use alloc::alloc::{alloc_zeroed, dealloc};
use core::alloc::Layout;
use core::ptr;

const DESCRIPTOR_BYTES: usize = 16;
const FLAG_DEVICE_WRITES: u16 = 2;
const FLAG_NO_INTERRUPT: u16 = 1;
const ALIGNMENT: usize = 64;

/// Who writes the buffers of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writer {
    Driver,
    Device,
}

#[repr(C)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}
const _: () = assert!(size_of::<Descriptor>() == DESCRIPTOR_BYTES);

/// An element of the used ring.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Used {
    id: u32,
    length: u32,
}

/// A buffer that came back from the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Returned {
    pub(super) index: u16,
    /// Bytes that the device wrote.
    pub(super) length: usize,
}

#[derive(Debug)]
pub(super) struct Queue {
    memory: *mut u8,
    layout: Layout,
    size: u16,
    writer: Writer,
    stride: usize,
    available: usize,
    used: usize,
    buffers: usize,
    /// The index that the available ring's next element will have, not reduced.
    next_available: u16,
    /// The index of the used ring's next element to take, not reduced.
    next_used: u16,
}

impl Queue {
    /// A queue of `size` (a power of two) buffers of `buffer_bytes`, all zero; `None` without memory for it.
    pub(super) fn new(size: u16, buffer_bytes: usize, writer: Writer) -> Option<Self> {
        assert!(size.is_power_of_two());
        let entries = usize::from(size);
        let stride = buffer_bytes.next_multiple_of(ALIGNMENT);
        let available = entries * DESCRIPTOR_BYTES;
        let used = (available + 6 + 2 * entries).next_multiple_of(ALIGNMENT);
        let buffers = (used + 6 + 8 * entries).next_multiple_of(ALIGNMENT);
        let layout = Layout::from_size_align(buffers + entries * stride, ALIGNMENT).ok()?;
        // SAFETY: the size is not zero.
        let memory = unsafe { alloc_zeroed(layout) };
        if memory.is_null() {
            return None;
        }
        let queue = Self {
            memory,
            layout,
            size,
            writer,
            stride,
            available,
            used,
            buffers,
            next_available: 0,
            next_used: 0,
        };
        for index in 0..entries {
            let descriptor = Descriptor {
                address: queue.at(buffers + index * stride) as u64,
                length: stride as u32,
                flags: match writer {
                    Writer::Device => FLAG_DEVICE_WRITES,
                    Writer::Driver => 0,
                },
                next: 0,
            };
            // SAFETY: inside the allocation, aligned, and the device does not know it yet.
            unsafe {
                queue
                    .at(index * DESCRIPTOR_BYTES)
                    .cast::<Descriptor>()
                    .write(descriptor)
            };
        }
        // SAFETY: as above.
        unsafe { queue.at(available).cast::<u16>().write(FLAG_NO_INTERRUPT) };
        Some(queue)
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Physical addresses of the descriptor table, the available ring and the used ring.
    pub(super) fn addresses(&self) -> [u64; 3] {
        [0, self.available, self.used].map(|offset| self.at(offset) as u64)
    }

    /// What the device returned next, without taking it.
    pub(super) fn peek(&self) -> Option<Returned> {
        // SAFETY: both rings are inside the allocation; volatile, because the device writes them.
        let element = unsafe {
            if ptr::read_volatile(self.at(self.used + 2).cast::<u16>()) == self.next_used {
                return None;
            }
            let slot = usize::from(self.next_used & (self.size - 1));
            ptr::read_volatile(self.at(self.used + 4 + 8 * slot).cast::<Used>())
        };
        assert!(
            element.id < u32::from(self.size),
            "virtio: no such descriptor"
        );
        Some(Returned {
            index: element.id as u16,
            length: (element.length as usize).min(self.stride),
        })
    }

    /// Takes what the device returned next: the buffer is the driver's until it is offered.
    pub(super) fn take(&mut self) -> Option<Returned> {
        let returned = self.peek()?;
        self.next_used = self.next_used.wrapping_add(1);
        Some(returned)
    }

    /// Offers a buffer to the device: for a device to read, its first `length` bytes; to write, all of it.
    pub(super) fn offer(&mut self, index: u16, length: usize) {
        debug_assert!(index < self.size && length <= self.stride);
        let slot = usize::from(self.next_available & (self.size - 1));
        self.next_available = self.next_available.wrapping_add(1);
        // SAFETY: all inside the allocation and aligned; volatile, because the device reads it.
        unsafe {
            if self.writer == Writer::Driver {
                let descriptor = self
                    .at(usize::from(index) * DESCRIPTOR_BYTES)
                    .cast::<Descriptor>();
                ptr::write_volatile(&raw mut (*descriptor).length, length as u32);
            }
            ptr::write_volatile(self.at(self.available + 4 + 2 * slot).cast::<u16>(), index);
            ptr::write_volatile(
                self.at(self.available + 2).cast::<u16>(),
                self.next_available,
            );
        }
    }

    /// A buffer that is the driver's own.
    pub(super) fn buffer(&self, index: u16) -> &[u8] {
        assert!(index < self.size);
        // SAFETY: inside the allocation, initialised, and not written by the device while it is the driver's.
        unsafe { core::slice::from_raw_parts(self.at(self.buffer_offset(index)), self.stride) }
    }

    /// A buffer that is the driver's own.
    pub(super) fn buffer_mut(&mut self, index: u16) -> &mut [u8] {
        assert!(index < self.size);
        // SAFETY: as in `buffer`, and borrowed mutably with the queue.
        unsafe { core::slice::from_raw_parts_mut(self.at(self.buffer_offset(index)), self.stride) }
    }

    fn buffer_offset(&self, index: u16) -> usize {
        self.buffers + usize::from(index) * self.stride
    }

    fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset < self.layout.size());
        // SAFETY: callers keep to the layout that `new` computed.
        unsafe { self.memory.add(offset) }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout. Whoever drops a queue has reset its device.
        unsafe { dealloc(self.memory, self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device that works on the queue's memory by the addresses it was told, as the hypervisor does.
    struct Device {
        size: u16,
        addresses: [u64; 3],
        taken: u16,
        returned: u16,
    }

    impl Device {
        fn of(queue: &Queue) -> Self {
            Self {
                size: queue.size(),
                addresses: queue.addresses(),
                taken: 0,
                returned: 0,
            }
        }

        fn half(&self, area: usize, offset: usize) -> u16 {
            // SAFETY: inside the queue under test.
            unsafe { ptr::read_volatile((self.addresses[area] as usize + offset) as *const u16) }
        }

        /// The next available buffer: descriptor, address, length, flags.
        fn take(&mut self) -> Option<(u16, usize, u32, u16)> {
            if self.half(1, 2) == self.taken {
                return None;
            }
            let index = self.half(1, 4 + 2 * usize::from(self.taken % self.size));
            self.taken = self.taken.wrapping_add(1);
            let at = self.addresses[0] as usize + 16 * usize::from(index);
            // SAFETY: inside the queue under test.
            let (address, length) =
                unsafe { ((at as *const u64).read(), ((at + 8) as *const u32).read()) };
            Some((
                index,
                address as usize,
                length,
                self.half(0, 16 * usize::from(index) + 12),
            ))
        }

        fn give(&mut self, index: u32, length: u32) {
            let at = self.addresses[2] as usize;
            let slot = at + 4 + 8 * usize::from(self.returned % self.size);
            self.returned = self.returned.wrapping_add(1);
            // SAFETY: inside the queue under test.
            unsafe {
                (slot as *mut Used).write_volatile(Used { id: index, length });
                ((at + 2) as *mut u16).write_volatile(self.returned);
            }
        }
    }

    #[test]
    fn buffers_go_round_past_the_wrap_of_the_indices() {
        let mut queue = Queue::new(8, 100, Writer::Device).expect("memory");
        let mut device = Device::of(&queue);
        (0..8).for_each(|index| queue.offer(index, 0));
        for round in 0..70_000_u32 {
            let (index, address, length, flags) = device.take().expect("one is always there");
            assert_eq!((length, flags), (128, FLAG_DEVICE_WRITES));
            // SAFETY: the buffer is the device's now.
            unsafe { (address as *mut u32).write(round) };
            device.give(index.into(), 4);
            assert_eq!(queue.peek(), Some(Returned { index, length: 4 }));
            assert_eq!(queue.take(), Some(Returned { index, length: 4 }));
            assert_eq!(queue.take(), None);
            assert_eq!(queue.buffer(index)[..4], round.to_le_bytes());
            queue.offer(index, 0);
        }
    }

    #[test]
    fn a_driver_sends_lengths_and_takes_buffers_back_in_the_devices_order() {
        let mut queue = Queue::new(4, 64, Writer::Driver).expect("memory");
        let mut device = Device::of(&queue);
        assert_eq!(device.half(1, 0), FLAG_NO_INTERRUPT);
        for index in 0..4 {
            queue.buffer_mut(index).fill(index as u8 + 1);
            queue.offer(index, 10 + usize::from(index));
        }
        let taken: Vec<_> = core::iter::from_fn(|| device.take()).collect();
        assert_eq!(taken.len(), 4);
        for (position, (index, address, length, flags)) in taken.iter().copied().enumerate() {
            assert_eq!(
                (usize::from(index), length, flags),
                (position, 10 + position as u32, 0)
            );
            // SAFETY: the buffer is the device's now.
            assert_eq!(unsafe { *(address as *const u8) }, index as u8 + 1);
        }
        device.give(2, 0);
        device.give(0, 0);
        assert_eq!(queue.take().map(|returned| returned.index), Some(2));
        assert_eq!(queue.take().map(|returned| returned.index), Some(0));
        assert_eq!(queue.take(), None);
    }

    #[test]
    fn areas_are_aligned_and_apart() {
        for size in [1, 2, 64, 256] {
            let queue = Queue::new(size, 1526, Writer::Device).expect("memory");
            let [descriptors, available, used] = queue.addresses().map(|address| address as usize);
            let entries = usize::from(size);
            assert!(
                descriptors.is_multiple_of(16)
                    && available.is_multiple_of(2)
                    && used.is_multiple_of(4)
            );
            assert!(descriptors + 16 * entries <= available);
            assert!(available + 6 + 2 * entries <= used);
            assert!(used + 6 + 8 * entries <= queue.buffer(0).as_ptr() as usize);
            assert_eq!(queue.buffer(0).len(), 1536);
        }
    }

    #[test]
    #[should_panic(expected = "no such descriptor")]
    fn a_descriptor_out_of_range_is_refused() {
        let queue = Queue::new(4, 64, Writer::Device).expect("memory");
        Device::of(&queue).give(4, 0);
        let _ = queue.peek();
    }

    #[test]
    fn a_length_beyond_the_buffer_is_cut() {
        let queue = Queue::new(4, 64, Writer::Device).expect("memory");
        Device::of(&queue).give(1, 1000);
        assert_eq!(
            queue.peek(),
            Some(Returned {
                index: 1,
                length: 64
            })
        );
    }
}
