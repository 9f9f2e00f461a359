//! The platform page: time, random numbers, waiting; and the power switch.

use crate::port;
use core::arch::asm;

const PAGE: usize = 0xd000_0000;
const HALT: usize = PAGE;
const CLOCK: usize = PAGE + 0x08;
const RANDOM: usize = PAGE + 0x10;
const POWER_PORT: u16 = 0x604;
const POWER_OFF: u16 = 0x2000;

/// A value on the guest's clock: nanoseconds since the guest started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct GuestTime(pub u64);

/// Waits until something has happened since the last call: a frame came, random bytes came, an interrupt was
/// delivered, the console received a byte. It is a notification of every virtio queue too. It may return early;
/// nothing is lost between a check and this call. One exit.
pub fn halt() -> GuestTime {
    GuestTime(read(HALT))
}

/// The clock. It never goes back. One exit.
#[must_use]
pub fn clock() -> GuestTime {
    GuestTime(read(CLOCK))
}

/// 64 random bits. One exit.
#[must_use]
pub fn random() -> u64 {
    read(RANDOM)
}

/// Turns the machine off. Status 0 means that all went well.
pub fn power_off(status: u8) -> ! {
    loop {
        port::write_u16(POWER_PORT, POWER_OFF + u16::from(status));
        // Only a machine that does not keep to the ABI comes here; wait rather than spin.
        halt();
    }
}

/// One plain MOV of 8 bytes, as the page wants it.
fn read(register: usize) -> u64 {
    let value: u64;
    // SAFETY: the page is mapped and its registers change no memory, except by frames and random bytes put into
    // virtqueues, which `asm!` without `nomem` lets the compiler expect.
    unsafe {
        asm!("mov {}, qword ptr [{}]", out(reg) value, in(reg) register, options(nostack, preserves_flags));
    }
    value
}
