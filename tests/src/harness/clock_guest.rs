//! A guest that computes without end and reads its clock from a page of its memory, as a Linux guest under replay does (`devices/pvclock.rs`), as
//! fast as it can, in ring 3.
//!
//! It either counts its reads as a prepared kernel does, and so makes an exit now and then, or makes none at all: then only who preempts it lets it see
//! time go on. Each tenth of a second by that clock it prints a line: the time in 16 hexadecimal digits, and a letter, `.`
//! as long as no reading was before the one before it, `b` from then on.
//!
//! Unsafe code lives here to read the guest's code, which the compiler assembles into this program, as bytes.

use std::arch::global_asm;
use std::time::Duration;

use super::late_guest::file;

/// Between two lines.
pub const APART: Duration = Duration::from_millis(100);

global_asm!(
    ".section .rodata.clock_guest, \"a\"",
    ".balign 16",
    "clock_guest_start:",
    // The interrupt table at 0xa0000, in free RAM: one gate, for the timer's vector 0x20; interrupt gate, DPL 0, IST 1.
    "lea rax, [rip + 5f]",
    "mov edi, 0xa0200",
    "mov word ptr [rdi], ax",
    "mov word ptr [rdi + 2], 0x08",
    "mov word ptr [rdi + 4], 0x8e01",
    "shr rax, 16",
    "mov word ptr [rdi + 6], ax",
    "lidt [rip + 6f]",
    // The 8259: vectors from 0x20, interrupts end by themselves, the timer's line open.
    ".irp word, 0x2011, 0x2120, 0x2104, 0x2103, 0x21fe",
    "mov al, \\word & 0xff",
    "out \\word >> 8, al",
    ".endr",
    // The 8254: channel 0, mode 2, 100 times a second.
    ".irp word, 0x4334, 0x409c, 0x402e",
    "mov al, \\word & 0xff",
    "out \\word >> 8, al",
    ".endr",
    // The page, at 0xa2000: MSR_KVM_SYSTEM_TIME_NEW.
    "mov ecx, 0x4b564d01",
    "mov eax, 0xa2001",
    "xor edx, edx",
    "wrmsr",
    // To ring 3, interrupts on.
    "push 0x1b",
    "push 0xc0000",
    "push 0x202",
    "push 0x23",
    "lea rax, [rip + 2f]",
    "push rax",
    "iretq",
    // RDI: the page. R8: the last time. R9: whether one was before it. R10: when the next line is due. R12: whether reads are counted.
    "2:",
    "mov edi, 0xa2000",
    "mov r12d, [rip + clock_guest_counts]",
    "xor r8d, r8d",
    "xor r9d, r9d",
    "xor r10d, r10d",
    "3:",
    "test r12d, r12d",
    "jz 4f",
    "sub dword ptr [rdi + 4], 1",
    "jns 4f",
    "in eax, 0xe4",
    "4:",
    "mov rax, [rdi + 16]",
    "cmp rax, r8",
    "jae 7f",
    "mov r9d, 1",
    "7:",
    "mov r8, rax",
    "cmp rax, r10",
    "jb 3b",
    // A line.
    "lea r10, [rax + 100000000]",
    "mov rbx, rax",
    "mov ecx, 16",
    "mov edx, 0x3f8",
    "8:",
    "rol rbx, 4",
    "mov al, bl",
    "and al, 15",
    "add al, 0x30",
    "cmp al, 0x39",
    "jbe 9f",
    "add al, 0x27",
    "9:",
    "out dx, al",
    "dec ecx",
    "jnz 8b",
    "mov al, 0x2e",
    "test r9d, r9d",
    "jz 9f",
    "mov al, 0x62",
    "9:",
    "out dx, al",
    "mov al, 10",
    "out dx, al",
    "jmp 3b",
    // The timer's handler.
    ".balign 16",
    "5:",
    "iretq",
    "6:",
    ".word 0xfff",
    ".quad 0xa0000",
    "clock_guest_counts:",
    ".long 0",
    "clock_guest_end:",
    ".text",
);

unsafe extern "C" {
    static clock_guest_start: u8;
    static clock_guest_counts: u8;
    static clock_guest_end: u8;
}

/// The guest as an ELF file.
#[must_use]
pub fn elf(counts: bool) -> Vec<u8> {
    let (start, end) = (&raw const clock_guest_start, &raw const clock_guest_end);
    let length = end as usize - start as usize;
    // SAFETY: both symbols are in one piece of this program's read-only data, the second behind the first.
    let mut code = unsafe { std::slice::from_raw_parts(start, length) }.to_vec();
    let at = &raw const clock_guest_counts as usize - start as usize;
    code[at] = counts.into();
    file(&code)
}

/// A line of the guest's: its time, and whether none was before the one before it. None for one that is cut.
#[must_use]
pub fn line(text: &str) -> Option<(Duration, bool)> {
    let (digits, letter) = text.split_at_checked(16)?;
    let time = u64::from_str_radix(digits, 16).ok()?;
    match letter {
        "." => Some((Duration::from_nanos(time), true)),
        "b" => Some((Duration::from_nanos(time), false)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_lines_are_read() {
        assert_eq!(
            line("000000003b9aca00."),
            Some((Duration::from_secs(1), true))
        );
        assert_eq!(
            line("0000000000000001b"),
            Some((Duration::from_nanos(1), false))
        );
        for cut in ["", "000000003b9aca00", "3b9aca00.", "00000000 b9aca00."] {
            assert_eq!(line(cut), None, "{cut}");
        }
    }
}
