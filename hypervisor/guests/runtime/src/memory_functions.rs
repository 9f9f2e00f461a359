//! memcpy, memmove, memset, memcmp and bcmp, which the compiler calls and no C library supplies here.
//!
//! In assembly, because a loop written in Rust may be compiled into a call of the very function it defines; by
//! 16-byte SSE moves, because `rep movsb` is slow where a KVM runs under emulation.

use core::arch::naked_asm;

/// Copies `n` bytes from `source` to `target`, which do not overlap.
///
/// # Safety
/// As C's memcpy.
#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn memcpy(target: *mut u8, source: *const u8, n: usize) -> *mut u8 {
    naked_asm!("jmp {forward}", forward = sym copy_forward)
}

/// Copies `n` bytes from `source` to `target`, which may overlap.
///
/// # Safety
/// As C's memmove.
#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn memmove(target: *mut u8, source: *const u8, n: usize) -> *mut u8 {
    naked_asm!(
        // Backward only if the target begins inside the source.
        "mov rax, rdi",
        "sub rax, rsi",
        "cmp rax, rdx",
        "jae {forward}",
        "jmp {backward}",
        forward = sym copy_forward,
        backward = sym copy_backward,
    )
}

/// Right for blocks apart and for a target below its source. Up to 64 bytes everything is read before anything is
/// written, so short blocks may overlap in any way.
#[unsafe(naked)]
unsafe extern "C" fn copy_forward(target: *mut u8, source: *const u8, n: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "cmp rdx, 64",
        "ja 2f",
        "jmp {short}",
        "2:",
        // The last 64 bytes, read before the loop can overwrite them.
        "movups xmm4, [rsi + rdx - 64]",
        "movups xmm5, [rsi + rdx - 48]",
        "movups xmm6, [rsi + rdx - 32]",
        "movups xmm7, [rsi + rdx - 16]",
        "lea rcx, [rdi + rdx - 64]", // where they go; also the loop's end
        "3:",
        "movups xmm0, [rsi]",
        "movups xmm1, [rsi + 16]",
        "movups xmm2, [rsi + 32]",
        "movups xmm3, [rsi + 48]",
        "movups [rdi], xmm0",
        "movups [rdi + 16], xmm1",
        "movups [rdi + 32], xmm2",
        "movups [rdi + 48], xmm3",
        "add rsi, 64",
        "add rdi, 64",
        "cmp rdi, rcx",
        "jb 3b",
        "movups [rcx], xmm4",
        "movups [rcx + 16], xmm5",
        "movups [rcx + 32], xmm6",
        "movups [rcx + 48], xmm7",
        "ret",
        short = sym copy_short,
    )
}

/// Right for a target that begins inside its source.
#[unsafe(naked)]
unsafe extern "C" fn copy_backward(target: *mut u8, source: *const u8, n: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "cmp rdx, 64",
        "ja 2f",
        "jmp {short}",
        "2:",
        // The first 64 bytes, read before the loop can overwrite them.
        "movups xmm4, [rsi]",
        "movups xmm5, [rsi + 16]",
        "movups xmm6, [rsi + 32]",
        "movups xmm7, [rsi + 48]",
        "3:",
        "movups xmm0, [rsi + rdx - 16]",
        "movups xmm1, [rsi + rdx - 32]",
        "movups xmm2, [rsi + rdx - 48]",
        "movups xmm3, [rsi + rdx - 64]",
        "movups [rdi + rdx - 16], xmm0",
        "movups [rdi + rdx - 32], xmm1",
        "movups [rdi + rdx - 48], xmm2",
        "movups [rdi + rdx - 64], xmm3",
        "sub rdx, 64",
        "cmp rdx, 64",
        "ja 3b",
        "movups [rdi], xmm4",
        "movups [rdi + 16], xmm5",
        "movups [rdi + 32], xmm6",
        "movups [rdi + 48], xmm7",
        "ret",
        short = sym copy_short,
    )
}

/// Up to 64 bytes, overlapping in any way; RAX holds the result already.
#[unsafe(naked)]
unsafe extern "C" fn copy_short() {
    naked_asm!(
        "cmp rdx, 32",
        "ja 5f",
        "cmp rdx, 16",
        "jae 4f",
        "cmp rdx, 8",
        "jae 3f",
        "cmp rdx, 4",
        "jae 2f",
        "test rdx, rdx",
        "je 6f",
        // 1 to 3 bytes: first, middle, last.
        "mov r8, rdx",
        "shr r8",
        "movzx ecx, byte ptr [rsi]",
        "movzx r9d, byte ptr [rsi + r8]",
        "movzx r10d, byte ptr [rsi + rdx - 1]",
        "mov [rdi], cl",
        "mov [rdi + r8], r9b",
        "mov [rdi + rdx - 1], r10b",
        "6:",
        "ret",
        "2:",
        "mov ecx, [rsi]",
        "mov r8d, [rsi + rdx - 4]",
        "mov [rdi], ecx",
        "mov [rdi + rdx - 4], r8d",
        "ret",
        "3:",
        "mov rcx, [rsi]",
        "mov r8, [rsi + rdx - 8]",
        "mov [rdi], rcx",
        "mov [rdi + rdx - 8], r8",
        "ret",
        "4:",
        "movups xmm0, [rsi]",
        "movups xmm1, [rsi + rdx - 16]",
        "movups [rdi], xmm0",
        "movups [rdi + rdx - 16], xmm1",
        "ret",
        "5:",
        "movups xmm0, [rsi]",
        "movups xmm1, [rsi + 16]",
        "movups xmm2, [rsi + rdx - 32]",
        "movups xmm3, [rsi + rdx - 16]",
        "movups [rdi], xmm0",
        "movups [rdi + 16], xmm1",
        "movups [rdi + rdx - 32], xmm2",
        "movups [rdi + rdx - 16], xmm3",
        "ret",
    )
}

/// Sets `n` bytes to `value`.
///
/// # Safety
/// As C's memset.
#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn memset(target: *mut u8, value: i32, n: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "movzx ecx, sil",
        "mov rsi, 0x0101010101010101",
        "imul rcx, rsi",
        "cmp rdx, 16",
        "jb 4f",
        "movq xmm0, rcx",
        "punpcklqdq xmm0, xmm0",
        "lea rcx, [rdi + rdx - 16]", // the last 16 bytes are written apart
        "2:",
        "cmp rdi, rcx",
        "jae 3f",
        "movups [rdi], xmm0",
        "add rdi, 16",
        "jmp 2b",
        "3:",
        "movups [rcx], xmm0",
        "ret",
        "4:",
        "cmp rdx, 8",
        "jae 6f",
        "cmp rdx, 4",
        "jae 7f",
        "test rdx, rdx",
        "je 5f",
        "mov r8, rdx",
        "shr r8",
        "mov [rdi], cl",
        "mov [rdi + r8], cl",
        "mov [rdi + rdx - 1], cl",
        "5:",
        "ret",
        "6:",
        "mov [rdi], rcx",
        "mov [rdi + rdx - 8], rcx",
        "ret",
        "7:",
        "mov [rdi], ecx",
        "mov [rdi + rdx - 4], ecx",
        "ret",
    )
}

/// Compares `n` bytes: negative, zero or positive as `a` is below, equal to or above `b`.
///
/// # Safety
/// As C's memcmp.
#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    naked_asm!(
        "2:",
        "cmp rdx, 16",
        "jb 4f",
        "movups xmm0, [rdi]",
        "movups xmm1, [rsi]",
        "pcmpeqb xmm0, xmm1",
        "pmovmskb eax, xmm0",
        "xor eax, 0xffff",
        "jne 3f",
        "add rdi, 16",
        "add rsi, 16",
        "sub rdx, 16",
        "jmp 2b",
        "3:",
        "bsf ecx, eax",
        "movzx eax, byte ptr [rdi + rcx]",
        "movzx ecx, byte ptr [rsi + rcx]",
        "sub eax, ecx",
        "ret",
        "4:",
        "cmp rdx, 8",
        "jb 5f",
        "mov rax, [rdi]",
        "mov rcx, [rsi]",
        "cmp rax, rcx",
        "jne 7f",
        "add rdi, 8",
        "add rsi, 8",
        "sub rdx, 8",
        "5:",
        "test rdx, rdx",
        "je 6f",
        "movzx eax, byte ptr [rdi]",
        "movzx ecx, byte ptr [rsi]",
        "sub eax, ecx",
        "jne 8f",
        "inc rdi",
        "inc rsi",
        "dec rdx",
        "jmp 5b",
        "6:",
        "xor eax, eax",
        "8:",
        "ret",
        // Eight bytes differ: the first difference decides, hence as big-endian numbers.
        "7:",
        "bswap rax",
        "bswap rcx",
        "cmp rax, rcx",
        "sbb eax, eax",
        "or eax, 1",
        "ret",
    )
}

/// Compares `n` bytes: zero if they are equal.
///
/// # Safety
/// As C's bcmp.
#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    naked_asm!("jmp {memcmp}", memcmp = sym memcmp)
}

/// Named by the precompiled core library, called by nobody: panics abort.
#[cfg(not(test))]
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every length around the borders of the code's cases, and some large ones.
    fn lengths() -> impl Iterator<Item = usize> {
        (0..300).chain([511, 512, 4095, 4096, 4097, 10_000])
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at * 7 + at / 251) as u8).collect()
    }

    #[test]
    fn memcpy_copies_all_and_nothing_more() {
        for n in lengths() {
            for offset in [0, 1, 9] {
                let source = pattern(n + 40);
                let mut target = vec![0xee_u8; n + 40];
                let to = target[offset..].as_mut_ptr();
                // SAFETY: both blocks have n bytes from there.
                let result = unsafe { memcpy(to, source[3..].as_ptr(), n) };
                assert_eq!(result, to);
                assert_eq!(target[offset..offset + n], source[3..3 + n]);
                assert!(
                    target[..offset]
                        .iter()
                        .chain(&target[offset + n..])
                        .all(|byte| *byte == 0xee)
                );
            }
        }
    }

    #[test]
    fn memmove_copies_blocks_that_overlap() {
        for n in lengths() {
            for (from, to) in [
                (0, 1),
                (1, 0),
                (0, 15),
                (15, 0),
                (0, 63),
                (64, 0),
                (0, 100),
                (100, 0),
                (5, 5),
            ] {
                let mut block = pattern(n + 128);
                let mut expected = block.clone();
                expected.copy_within(from..from + n, to);
                let start = block.as_mut_ptr();
                // SAFETY: both ranges are inside the block.
                unsafe { memmove(start.add(to), start.add(from), n) };
                assert_eq!(block, expected, "{n} bytes from {from} to {to}");
            }
        }
    }

    #[test]
    fn memset_sets_all_and_nothing_more() {
        for n in lengths() {
            let mut block = vec![0x11_u8; n + 40];
            // SAFETY: the block has n bytes from there.
            unsafe { memset(block[7..].as_mut_ptr(), 0x1a5, n) };
            assert!(block[7..7 + n].iter().all(|byte| *byte == 0xa5));
            assert!(
                block[..7]
                    .iter()
                    .chain(&block[7 + n..])
                    .all(|byte| *byte == 0x11)
            );
        }
    }

    #[test]
    fn memcmp_finds_the_first_difference() {
        for n in lengths() {
            let a = pattern(n);
            // SAFETY: both blocks have n bytes.
            assert_eq!(unsafe { memcmp(a.as_ptr(), a.clone().as_ptr(), n) }, 0);
            for at in (0..n).step_by(1 + n / 40) {
                let mut b = a.clone();
                b[at] = b[at].wrapping_add(0x81);
                if at + 1 < n {
                    b[n - 1] = b[n - 1].wrapping_sub(1);
                }
                // SAFETY: both blocks have n bytes.
                let (ab, ba, equal) = unsafe {
                    (
                        memcmp(a.as_ptr(), b.as_ptr(), n),
                        memcmp(b.as_ptr(), a.as_ptr(), n),
                        bcmp(a.as_ptr(), b.as_ptr(), n),
                    )
                };
                assert_eq!(ab.signum(), if a[at] < b[at] { -1 } else { 1 });
                assert_eq!(ba.signum(), -ab.signum());
                assert_ne!(equal, 0);
            }
        }
    }
}
