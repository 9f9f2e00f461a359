//! Frames that a guest answers one by one: ARP requests and pings of every size.
#![forbid(unsafe_code)]

use super::random::Random;

/// The machine's own network address, on the cable and above it.
const GUEST_MAC: [u8; 6] = [0x02, 0xd0, 0x99, 0xe1, 0, 1];
const GUEST: [u8; 4] = [10, 77, 0, 2];

const ETHERNET: usize = 14;
const IPV4: usize = 20;
const ARP: u16 = 0x0806;
/// Ethernet, IPv4, their lengths (RFC 826).
const ARP_HEAD: [u8; 6] = [0, 1, 8, 0, 6, 4];

/// The shortest frame that a wire carries, in bytes, without its checksum.
const SHORTEST: usize = 60;

/// Who makes the requests.
const ASKER: Asker = Asker {
    mac: [0x02, 0, 0, 0, 0, 9],
    address: [10, 77, 0, 1],
};

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
            return Some(ASKER.arp_request());
        }
        let length = 32 + self.random.below(1400) as usize;
        Some(ASKER.ping(self.made, length, self.random.next()))
    }
}

/// Who asks: an address on the cable and one above it.
#[derive(Clone, Copy, Debug)]
pub struct Asker {
    /// The card's.
    pub mac: [u8; 6],
    /// IPv4's, in the guest's network.
    pub address: [u8; 4],
}

impl Asker {
    /// Asks for the guest's address on the cable, by which the guest learns the asker's.
    #[must_use]
    pub fn arp_request(&self) -> Vec<u8> {
        self.arp([0xff; 6], 1, [0; 6])
    }

    /// The answer to a request of the guest's for this asker's address on the cable; none if the frame is none.
    #[must_use]
    pub fn arp_reply_to(&self, frame: &[u8]) -> Option<Vec<u8>> {
        let request = frame.get(ETHERNET..ETHERNET + 28)?;
        let asks = frame[12..ETHERNET] == ARP.to_be_bytes()
            && request[..8] == [&ARP_HEAD[..], &[0, 1]].concat()
            && request[14..18] == GUEST
            && request[24..] == self.address;
        asks.then(|| self.arp(GUEST_MAC, 2, GUEST_MAC))
    }

    fn arp(&self, to: [u8; 6], operation: u8, target: [u8; 6]) -> Vec<u8> {
        let mut frame = self.ethernet(to, ARP);
        frame.extend_from_slice(&ARP_HEAD);
        frame.extend_from_slice(&[0, operation]);
        frame.extend_from_slice(&self.mac);
        frame.extend_from_slice(&self.address);
        frame.extend_from_slice(&target);
        frame.extend_from_slice(&GUEST);
        frame.resize(SHORTEST, 0);
        frame
    }

    /// An echo request (RFC 792) with so many bytes of data, the first of which are its number.
    #[must_use]
    pub fn ping(&self, number: u64, length: usize, fill: u64) -> Vec<u8> {
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
        header.extend_from_slice(&((IPV4 + message.len()) as u16).to_be_bytes());
        header.extend_from_slice(&[0, 0, 0x40, 0, 64, 1, 0, 0]);
        header.extend_from_slice(&self.address);
        header.extend_from_slice(&GUEST);
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum);

        let mut frame = self.ethernet(GUEST_MAC, 0x0800);
        frame.extend_from_slice(&header);
        frame.extend_from_slice(&message);
        frame
    }

    /// The number of the ping that this frame answers; none if it is no answer of the guest's to this asker.
    #[must_use]
    pub fn answered(&self, frame: &[u8]) -> Option<u64> {
        let (header, message) = frame.get(ETHERNET..)?.split_at_checked(IPV4)?;
        let is_ours = header[0] == 0x45
            && header[9] == 1
            && header[12..16] == GUEST
            && header[16..] == self.address;
        let (kind, rest) = message.split_first_chunk::<2>()?;
        let number = rest.get(6..14)?.try_into().ok()?;
        (is_ours && *kind == [0, 0]).then_some(u64::from_be_bytes(number))
    }

    fn ethernet(&self, to: [u8; 6], kind: u16) -> Vec<u8> {
        let mut frame = to.to_vec();
        frame.extend_from_slice(&self.mac);
        frame.extend_from_slice(&kind.to_be_bytes());
        frame
    }
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
        let frame = ASKER.ping(7, 99, 0x0123_4567_89ab_cdef);
        assert_eq!(checksum(&frame[14..34]), [0, 0]);
        assert_eq!(checksum(&frame[34..]), [0, 0]);
        assert_eq!(frame.len(), 14 + 20 + 8 + 99);
    }

    #[test]
    fn an_answer_is_told_from_a_question() {
        let mut frame = ASKER.ping(7, 16, 0);
        assert_eq!(ASKER.answered(&frame), None);
        // What the guest makes of it.
        frame[26..30].copy_from_slice(&GUEST);
        frame[30..34].copy_from_slice(&ASKER.address);
        frame[34] = 0;
        assert_eq!(ASKER.answered(&frame), Some(7));
        let other = Asker {
            address: [10, 77, 0, 3],
            ..ASKER
        };
        assert_eq!(other.answered(&frame), None);
        assert_eq!(ASKER.answered(&frame[..40]), None);
    }

    #[test]
    fn the_guest_is_told_where_the_asker_is() {
        let guest = Asker {
            mac: GUEST_MAC,
            address: GUEST,
        };
        let mut request = guest.arp_request();
        assert_eq!(ASKER.arp_reply_to(&request), None, "it asks for itself");
        request[38..42].copy_from_slice(&ASKER.address);
        let reply = ASKER.arp_reply_to(&request).unwrap();
        assert_eq!(reply[..12], [GUEST_MAC, ASKER.mac].concat());
        assert_eq!(
            reply[20..32],
            [&[0, 2], &ASKER.mac[..], &ASKER.address].concat()
        );
        assert_eq!(ASKER.arp_reply_to(&reply), None);
    }
}
