//! Telling the guest's link where the guest is now: switches send frames for an address to where they last saw it.
//!
//! A reverse ARP request (RFC 903) for the guest's own address, by broadcast, as hypervisors send it after a migration: it names no
//! IP address, so whatever the guest speaks, nobody who hears it learns anything else.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use super::NetPort;

/// Bytes of the frame: the shortest that Ethernet carries, without its checksum.
const LENGTH: usize = 60;

/// Between one announcement and the next: several, because a frame may be lost, and the link of a host that has just taken over may need
/// a moment until it forwards; and some for a minute, because an old primary that is thawed may send a frame that had committed before,
/// by which switches look for the guest there again.
const GAPS_MS: [u64; 8] = [50, 150, 250, 550, 2000, 7000, 20_000, 30_000];

/// The frame that announces a MAC address.
#[must_use]
pub fn frame(mac: [u8; 6]) -> [u8; LENGTH] {
    let mut frame = [0; LENGTH];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    // Ethertype RARP; hardware Ethernet, protocol IPv4, their lengths; "request reverse".
    frame[12..22].copy_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    frame[22..28].copy_from_slice(&mac);
    frame[32..38].copy_from_slice(&mac);
    frame
}

/// Announcements that are due, one after the other.
#[derive(Debug)]
pub struct Announcer {
    frame: [u8; LENGTH],
    sent: usize,
    due: Instant,
}

impl Announcer {
    /// Announces this address from now on.
    #[must_use]
    pub fn new(mac: [u8; 6], now: Instant) -> Self {
        Self {
            frame: frame(mac),
            sent: 0,
            due: now,
        }
    }

    /// When the next one is due.
    #[must_use]
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Sends what is due; false when all were sent. A port that takes nothing now is left alone until the next is due.
    pub fn turn(&mut self, port: &NetPort, now: Instant) -> bool {
        if now < self.due {
            return true;
        }
        // One that is lost is what the others are for; a port that fails is told of by the guest's own frames.
        let _ = port.write(&self.frame);
        let Some(gap) = GAPS_MS.get(self.sent) else {
            return false;
        };
        self.sent += 1;
        self.due = now + Duration::from_millis(*gap);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backends::link;

    const MAC: [u8; 6] = [2, 0xd0, 0x99, 0xe1, 0, 1];

    #[test]
    fn the_link_sees_a_reverse_arp_request_of_the_guest_a_few_times() {
        let (ours, theirs) = link::pair().unwrap();
        let start = Instant::now();
        let mut announcer = Announcer::new(MAC, start);
        let mut seen = Vec::new();
        let mut goes_on = true;
        for ms in 0..70_000 {
            let now = start + Duration::from_millis(ms);
            goes_on = goes_on && announcer.turn(&ours, now);
            let mut slot = [0; 100];
            while let Some(length) = theirs.read_into(&mut slot).unwrap() {
                seen.push((ms, slot[..length].to_vec()));
            }
        }
        assert!(!goes_on);
        let times: Vec<u64> = seen.iter().map(|(at, _)| *at).collect();
        assert_eq!(times, [0, 50, 200, 450, 1000, 3000, 10_000, 30_000, 60_000]);
        let mut expected = vec![0xff; 6];
        expected.extend(MAC);
        expected.extend([0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        expected.extend(MAC);
        expected.extend([0; 4]);
        expected.extend(MAC);
        expected.extend([0; 22]);
        assert!(seen.iter().all(|(_, frame)| *frame == expected), "{seen:?}");
    }
}
