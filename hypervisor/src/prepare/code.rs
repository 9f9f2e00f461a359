//! Decoding instructions, from where functions are known to start.
//!
//! The bytes of RDTSC are found by the hundred in the middle of other instructions, so nothing is searched for. Each
//! stretch from one known start to the next is decoded; where it makes no sense, decoding goes on at the next start, and what was
//! left out is a *gap* that the report tells of.

use std::ops::Range;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction as Decoded};

use super::TSC_PORT;
use super::report::Instruction;

/// One instruction of the family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// How far into the bytes.
    pub(super) at: usize,
    /// Its length: prefixes count.
    pub(super) length: usize,
    pub(super) instruction: Instruction,
}

/// So many in one file are no sites: Debian's kernel has 125. They would be told of one by one, in a hundred times their bytes.
pub(super) const SITES_MOST: usize = 1 << 16;

/// What decoding gave.
#[derive(Debug, Default)]
pub(super) struct Swept {
    /// At most [`SITES_MOST`].
    pub(super) found: Vec<Found>,
    /// What could not be decoded.
    pub(super) gaps: Vec<Range<usize>>,
    /// Reads of [`TSC_PORT`] that are there already.
    pub(super) prepared: usize,
}

/// Decodes `bytes`, which lie at `address`, from their first on and anew from each of `starts` (in ascending order, counted from
/// the first byte).
pub(super) fn sweep(bytes: &[u8], address: u64, bitness: u32, starts: &[usize]) -> Swept {
    let mut swept = Swept::default();
    let mut from = 0;
    for &start in starts.iter().chain([&bytes.len()]) {
        if start > from && start <= bytes.len() {
            stretch(bytes, from..start, address, bitness, &mut swept);
            from = start;
        }
    }
    swept
}

fn stretch(bytes: &[u8], range: Range<usize>, address: u64, bitness: u32, swept: &mut Swept) {
    let ip = address.wrapping_add(range.start as u64);
    let mut decoder = Decoder::with_ip(bitness, &bytes[range.clone()], ip, DecoderOptions::NONE);
    let mut decoded = Decoded::default();
    while decoder.can_decode() {
        let at = range.start + decoder.position();
        decoder.decode_out(&mut decoded);
        if decoded.is_invalid() {
            swept.gaps.push(at..range.end);
            return;
        }
        if let Some(instruction) = family(decoded.code()) {
            if swept.found.len() == SITES_MOST {
                return;
            }
            swept.found.push(Found {
                at,
                length: decoded.len(),
                instruction,
            });
        } else if decoded.code() == Code::In_EAX_imm8 && decoded.immediate8() == TSC_PORT {
            swept.prepared += 1;
        }
    }
}

/// Which of the family this is.
pub(super) fn family(code: Code) -> Option<Instruction> {
    match code {
        Code::Rdtsc => Some(Instruction::Rdtsc),
        Code::Rdtscp => Some(Instruction::Rdtscp),
        Code::Rdrand_r16 | Code::Rdrand_r32 | Code::Rdrand_r64 => Some(Instruction::Rdrand),
        Code::Rdseed_r16 | Code::Rdseed_r32 | Code::Rdseed_r64 => Some(Instruction::Rdseed),
        _ => None,
    }
}

/// Whether a gap holds the bytes of RDTSC or RDTSCP, be they what they may.
pub(super) fn is_suspicious(gap: &[u8]) -> bool {
    gap.windows(2).any(|bytes| bytes == RDTSC) || gap.windows(3).any(|bytes| bytes == RDTSCP)
}

/// RDTSC (Intel SDM volume 2B).
pub(super) const RDTSC: [u8; 2] = [0x0f, 0x31];
const RDTSCP: [u8; 3] = [0x0f, 0x01, 0xf9];

#[cfg(test)]
mod tests {
    use super::*;

    fn found(bytes: &[u8], starts: &[usize]) -> Vec<(usize, Instruction)> {
        let swept = sweep(bytes, 0xffff_ffff_8100_0000, 64, starts);
        swept
            .found
            .iter()
            .map(|found| (found.at, found.instruction))
            .collect()
    }

    #[test]
    fn the_family_is_found_and_nothing_else() {
        let code = [
            0x0f, 0x31, // rdtsc
            0x48, 0xc1, 0xe2, 0x20, // shl rdx, 32
            0x0f, 0x01, 0xf9, // rdtscp
            0x0f, 0xc7, 0xf0, // rdrand eax
            0x48, 0x0f, 0xc7, 0xf8, // rdseed rax
            0x0f, 0xc7, 0x0f, // cmpxchg8b [rdi]
            0xc3,
        ];
        let expected = [
            (0, Instruction::Rdtsc),
            (6, Instruction::Rdtscp),
            (9, Instruction::Rdrand),
            (12, Instruction::Rdseed),
        ];
        assert_eq!(found(&code, &[]), expected);
    }

    #[test]
    fn the_same_bytes_inside_another_instruction_are_not_one() {
        for code in [
            &[0xb8, 0x0f, 0x31, 0x0f, 0x31][..], // mov eax, 0x310f310f
            &[0x48, 0xb8, 0, 0x0f, 0x31, 0, 0x0f, 0x31, 0, 0], // mov rax, imm64
            &[0xe8, 0x0f, 0x31, 0x00, 0x00],     // call +0x310f
            &[0x8b, 0x05, 0x0f, 0x31, 0x00, 0x00], // mov eax, [rip+0x310f]
            &[0x80, 0x3d, 0, 0, 0, 0x0f, 0x31, 0xc0], // cmp byte [rip], 0x0f; xor eax, eax
            &[0xf6, 0x44, 0x24, 0x0f, 0x31],     // test byte [rsp+0x0f], 0x31
        ] {
            assert!(code.windows(2).any(|bytes| bytes == RDTSC));
            assert_eq!(found(code, &[]), [], "{code:x?}");
        }
    }

    #[test]
    fn decoding_begins_anew_at_each_known_start() {
        // Data in front of a function whose last byte would swallow the function's first.
        let code = [0x00, 0x00, 0xb8, 0x0f, 0x31, 0xc3];
        assert_eq!(
            found(&code, &[]),
            [],
            "swept in one piece it is mov eax, imm32"
        );
        assert_eq!(found(&code, &[3]), [(3, Instruction::Rdtsc)]);
        let swept = sweep(&code, 0, 64, &[3]);
        assert_eq!(
            swept.gaps,
            vec![2..3],
            "an instruction that crosses a start is none"
        );
    }

    #[test]
    fn what_makes_no_sense_is_a_gap_up_to_the_next_start() {
        // 0x06 is no instruction in 64-bit code.
        let code = [0x90, 0x06, 0x0f, 0x31, 0x90, 0x0f, 0x31];
        assert_eq!(found(&code, &[5]), [(5, Instruction::Rdtsc)]);
        let swept = sweep(&code, 0, 64, &[5]);
        assert_eq!(swept.gaps, vec![1..5]);
        assert!(is_suspicious(&code[1..5]));
        assert!(!is_suspicious(&code[..2]));
        assert_eq!(
            sweep(&code, 0, 32, &[5]).found.len(),
            2,
            "in 32-bit code it is PUSH ES"
        );
    }

    #[test]
    fn a_prepared_read_is_known_again() {
        let swept = sweep(&[0xe5, TSC_PORT, 0xe5, 0x70, 0xc3], 0, 64, &[]);
        assert_eq!(swept.prepared, 1);
    }
}
