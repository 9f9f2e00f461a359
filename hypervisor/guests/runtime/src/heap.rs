//! The heap: all RAM after the image, managed by `talc` (constant time over many sizes, grows in place).

use core::alloc::{GlobalAlloc, Layout};
use talc::base::binning::DefaultBinning;
use talc::cell::TalcCell;
use talc::source::Manual;

#[global_allocator]
static HEAP: Heap = Heap(TalcCell::new(Manual));

struct Heap(TalcCell<Manual, DefaultBinning>);

// SAFETY: a guest has one thread, and interrupt stubs do not allocate.
unsafe impl Sync for Heap {}

// SAFETY: every call is handed to talc, which keeps the contract.
unsafe impl GlobalAlloc for Heap {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract.
        unsafe { self.0.alloc(layout) }
    }

    #[inline]
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract.
        unsafe { self.0.dealloc(pointer, layout) }
    }

    #[inline]
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller keeps the contract.
        unsafe { self.0.realloc(pointer, layout, size) }
    }
}

/// Gives `start..end` to the heap.
///
/// # Safety
/// The region must be mapped memory that nothing else uses, ever.
pub(crate) unsafe fn claim(start: usize, end: usize) {
    // SAFETY: the caller vouches for the region. Too small a region is not taken: allocations then fail.
    unsafe { HEAP.0.claim(start as *mut u8, end.saturating_sub(start)) };
}
