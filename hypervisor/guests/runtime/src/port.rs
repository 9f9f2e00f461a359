//! Port I/O. Ring 3 may use every port (`docs/guest-abi.md`). Each access is an exit: on the slowest KVM 45 µs.

use core::arch::asm;

/// Reads a byte from a port.
#[must_use]
pub fn read_u8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: no port of this machine changes memory, except by frames and random bytes put into virtqueues,
    // which `asm!` without `nomem` lets the compiler expect.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags)) };
    value
}

/// Writes a byte to a port.
pub fn write_u8(port: u16, value: u8) {
    // SAFETY: as in `read_u8`.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) };
}

/// Writes 16 bits to a port.
pub fn write_u16(port: u16, value: u16) {
    // SAFETY: as in `read_u8`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack, preserves_flags)) };
}
