//! What a bare-metal guest of Doppel needs: start, exceptions, interrupts, heap, console, clock, virtio.
//!
//! A guest is a program without an operating system, written to `docs/guest-abi.md`. It names its main function
//! with [`entry!`] and is linked by `guest.ld`:
//!
//! ```ignore
//! #![no_std]
//! #![no_main]
//! guest_runtime::entry!(main);
//! fn main(boot: &'static Boot) -> Outcome { Ok(0) }
//! ```
//!
//! Everything runs in ring 3. Ring 0 holds a few instructions of plain integer code: the way from the entry point
//! to ring 3, and the interrupt stubs, which count and return.
//!
//! Unsafe code lives where the machine is touched: device windows, ports, the heap's memory, virtqueues shared
//! with a device. A guest has one CPU and one thread, and interrupt stubs touch nothing but their own counters.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod boot;
pub mod console;
#[cfg(not(test))]
mod heap;
pub mod interrupts;
#[cfg_attr(test, allow(dead_code))]
mod memory_functions;
pub mod platform;
pub mod port;
#[cfg(not(test))]
mod start;
pub mod timer;
pub mod virtio;

pub use boot::Boot;

/// How a guest's main function ends: the status it powers off with (0 is well), or what went wrong.
pub type Outcome = Result<u8, alloc::boxed::Box<dyn core::error::Error>>;

/// The status of a power-off after an error that the main function returned.
pub const STATUS_ERROR: u8 = 0xec;
/// The status of a power-off when the boot information is not that of ABI version 1.
pub const STATUS_NO_BOOT: u8 = 0xed;
/// The status of a power-off after an exception.
pub const STATUS_EXCEPTION: u8 = 0xee;
/// The status of a power-off after a panic.
pub const STATUS_PANIC: u8 = 0xef;

/// Names the guest's main function: `fn(&'static Boot) -> Outcome`.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        /// Called by the runtime in ring 3, once heap and interrupt table stand.
        #[unsafe(no_mangle)]
        fn guest_main(boot: &'static $crate::Boot) -> $crate::Outcome {
            $main(boot)
        }
    };
}
