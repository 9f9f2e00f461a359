//! CRC-32C, of an entry (header and payload in one go) and of any bytes.
//!
//! Most entries are one cache line, and the time that a log adds to an output counts in tens of nanoseconds. The
//! `crc32c` crate is made for long buffers: its two calls for one line cost more than the line's way between two cores.
//! So short pieces are done here, by the same instruction, and long ones left to the crate.
//!
//! A processor that is emulated has the instruction too, and computes it bit by bit (QEMU takes 10 ns for a byte of it, and more than all
//! else that a log does with that byte): the first checksum measures whether a table is quicker.
//!
//! Unsafe: calls of a function that needs SSE 4.2, behind the check that this processor has it.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use crc::{CRC_32_ISCSI, Crc, Table};

static TABLE: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);

/// From so many bytes on, the crate's three streams at once win over its overhead: it interleaves from 768.
#[cfg(target_arch = "x86_64")]
const LONG: usize = 768;

/// The checksum of the header's words, in the order and byte order of the wire, and of the payload's pieces.
#[inline]
pub(crate) fn checksum(seed: u32, header: [u64; 4], payload: &[&[u8]]) -> u32 {
    match Way::of_this_machine() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: it is chosen only where the processor has the instructions.
        Way::Instruction => unsafe { with_sse(seed, header, payload) },
        #[cfg(not(target_arch = "x86_64"))]
        Way::Instruction => by_crate(seed, header, payload),
        Way::Table => by_table(seed, header, payload),
    }
}

/// CRC-32C of these bytes, by what is quickest on this machine.
#[inline]
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc32c_append(0, bytes)
}

/// The same of bytes that follow those whose checksum is `seed`.
#[inline]
#[must_use]
pub fn crc32c_append(seed: u32, bytes: &[u8]) -> u32 {
    match Way::of_this_machine() {
        Way::Instruction => crc32c::crc32c_append(seed, bytes),
        Way::Table => append_by_table(seed, bytes),
    }
}

/// Who computes the checksums of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The processor.
    Instruction,
    /// A table.
    Table,
}

impl Way {
    #[inline]
    fn of_this_machine() -> Way {
        /// 0 before it was measured.
        static CHOSEN: AtomicU8 = AtomicU8::new(0);

        // Each thread that comes first may measure: what they find is right either way.
        match CHOSEN.load(Ordering::Relaxed) {
            1 => Way::Instruction,
            2 => Way::Table,
            _ => {
                let way = Way::measured();
                CHOSEN.store(way as u8 + 1, Ordering::Relaxed);
                way
            }
        }
    }

    /// Some microseconds on a processor, a tenth of a millisecond where it is emulated.
    #[cold]
    fn measured() -> Way {
        #[cfg(target_arch = "x86_64")]
        if !is_x86_feature_detected!("sse4.2") {
            return Way::Table;
        }
        let content = [0x5a; 1024];
        let quickest = |way: fn(u32, [u64; 4], &[&[u8]]) -> u32| {
            let took = || {
                let begun = Instant::now();
                std::hint::black_box(way(0, [0; 4], &[std::hint::black_box(&content)]));
                begun.elapsed()
            };
            (0..5).map(|_| took()).min()
        };
        // A processor's own takes a tenth of a table's time; nothing hangs on which is taken where they are close.
        if quickest(by_table) < quickest(by_crate) {
            Way::Table
        } else {
            Way::Instruction
        }
    }
}

/// By the crate, which takes this machine's instruction.
fn by_crate(seed: u32, header: [u64; 4], payload: &[&[u8]]) -> u32 {
    folded(crc32c::crc32c_append, seed, header, payload)
}

fn by_table(seed: u32, header: [u64; 4], payload: &[&[u8]]) -> u32 {
    folded(append_by_table, seed, header, payload)
}

/// The header's words as bytes, then the pieces, each appended to what was before.
fn folded(
    append: impl Fn(u32, &[u8]) -> u32,
    seed: u32,
    header: [u64; 4],
    payload: &[&[u8]],
) -> u32 {
    let mut head = [0; 32];
    for (to, word) in head.as_chunks_mut::<8>().0.iter_mut().zip(header) {
        *to = word.to_le_bytes();
    }
    payload
        .iter()
        .fold(append(seed, &head), |crc, piece| append(crc, piece))
}

/// The crate takes a start in the polynomial's bit order.
fn append_by_table(seed: u32, bytes: &[u8]) -> u32 {
    let mut digest = TABLE.digest_with_initial((!seed).reverse_bits());
    digest.update(bytes);
    digest.finalize()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
fn with_sse(seed: u32, header: [u64; 4], payload: &[&[u8]]) -> u32 {
    use std::arch::x86_64::{_mm_crc32_u8, _mm_crc32_u64};

    let mut state = u64::from(!seed);
    for word in header {
        state = _mm_crc32_u64(state, word);
    }
    for piece in payload {
        // What makes an entry fill one line, and most do: no loops.
        if let Ok(rest) = <&[u8; 32]>::try_from(*piece) {
            let (words, _) = rest.as_chunks::<8>();
            for word in words {
                state = _mm_crc32_u64(state, u64::from_le_bytes(*word));
            }
            continue;
        }
        if piece.len() >= LONG {
            state = u64::from(!crc32c::crc32c_append(!(state as u32), piece));
            continue;
        }
        let (words, rest) = piece.as_chunks::<8>();
        for word in words {
            state = _mm_crc32_u64(state, u64::from_le_bytes(*word));
        }
        for byte in rest {
            state = u64::from(_mm_crc32_u8(state as u32, *byte));
        }
    }
    !(state as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_crc_of_the_bytes_however_they_are_cut() {
        let bytes: Vec<u8> = (0..3000u32).map(|i| (i * 7 + i / 251) as u8).collect();
        let header = [1, u64::MAX, 0x0123_4567_89ab_cdef, 42];
        for len in (0..100).chain([LONG - 1, LONG, LONG + 1, 3000]) {
            let mut whole: Vec<u8> = header
                .iter()
                .flat_map(|word: &u64| word.to_le_bytes())
                .collect();
            whole.extend_from_slice(&bytes[..len]);
            let expected = crc32c::crc32c_append(7, &whole);
            for cut in [0, 1, 9, len / 2, len].map(|cut| cut.min(len)) {
                let (a, b) = bytes[..len].split_at(cut);
                assert_eq!(checksum(7, header, &[a, b]), expected, "{len} {cut}");
                assert_eq!(
                    crc32c_append(crc32c_append(7, &whole[..cut]), &whole[cut..]),
                    expected
                );
                assert_eq!(append_by_table(7, &whole), expected);
                assert_eq!(by_crate(7, header, &[a, b]), expected, "{len} {cut}");
                assert_eq!(by_table(7, header, &[a, b]), expected, "{len} {cut}");
            }
        }
    }
}
