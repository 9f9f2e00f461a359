//! CRC-32C of an entry: header and payload in one go.
//!
//! Most entries are one cache line, and the time that a log adds to an output counts in tens of nanoseconds. The
//! `crc32c` crate is made for long buffers: its two calls for one line cost more than the line's way between two cores.
//! So short pieces are done here, by the same instruction, and long ones left to the crate.
//!
//! Unsafe: one call of a function that needs SSE 4.2, behind the check that this processor has it.
#![allow(unsafe_code)]

/// From so many bytes on, the crate's three streams at once win over its overhead: it interleaves from 768.
#[cfg(target_arch = "x86_64")]
const LONG: usize = 768;

/// The checksum of the header's words, in the order and byte order of the wire, and of the payload's pieces.
#[inline]
pub(crate) fn checksum(seed: u32, header: [u64; 4], payload: &[&[u8]]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("sse4.2") {
        // SAFETY: the processor has the instructions.
        return unsafe { with_sse(seed, header, payload) };
    }
    portable(seed, header, payload)
}

fn portable(seed: u32, header: [u64; 4], payload: &[&[u8]]) -> u32 {
    let head = header.iter().fold(seed, |crc, word| {
        crc32c::crc32c_append(crc, &word.to_le_bytes())
    });
    payload
        .iter()
        .fold(head, |crc, piece| crc32c::crc32c_append(crc, piece))
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
                assert_eq!(portable(7, header, &[a, b]), expected, "{len} {cut}");
            }
        }
    }
}
