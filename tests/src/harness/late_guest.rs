//! A guest whose interrupts come late: its handler makes an exit of its own, with interrupts off, while the next tick is due.
//!
//! That tick waits through the return from the handler and the computing behind it, where nothing but the next exit may
//! let it in. The guest computes for about a millisecond from exit to exit with a counter in RCX, which is 0 at each exit; its
//! handler adds up what RCX was. So an interrupt between two exits, which a kick could bring, shows in the guest itself: it
//! turns itself off with status 1.
//!
//! Unsafe code lives here to read the guest's code, which the compiler assembles into this program, as bytes.

use std::arch::global_asm;

/// Where the guest is loaded: the lowest address that the guest ABI allows.
const BASE: u64 = 0x10_0000;

global_asm!(
    ".section .rodata.late_guest, \"a\"",
    ".balign 16",
    "late_guest_start:",
    // The interrupt table at 0xa0000, in free RAM: one gate, for the timer's vector 0x20; interrupt gate, DPL 0, IST 1.
    "lea rax, [rip + 5f]",
    "mov edi, 0xa0200",
    "mov word ptr [rdi], ax",
    "mov word ptr [rdi + 2], 0x08",
    "mov word ptr [rdi + 4], 0x8e01",
    "shr rax, 16",
    "mov word ptr [rdi + 6], ax",
    "lidt [rip + 6f]",
    // The 8259: vectors from 0x20, ends of interrupts by command, the timer's line open.
    ".irp word, 0x2011, 0x2120, 0x2104, 0x2101, 0x21fe",
    "mov al, \\word & 0xff",
    "out \\word >> 8, al",
    ".endr",
    // The 8254: channel 0, mode 2, every 64 periods of 838 ns.
    ".irp word, 0x4334, 0x4040, 0x4000",
    "mov al, \\word & 0xff",
    "out \\word >> 8, al",
    ".endr",
    // To ring 3, interrupts on. R12 is the number of exits, given by the loader in this constant.
    "mov r12d, [rip + late_guest_rounds]",
    "push 0x1b",
    "push 0xc0000",
    "push 0x202",
    "push 0x23",
    "lea rax, [rip + 2f]",
    "push rax",
    "iretq",
    "2:",
    "mov ecx, 1000000",
    "3:",
    "dec ecx",
    "jnz 3b",
    "in al, 0x21",
    "dec r12d",
    "jnz 2b",
    // Power off with status 1 if RCX was ever not 0.
    "xor eax, eax",
    "cmp qword ptr [0xa1000], 0",
    "setne al",
    "or ax, 0x2000",
    "mov dx, 0x604",
    "out dx, ax",
    "4:",
    "jmp 4b",
    // The timer's handler.
    ".balign 16",
    "5:",
    "push rax",
    "add qword ptr [0xa1000], rcx",
    "mov al, 0x20",
    "out 0x20, al",
    "pop rax",
    "iretq",
    "6:",
    ".word 0xfff",
    ".quad 0xa0000",
    "late_guest_rounds:",
    ".long 0",
    "late_guest_end:",
    ".text",
);

unsafe extern "C" {
    static late_guest_start: u8;
    static late_guest_rounds: u8;
    static late_guest_end: u8;
}

/// The guest as an ELF file; it makes about this many exits of its own, and one for each interrupt.
#[must_use]
pub fn elf(rounds: u32) -> Vec<u8> {
    let (start, end) = (&raw const late_guest_start, &raw const late_guest_end);
    let length = end as usize - start as usize;
    // SAFETY: both symbols are in one piece of this program's read-only data, the second behind the first.
    let mut code = unsafe { std::slice::from_raw_parts(start, length) }.to_vec();
    let at = &raw const late_guest_rounds as usize - start as usize;
    code[at..at + 4].copy_from_slice(&rounds.to_le_bytes());
    file(&code)
}

/// An ELF file with one segment, which is entered at its start.
pub(super) fn file(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    const EXECUTABLE: u16 = 2;
    const X86_64: u16 = 62;
    const LOAD: u32 = 1;
    const READ_WRITE_EXECUTE: u32 = 7;
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    bytes.extend(EXECUTABLE.to_le_bytes());
    bytes.extend(X86_64.to_le_bytes());
    bytes.extend(1_u32.to_le_bytes());
    // Entry point, program headers right behind this header, no section headers.
    for word in [BASE, 64, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 64, 0, 0] {
        bytes.extend(half.to_le_bytes());
    }
    bytes.extend(LOAD.to_le_bytes());
    bytes.extend(READ_WRITE_EXECUTE.to_le_bytes());
    let length = code.len() as u64;
    for word in [HEADERS, BASE, BASE, length, length, 8] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(code);
    bytes
}
