//! Frames that a guest answers one by one: ARP requests and pings of every size.
#![forbid(unsafe_code)]

use super::random::Random;

/// The machine's own network address, on the cable and above it.
const GUEST_MAC: [u8; 6] = [0x02, 0xd0, 0x99, 0xe1, 0, 1];
const GUEST: [u8; 4] = [10, 77, 0, 2];
/// The asker's.
const ASKER_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 9];
const ASKER: [u8; 4] = [10, 77, 0, 1];

/// The shortest frame that a wire carries, in bytes, without its checksum.
const SHORTEST: usize = 60;

/// Makes requests, each answered by one frame.
#[derive(Debug)]
pub struct Requests {
    random: Random,
    made: u64,
}

impl Requests {
    /// From a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            random: Random::new(seed),
            made: 0,
        }
    }

    /// How many were made.
    #[must_use]
    pub fn made(&self) -> u64 {
        self.made
    }
}

impl Iterator for Requests {
    type Item = Vec<u8>;

    /// The next request. The first asks for the guest's address, by which the guest learns the asker's.
    fn next(&mut self) -> Option<Vec<u8>> {
        self.made += 1;
        if self.made == 1 || self.random.below(4) == 0 {
            return Some(arp_request());
        }
        let length = 32 + self.random.below(1400) as usize;
        Some(ping(self.made, length, self.random.next()))
    }
}

fn arp_request() -> Vec<u8> {
    let mut frame = ethernet([0xff; 6], 0x0806);
    // Ethernet, IPv4, their lengths, request (RFC 826).
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend_from_slice(&ASKER_MAC);
    frame.extend_from_slice(&ASKER);
    frame.extend_from_slice(&[0; 6]);
    frame.extend_from_slice(&GUEST);
    frame.resize(SHORTEST, 0);
    frame
}

/// An echo request (RFC 792) with so many bytes of data, the first of which are its number.
fn ping(number: u64, length: usize, fill: u64) -> Vec<u8> {
    let mut message = vec![8, 0, 0, 0, 0x0d, 0x0b];
    message.extend_from_slice(&(number as u16).to_be_bytes());
    message.extend_from_slice(&number.to_be_bytes());
    message.extend(
        fill.to_le_bytes()
            .iter()
            .cycle()
            .take(length.saturating_sub(8)),
    );
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum);

    let mut header = vec![0x45, 0];
    header.extend_from_slice(&((20 + message.len()) as u16).to_be_bytes());
    header.extend_from_slice(&[0, 0, 0x40, 0, 64, 1, 0, 0]);
    header.extend_from_slice(&ASKER);
    header.extend_from_slice(&GUEST);
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum);

    let mut frame = ethernet(GUEST_MAC, 0x0800);
    frame.extend_from_slice(&header);
    frame.extend_from_slice(&message);
    frame
}

fn ethernet(to: [u8; 6], kind: u16) -> Vec<u8> {
    let mut frame = to.to_vec();
    frame.extend_from_slice(&ASKER_MAC);
    frame.extend_from_slice(&kind.to_be_bytes());
    frame
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| {
            u32::from(u16::from_be_bytes([
                pair[0],
                pair.get(1).copied().unwrap_or(0),
            ]))
        })
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_come_out_as_zero() {
        let frame = ping(7, 99, 0x0123_4567_89ab_cdef);
        assert_eq!(checksum(&frame[14..34]), [0, 0]);
        assert_eq!(checksum(&frame[34..]), [0, 0]);
        assert_eq!(frame.len(), 14 + 20 + 8 + 99);
    }
}
