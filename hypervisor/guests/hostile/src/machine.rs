//! Accesses of every width to any port and any address of the device windows, and memory that devices share.
//!
//! Unsafe: ports, windows and shared memory are touched by assembly and raw pointers.

use core::arch::asm;

/// The first and the last address of what the wild accesses reach: the three windows and a page behind them.
pub(crate) const WINDOWS: usize = 0xd000_0000;
pub(crate) const WINDOWS_BYTES: usize = 0x4000;

/// A plain MOV from a window: 1, 2, 4 or 8 bytes.
pub(crate) fn read(address: usize, width: usize) -> u64 {
    let value: u64;
    // SAFETY: the windows are mapped; a device changes no memory but the arena, which only raw pointers reach.
    unsafe {
        match width {
            1 => {
                asm!("movzx {0:e}, byte ptr [{1}]", out(reg) value, in(reg) address, options(nostack))
            }
            2 => {
                asm!("movzx {0:e}, word ptr [{1}]", out(reg) value, in(reg) address, options(nostack))
            }
            4 => {
                asm!("mov {0:e}, dword ptr [{1}]", out(reg) value, in(reg) address, options(nostack))
            }
            _ => {
                asm!("mov {0}, qword ptr [{1}]", out(reg) value, in(reg) address, options(nostack))
            }
        }
    }
    value
}

/// A plain MOV to a window: 1, 2, 4 or 8 bytes.
pub(crate) fn write(address: usize, width: usize, value: u64) {
    // SAFETY: as in `read`.
    unsafe {
        match width {
            1 => {
                asm!("mov byte ptr [{1}], {0}", in(reg_byte) value as u8, in(reg) address, options(nostack))
            }
            2 => {
                asm!("mov word ptr [{1}], {0:x}", in(reg) value, in(reg) address, options(nostack))
            }
            4 => {
                asm!("mov dword ptr [{1}], {0:e}", in(reg) value, in(reg) address, options(nostack))
            }
            _ => asm!("mov qword ptr [{1}], {0}", in(reg) value, in(reg) address, options(nostack)),
        }
    }
}

/// IN of 1, 2 or 4 bytes.
pub(crate) fn port_in(port: u16, width: usize) -> u32 {
    let value: u32;
    // SAFETY: no port changes memory but the arena; that of the time stamp changes RDX.
    unsafe {
        match width {
            1 => {
                asm!("in al, dx", "movzx eax, al", in("dx") port, out("eax") value, options(nostack))
            }
            2 => {
                asm!("in ax, dx", "movzx eax, ax", in("dx") port, out("eax") value, options(nostack))
            }
            _ => {
                asm!("in eax, dx", inout("rdx") u64::from(port) => _, out("eax") value, options(nostack))
            }
        }
    }
    value
}

/// OUT of 1, 2 or 4 bytes.
pub(crate) fn port_out(port: u16, width: usize, value: u32) {
    // SAFETY: as in `port_in`.
    unsafe {
        match width {
            1 => asm!("out dx, al", in("dx") port, in("al") value as u8, options(nostack)),
            2 => asm!("out dx, ax", in("dx") port, in("ax") value as u16, options(nostack)),
            _ => asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack)),
        }
    }
}

/// REP OUTSB of the arena's first bytes, and REP INSB into it.
pub(crate) fn port_string(port: u16, count: usize, write: bool, at: usize) {
    // SAFETY: `at` and `count` bytes behind it lie in the arena, which only raw pointers reach.
    unsafe {
        if write {
            asm!("rep outsb", in("dx") port, inout("rcx") count => _, inout("rsi") at => _, options(nostack));
        } else {
            asm!("rep insb", in("dx") port, inout("rcx") count => _, inout("rdi") at => _, options(nostack));
        }
    }
}

/// Memory that devices may write all over: nothing else lies there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arena(usize);

impl Arena {
    pub(crate) const BYTES: usize = 128 << 10;

    /// Memory for good, aligned to a page.
    pub(crate) fn new() -> Self {
        let bytes = alloc::vec![0_u8; Self::BYTES + 4096].leak();
        Self((bytes.as_mut_ptr() as usize).next_multiple_of(4096))
    }

    /// The address of its first byte.
    pub(crate) fn start(self) -> usize {
        self.0
    }

    /// Stores bytes at an offset, as far as they reach.
    pub(crate) fn store(self, offset: usize, bytes: &[u8]) {
        for (at, &byte) in (offset..Self::BYTES).zip(bytes) {
            // SAFETY: inside the arena. Devices change it only while the guest stands at an exit.
            unsafe { ((self.0 + at) as *mut u8).write_volatile(byte) };
        }
    }
}
